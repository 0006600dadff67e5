"""Images that prompts generate during an inversion, by which the best prompt is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_prompts.backbones import repeat
from lightning_prompts.engine.method import MOST_STEPS
from lightning_prompts.sampling import Sampler, SamplerSettings
from lightning_prompts.sampling.seeding import RERANK
from lightning_prompts.setting_types import Positive, Weight

if TYPE_CHECKING:
    from lightning_prompts.methods.inversion.base import Inverter


@dataclass(frozen=True)
class Rerank:
    """Set how much the choice of the best prompt depends on images that the prompts generate.

    Args:
        weight: Weight, in the validation loss, of one minus the cosine in CLIP of the target and generated images; 0
            for none.
        images: Images to generate at each scoring.
        num_inference_steps: Denoising steps of these images; None for the model's default, at most 10.
    """

    weight: Weight = 0.0
    images: Positive = 2
    num_inference_steps: Positive | None = None


class Reranker:
    """Compare images that a prompt generates with the target, as a term of the validation loss.

    Args:
        sampler: Sampler of the final images, whose guidance and microbatch are used.
        settings: Weight of the term, and the images.
    """

    def __init__(self, sampler: Sampler, settings: Rerank) -> None:
        few = SamplerSettings(settings.num_inference_steps, sampler.guidance_scale)
        self.sampler = few.build(sampler.backbone, sampler.microbatch, MOST_STEPS)
        self.images, self.weight = int(settings.images), settings.weight

    def loss(self, method: Inverter, rows: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Compute weighted mean CLIP distances (Q,) of the targets and the images of encoded prompts (Q, R, D)."""
        noise = method.draw_noise(method.records(rows), RERANK, self.images).flatten(0, 1)
        prompt_embeds = repeat(prompt_embeds, self.images)
        negative_prompt_embeds = method.encode([""], negative=True)

        def features(indices: Tensor) -> Tensor:
            images = self.sampler.sample(prompt_embeds[indices], negative_prompt_embeds, noise[indices])
            return method.clip.features(images)

        generated = self.sampler.microbatch.map(len(noise), features, method.device)
        method.batch.add_cost(rows, self.images * self.sampler.cost())
        generated = generated.view(len(rows), self.images, -1).mean(1)
        return self.weight * (1 - (generated * method.features(rows)).sum(1))
