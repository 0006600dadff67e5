"""Files of embeddings: every layout that people have, other tools' loaders, and pipelines that are left as they were."""

import diffusers
import families
import pytest
import torch
from safetensors.torch import load, save_file

from lightning_prompts.backbones import load_backbone
from lightning_prompts.errors import UserError
from lightning_prompts.interop import embedding_in, encoder_names, pack_embedding, read_embedding, read_prompt_embeds
from lightning_prompts.vocabulary import encode_text, fillers

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


def encoded(backbone, embedding):
    """What is told for the text with the embedding in it."""
    vocabulary = backbone.vocabulary
    ids, others = encode_text(
        vocabulary.tokenizer, [TEXT.format(f"{x} {x}") for x in fillers(vocabulary.tokenizer)], vocabulary.length
    )
    places = (ids != others).nonzero().squeeze(1)
    return backbone.encode(ids[None], vocabulary.table[ids].index_copy(0, places, embedding)[None])


def test_file_is_read_again(backbone, embedding, tmp_path):
    file = tmp_path / "fox.bin"  # what it is called does not count
    file.write_bytes(pack_embedding(embedding, backbone, "<fox>"))
    assert torch.equal(read_embedding(file, backbone), embedding)


def comfy(tensors, key):
    """Which tensor ComfyUI takes for an encoder: comfy/sd1_clip.py, load_embed, of its repository."""
    return tensors["string_to_param"].values() if "string_to_param" in tensors else tensors.get(key, next(iter(tensors.values())))  # fmt: skip


def automatic1111(tensors):
    """What AUTOMATIC1111 takes: modules/textual_inversion/textual_inversion.py, create_embedding_from_data, of its repository."""
    if "clip_g" in tensors and "clip_l" in tensors:
        return tensors
    assert len(tensors) == 1
    return next(iter(tensors.values()))


def test_other_tools_take_our_tensors(backbone, embedding, family):
    tensors = load(pack_embedding(embedding, backbone, "<fox>"))
    parts = backbone.vocabulary.split(embedding)
    for name, part in zip(encoder_names(backbone), parts, strict=True):
        assert torch.equal(comfy(tensors, name), part)
    theirs = automatic1111(tensors)
    if len(parts) == 2:
        assert all(torch.equal(theirs[name], part) for name, part in zip(("clip_l", "clip_g"), parts, strict=True))
    else:
        assert torch.equal(theirs, parts[0])


def test_layouts(tmp_path):
    backbone = load_backbone(str(families.save("sd1", tmp_path)))
    rows = torch.randn(2, 32)
    for i, tensors in enumerate([
        {"<fox>": rows}, {"emb_params": rows.half()}, {"clip_l": rows}, {"bundle_emb.fox.string_to_param.*": rows, "lora_down": torch.ones(3, 3)},
        {"bundle_emb.fox.clip_l": rows},
    ]):  # fmt: skip
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


