"""Measure the memory of every family at its full size: `python benchmarks/memory.py`.

Weights and activations are counted on the meta device, where tensors have a size and no content, so no model is
downloaded and all machines give the same figures. Weights are bfloat16. Activations are those that autograd keeps for
one call of the denoiser on one noisy image at the family's default size, with a gradient to the prompt.

`python benchmarks/memory.py --search ph2p` or `--search dpo_diff` runs a search instead: it writes a model of the size
of Stable Diffusion 1.5 with random weights, and its CLIP, into a folder, searches for two steps from the command line,
and prints the peak memory of the process and the seconds of the steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from lightning_prompts.backbones import Backbone, TextEncoder
from lightning_prompts.backbones.flux import Flux
from lightning_prompts.backbones.pixart import PixArt
from lightning_prompts.backbones.sd3 import StableDiffusion3
from lightning_prompts.backbones.stable_diffusion import StableDiffusion, StableDiffusionXL
from lightning_prompts.backbones.text_encoders import TextEncoderOutput

GIB = 2**30
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
PIXART = {
    "sample_size": 128,
    "num_layers": 28,
    "patch_size": 2,
    "attention_head_dim": 72,
    "num_attention_heads": 16,
    "in_channels": 4,
    "out_channels": 8,
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "use_additional_conditions": False,
}


def words() -> Iterator[str]:
    """Return every word of one to four letters, the short ones first."""
    return (
        "".join(letters) for size in range(1, 5) for letters in itertools.product(string.ascii_lowercase, repeat=size)
    )


@cache
def clip_tokenizer(size: int = 49408, pad: str = "<|endoftext|>") -> Any:
    """Create a tokenizer in CLIP's format whose tokens are words of up to four letters that survive a round trip.

    A word is merged from its end, `a b c</w>` to `a bc</w>` to `abc</w>`, so that no two merges compete.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = list(itertools.islice(words(), 26, 26 + size - 2 * len(alphabet) - 2))  # one-letter words are bytes
    tokens = [*alphabet, *(f"{word}</w>" for word in (*alphabet, *merged)), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text(
            "#version: 0.2\n" + "".join(f"{word[0]} {word[1:]}</w>\n" for word in merged)
        )
        return CLIPTokenizerFast.from_pretrained(folder, model_max_length=77, pad_token=pad)


@cache
def t5_tokenizer(size: int = 32128) -> Any:
    """Create a tokenizer in T5's format with letters and words of up to four letters."""
    letters = string.ascii_lowercase + string.digits + ",.!-'"
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -4.0, **dict.fromkeys(letters, -4.0)}
    pieces |= {f"▁{word}": -2.0 for word in itertools.islice(words(), size - len(pieces))}
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        return T5TokenizerFast.from_pretrained(folder, extra_ids=0)


def clip(projection: int | None = None, tokenizer: Any = None, **config: int) -> tuple[Any, Any]:
    """Create a CLIP text encoder and its tokenizer, by default one in place of CLIP's own."""
    tokenizer = tokenizer or clip_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    own = CLIPTextConfig(
        vocab_size=len(tokenizer), **ids, **config, **({"projection_dim": projection} if projection else {})
    )
    return tokenizer, (CLIPTextModelWithProjection if projection else CLIPTextModel)(own)


def t5(tokenizer: Any = None, **config: Any) -> tuple[Any, Any]:
    """Create the T5 of three families, or a smaller one."""
    tokenizer = tokenizer or t5_tokenizer()
    return tokenizer, T5EncoderModel(T5Config(**T5_XXL | config | {"vocab_size": len(tokenizer)}))


def vae(channels: int = 4, **config: Any) -> Any:
    """Create the autoencoder of Stable Diffusion, or one with more channels."""
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        sample_size=512,
        **config,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def unet(**config: Any) -> Any:
    """Create a UNet, by default with the layers of Stable Diffusion's."""
    return diffusers.UNet2DConditionModel(**config)


def backbone(
    family: type[Backbone], texts: list[tuple[Any, Any]], denoiser: Any, autoencoder: Any, scheduler: Any
) -> Backbone:
    """Create a model from its parts."""
    text_encoders = [TextEncoder(*text, spec) for text, spec in zip(texts, family.text_encoder_specs, strict=True)]
    return family(family.__name__, text_encoders, denoiser, autoencoder, scheduler)


