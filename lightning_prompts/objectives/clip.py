"""CLIP similarity of images and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prompts.backbones import Backbone
from lightning_prompts.backbones.hub import clip_beside, hub_access, local_folder
from lightning_prompts.backbones.vocabulary import check_embedded
from lightning_prompts.errors import UserError
from lightning_prompts.objectives.image_processor import load_image_processor
from lightning_prompts.typed_module import TypedModule


def load_clip(name: str, offline: bool = False) -> Any:
    """Load a frozen float32 CLIPModel from safetensors in a folder or on the hub."""
    from transformers import CLIPModel
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with hub_access(offline):
            model = CLIPModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The CLIP {name!r} cannot be loaded; give a folder or hub id that holds CLIP safetensors."
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval().requires_grad_(False)


def load_tokenizer(name: str, offline: bool = False) -> Any:
    """Load the tokenizer of a CLIP from its folder or the hub."""
    from transformers import CLIPTokenizerFast

    try:
        with hub_access(offline):
            tokenizer = CLIPTokenizerFast.from_pretrained(name, local_files_only=offline)
        if len(tokenizer) <= len(
            tokenizer.all_special_ids
        ):  # transformers 5 returns an empty one if there are no files
            raise ValueError("it has no tokens")
    except (OSError, TypeError, ValueError) as error:  # transformers 4 raises a TypeError if there are no files
        raise UserError(
            f"The CLIP {name!r} has no tokenizer that can be loaded; add vocab.json and merges.txt, or tokenizer.json, "
            "to its folder."
        ) from error
    return tokenizer


def default_clip(backbone: Backbone) -> str:
    """Return the default CLIP of a backbone: the folder `clip` next to it, else that of its first text encoder."""
    folder = local_folder(backbone.name)
    if folder and (folder / "clip").is_dir():
        return str(folder / "clip")
    return clip_beside(text_encoder.width for text_encoder in backbone.text_encoders)


class ClipSimilarity(TypedModule):
    """One minus the cosine between images and prompts, in [0, 2], lower is better: the loss of PEZ (arXiv 2302.03668).

    Args:
        name: Folder or hub id of a CLIPModel.
        offline: Do not connect to the hub.
    """

    def __init__(self, name: str, offline: bool = False) -> None:
        super().__init__()
        self.name, self.offline = name, offline
        self.clip = load_clip(name, offline)
        size = self.clip.config.vision_config.image_size
        self.image_processor = load_image_processor(name, size, offline)
        self.pixels(torch.zeros(1, 3, size, size))  # raises an error for the image processor of another CLIP

    @property
    def vocab_size(self) -> int:
        """Size V of the vocabulary."""
        size: int = self.clip.config.text_config.vocab_size
        return size

    @property
    def width(self) -> int:
        """Width D of the token embeddings."""
        width: int = self.clip.config.text_config.hidden_size
        return width

    @cached_property
    def tokenizer(self) -> Any:
        """The CLIP's tokenizer, loaded on first use."""
        return load_tokenizer(self.name, self.offline)

    def has_same_image_encoder(self, other: ClipSimilarity) -> bool:
        """Return whether another CLIP has the same image encoder, regardless of its folder and precision."""
        own, others = (
            [*clip.clip.vision_model.parameters(), clip.clip.visual_projection.weight] for clip in (self, other)
        )
        # The tolerance is above the rounding of float16 and bfloat16, and below the changes of training.
        return [weight.shape for weight in own] == [weight.shape for weight in others] and all(
            torch.allclose(one, two.to(one), rtol=5e-3, atol=1e-6) for one, two in zip(own, others, strict=True)
        )

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Tokenize P texts to ids (P, L); long texts are truncated but keep the end-of-text token."""
        length = self.clip.config.text_config.max_position_embeddings
        ids: Tensor = self.tokenizer(
            list(texts), truncation=True, max_length=length, padding=True, return_tensors="pt"
        ).input_ids
        check_embedded(self.tokenizer, texts, ids.tolist(), self.vocab_size)
        return ids.to(self.clip.device)

    def has_same_tokens(self, tokenizer: Any, ids: Tensor) -> bool:
        """Return whether the ids (N,) of another tokenizer are the same tokens in this CLIP's vocabulary."""
        numbers = ids.tolist()
        if max(numbers) >= self.vocab_size:
            return False
        same: bool = self.tokenizer.convert_ids_to_tokens(numbers) == tokenizer.convert_ids_to_tokens(numbers)
        return same

    def features(self, images: Tensor) -> Tensor:
        """Return unit features (B, E) of images (B, 3, H, W) in [-1, 1]."""
        pixels = self.pixels(images.to(self.clip.device))
        return F.normalize(_tensor(self.clip.get_image_features(pixel_values=pixels)).float(), dim=-1)

    def pixels(self, images: Tensor) -> Tensor:
        """Resize, crop and normalize images (B, 3, H, W) in [-1, 1] as the CLIP's own image processor does."""
        pixels, size = self.image_processor(images), self.clip.config.vision_config.image_size
        if pixels.shape[-2:] != (size, size):
            shape = " x ".join(map(str, pixels.shape[-2:]))
            raise UserError(
                f"The CLIP {self.name!r} takes images of {size} x {size} pixels, but its image processor makes "
                f"{shape}; correct its preprocessor_config.json."
            )
        return pixels

    @torch.no_grad()
    def features_of_many(self, images: Tensor, batch: int) -> Tensor:
        """Return unit features (P, N, E) of images (P, N, 3, H, W) in [-1, 1], computed in batches of `batch`."""
        features = [self.features(some) for some in images.flatten(0, 1).split(batch)]
        return torch.cat(features).view(*images.shape[:2], -1)

    def forward(self, ids: Tensor, embeddings: Tensor, features: Tensor) -> Tensor:
        """Compute the losses (P,) of token ids (P, L) with embeddings (P, L, D) for mean image features (P, E)."""
        return 1 - (self.text_features(ids, embeddings) * features).sum(1)

    def text_features(self, ids: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Return unit features (P, E) of token ids (P, L), with `embeddings` (P, L, D) in place of their own."""
        layer, end = self.clip.text_model.embeddings.token_embedding, self.clip.config.text_config.eos_token_id
        # Old configs have 2 regardless of the tokenizer.
        ends = ids.argmax(1) if end == 2 else (ids == end).int().argmax(1)
        used = int(ends.max()) + 1  # attention is causal, so later tokens have no effect
        ids, embeddings = ids[:, :used], None if embeddings is None else embeddings[:, :used]
        with ExitStack() as stack:
            if embeddings is not None:
                stack.enter_context(
                    layer.register_forward_hook(lambda module, args, replaced: embeddings.to(replaced.dtype))
                )
            return F.normalize(_tensor(self.clip.get_text_features(input_ids=ids)).float(), dim=-1)

    @torch.no_grad()
    def features_of(self, texts: Sequence[str]) -> Tensor:
        """Return unit features (P, E) of P texts."""
        return self.text_features(self.encode(texts))


def _tensor(output: Any) -> Tensor:
    """Unwrap features, which transformers 5 returns in an output object."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
