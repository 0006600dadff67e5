"""Embedding files: all common layouts, other tools' loaders, and pipelines that stay unchanged."""

import logging
import os

import diffusers
import families
import pytest
import torch
from safetensors.torch import load, save_file

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.embedding_files import embedding_keys, pack_embedding, read_embedding
from lightning_prompts.backbones.pipeline_embeddings import embedding_in
from lightning_prompts.backbones.prompt_embeds_files import read_prompt_embeds
from lightning_prompts.backbones.vocabulary import encode_text, fillers
from lightning_prompts.errors import UserError

FAMILIES = ["sd1", "sd2", "sdxl", "sd3", "flux", "pixart"]
TEXT = "a red {} on a blue background"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return families.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def backbone(family):
    return load_backbone(str(family), image_size=16)


@pytest.fixture
def embedding(backbone):
    return torch.randn(2, backbone.vocabulary.table.shape[1]) * backbone.vocabulary.table.std()


def encode(backbone, embedding):
    """Return the `prompt_embeds` of the text with the embedding in it."""
    vocabulary = backbone.vocabulary
    ids, others = encode_text(
        vocabulary.tokenizer, [TEXT.format(f"{x} {x}") for x in fillers(vocabulary.tokenizer)], vocabulary.length
    )
    positions = (ids != others).nonzero().squeeze(1)
    return backbone.encode(ids[None], vocabulary.table[ids].index_copy(0, positions, embedding)[None])


def test_embedding_file_round_trips(backbone, embedding, tmp_path):
    file = tmp_path / "fox.bin"  # the name does not matter
    file.write_bytes(pack_embedding(embedding, backbone, "<fox>"))
    assert torch.equal(read_embedding(file, backbone), embedding)


def comfy(tensors, key):
    """Return the tensor that ComfyUI takes for an encoder: comfy/sd1_clip.py, load_embed, in its repository."""
    return (
        tensors["string_to_param"].values()
        if "string_to_param" in tensors
        else tensors.get(key, next(iter(tensors.values())))
    )


def automatic1111(tensors):
    """Return the tensor that AUTOMATIC1111 takes: create_embedding_from_data in textual_inversion.py."""
    if "clip_g" in tensors and "clip_l" in tensors:
        return tensors
    assert len(tensors) == 1
    return next(iter(tensors.values()))


def test_other_tools_read_the_exported_tensors(backbone, embedding, family):
    tensors = load(pack_embedding(embedding, backbone, "<fox>"))
    parts = backbone.vocabulary.split(embedding)
    for name, part in zip(embedding_keys(backbone), parts, strict=True):
        assert torch.equal(comfy(tensors, name), part)
    theirs = automatic1111(tensors)
    if len(parts) == 2:
        assert all(torch.equal(theirs[name], part) for name, part in zip(("clip_l", "clip_g"), parts, strict=True))
    else:
        assert torch.equal(theirs, parts[0])


def test_common_layouts_are_read(tmp_path):
    backbone = load_backbone(str(families.save("sd1", tmp_path)))
    rows = torch.randn(2, 32)
    layouts = [
        {"<fox>": rows},
        {"emb_params": rows.half()},
        {"clip_l": rows},
        {"bundle_emb.fox.string_to_param.*": rows, "lora_down": torch.ones(3, 3)},
        {"bundle_emb.fox.clip_l": rows},
    ]
    for i, tensors in enumerate(layouts):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        torch.testing.assert_close(read_embedding(tmp_path / f"{i}.safetensors", backbone), rows, atol=2e-3, rtol=0)
    for i, pickled in enumerate([{"string_to_param": {"*": rows}, "name": "fox", "step": 5}, rows, {"<fox>": rows[0]}]):
        torch.save(pickled, tmp_path / f"{i}.pt")
        with pytest.raises(UserError, match=r"is a pickle, which can run code"):
            read_embedding(tmp_path / f"{i}.pt", backbone)
        torch.testing.assert_close(read_embedding(tmp_path / f"{i}.pt", backbone, pickle=True), rows[: 1 + (i < 2)])


class Malicious:
    def __reduce__(self):
        return print, ("run",)


