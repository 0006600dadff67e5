"""Wrong attributes at the boundaries between methods, data modules and callbacks, which mypy must report.

`make types` checks this file: in strict mode, an ignore comment without an error is an error. The file is never run.
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
    """Read an attribute that no data module has."""
    method.data.images  # type: ignore[attr-defined]
    inverter.data.picturs  # type: ignore[attr-defined]
    ph2p.data.latent  # type: ignore[attr-defined]
    dpo_diff.data.images  # type: ignore[attr-defined]
    steering.data.timestep_range  # type: ignore[attr-defined]


def data_to_method(data: ProblemData, images: ImagesToPrompts, prompts: Prompts) -> None:
    """Read an attribute that no method has."""
    data.method.template  # type: ignore[attr-defined]
    images.method.templates  # type: ignore[attr-defined]
    prompts.method.template  # type: ignore[union-attr]


def method_itself(method: PromptMethod, inverter: Inverter, steering: Steering) -> None:
    """Read an attribute that nn.Module alone would accept, because it accepts every name."""
    method.problem  # type: ignore[attr-defined]
    inverter.prompt.tabel  # type: ignore[attr-defined]
    steering.prompt.table  # type: ignore[union-attr]
    inverter.backbone.denoise_all  # type: ignore[attr-defined]


class WrongCallback(pl.Callback):
    """A callback with wrong types; the hooks are typed in lightning_prompts/callbacks."""

    def call(self, trainer: pl.Trainer, module: PromptMethod, results: Results) -> None:
        """Call a hook with something other than a method."""
        results.on_train_end(trainer, pl.LightningModule())  # type: ignore[arg-type]
        VocabularyProjection().on_train_batch_end(trainer, module, None, 3, 0)  # type: ignore[arg-type]
