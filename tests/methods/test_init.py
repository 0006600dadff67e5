"""Searches that start from an embedding file, a text, or the result of an earlier search."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_prompts import human_feedback, invert, load_backbone, metric_guidance
from lightning_prompts.backbones.embedding_files import pack_embedding, read_embedding
from lightning_prompts.engine.batch import Row
from lightning_prompts.errors import UserError
from lightning_prompts.methods import GCG, PEZ, MetricGuidance, SeedInvariance, TextualInversion
from lightning_prompts.methods.steering.human_feedback import Choice
from lightning_prompts.objectives import Sharpness
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling import SamplerSettings

SHORT = {"steps": 1, "sampler": SamplerSettings(2), "device": "cpu"}


@pytest.fixture
def image(image_folder):
    return sorted(image_folder.iterdir())[0]


@pytest.fixture
def backbone(tiny):
    return load_backbone(tiny)


def initial_embeddings(module, problems=2):
    """Return the initial embeddings of a method with a number of problems."""
    module.batch.rows = [Row(Problem(str(i), "")) for i in range(problems)]
    return module.init_params(torch.arange(problems))


@pytest.mark.parametrize("layout", ["ours", "vector", "string_to_param"])
def test_search_starts_from_an_embedding_file(layout, backbone, tmp_path, caplog):
    embedding = torch.randn(1 if layout == "vector" else 3, 32)
    file = tmp_path / "fox.pt"
    if layout == "ours":
        file.write_bytes(pack_embedding(embedding, backbone, "<fox>"))
    elif layout == "vector":
        save_file({"emb_params": embedding[0].contiguous()}, file)
    else:
        torch.save({"string_to_param": {"*": embedding}, "name": "fox"}, file)
        with pytest.raises(UserError, match="is a pickle"):
            PEZ(backbone=backbone, init=str(file))
    for tokens in (2, 3, 7):
        module = TextualInversion(
            backbone=backbone, num_tokens=tokens, init=str(file), allow_pickle=layout == "string_to_param"
        )
        initial = initial_embeddings(module)
        assert initial.shape == (2, tokens, 32)
        for i in range(tokens):
            assert torch.equal(initial[0, i], embedding[i % len(embedding)])
    assert ("starts from the first 2" in caplog.text) == (layout != "vector")


def test_search_starts_from_a_text(backbone, caplog):
    caplog.set_level(logging.WARNING)
    ids = torch.tensor(backbone.vocabulary.tokenizer("a red cat", add_special_tokens=False)["input_ids"])
    table = backbone.vocabulary.table
    initial = initial_embeddings(GCG(backbone=backbone, num_tokens=len(ids) + 1, init="a red cat"))
    assert torch.equal(initial[1], table[torch.cat([ids, ids[:1]])])
    assert caplog.text == ""
    initial = initial_embeddings(GCG(backbone=backbone, num_tokens=1, init="a red cat"))
    assert torch.equal(initial[1], table[ids[:1]])
    assert f"'a red cat' has {len(ids)} tokens, and the search starts from the first 1." in caplog.text


def test_file_with_several_embeddings_needs_a_name(backbone, tmp_path):
    save_file({"fox": torch.randn(1, 32), "dog": torch.full((1, 32), 0.5)}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="has 2 embeddings, 'dog', 'fox'"):
        PEZ(backbone=backbone, init=f"{tmp_path}/two.safetensors")
    initial = initial_embeddings(
        TextualInversion(backbone=backbone, num_tokens=2, init=f"{tmp_path}/two.safetensors#dog")
    )
    assert torch.equal(initial, torch.full((2, 2, 32), 0.5))


def test_long_text_is_cut_to_the_number_of_tokens(backbone):
    """The text is longer than a file name may be."""
    text = "a red cat " * 500
    first = initial_embeddings(GCG(backbone=backbone, num_tokens=2, init=text))
    assert torch.equal(first, initial_embeddings(GCG(backbone=backbone, num_tokens=2, init="a red cat")))


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("runs/none", "There is neither a run nor an embedding in 'runs/none'"),
        ("fox.safetensors", "There is neither a run nor an embedding"),
        ("fox.safetensors#dog", "There is neither a run nor an embedding"),
        ("fox.pt", "There is neither a run nor an embedding"),
        ("fox.bin", "There is neither a run nor an embedding"),
        ("clip words", "--model.init 'clip words' is unknown; did you mean clip_words"),
        ("randon", "--model.init 'randon' is unknown; did you mean random"),
        ("", "--model.init must not be empty"),
    ],
)
def test_unknown_init_is_refused(init, message, backbone):
    with pytest.raises(UserError, match=message):
        PEZ(backbone=backbone, init=init)


def test_embedding_of_another_width_is_refused(backbone, tmp_path):
    save_file({"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 1280)}, tmp_path / "sdxl.safetensors")
    PEZ(backbone=backbone, init=str(tmp_path / "sdxl.safetensors"))  # whose first encoder is this model's
    save_file({"fox": torch.randn(2, 1024)}, tmp_path / "sd2.safetensors")
    with pytest.raises(UserError, match="1024 wide, which is for Stable Diffusion 2, and the model"):
        PEZ(backbone=backbone, init=str(tmp_path / "sd2.safetensors"))


def test_textual_inversion_continues_from_its_own_file(backbone, image, tmp_path):
    """Other tools and searches can read the exported file."""
    how = {"method": "textual_inversion", "backbone": backbone, "num_tokens": 2, **SHORT, "steps": 3}
    first = invert(image, folder=tmp_path / "run", **how)
    (file,) = (tmp_path / "run/embeddings").iterdir()
    assert f"<{file.stem}>" == first.prompt
    assert torch.equal(read_embedding(file, backbone), first.embedding)
    assert torch.equal(load_file(file)[first.prompt], first.embedding)
    second = invert(image, init=str(file), **how)
    assert second.record.initial_validation_loss == pytest.approx(first.record.validation_loss, rel=1e-5)


def initial_embeds(module, prompts):
    """Return the initial embeddings of a steering method, and those of the prompt."""
    module.batch.rows = [Row(Problem(str(i), prompt)) for i, prompt in enumerate(prompts)]
    module.prompt.set_initial(module.initial(module.batch.records))
    return module.init_embeds(torch.arange(len(prompts))), module.prompt.initial


def test_steering_starts_from_the_embeddings_of_an_earlier_run(backbone, tmp_path):
    prompts = ["a red cat", "two dogs"]
    earlier = metric_guidance(prompts, Sharpness(), backbone=backbone, folder=tmp_path / "run", **SHORT)
    expected = torch.stack([result.prompt_embeds for result in earlier])
    for start in (tmp_path / "run", tmp_path / "run/prompt_embeds.safetensors"):
        how = {"backbone": backbone, "sampler": SamplerSettings(2), "init": str(start)}
        first, initial = initial_embeds(MetricGuidance(objective=Sharpness(), **how), prompts[::-1])
        assert torch.equal(first[:, 0], expected.flip(0))
        assert not torch.equal(first, initial)
        first, initial = initial_embeds(SeedInvariance(unconditional=True, **how), prompts)
        assert torch.equal(first[:, 0], expected)
        assert torch.equal(first[:, 1], initial[:, 1])
        with pytest.raises(UserError, match=r"--model.init has no embeddings of the prompt 'a tree'"):
            initial_embeds(MetricGuidance(objective=Sharpness(), **how), ["a tree"])
        with pytest.raises(UserError, match=r"leave out --model\.init"):
            SeedInvariance(towards="a tree", **how)


def test_gain_is_relative_to_the_prompt_when_starting_from_a_result(backbone, tmp_path):
    """A search that starts from a result starts with its metric, and reports the gain over the prompt."""
    how = {"backbone": backbone, **SHORT, "optimizer": {"lr": 0.05}}
    one = metric_guidance("a red cat", Sharpness(), folder=tmp_path / "one", **how)
    two = metric_guidance("a red cat", Sharpness(), init=str(tmp_path / "one"), **how | {"optimizer": {"lr": 1e-12}})
    assert two.details.metric_before == pytest.approx(one.details.metric_before)
    assert two.details.metric_after == pytest.approx(one.details.metric_after)


def test_human_feedback_starts_from_the_embeddings_of_a_run(backbone, tmp_path):
    earlier = metric_guidance("a red cat", Sharpness(), backbone=backbone, folder=tmp_path / "run", **SHORT)
    how = {"backbone": backbone, "sampler": SamplerSettings(2), "texts": 6, "device": "cpu"}
    same = human_feedback("a red cat", lambda question: Choice("finish"), init=str(tmp_path / "run"), **how)
    torch.testing.assert_close(same.prompt_embeds, earlier.prompt_embeds)


def test_init_without_embeddings_is_refused(backbone, tmp_path):
    for start in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match="There are no embeddings in"):
            MetricGuidance(objective=Sharpness(), backbone=backbone, init=str(start))