def test_what_is_refused(tmp_path, capsys):
    backbone = load_backbone(str(families.save("sd1", tmp_path)))
    cases = {
        "wide": ({"<fox>": torch.ones(1, 1280)}, r"is 1280 wide, which is for the second encoder of SDXL .*takes 32"),
        "two": ({"<fox>": torch.ones(1, 32), "<dog>": torch.ones(1, 32)}, "has 2 embeddings, and one is needed"),
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
    torch.save({"<fox>": Malicious()}, tmp_path / "code.safetensors")
    for name, reason in (
        ("cut", "cannot be read as an embedding"),
        ("text", "is no embedding"),
        ("code.safetensors", "cannot be read as an"),
    ):
        with pytest.raises(UserError, match=reason):
            read_embedding(tmp_path / name, backbone, pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_embedding(tmp_path / "missing", backbone)
    assert "run" not in capsys.readouterr().out.split()


def pipeline_of(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def told(pipeline, text):
    """What a pipeline tells its denoiser, in our rows."""
    if isinstance(pipeline, diffusers.FluxPipeline | diffusers.StableDiffusion3Pipeline):
        more = {"prompt_3": None} if isinstance(pipeline, diffusers.StableDiffusion3Pipeline) else {}
        found = pipeline.encode_prompt(text, prompt_2=None, **more)
        return found[0], found[2 if more else 1]
    if isinstance(pipeline, diffusers.StableDiffusionXLPipeline):
        found = pipeline.encode_prompt(text)
        return found[0], found[2]
    if isinstance(pipeline, diffusers.PixArtSigmaPipeline):
        found = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
        return found[0] * found[1].unsqueeze(2), None
    return pipeline.encode_prompt(text, "cpu", 1, False)[0], None


def test_token_in_a_pipeline_which_is_left_as_it_was(backbone, embedding, family):
    pipeline = pipeline_of(family)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    before = {name: {key: x.clone() for key, x in part.state_dict().items()} for name, part in parts.items()}
    tokenizers = {name: (part, len(part)) for name, part in pipeline.components.items() if name.startswith("tokenizer")}
    plain, config = told(pipeline, "a red <fox> cat")[0], dict(pipeline.config)
    with embedding_in(pipeline, backbone, embedding, "<fox>") as used:
        hidden, pooled = told(used, TEXT.format("<fox>"))
    ours, our_pooled = backbone.split(encoded(backbone, embedding))
    rows = (
        slice(None) if len(backbone.vocabulary.towers) == len(backbone.towers) else slice(0, backbone.vocabulary.length)
    )
    torch.testing.assert_close(hidden[:, rows], ours[:, rows], atol=1e-5, rtol=1e-5)
    if pooled is not None and backbone.vocabulary.towers[0].kind == "clip":
        torch.testing.assert_close(pooled, our_pooled, atol=1e-5, rtol=1e-5)
    for name, part in parts.items():
        assert all(torch.equal(x, before[name][key]) for key, x in part.state_dict().items())
    assert {name: (getattr(pipeline, name), len(getattr(pipeline, name))) for name in tokenizers} == tokenizers
    assert dict(pipeline.config) == config
    assert torch.equal(told(pipeline, "a red <fox> cat")[0], plain)


def test_pictures_of_diffusers_own_loader(tmp_path):
    folder = families.save("sd1", tmp_path)
    backbone, pipeline = load_backbone(str(folder)), pipeline_of(folder)
    embedding = torch.randn(3, 32)
    (tmp_path / "fox.safetensors").write_bytes(pack_embedding(embedding[:2], backbone, "<fox>"))
    pipeline.load_textual_inversion(str(tmp_path / "fox.safetensors"))
    noise = torch.randn(1, *backbone.latent_shape)
    how = {"num_inference_steps": 3, "guidance_scale": 7.5, "output_type": "pt", "latents": noise}
    theirs = pipeline(TEXT.format("<fox>"), **how).images * 2 - 1
    with torch.no_grad():
        prompt, empty = encoded(backbone, embedding[:2]), backbone.encode_text([""])
        ours = backbone.decode(backbone.sample(prompt, empty, noise, 3, 7.5))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_pictures_of_diffusers_own_loader_with_two_encoders(tmp_path):
    """Which takes an encoder's tensor at a time."""
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
        prompt, empty = encoded(backbone, embedding), backbone.encode_text([""])
        away = torch.zeros_like(empty) if backbone.zero_empty else empty
        ours = backbone.decode(backbone.sample(prompt, away, noise, 3, 7.5))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_pipeline_of_another_family(tmp_path):
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


def test_what_a_pipeline_has_encoded_is_read(backbone, family, tmp_path):
    """Under diffusers' names, padding masked; a batch is numbered."""
    pipeline, texts = pipeline_of(family), ["a red cat", "two dogs beside a large tree"]
    said = [told(pipeline, text) for text in texts]
    tensors = {"prompt_embeds": torch.cat([hidden for hidden, _ in said]).contiguous()}
    if isinstance(pipeline, diffusers.PixArtSigmaPipeline):
        raw = [pipeline.encode_prompt(text, do_classifier_free_guidance=False) for text in texts]
        tensors = {
            "prompt_embeds": torch.cat([one[0] for one in raw]),
            "prompt_attention_mask": torch.cat([one[1] for one in raw]),
        }
    if backbone.pooled_width:
        tensors["pooled_prompt_embeds"] = torch.cat([pooled for _, pooled in said]).contiguous()
    save_file(tensors, tmp_path / "told.safetensors")
    expected = backbone.encode_text(texts)
    found = read_prompt_embeds(tmp_path / "told.safetensors", backbone, expected.shape[1:])
    assert list(found) == ["0", "1"]
    torch.testing.assert_close(torch.cat([found["0"], found["1"]]), expected, atol=1e-5, rtol=1e-5)


def test_encoded_prompts_that_cannot_be_read(tmp_path):
    backbone = load_backbone(str(families.save("sdxl", tmp_path)), image_size=16)
    shape = backbone.encode_text([""]).shape[1:]
    length, pooled = backbone.split(torch.empty(shape))[0].shape[0], torch.zeros(1, 24)
    right = torch.zeros(1, length, 80)
    for tensors, said in (
        ({"prompt_embeds": right}, "has no pooled_prompt_embeds"),
        ({"prompt_embeds": right[..., :32], "pooled_prompt_embeds": pooled}, r"is told \[32, 80\]"),
        ({"latents": right}, "holds no encoded prompt"),
    ):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "told.safetensors")
        with pytest.raises(UserError, match=said):
            read_prompt_embeds(tmp_path / "told.safetensors", backbone, shape)
