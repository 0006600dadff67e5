"""The gradient step that PEZ, PH2P and TextualInversion share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_prompts.engine.datamodule import Step
from lightning_prompts.methods.inversion.base import Inverter
from lightning_prompts.methods.inversion.samples import Samples


class GradientInverter(Inverter):
    """Move the token embeddings along the gradient of the losses.

    Attributes:
        straight_through: Whether the gradient is taken at the embeddings of the nearest tokens and applied to the
            continuous ones.
    """

    straight_through: bool = False

    def step(self, batch: Step, rows: Tensor) -> None:
        """Take one optimizer step on the losses of this step's samples."""
        loss = self.losses(rows, self.samples(rows, batch), self.texts(rows))
        self.step_active(loss, rows)
        self.log_step(batch, rows, loss=loss)

    def losses(self, rows: Tensor, samples: Samples, texts: Sequence[str] | None) -> Tensor:
        """Compute the losses (Q,) of the current prompts of the problems `rows` (Q,); see `Inverter.loss`."""
        ids, embeddings = self.prompt(rows.to(self.device, non_blocking=True), straight_through=self.straight_through)
        return self.loss(rows, ids, embeddings, samples, texts)

    def texts(self, rows: Tensor) -> list[str] | None:
        """Return Q texts for the text encoders that are not searched; None for the text of the tokens."""
        return None
