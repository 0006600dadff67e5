"""The untrained networks of the embedded model."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from lightning_prompts.emoji import world
from lightning_prompts.emoji.tokenizer import CONTEXT


def clip(tokenizer: CLIPTokenizerFast, vision: tuple[int, int], text: tuple[int, int]) -> CLIPModel:
    """Create a CLIP with patches of 8 pixels and a joint space of 128 dimensions.

    Args:
        tokenizer: Supplies the vocabulary size and the ids of the special tokens.
        vision: Width and number of layers of the vision encoder.
        text: Width and number of layers of the text encoder.
    """

    def transformer(width: int, layers: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "projection_dim": 128,
        }

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPModel(
        CLIPConfig(
            text_config={**transformer(*text), **ids, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT},
            vision_config={**transformer(*vision), "image_size": world.SIZE, "patch_size": 8},
            projection_dim=128,
        )
    )


def image_processor() -> dict[str, Any]:
    """Return the preprocessor_config.json of the CLIPs, which are trained on pixels in [-1, 1]."""
    size = {"height": world.SIZE, "width": world.SIZE}
    return {
        "crop_size": size,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.5] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": world.SIZE},
    }


def autoencoder() -> AutoencoderKL:
    """Create an autoencoder with images (3, 64, 64) and latents (4, 16, 16)."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=world.SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def denoiser(width: int) -> UNet2DConditionModel:
    """Create a UNet with cross-attention at resolutions 8 x 8 and 4 x 4 to a text encoder of a given width."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        norm_num_groups=16,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
    )


def scheduler() -> DDIMScheduler:
    """Create the scheduler: DDPM's linear betas, with sampling from the noisiest timestep."""
    return DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
