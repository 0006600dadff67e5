"""Search, resume, test and predict with every method on models with published configurations and tokenizers.

The models are loaded once, and values that depend only on a vocabulary of full size are computed once. By default, a
few cells of the table run; `pytest -m slow` runs the others.
"""

import importlib.util
import shutil
from functools import cache, partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from inputs import noise
from searches import result_of

from lightning_prompts import methods
from lightning_prompts.backbones import Vocabulary, load_backbone
from lightning_prompts.callbacks import ImageWriter, Results
from lightning_prompts.engine.checkpoint import AtomicCheckpointIO, PromptCheckpoint
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.engine.loaders import PredictSettings
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.errors import UserError
from lightning_prompts.methods import TRAINER
from lightning_prompts.methods.dpo_diff.semantic_similarity import Similarity
from lightning_prompts.methods.inversion import search_clip
from lightning_prompts.methods.inversion.base import Inverter
from lightning_prompts.methods.steering.human_feedback import Scripted
from lightning_prompts.objectives import Sharpness, clip
from lightning_prompts.optimizers import BatchedLBFGS
from lightning_prompts.python_search import CONFIGS
from lightning_prompts.python_settings import checked_settings
from lightning_prompts.sampling import SamplerSettings

SHARED = Path(__file__).parents[2].parent / "shared"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not (SHARED / "data/published").is_dir(), reason=f"no published configurations in {SHARED}"),
]

PROMPT = "a small cat on a red background"
IMAGE = {"num_tokens": 2, "num_noise_samples": 2, "num_validation_samples": 2, "steps": 2}
PROMPTED = {"seeds": 1, "steps": 2}
CELLS = {
    "PH2P": {**IMAGE, "optimizer": partial(BatchedLBFGS, max_iter=2)},
    "PEZ": IMAGE,
    "GCG": {**IMAGE, "candidates": 3},
    "TextualInversion": IMAGE,
    "ClipWords": IMAGE,
    "RandomTokens": IMAGE,
    "DPODiff": {"budget": 3, "population": 1, "elites": 1, "seeds": 1, "gradient_share": 0.5, "schedule": "fix-0",
                "positive": ["neighbors"], "negative": ["library"], "similarity": Similarity(-1)},
    "MetricGuidance": {**PROMPTED, "objective": Sharpness()},
    "SeedInvariance": {**PROMPTED, "seeds_per_step": 1},
    "HumanFeedback": {**PROMPTED, "texts": 3, "candidates": 2, "words": ["red", "blue", "large"]},
    "configs/invert.yaml": {"candidates": 3, "num_noise_samples": 2, "num_validation_samples": 2, "steps": 2},
    "configs/textual_inversion.yaml": {"num_noise_samples": 1, "num_validation_samples": 2, "steps": 2},
}  # fmt: skip
MODELS = ["sd15", "sd21", "sdxl", "playground25", "sd3", "sd3, T5", "flux-dev", "flux-schnell", "pixart"]
REFUSED = {
    (
        "DPODiff",
        model,
    ): "has guidance built in, so a negative prompt does nothing; search other words for the prompt with "
    r"--model.negative \[\] --model.positive \[synonyms\], or choose another model"
    for model in ("flux-dev", "flux-schnell")
}
DEFAULT = {("configs/invert.yaml", "flux-dev"), ("DPODiff", "sd3, T5"), ("GCG", "sd21")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the models, loaded on first use."""
    spec = importlib.util.spec_from_file_location("published", SHARED / "tools/published.py")
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)

    @cache
    def folder(name):
        path = tmp_path_factory.mktemp(name) / "model"
        return pixart(folder("flux-dev"), path) if name == "pixart" else published.build(name, path)

    @cache
    def model(name):
        return load_backbone(
            str(folder(name.partition(",")[0])), vocabulary="t5" if name.endswith("T5") else None, image_size=64
        )

    return model


def pixart(flux, folder):
    """Create PixArt-Sigma XL 2 1024 MS as documented, with reduced width and depth, and the T5 of FLUX."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        caption_channels=64,
        cross_attention_dim=32,
        attention_bias=True,
        activation_fn="gelu-approximate",
        interpolation_scale=2,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        use_additional_conditions=False,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4, latent_channels=4, sample_size=64, scaling_factor=0.13025, force_upcast=True,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
    )
    tokenizer = transformers.T5TokenizerFast.from_pretrained(flux / "tokenizer_2")
    encoder = transformers.T5EncoderModel.from_pretrained(flux / "text_encoder_2")
    diffusers.PixArtSigmaPipeline(tokenizer, encoder, vae.eval(), transformer.eval(), scheduler).save_pretrained(folder)
    shutil.copytree(flux / "clip", folder / "clip")
    return folder


