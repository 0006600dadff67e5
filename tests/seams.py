"""Wrong attributes on the seams between methods, data modules and callbacks, each of which mypy has to see.

`make types` checks this file: under `strict` an ignored error that does not exist is an error. Nothing runs it.
"""

from __future__ import annotations

import pytorch_lightning as pl

from lightning_prompts.callbacks import Results, VocabularyProjection
from lightning_prompts.engine.datamodule import ProblemData
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.methods import PH2P, DPODiff, PromptMethod
from lightning_prompts.methods.inversion.base import Inverter
from lightning_prompts.methods.steering.base import Steering


def method_to_data(method: PromptMethod, inverter: Inverter, ph2p: PH2P, dpo_diff: DPODiff, steering: Steering) -> None:
    """Read what no data module has."""
    method.data.pictures  # type: ignore[attr-defined]
    inverter.data.picturs  # type: ignore[attr-defined]
    ph2p.data.latent  # type: ignore[attr-defined]
    dpo_diff.data.pictures  # type: ignore[attr-defined]
    steering.data.timesteps  # type: ignore[attr-defined]


def data_to_method(data: ProblemData, images: ImagesToPrompts, prompts: Prompts) -> None:
    """Read what no method has."""
    data.method.template  # type: ignore[attr-defined]
    images.method.templates  # type: ignore[attr-defined]
    prompts.method.template  # type: ignore[union-attr]


def method_itself(method: PromptMethod, inverter: Inverter, steering: Steering) -> None:
    """Read what nn.Module, which answers to every name, lets pass."""
    method.problem  # type: ignore[attr-defined]
    inverter.prompt.tabel  # type: ignore[attr-defined]
    steering.prompt.table  # type: ignore[union-attr]
    inverter.backbone.denoise_all  # type: ignore[attr-defined]


class WrongCallback(pl.Callback):
    """Hooks are typed in lightning_prompts/callbacks; these are what their callers would get wrong."""

    def call(self, trainer: pl.Trainer, module: PromptMethod, results: Results) -> None:
        """Hand a hook something else than a method."""
        results.on_train_end(trainer, pl.LightningModule())  # type: ignore[arg-type]
        VocabularyProjection().on_train_batch_end(trainer, module, None, 3, 0)  # type: ignore[arg-type]
