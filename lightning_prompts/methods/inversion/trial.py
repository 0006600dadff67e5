"""Images that prompts generate during an inversion, by which the best prompt is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_prompts.backbones import repeat
from lightning_prompts.sampling import Sampler
from lightning_prompts.sampling.seeding import RERANK

if TYPE_CHECKING:
    from lightning_prompts.methods.inversion.base import Inverter


class Trial:
    """Compare images that a prompt generates with the target, as a term of the validation loss.

    Args:
        sampler: Sampler of the final images, whose guidance and microbatch are used.
        steps: Denoising steps of an image.
        images: Images per prompt.
        weight: Weight of the term.
    """

    def __init__(self, sampler: Sampler, steps: int, images: int, weight: float) -> None:
        self.sampler = Sampler(sampler.backbone, steps, sampler.guidance_scale, sampler.microbatch)
        self.images, self.weight = images, weight

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
