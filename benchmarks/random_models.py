"""Models with random weights, created on the device: of published sizes, and small ones of the same families."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import diffusers
import memory
import torch

from lightning_prompts.backbones import Backbone
from lightning_prompts.backbones.flux import Flux
from lightning_prompts.backbones.stable_diffusion import StableDiffusion, StableDiffusionXL


def tiny_unet(width: int, **config: Any) -> Any:
    return memory.unet(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **config,
    )


def tiny_vae(**config: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    )


def tiny_clip(pad: str = "<|endoftext|>", projection: int | None = None) -> tuple[Any, Any]:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return memory.clip(projection, memory.clip_tokenizer(2000, pad), **small)


def tiny_t5() -> tuple[Any, Any]:
    return memory.t5(memory.t5_tokenizer(2000), d_model=48, d_kv=8, d_ff=96, num_layers=2, num_heads=4)


def tiny_sdxl() -> Backbone:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 72,
    }
    texts = [tiny_clip(), tiny_clip("!", 24)]
    return memory.backbone(StableDiffusionXL, texts, tiny_unet(64, **added), tiny_vae(), memory.EPSILON)


def tiny_flux() -> Backbone:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    model = memory.backbone(Flux, [tiny_clip(), tiny_t5()], transformer, tiny_vae(**memory.NO_QUANT), memory.FLOW)
    model.image_size = 16  # the default size of Flux is always 128 latents
    return model


TINY: dict[str, Callable[[], Backbone]] = {
    "Stable Diffusion 1.5": lambda: memory.backbone(
        StableDiffusion, [tiny_clip()], tiny_unet(32), tiny_vae(), memory.EPSILON
    ),
    "SDXL": tiny_sdxl,
    "FLUX.1 dev": tiny_flux,
}
"""Small models under the names that `memory.MODELS` has for those of full size."""


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create networks on a device in a given precision, always with the same random weights."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def backbone(build: Callable[[], Backbone], device: torch.device) -> Backbone:
    """Return a model in bfloat16, like `load_backbone`."""
    with made_on(device, torch.bfloat16):
        model = build()
    model.alphas_cumprod = model.alphas_cumprod.to(device, torch.float32)
    for network in (model.denoiser, model.vae):
        if not isinstance(network, diffusers.FluxTransformer2DModel):
            network.to(memory_format=torch.channels_last)
    return model


@cache
def clip(device: torch.device, tiny: bool) -> tuple[Any, Any]:
    """Return a tokenizer and a CLIP of the size of ViT-L/14 in float32, like `load_tokenizer` and `load_clip`."""
    tokenizer, text = tiny_clip() if tiny else memory.clip(**memory.CLIP_L)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    with made_on(device, torch.float32):
        network = memory.clip_model(text.config, **(small if tiny else memory.VIT_L))
    return tokenizer, network.eval().requires_grad_(False)