EPSILON = diffusers.DDIMScheduler()
V = diffusers.DDIMScheduler(prediction_type="v_prediction")
FLOW = diffusers.FlowMatchEulerDiscreteScheduler()
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}

MODELS: dict[str, Callable[[], Backbone]] = {
    "Stable Diffusion 1.5": lambda: backbone(
        StableDiffusion,
        [clip(**CLIP_L)],
        unet(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        vae(),
        EPSILON,
    ),
    "Stable Diffusion 2.1": lambda: backbone(
        StableDiffusion,
        [clip(**CLIP_H)],
        unet(sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        vae(),
        V,
    ),
    "SDXL": lambda: backbone(
        StableDiffusionXL,
        [clip(**CLIP_L), clip(1280, clip_tokenizer(pad="!"), **CLIP_G)],
        unet(**SDXL_UNET),
        vae(),
        EPSILON,
    ),
    "PixArt-Sigma": lambda: backbone(PixArt, [t5()], diffusers.PixArtTransformer2DModel(**PIXART), vae(), EPSILON),
    "Stable Diffusion 3.5 medium": lambda: backbone(
        StableDiffusion3,
        [clip(768, **CLIP_L), clip(1280, clip_tokenizer(pad="!"), **CLIP_G), t5()],
        diffusers.SD3Transformer2DModel(**SD35_MEDIUM),
        vae(16, **NO_QUANT),
        FLOW,
    ),
    "FLUX.1 dev": lambda: backbone(
        Flux, [clip(**CLIP_L), t5()], diffusers.FluxTransformer2DModel(guidance_embeds=True), vae(16, **NO_QUANT), FLOW
    ),
}


def weights(network: Any) -> int:
    """Count the bytes of a network's weights."""
    return sum(weight.nbytes for weight in network.parameters())


class SavedTensors:
    """A context that records the tensors that autograd keeps, except weights."""

    def __init__(self, network: Any) -> None:
        self.weights = {weight.untyped_storage()._cdata for weight in network.parameters()}
        self.tensors: dict[int, Tensor] = {}  # kept alive, so that no other tensor reuses the storage
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    def add(self, tensor: Tensor) -> Tensor:
        """Record a tensor that is no weight."""
        if tensor.untyped_storage()._cdata not in self.weights:
            self.tensors[tensor.untyped_storage()._cdata] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        """Return the bytes of all recorded storages."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


@contextmanager
def fused_attention() -> Iterator[None]:
    """Make attention keep the tensors that fused kernels keep, see `FusedAttention`."""

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return FusedAttention.apply(query, key, value)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused):
        yield


class FusedAttention(torch.autograd.Function):
    """Keep the tensors that fused kernels keep, where torch on the meta device keeps the matrix of each head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return a tensor of the right shape."""
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def saved_bytes(network: Any, call: Callable[[], Tensor], checkpointing: bool) -> int:
    """Count the bytes that autograd keeps of a call; with checkpointing, add those of the largest block again."""
    kept, blocks = SavedTensors(network), [0]

    def block(module: Any, *args: Any) -> Any:
        within = SavedTensors(network)
        with within.hooks:
            given = module(*args)
        blocks.append(within.bytes)
        for tensor in args:
            if isinstance(tensor, Tensor):
                kept.add(tensor)
        return given

    if checkpointing:
        network.enable_gradient_checkpointing(block)
    with kept.hooks:
        output = call()
    assert output.requires_grad
    return kept.bytes + max(blocks)


def on_meta(build: Callable[[], Backbone]) -> Backbone:
    """Create a model in bfloat16 on the meta device."""
    with torch.device("meta"):
        return build().to(torch.bfloat16).to("meta")


def calls(model: Backbone) -> list[tuple[Any, Callable[[], Tensor]]]:
    """Return calls of the denoiser and the decoder for one image, with gradients to the prompt and the latents."""
    outputs = []
    for text_encoder, spec in zip(
        model.text_encoders, model.text_encoder_specs, strict=True
    ):  # without content they cannot be called: T5 looks at what its mask holds
        pooled = (
            text_encoder.encoder.config.projection_dim if spec.network.endswith("Projection") else text_encoder.width
        )
        shapes = (1, text_encoder.length, text_encoder.width), (1, pooled)
        outputs.append(TextEncoderOutput(*(torch.zeros(shape, device=model.device) for shape in shapes)))
    prompt_embeds = model.combine(outputs).to(torch.bfloat16).requires_grad_()
    latents = torch.zeros(1, *model.latent_shape, device=model.device)
    timesteps = torch.zeros(1, device=model.device)
    return [
        (model.denoiser, lambda: model.denoise(latents, timesteps, prompt_embeds)),
        (model.vae, lambda: model.decode(latents.requires_grad_())),
    ]


def activations(model: Backbone) -> list[int]:
    """Count the bytes that autograd keeps of calls of the denoiser and the decoder, without and with checkpointing."""
    with fused_attention():
        return [saved_bytes(*call, checkpointing) for call in calls(model) for checkpointing in (False, True)]


def table() -> str:
    """Return the table of weights and activations of each family."""
    head = (
        "pixels",
        "text encoders",
        "denoiser",
        "autoencoder",
        "a call",
        "checkpointed",
        "a decoding",
        "checkpointed",
    )
    lines = [f"| GiB | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for name, build in MODELS.items():
        model = on_meta(build)
        parts = [weights(part) for part in (model.text_encoders, model.denoiser, model.vae)]
        figures = [size / GIB for size in (*parts, *activations(model))]
        lines.append(f"| {name} | {model.image_size} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    return "\n".join(lines)


SEARCHES = {
    "ph2p": (
        "--config configs/ph2p.yaml --data.images docs/images/demo.png --model.steps 2 --data.num_noise_samples 1 "
        "--data.num_validation_samples 1 --model.sampler.num_inference_steps 2 --model.sampler.guidance_scale 7.5"
    ),
    "dpo_diff": (
        "--config configs/dpo_diff.yaml --data.prompts dog --model.solver gradient --model.budget 2 "
        "--model.gradient_share 0.5 --model.seeds 1 --model.sampler.num_inference_steps 2 --model.schedule fix-1 "
        "--model.sampler.guidance_scale 7.5"
    ),
}


def clip_model(text: Any, projection: int = 768, **vision: Any) -> Any:
    """Create the CLIP to which a text encoder of this configuration belongs."""
    own_vision = CLIPVisionConfig(**vision)
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=own_vision.to_dict(), projection_dim=projection)
    )


def write_model(folder: Path) -> None:
    """Write a model of the size of Stable Diffusion 1.5, and the CLIP to which its text encoder belongs."""
    model = MODELS["Stable Diffusion 1.5"]()
    tokenizer, encoder = model.text_encoders[0].tokenizer, model.text_encoders[0].encoder
    pipeline = diffusers.StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=model.denoiser,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder / "model")
    clip_model(encoder.config, **VIT_L).to(torch.bfloat16).save_pretrained(folder / "model/clip")
    tokenizer.save_pretrained(folder / "model/clip")


def measure(search: str, settings: list[str]) -> str:
    """Run two steps from the command line."""
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch))
        run = Path(scratch) / "run"
        own_settings = [
            "--model.backbone",
            f"{scratch}/model",
            "--model.backbone.offline",
            "true",
            "--model.microbatch",
            "1",
            "--run",
            str(run),
        ]
        command = [
            sys.executable,
            "train.py",
            "fit",
            *SEARCHES[search].split(),
            *own_settings,
            *settings,
            "--trainer.accelerator",
            "cpu",
        ]
        begun = time.perf_counter()
        subprocess.run(command, check=True)
        (problem,) = json.loads((run / "result.json").read_text())["problems"]
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB
    line = f"{most:.1f} GiB peak, {problem['seconds'] / 2:.0f} s per step, {time.perf_counter() - begun:.0f} s in total"
    return f"{search} {' '.join(settings)}: {line}"


def main() -> None:
    """Count memory or run a search, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", choices=SEARCHES, help="run a search; further arguments are its settings")
    args, settings = parser.parse_known_args()
    if args.search:
        print(measure(args.search, settings))
        return
    print(table())


if __name__ == "__main__":
    main()