def test_unusable_files_are_refused(tmp_path, capsys):
    backbone = load_backbone(str(families.save("sd1", tmp_path)))
    cases = {
        "wide": ({"<fox>": torch.ones(1, 1280)}, r"is 1280 wide, which is for the second encoder of SDXL .*takes 32"),
        "two": (
            {"<fox>": torch.ones(1, 32), "<dog>": torch.ones(1, 32)},
            r"has 2 embeddings, '<dog>', '<fox>'; name one .*two#<dog>'",
        ),
        "scalar": ({"<fox>": torch.tensor(1.0)}, "holds no embedding"),
        "empty": ({"<fox>": torch.ones(0, 32)}, "has no row"),
        "nan": ({"<fox>": torch.full((1, 32), torch.nan)}, "numbers that are not finite"),
        "convolution": ({"<fox>": torch.ones(4, 4, 3, 3)}, "holds no embedding"),
        "lora": (
            {"lora_unet_mid.lora_down.weight": torch.ones(4, 32)},
            "holds the weights of a LoRA, not an embedding",
        ),
        "optimizer": (
            {"<fox>": torch.ones(1, 32), "state.0.exp_avg": torch.ones(1, 32)},
            "holds the state of an optimizer",
        ),
        "whole": ({"text_model.embeddings.token_embedding.weight": torch.ones(9, 32)}, "holds the weights of a model"),
        "other": ({"t5xxl": torch.ones(1, 4096)}, "holds t5xxl of width 4096, which is for the T5 .* needs clip_l"),
        "none": ({"<fox>": torch.ones(1, 32, dtype=torch.long)}, "holds no embedding"),
    }
    for name, (tensors, reason) in cases.items():
        save_file(tensors, tmp_path / name)
        with pytest.raises(UserError, match=reason):
            read_embedding(tmp_path / name, backbone)
    whole = pack_embedding(torch.ones(2, 32), backbone, "<fox>")
    (tmp_path / "cut").write_bytes(whole[:-8])
    (tmp_path / "text").write_text("an embedding")
    (tmp_path / "nothing").write_bytes(b"")
    torch.save({"<fox>": Malicious()}, tmp_path / "code.safetensors")
    for name, reason in (
        ("cut", "cannot be read as an embedding"),
        ("text", "is not an embedding"),
        ("code.safetensors", "holds more than tensors, .* not unpickled because it could run code"),
        ("nothing", "is not an embedding"),
        (".", "cannot be read"),
    ):
        with pytest.raises(UserError, match=reason):
            read_embedding(tmp_path / name, backbone, pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_embedding(tmp_path / "missing", backbone)
    assert "run" not in capsys.readouterr().out.split()


def original(embeddings, path, **how):
    """Write a file like the released code of arXiv 2208.01618: embedding_manager.py, save, in its repository."""
    parameters = torch.nn.ParameterDict({name: torch.nn.Parameter(rows) for name, rows in embeddings.items()})
    torch.save(
        {"string_to_token": dict.fromkeys(embeddings, torch.tensor(265)), "string_to_param": parameters}, path, **how
    )
    return path


@pytest.mark.parametrize("old", [False, True])
def test_files_of_the_original_code_are_read(old, tmp_path, monkeypatch):
    """Files of torch before 2.0 are included, whose ParameterDict had no list of its keys."""
    backbone = load_backbone(str(families.save("sd1", tmp_path)))
    rows = torch.randn(2, 32)
    if old:
        state = torch.nn.ParameterDict.__getstate__
        monkeypatch.setattr(
            torch.nn.ParameterDict, "__getstate__", lambda self: {k: v for k, v in state(self).items() if k != "_keys"}
        )
    file = original({"*": rows}, tmp_path / "fox.pt")
    with pytest.raises(UserError, match=r"allow it with --model\.allow_pickle true"):
        read_embedding(file, backbone)
    assert torch.equal(read_embedding(file, backbone, pickle=True), rows)
    several = original({"fox": rows, "dog": -rows}, tmp_path / "several.pt")
    with pytest.raises(
        UserError, match=r"has 2 embeddings, 'dog', 'fox'; name one of them, such as '.*several.pt#dog'"
    ):
        read_embedding(several, backbone, pickle=True)
    assert torch.equal(read_embedding(f"{several}#dog", backbone, pickle=True), -rows)


def test_legacy_torch_format_is_read(tmp_path):
    """In files of torch before 1.6, tensors are read and modules are refused."""
    backbone = load_backbone(str(families.save("sd1", tmp_path)))
    rows, legacy = torch.randn(2, 32), {"_use_new_zipfile_serialization": False}
    torch.save({"string_to_param": {"*": rows}, "name": "fox"}, tmp_path / "fox.pt", **legacy)
    assert torch.equal(read_embedding(tmp_path / "fox.pt", backbone, pickle=True), rows)
    with pytest.raises(UserError, match=r"a module saved by torch before 1\.6"):
        read_embedding(original({"*": rows}, tmp_path / "module.pt", **legacy), backbone, pickle=True)


class Code:
    """An object whose pickle leaves a mark when it is run."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_pickles_is_never_run(legacy, tmp_path):
    backbone = load_backbone(str(families.save("sd1", tmp_path)))
    mark, file = tmp_path / "mark", tmp_path / "fox.pt"
    touch = Code(os.system, f"touch {mark}")
    hostile = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(1, 32))})
    hostile.extra = touch
    hook = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(1, 32))})
    hook._load_state_dict_pre_hooks[0] = Code(eval, f"open({str(mark)!r}, 'w')")
    for content in (
        touch,
        {"string_to_param": touch},
        {"string_to_param": {"*": Code(exec, f"open({str(mark)!r}, 'w')")}},
        {"string_to_param": hostile},
        {"string_to_param": hook},
        {"string_to_param": Code(torch.nn.ParameterDict, {"*": touch})},
        {"string_to_param": torch.nn.ModuleDict({"x": torch.nn.Linear(2, 2)})},
    ):
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match="is broken or holds more than tensors"):
            read_embedding(file, backbone, pickle=True)
        assert not mark.exists()
    torch.load(file, weights_only=False)
    torch.save(touch, file)
    torch.load(file, weights_only=False)
    assert mark.exists()  # executed code leaves its mark here


def test_one_of_several_embeddings_is_selected_by_name(tmp_path):
    backbone = load_backbone(str(families.save("sd1", tmp_path)))
    fox, dog = torch.randn(1, 32), torch.randn(3, 32)
    file = tmp_path / "two.safetensors"
    save_file({"fox": fox, "dog#1": dog, "step": torch.tensor(5)}, file)
    with pytest.raises(UserError, match=r"has 2 embeddings, 'dog#1', 'fox'; name one of them, such as '.*#dog#1'"):
        read_embedding(file, backbone)
    assert torch.equal(read_embedding(f"{file}#fox", backbone), fox)
    assert torch.equal(read_embedding(f"{file}#dog#1", backbone), dog)
    with pytest.raises(UserError, match=r"has no embedding 'cat', only 'dog#1', 'fox'; name one"):
        read_embedding(f"{file}#cat", backbone)
    save_file({"emb_params": fox}, tmp_path / "a#b")  # a file named like this takes precedence
    assert torch.equal(read_embedding(tmp_path / "a#b", backbone), fox)
    with pytest.raises(UserError, match="holds one embedding, which has no name; leave out #fox"):
        read_embedding(f"{tmp_path}/a#b#fox", backbone)
    bundle = {f"bundle_emb.{name}.string_to_param.*": rows for name, rows in (("fox", fox), ("dog", dog))}
    save_file({**bundle, "lora_unet_mid.lora_down.weight": torch.ones(3, 32)}, file)
    with pytest.raises(UserError, match="has 2 embeddings, 'dog', 'fox'"):
        read_embedding(file, backbone)
    assert torch.equal(read_embedding(f"{file}#dog", backbone), dog)


@pytest.mark.parametrize("name", ["t5", "t5xxl"])
@pytest.mark.parametrize(
    ("family_name", "vocabulary"), [("flux", None), ("flux", "clip"), ("sd3", None), ("sd3", "t5")]
)
def test_ignored_parts_are_logged(family_name, vocabulary, name, tmp_path, caplog):
    backbone = load_backbone(str(families.save(family_name, tmp_path)), image_size=16, vocabulary=vocabulary)
    widths = {"flux": {"clip_l": 32, name: 48}, "sd3": {"clip_l": 32, "clip_g": 48, name: 96}}[family_name]
    parts = {encoder: torch.randn(2, width) for encoder, width in widths.items()}
    save_file(parts, tmp_path / "fox.safetensors")
    searched = [{"t5xxl": name}.get(encoder, encoder) for encoder in embedding_keys(backbone)]
    with caplog.at_level(logging.INFO, "lightning_prompts"):
        result = read_embedding(tmp_path / "fox.safetensors", backbone)
    assert torch.equal(result, torch.cat([parts[encoder] for encoder in searched], 1))
    unused = " and ".join({name: "t5xxl"}.get(encoder, encoder) for encoder in widths if encoder not in searched)
    assert f"Ignoring the embedding for {unused} in" in caplog.text
    assert f"the search uses the tokens of {' and '.join(embedding_keys(backbone))}." in caplog.text
    del parts[searched[-1]]
    save_file(parts, tmp_path / "fox.safetensors")
    with pytest.raises(UserError, match=f"and the model .* needs {embedding_keys(backbone)[-1]}; give"):
        read_embedding(tmp_path / "fox.safetensors", backbone)


def test_names_are_escaped_in_messages(tmp_path, caplog):
    backbone = load_backbone(str(families.save("sd1", tmp_path)))
    names = ["\x1b[31mfox\x07", "two\nlines", "n" * 10_000, "\u202eleft", *map(str, range(100))]
    save_file({name: torch.randn(1, 32) for name in names}, tmp_path / "f\x1b[2J.safetensors")
    for name in ("", "#\x1b]0;title\x07", f"#{'x' * 10_000}"):
        with pytest.raises(UserError) as error:
            read_embedding(f"{tmp_path}/f\x1b[2J.safetensors{name}", backbone)
        text = str(error.value)
        assert text.isprintable()
        assert len(text) < 1000
    for name in names:  # all can be used
        assert read_embedding(f"{tmp_path}/f\x1b[2J.safetensors#{name}", backbone).shape == (1, 32)
    assert all(line.isprintable() for line in caplog.text.splitlines())


def pipeline_of(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt_embeds_of(pipeline, text):
    """Return the `prompt_embeds` of a pipeline in this package's layout."""
    if isinstance(pipeline, diffusers.FluxPipeline | diffusers.StableDiffusion3Pipeline):
        more = {"prompt_3": None} if isinstance(pipeline, diffusers.StableDiffusion3Pipeline) else {}
        result = pipeline.encode_prompt(text, prompt_2=None, **more)
        return result[0], result[2 if more else 1]
    if isinstance(pipeline, diffusers.StableDiffusionXLPipeline):
        result = pipeline.encode_prompt(text)
        return result[0], result[2]
    if isinstance(pipeline, diffusers.PixArtSigmaPipeline):
        result = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
        return result[0] * result[1].unsqueeze(2), None
    return pipeline.encode_prompt(text, "cpu", 1, False)[0], None


def test_embedding_in_a_pipeline_is_encoded_and_removed(backbone, embedding, family):
    pipeline = pipeline_of(family)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    before = {name: {key: x.clone() for key, x in part.state_dict().items()} for name, part in parts.items()}
    tokenizers = {name: (part, len(part)) for name, part in pipeline.components.items() if name.startswith("tokenizer")}
    plain, config = prompt_embeds_of(pipeline, "a red <fox> cat")[0], dict(pipeline.config)
    with embedding_in(pipeline, backbone, embedding, "<fox>") as used:
        hidden, pooled = prompt_embeds_of(used, TEXT.format("<fox>"))
    ours, our_pooled = backbone.split(encode(backbone, embedding))
    rows = (
        slice(None)
        if len(backbone.vocabulary.text_encoders) == len(backbone.text_encoders)
        else slice(0, backbone.vocabulary.length)
    )
    torch.testing.assert_close(hidden[:, rows], ours[:, rows], atol=1e-5, rtol=1e-5)
    if pooled is not None and backbone.vocabulary.text_encoders[0].kind == "clip":
        torch.testing.assert_close(pooled, our_pooled, atol=1e-5, rtol=1e-5)
    for name, part in parts.items():
        assert all(torch.equal(x, before[name][key]) for key, x in part.state_dict().items())
    assert {name: (getattr(pipeline, name), len(getattr(pipeline, name))) for name in tokenizers} == tokenizers
    assert dict(pipeline.config) == config
    assert torch.equal(prompt_embeds_of(pipeline, "a red <fox> cat")[0], plain)


def test_images_equal_those_of_diffusers_loader(tmp_path):
    folder = families.save("sd1", tmp_path)
    backbone, pipeline = load_backbone(str(folder)), pipeline_of(folder)
    embedding = torch.randn(3, 32)
    (tmp_path / "fox.safetensors").write_bytes(pack_embedding(embedding[:2], backbone, "<fox>"))
    pipeline.load_textual_inversion(str(tmp_path / "fox.safetensors"))
    noise = torch.randn(1, *backbone.latent_shape)
    how = {"num_inference_steps": 3, "guidance_scale": 7.5, "output_type": "pt", "latents": noise}
    theirs = pipeline(TEXT.format("<fox>"), **how).images * 2 - 1
    with torch.no_grad():
        prompt, empty = encode(backbone, embedding[:2]), backbone.encode_text([""])
        ours = backbone.decode(backbone.sample(prompt, empty, noise, 3, 7.5))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_images_equal_those_of_diffusers_loader_with_two_encoders(tmp_path):
    """The loader takes the tensor of one encoder at a time."""
    folder = families.save("sdxl", tmp_path)
    backbone, pipeline = load_backbone(str(folder), image_size=16), pipeline_of(folder)
    embedding = torch.randn(2, 80)
    tensors = load(pack_embedding(embedding, backbone, "<fox>"))
    read = (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    )
    for name, encoder, tokenizer in read:
        families.correct_end(encoder, tokenizer)
        pipeline.load_textual_inversion(tensors[name], token="<fox>", text_encoder=encoder, tokenizer=tokenizer)
    noise = torch.randn(1, *backbone.latent_shape)
    how = {
        "num_inference_steps": 3,
        "guidance_scale": 7.5,
        "output_type": "pt",
        "latents": noise,
        "height": 16,
        "width": 16,
    }
    theirs = pipeline(TEXT.format("<fox>"), **how).images * 2 - 1
    with torch.no_grad():
        prompt, empty = encode(backbone, embedding), backbone.encode_text([""])
        negative = torch.zeros_like(empty) if backbone.zero_empty else empty
        ours = backbone.decode(backbone.sample(prompt, negative, noise, 3, 7.5))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_pipeline_of_another_family_is_refused(tmp_path):
    folders = {name: families.save(name, tmp_path / name) for name in ("sd1", "sd2", "sdxl", "sd3")}
    for name, other in (("sd1", "sd2"), ("sd1", "sdxl"), ("sdxl", "sd1"), ("sdxl", "sd3")):
        backbone, pipeline = load_backbone(str(folders[name]), image_size=16), pipeline_of(folders[other])
        before = {part: getattr(pipeline, part) for part in pipeline.components}
        embedding = torch.randn(2, sum(backbone.vocabulary.widths))
        with (
            pytest.raises(UserError, match="give a pipeline of that model"),
            embedding_in(pipeline, backbone, embedding, "<a>"),
        ):
            pass
        assert {part: getattr(pipeline, part) for part in pipeline.components} == before


def test_prompt_embeds_of_a_pipeline_are_read(backbone, family, tmp_path):
    """They have diffusers' names and masked padding; the items of a batch are numbered."""
    pipeline, texts = pipeline_of(family), ["a red cat", "two dogs beside a large tree"]
    embeds = [prompt_embeds_of(pipeline, text) for text in texts]
    tensors = {"prompt_embeds": torch.cat([hidden for hidden, _ in embeds]).contiguous()}
    if isinstance(pipeline, diffusers.PixArtSigmaPipeline):
        raw = [pipeline.encode_prompt(text, do_classifier_free_guidance=False) for text in texts]
        tensors = {
            "prompt_embeds": torch.cat([one[0] for one in raw]),
            "prompt_attention_mask": torch.cat([one[1] for one in raw]),
        }
    if backbone.pooled_width:
        tensors["pooled_prompt_embeds"] = torch.cat([pooled for _, pooled in embeds]).contiguous()
    save_file(tensors, tmp_path / "embeds.safetensors")
    expected = backbone.encode_text(texts)
    result = read_prompt_embeds(tmp_path / "embeds.safetensors", backbone, expected.shape[1:])
    assert list(result) == ["0", "1"]
    torch.testing.assert_close(torch.cat([result["0"], result["1"]]), expected, atol=1e-5, rtol=1e-5)


def test_unusable_prompt_embeds_are_refused(tmp_path):
    backbone = load_backbone(str(families.save("sdxl", tmp_path)), image_size=16)
    shape = backbone.encode_text([""]).shape[1:]
    length, pooled = backbone.split(torch.empty(shape))[0].shape[0], torch.zeros(1, 24)
    right = torch.zeros(1, length, 80)
    for tensors, message in (
        ({"prompt_embeds": right}, "has no pooled_prompt_embeds"),
        ({"prompt_embeds": right[..., :32], "pooled_prompt_embeds": pooled}, r"takes \[32, 80\]"),
        ({"latents": right}, "holds no encoded prompt"),
    ):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "embeds.safetensors")
        with pytest.raises(UserError, match=message):
            read_prompt_embeds(tmp_path / "embeds.safetensors", backbone, shape)
