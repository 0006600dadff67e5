"""Generate images and score them, one microbatch at a time."""

from lightning_prompts.sampling.microbatch import OUT_OF_MEMORY, Microbatch, out_of_memory
from lightning_prompts.sampling.sampler import Sampler, SamplerSettings

__all__ = ["OUT_OF_MEMORY", "Microbatch", "Sampler", "SamplerSettings", "out_of_memory"]