@pytest.fixture(scope="module", autouse=True)
def once():
    """Compute what only depends on a vocabulary or a CLIP once."""
    allowed, features = Vocabulary.allowed, search_clip.word_features
    known = {}

    def allowed_once(self, banned_words=(), allowed_words=None):
        key = id(self), tuple(banned_words), allowed_words
        if key not in known:
            known[key] = self, allowed(self, banned_words, allowed_words)  # keeping the vocabulary keeps its id unique
        return known[key][1].clone()

    def features_once(clip, prompt, as_text, chunk=256):
        key = clip.name, id(prompt.vocabulary), prompt.words_around, as_text
        if key not in known:
            known[key] = features(clip, prompt, as_text, chunk)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Vocabulary, "allowed", allowed_once)
        patch.setattr(search_clip, "word_features", features_once)
        patch.setattr(clip, "load_clip", cache(clip.load_clip))
        patch.setattr(clip, "load_tokenizer", cache(clip.load_tokenizer))
        yield


class Stopping(PromptCheckpoint):
    """Save after the first step and stop the program."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._save(trainer)
        raise KeyboardInterrupt


class Cell:
    """A method, or a config, on a model."""

    def __init__(self, name, backbone, image):
        self.kind, given = getattr(methods, name, None), CELLS[name]
        if self.kind is None:
            config = yaml.safe_load((CONFIGS.parent / name).read_text())
            self.kind = getattr(methods, config["model"]["class_path"])
            (given_model,) = checked_settings((self.kind,), config["model"]["init_args"], {})
            given = {**given_model, **config["data"]["init_args"], **given}
        data = {"num_noise_samples", "num_validation_samples", "timestep_range"}
        self.data = {key: value for key, value in given.items() if key in data}
        self.model = {key: value for key, value in given.items() if key not in data}
        self.model |= {"backbone": backbone, "sampler": SamplerSettings(2), "log_images_every_n_steps": 0}
        self.image = image
        if name == "HumanFeedback":
            self.model["chooser"] = Scripted(image)

    def run(self, command, folder, saving=PromptCheckpoint, ckpt_path=None):
        """Run a command in its own module and Trainer."""
        module = self.kind(**self.model)
        data = ImagesToPrompts(self.image, **self.data) if issubclass(self.kind, Inverter) else Prompts(PROMPT)
        how = TRAINER | {"accelerator": "cpu", "logger": False, "enable_checkpointing": True}
        callbacks = [Results(report=False), ImageWriter(), saving(folder / "checkpoints")]
        trainer = pl.Trainer(**how, default_root_dir=folder, callbacks=callbacks, plugins=[AtomicCheckpointIO()])
        data.predict_settings = PredictSettings(seeds=(3,))
        if command == "fit":
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        else:
            getattr(trainer, command)(module, datamodule=data)


def params():
    """Return all cells; those that do not run by default are marked as slow."""
    for model in MODELS:
        for name in CELLS:
            marks = [] if (name, model) in DEFAULT else [pytest.mark.slow]
            yield pytest.param(name, model, marks=marks, id=f"{model.replace(', ', '-')}-{Path(name).stem}")


def test_table_in_the_docs_equals_the_tested_cells():
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    lines = page[page.index("| | sd15 ") :].partition("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    documented = {
        (row[0].strip("`"), model): cell for row in rows for model, cell in zip(head[1:], row[1:], strict=True)
    }
    works = {(name, model): "yes" for name in CELLS for model in MODELS}
    assert documented == works | dict.fromkeys(REFUSED, "positive words only")


@pytest.mark.parametrize(("name", "model"), list(params()))
def test_method_on_model_runs_and_resumes(name, model, models, tmp_path, capsys):
    noise(64, 64).save(tmp_path / "p.png")
    cell, run, again = Cell(name, models(model), str(tmp_path / "p.png")), tmp_path / "run", tmp_path / "again"
    before = {key: tensor.clone() for key, tensor in cell.model["backbone"].state_dict().items()}
    if reason := REFUSED.get((name, model)):
        with pytest.raises(UserError, match=reason):
            cell.run("fit", run)
        cell.model |= {"negative": []}
    cell.run("fit", run)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cell.run("fit", again, Stopping)
    (last,) = (again / "checkpoints").glob("*.ckpt")
    cell.run("fit", again, ckpt_path=str(last))
    (one, files), (other, theirs) = result_of(run, 4), result_of(again, 4)
    assert one == other
    assert one["status"] in ("done", "not improved"), one
    assert files.keys() == theirs.keys()
    for file, tensors in files.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, theirs[file][key], atol=1e-5, rtol=1e-5)
    cell.run("test", run)
    assert result_of(run, 4)[0] == one
    cell.run("predict", run)
    assert len(list((run / "images").glob("*.png"))) == 1
    after = cell.model["backbone"].state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
