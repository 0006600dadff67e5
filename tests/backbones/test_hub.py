"""Models on the Hugging Face hub, with a small local hub."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import families
import pytest
import torch
from hub import forget_connections
from searches import pez_command

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.hub import CLIPS, find_model
from lightning_prompts.commands.main import main
from lightning_prompts.objectives.clip import load_clip

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries


def assert_refused(match, name="owner/model", **how):
    families.assert_refused(match, name, **how)


OTHERS = [  # other precisions, pickles and further files that are not read
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "safety_checker/model.safetensors",
    "v1-5-pruned.safetensors",
    "text_encoder/model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "README.md",
]


@pytest.fixture
def published(hub, sd1, tmp_path):
    """Publish a model with files that are not read; return its commit."""
    folder = shutil.copytree(sd1, tmp_path / "published")
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    return hub.push("owner/model", folder)


@pytest.fixture
def clip(hub, tiny):
    """Publish the CLIP that belongs to the model; return its commit."""
    return hub.push(CLIPS[768], f"{tiny}/clip")


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Fetching


def test_only_files_that_are_read_are_fetched(hub, published, sd1):
    folder = find_model("owner/model", False, None)
    assert names(folder) == names(sd1)
    assert folder.name == published
    backbone = load_backbone("owner/model")
    assert backbone.name == "owner/model"
    assert torch.equal(backbone.text_encoders[0].table, load_backbone(str(sd1)).text_encoders[0].table)
    assert len({path for method, path in hub.asked if method == "GET" and "/resolve/" in path}) == len(names(sd1))


def test_shards_are_fetched(hub, sd1, tmp_path):
    folder = shutil.copytree(sd1, tmp_path / "sharded")
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    hub.push("owner/model", folder)
    loaded = load_backbone("owner/model").denoiser.state_dict()
    for key, value in unet.state_dict().items():
        assert torch.equal(loaded[key], value)


def test_revisions_are_resolved(hub, published, sd1, sd2):
    older = published
    newer = hub.push("owner/model", sd2)
    hub.push("owner/model", sd1, "v1")
    assert find_model("owner/model", False, None).name == newer
    assert load_backbone("owner/model", revision=older).prediction_type == "epsilon"
    assert load_backbone("owner/model").prediction_type == "v_prediction"
    assert find_model("owner/model", True, None).name == newer
    assert find_model("owner/model", True, older).name == older
    assert_refused("has not been downloaded completely", revision="v1", offline=True)
    assert load_backbone("owner/model", revision="v1").prediction_type == "epsilon"
    assert_refused(r"has no revision 'v9'; give one of its branches, tags or commits", revision="v9")
    assert_refused("has no revision", revision="0" * 40)


# Answers of the hub


@pytest.mark.parametrize(
    ("path", "status", "headers", "match"),
    [
        (
            "/api",
            401,
            {"X_Error_Code": "RepoNotFound"},
            r"neither a folder nor on the Hugging Face hub; correct the name",
        ),
        (
            "/api",
            404,
            {"X_Error_Code": "RepoNotFound"},
            r"neither a folder nor on the Hugging Face hub; correct the name",
        ),
        (
            "/api",
            401,
            {"X_Error_Message": "Invalid credentials in Authorization header"},
            r"was refused by the Hugging Face hub; log in again with `hf auth login` or unset HF_TOKEN",
        ),
        (
            "/api",
            403,
            {"X_Error_Code": "GatedRepo"},
            r"is gated; accept its terms on https://huggingface\.co/owner/model and log in",
        ),
        (
            "/owner",
            403,
            {"X_Error_Code": "GatedRepo"},
            r"is gated; accept its terms on https://huggingface\.co/owner/model and log in",
        ),
        (
            "/owner",
            401,
            {"X_Error_Code": "GatedRepo"},
            r"is gated; accept its terms on https://huggingface\.co/owner/model and log in",
        ),
        (
            "/api",
            500,
            {},
            r"could not be fetched from the Hugging Face hub \(it answered 500\); check the connection, or use 'emoji'",
        ),
        (
            "/owner",
            403,
            {},
            r"download of the model 'owner/model' was interrupted \(it answered 403\); check the connection and run",
        ),
    ],
)
def test_refusals_of_the_hub_are_explained(hub, published, path, status, headers, match):
    hub.answer[path] = (status, headers)
    assert_refused(match)
    assert_refused("has not been downloaded completely", offline=True)
    hub.answer.clear()
    assert load_backbone("owner/model").name == "owner/model"
    hub.answer[path] = (status, headers)
    assert load_backbone("owner/model").name == "owner/model"  # downloaded before


def test_hanging_hub_is_given_up(hub, published, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 1)
    hub.hangs = True
    start = time.monotonic()
    assert_refused(
        r"could not be fetched from the Hugging Face hub \(it timed out after 1 seconds\); check the connection"
    )
    assert time.monotonic() - start < 3
    hub.hangs = False
    find_model("owner/model", False, None)
    hub.hangs = True
    assert find_model("owner/model", False, None).name == published


def test_unreachable_hub_is_reported(hub_cache, attempts):
    assert_refused(
        r"'owner/model' is not a local folder and could not be fetched .*\(\w+\); check the connection, or use 'emoji'"
    )
    assert attempts


def test_repository_without_a_pipeline_is_refused(hub, language_model, hub_cache):
    hub.push("owner/model", language_model)
    assert_refused(r"'owner/model' on the Hugging Face hub has no model_index\.json; give a model in diffusers' layout")
    assert not hub_cache.exists()


def test_interrupted_download_is_resumed(hub, published, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts
    hub.broken = "unet/diffusion_pytorch_model.safetensors"
    assert_refused(
        r"The download of the model 'owner/model' was interrupted \(\w+\); check the connection and run again"
    )
    # Old versions of huggingface_hub do not check for missing files; then the loader does.
    incomplete = r"has not been downloaded completely|has no unet/diffusion_pytorch_model\.safetensors; download"
    assert_refused(incomplete, offline=True)
    assert_refused(incomplete, offline=True, revision=published)
    hub.broken, hub.asked[:] = None, []
    load_backbone("owner/model")
    assert [path for method, path in hub.asked if method == "GET" and "/resolve/" in path] == [
        f"/owner/model/resolve/{published}/unet/diffusion_pytorch_model.safetensors"
    ]
    load_backbone("owner/model", offline=True)


def test_too_little_disk_space_is_refused_before_the_download(hub, published, monkeypatch, hub_cache):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    assert_refused(
        r"'owner/model' needs [\d.]+ MB, but .*hub has only 0\.1 MB free; free disk space, or set HF_HOME to"
    )
    assert not hub_cache.exists()


def test_disk_that_fills_during_the_download_is_reported(hub, published, monkeypatch):
    def write(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", write)
        assert_refused(
            r"'owner/model' could not be written to .*hub \(No space left on device\); free disk space, or set HF_HOME "
            r"to"
        )
    assert_refused("has not been downloaded completely", offline=True)
    load_backbone("owner/model")


# Prefetching


def test_prefetch_downloads_and_lists_the_files(hub, published, clip, hub_cache, sd1, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)  # is not imported
    monkeypatch.setitem(sys.modules, "lightning_prompts.commands.cli", None)
    monkeypatch.setattr("lightning_prompts.backbones.hub.SHORT_NAMES", {"short": "owner/model"})
    main(["prefetch", "short", "emoji", str(sd1)])
    output = capsys.readouterr()
    size = sum(path.stat().st_size for path in sd1.rglob("*") if path.is_file()) / 1e6
    snapshot = hub_cache / "models--owner--model" / "snapshots" / published
    model, _, beside = output.out.partition(f"{CLIPS[768]}:\n")
    lines = model.splitlines()
    assert lines[0] == "owner/model:"
    assert {line.split()[-1] for line in lines[1:-4]} == names(sd1)
    assert lines[-4].split() == f"{size:.1f} MB in all, of which 0.0 MB are in the cache".split()
    assert lines[-3] == f"The model 'owner/model' is in {snapshot}, commit {published}."
    assert "nothing has to be fetched" in lines[-2]
    assert lines[-1] == f"The model {str(sd1)!r} is the folder {sd1}, and nothing has to be fetched."
    listed = {line.split()[-1] for line in beside.splitlines()[:-2]}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= listed
    assert beside.endswith(f"commit {clip}.\n")
    (folder,) = (hub_cache / f"models--{CLIPS[768].replace('/', '--')}" / "snapshots").iterdir()
    assert load_clip(str(folder), offline=True)
    assert "MB" in output.err or "%" in output.err or "B/s" in output.err
    main(["prefetch", "short"])
    output = capsys.readouterr().out
    assert f"of which {size:.1f} MB are in the cache" in output
    assert output.count("(in the cache)") == len(names(sd1)) + len(listed)


@pytest.mark.parametrize(
    ("args", "environment", "output"),
    [
        (["owner/model", "nowhere"], {}, "The model 'nowhere' is neither"),
        (["owner/model", "--revision", "v9"], {}, "has no revision 'v9'"),
        (
            ["owner/model", "--revision"],
            {},
            "argument --revision: expected one argument; the command reads: train.py prefetch NAME",
        ),
        ([], {}, "the following arguments are required: NAME; the command reads"),
        (
            ["owner/model"],
            {"HF_HUB_OFFLINE": "1"},
            "HF_HUB_OFFLINE forbids the connection that prefetch needs; unset it.",
        ),
    ],
)
def test_prefetch_mistakes_give_one_sentence(hub, published, capsys, monkeypatch, args, environment, output):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        main(["prefetch", *args])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert output in error
    assert not any("/resolve/" in path for _, path in hub.asked)


def test_prefetch_runs_as_a_program(hub, published, clip, tmp_path):
    """The environment sets hub and cache, and Lightning is not imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    code = (
        "import sys; from lightning_prompts.commands.main import main; main(['prefetch', 'owner/model']); "
        "assert 'pytorch_lightning' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"commit {published}." in done.stdout
    assert str(tmp_path / "home" / "hub") in done.stdout


# The commit of a run


def test_run_keeps_its_commit(hub, published, sd1, sd2, image_folder, tmp_path, capsys):
    run = tmp_path / "run"
    fit = pez_command(run, "owner/model", image_folder / "0.png")

    def commit():
        return json.loads((run / "result.json").read_text())["settings"]["model"]["backbone"]["revision"]

    def refusal_of(*args):
        with pytest.raises(SystemExit) as stopped:
            main([*fit, *args])
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    main(fit)
    assert commit() == published
    newer = hub.push("owner/model", sd2)
    hub.push("owner/model", sd1, "v1")
    hub.asked.clear()
    for command in ("test", "predict"):
        main([command, "--run", str(run)])
        assert commit() == published
    fit += ["--data.images", str(image_folder), "--model.steps", "3"]
    main([*fit, "--ckpt_path", "last"])
    assert commit() == published
    assert len(json.loads((run / "result.json").read_text())["problems"]) == 3
    main([*fit, "--ckpt_path", "last", "--model.backbone.revision", published])
    assert not any(newer in path for _, path in hub.asked)
    output = refusal_of("--ckpt_path", "last", "--model.backbone.revision", "v1")
    tagged = hub.models["owner/model"][0]["v1"]
    assert f'was started with --model.backbone.revision "{published}" and cannot resume with "{tagged}"' in output
    main(["test", "--run", str(run), "--model.backbone.offline", "true"])
    assert commit() == published
    hub.answer["/api"] = (401, {"X_Error_Code": "RepoNotFound"})
    fit[2] = str(tmp_path / "other")
    output = refusal_of("--model.backbone.revision", "v2")
    assert "neither a folder nor on the Hugging Face hub" in output
    assert not (tmp_path / "other").exists()


# Offline


@pytest.fixture(scope="module", params=families.BUILD)
def family(request, tmp_path_factory):
    """Return the folder of each family."""
    return families.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_makes_no_requests(hub_cache, attempts, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_refused(
        r"has not been downloaded completely, and this run is offline; run `train\.py prefetch owner/model` once "
        r"online",
        offline=how == "argument",
    )
    assert not attempts


def test_offline_loads_downloaded_models(hub, family, monkeypatch, request):
    hub.push("owner/model", family)
    folder = find_model("owner/model", False, None)
    forget_connections()
    attempts = request.getfixturevalue("attempts")
    expected = load_backbone(str(family), offline=True).denoiser.state_dict()
    for how in ({"offline": True}, {"offline": True, "revision": folder.name}, {"offline": False}):
        monkeypatch.setenv("HF_HUB_OFFLINE", "" if how["offline"] else "1")
        read = load_backbone("owner/model", **how).denoiser.state_dict()
        assert all(torch.equal(read[key], value) for key, value in expected.items())
    assert not attempts


# Variants


def as_variant(folder, variant="fp16", parts=("text_encoder", "unet", "vae"), keep=False, shards=None, source=None):
    """Replace the weights of components with a half-precision variant, saved by the libraries."""
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(source or folder)
    for part in parts:
        network = getattr(pipeline, part).half()
        if not keep:
            for file in (folder / part).glob("*.safetensors"):
                file.unlink()
        network.save_pretrained(folder / part, variant=variant, **({"max_shard_size": shards} if shards else {}))
    return folder


def halves(folder):
    """Return the half-precision weights of a folder by component."""
    full = load_backbone(str(folder))
    parts = {"text_encoder": full.text_encoders[0].encoder, "unet": full.denoiser, "vae": full.vae}
    return {part: {key: x.half().float() for key, x in network.state_dict().items()} for part, network in parts.items()}


def assert_read(backbone, half, full, parts=("text_encoder", "unet", "vae")):
    """Assert that these components were read in half precision and the others in full precision."""
    read = {"text_encoder": backbone.text_encoders[0].encoder, "unet": backbone.denoiser, "vae": backbone.vae}
    whole = {"text_encoder": full.text_encoders[0].encoder, "unet": full.denoiser, "vae": full.vae}
    for part, network in read.items():
        expected = half[part] if part in parts else whole[part].state_dict()
        for key, x in network.state_dict().items():
            assert x.dtype == torch.float32
            assert torch.equal(x, expected[key]), (part, key)


@pytest.fixture(scope="module")
def full(sd1):
    return load_backbone(str(sd1))


@pytest.fixture(scope="module")
def half(sd1):
    return halves(sd1)


@pytest.mark.parametrize("shards", [None, "60KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_variant_of_a_folder_is_read(sd1, full, half, tmp_path, caplog, shards, variant):
    """The only variant is chosen automatically, also in shards."""
    folder = as_variant(shutil.copytree(sd1, tmp_path / "model"), shards=shards)
    names_of = {path.name for path in folder.glob("*/*")}
    if shards:
        assert {"model.safetensors.index.fp16.json", "diffusion_pytorch_model.safetensors.index.fp16.json"} <= names_of
        assert "model.fp16-00001-of-00002.safetensors" in names_of
    else:
        assert {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"} <= names_of
    with caplog.at_level("INFO", "lightning_prompts"):
        assert_read(load_backbone(str(folder), variant=variant), half, full)
    assert ("has weights only as variant 'fp16'; using it." in caplog.text) == (variant is None)
    assert load_backbone(str(folder), "float16").denoiser.dtype == torch.float16


def test_components_without_the_variant_are_read_without_one(sd1, full, half, tmp_path, caplog):
    """This is what diffusers does; a log line says so."""
    folder = as_variant(shutil.copytree(sd1, tmp_path / "model"), parts=["unet", "text_encoder"], keep=True)
    assert_read(load_backbone(str(folder)), half, full, [])  # files without a variant take precedence
    with caplog.at_level("INFO", "lightning_prompts"):
        assert_read(load_backbone(str(folder), variant="fp16"), half, full, ["unet", "text_encoder"])
    assert "has no variant 'fp16' of vae; reading weights without one" in caplog.text
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert_read(load_backbone(str(folder)), half, full, ["unet", "text_encoder"])  # as if the variant had been given


def test_unavailable_variants_are_refused(sd1, tmp_path):
    folder = shutil.copytree(sd1, tmp_path / "model")
    assert_refused("has no variants, but 'fp16' was given; leave out --model.backbone.variant", folder, variant="fp16")
    assert_refused(
        "'emoji' has no variants, but 'fp16' was given; leave out --model.backbone.variant", "emoji", variant="fp16"
    )
    as_variant(folder, "bf16", keep=True)
    as_variant(folder, "non_ema", ["unet"], keep=True)
    assert_refused("has no variant 'fp16', only bf16, non_ema; choose one of these", folder, variant="fp16")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert_refused("has weights only as the variants bf16, non_ema; choose one with --model.backbone.variant", folder)
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert load_backbone(str(folder), variant="bf16")
    assert_refused(
        "The vae of the model .* has neither the variant 'non_ema' nor weights without one, only bf16; choose another",
        folder,
        variant="non_ema",
    )
    assert load_backbone(str(folder))  # the only variant of every component that needs one
    (folder / "vae/diffusion_pytorch_model.bf16.safetensors").unlink()
    (folder / "unet/diffusion_pytorch_model.non_ema.safetensors").unlink()
    assert_refused(r"has no vae/diffusion_pytorch_model\.safetensors; download", folder)
    save = tmp_path / "file.safetensors"
    save.write_bytes(b"x")
    assert_refused("is a file, which has no variants; leave out --model.backbone.variant", save, variant="fp16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_variant_of_a_repository_is_read(hub, sd1, full, half, tmp_path, variant, request):
    """It is read online, and offline from downloaded files."""
    folder = as_variant(shutil.copytree(sd1, tmp_path / "model"), shards="60KB")
    hub.push("owner/model", folder)
    assert_read(load_backbone("owner/model", variant=variant), half, full)
    assert names(find_model("owner/model", False, None)) == names(folder)
    assert_refused("has no variant 'bf16', only fp16; choose one", variant="bf16")
    forget_connections()
    attempts = request.getfixturevalue("attempts")
    assert_read(load_backbone("owner/model", offline=True, variant=variant), half, full)
    assert_refused("run `train.py prefetch owner/model --variant bf16` once online", offline=True, variant="bf16")
    assert not attempts


def test_only_files_of_the_variant_are_fetched(hub, sd1, full, half, tmp_path, clip, capsys):
    folder = as_variant(shutil.copytree(sd1, tmp_path / "model"), parts=["unet", "text_encoder"], keep=True)
    hub.push("owner/model", folder)
    main(["prefetch", "owner/model", "--variant", "fp16"])
    listed = capsys.readouterr().out.partition(f"{CLIPS[768]}:")[0]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in listed
    assert "vae/diffusion_pytorch_model.safetensors" in listed
    assert "unet/diffusion_pytorch_model.safetensors" not in listed
    snapshot = find_model("owner/model", True, None, variant="fp16")
    left_out = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert names(snapshot) == names(folder) - left_out
    assert_read(load_backbone("owner/model", offline=True, variant="fp16"), half, full, ["unet", "text_encoder"])
    # Offline, the variant is the only choice.
    assert_read(load_backbone("owner/model", offline=True), half, full, ["unet", "text_encoder"])
    assert_read(load_backbone("owner/model"), half, full, [])  # online it is not
    assert_read(load_backbone("owner/model", offline=True), half, full, [])
    with pytest.raises(SystemExit):
        main(["prefetch", "owner/model", "--variant", "bf16"])
    assert "has no variant 'bf16', only fp16" in capsys.readouterr().err


def test_incomplete_download_of_a_variant_is_resumed(hub, sd1, tmp_path, monkeypatch):
    hub.push("owner/model", as_variant(shutil.copytree(sd1, tmp_path / "model"), shards="60KB"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts
    hub.broken = "text_encoder/model.fp16-00002-of-00002.safetensors"
    assert_refused("was interrupted")
    hub.broken = None
    assert_refused(r"has not been downloaded completely|cannot be read|has no \w+/[\w.]+; download", offline=True)
    load_backbone("owner/model")
    load_backbone("owner/model", offline=True)


def test_run_keeps_its_variant(hub, sd1, image_folder, tmp_path, capsys, caplog):
    folder = as_variant(shutil.copytree(sd1, tmp_path / "model"))
    run = tmp_path / "run"
    fit = pez_command(run, folder, image_folder / "0.png")
    main(fit)
    assert "has weights only as variant 'fp16'; using it." in caplog.text
    assert json.loads((run / "result.json").read_text())["settings"]["model"]["backbone"]["variant"] == "fp16"
    as_variant(folder, "bf16", keep=True, source=sd1)
    main([*fit, "--model.steps", "3", "--ckpt_path", "last"])
    main(["test", "--run", str(run)])
    assert json.loads((run / "result.json").read_text())["settings"]["model"]["backbone"]["variant"] == "fp16"
    with pytest.raises(SystemExit) as stopped:
        main([*fit, "--ckpt_path", "last", "--model.backbone.variant", "bf16"])
    assert stopped.value.code == 2
    assert 'was started with --model.backbone.variant "fp16" and cannot resume with "bf16"' in capsys.readouterr().err
