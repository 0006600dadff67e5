"""Frozen text-to-image models behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prompts.backbones.latent_diffusion import LatentDiffusion
from lightning_prompts.backbones.metadata import Metadata
from lightning_prompts.backbones.text_encoders import TextEncoder, TextEncoderOutput, TextEncoderSpec, Vocabulary
from lightning_prompts.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from typing_extensions import Self


class Backbone(LatentDiffusion, ABC):
    """A frozen text-to-image model: no parameter requires a gradient, and it never leaves evaluation mode.

    An encoded prompt is a tensor of rows (R, D): one row per token, which the denoiser attends to, followed by the
    pooled vector, padded with zeros, in families that have one. An operation on all rows thus covers everything that
    the denoiser gets from a prompt.

    A subclass is a family of models. Its class attributes name the diffusers pipelines that it supports and their
    components; its methods build encoded prompts from the outputs of the text encoders (`combine`) and call the
    denoiser (`denoise`). Defining the subclass registers it, see `families`.

    Args:
        name: The name that the user gave.
        text_encoders: The text encoders in the order of `text_encoder_specs`, without optional ones that are absent.
        denoiser: The diffusers model that predicts noise or velocity.
        vae: The diffusers autoencoder.
        scheduler: The diffusers scheduler: noise schedule, prediction type and sampler.
        vocabulary: Kind of the text encoders whose tokens are searched, such as `t5`; None for the family's default.
        image_size: Height and width of generated images, in pixels; None for the size that the model was trained on.
        zero_empty: Encode empty negative prompts as zeros.
        clip_skip: Number of last layers of the CLIP text encoders to skip for prompts, as in diffusers' pipelines;
            negative prompts use all layers. None for all layers.
    """

    pipelines: ClassVar[tuple[str, ...]]  # diffusers pipelines of the family
    text_encoder_specs: ClassVar[tuple[TextEncoderSpec, ...]]
    denoiser_spec: ClassVar[tuple[str, str]]  # the denoiser's component and diffusers class
    autoencoder: ClassVar[str] = "AutoencoderKL"  # the diffusers class of the component `vae`
    # Prefix of the text encoder's weights in single files in their original layout, and the model that has their
    # configuration.
    single_files: ClassVar[Mapping[str, str]] = {}
    default_vocabulary: ClassVar[str] = "clip"
    fixed_rows: ClassVar[int] = 1  # first rows of an encoded prompt, which are the same for all prompts
    supports_clip_skip: ClassVar[bool] = False  # whether diffusers' pipelines of the family take it
    zeroes_empty: ClassVar[bool] = False  # whether `force_zeros_for_empty_prompt` is true if the config lacks it

    metadata = Metadata()  # of the model's folder, if it has one
    offloaded = False  # see `save_memory`
    offline = False  # whether to avoid the hub, also for the other models that a search loads
    text_encoders: Sequence[TextEncoder]

    def __init__(
        self,
        name: str,
        text_encoders: Sequence[TextEncoder],
        denoiser: nn.Module,
        vae: nn.Module,
        scheduler: Any,
        vocabulary: str | None = None,
        image_size: int | None = None,
        zero_empty: bool = False,
        clip_skip: int | None = None,
    ) -> None:
        super().__init__(name, denoiser, vae, scheduler, image_size)
        self.zero_empty, self.clip_skip = zero_empty, clip_skip
        self.text_encoders = cast("Sequence[TextEncoder]", nn.ModuleList(text_encoders))
        kind = vocabulary or self.default_vocabulary
        if not (searched := [encoder for encoder in text_encoders if encoder.kind == kind]):
            raise UserError(
                f"The model {name!r} has no {kind} text encoder to search the tokens of; leave out "
                "--model.backbone.vocabulary."
            )
        if any(encoder.tokenizer.get_vocab() != searched[0].tokenizer.get_vocab() for encoder in searched[1:]):
            raise UserError(
                f"The {kind} text encoders of the model {name!r} have different tokenizers, so they come from "
                "different models; download or save the whole model again."
            )
        self.vocabulary = Vocabulary(searched)
        if clip_skip is not None:
            self._check_clip_skip(clip_skip)
        for what, (given, expected) in self.widths().items():
            if given != expected:
                raise UserError(
                    f"The {what} of the model {name!r} are {given} wide, but its denoiser takes {expected}, so they "
                    "come from different models; download or save the whole model again."
                )
        self._empty: dict[tuple[torch.dtype | None, bool], Tensor] = {}
        self.requires_grad_(False).eval()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _FAMILIES.update(dict.fromkeys(vars(cls).get("pipelines", ()), cls))

    @classmethod
    def components(cls) -> dict[str, tuple[str, str]]:
        """Return the networks of the family: for each component, its class and the stem of its files."""
        component, network = cls.denoiser_spec
        texts = {spec.component: (spec.network, "model") for spec in cls.text_encoder_specs}
        stem = "diffusion_pytorch_model"
        return {**texts, component: (network, stem), "vae": (cls.autoencoder, stem)}

    @classmethod
    def correct_scheduler(cls, pipeline: str, scheduler: Any) -> None:
        """Correct the scheduler config of old files as the constructor of the diffusers pipeline `pipeline` does."""

    @classmethod
    def correct_denoiser(cls, pipeline: str, denoiser: Any) -> None:
        """Correct the denoiser config of old files as the constructor of the diffusers pipeline `pipeline` does."""

    @classmethod
    def from_pipeline(
        cls,
        pipeline: DiffusionPipeline,
        *,
        vocabulary: str | None = None,
        scheduler: str | None = None,
        image_size: int | None = None,
        clip_skip: int | None = None,
    ) -> Backbone:
        """Take the networks of a diffusers pipeline, which stays unchanged, see `from_pipeline`.

        Args:
            pipeline: A pipeline of a supported class. On a subclass of `Backbone`, any pipeline of that family.
            vocabulary: Kind of the text encoders whose tokens are searched, such as `t5`; None for the family's
                default.
            scheduler: Class name of another diffusers scheduler; None for the pipeline's own.
            image_size: Height and width of generated images, in pixels; None for the size that the model was trained
                on.
            clip_skip: Number of last layers of the CLIP text encoders to skip for prompts; None for all layers.

        Raises:
            UserError: The pipeline's class is unknown, or it is quantized or offloaded.
        """
        from lightning_prompts.backbones.from_pipeline import from_pipeline  # which needs all families

        return from_pipeline(cls, pipeline, vocabulary, scheduler, image_size, clip_skip)

    def _check_clip_skip(self, clip_skip: int) -> None:
        """Refuse to skip fewer than one layer, or more than there are."""
        most = min(encoder.most_skipped for encoder in self.text_encoders if encoder.kind == "clip")
        if not 1 <= clip_skip <= most:
            raise UserError(
                f"--model.backbone.clip_skip must be between 1 and {most}, the most layers that the model "
                f"{self.name!r} can skip, got {clip_skip}; leave it out to skip none."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Apply a function, such as a move to a device, except to offloaded networks, which move when called."""
        self._empty = {}
        return cast("Self", super()._apply(fn, recurse and not self.offloaded))  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, even if the parent module enters training mode."""
        return super().train(False)

    @abstractmethod
    def widths(self) -> dict[str, tuple[int, int]]:
        """Return the widths of the denoiser's inputs by name, each with the width that the denoiser takes."""

    @abstractmethod
    def combine(self, outputs: Sequence[TextEncoderOutput]) -> Tensor:
        """Build encoded prompts (P, R, D) from the output of each text encoder for P prompts."""

    @property
    def pooled_width(self) -> int:
        """The width of the pooled vector; 0 in families without one."""
        return 0

    @property
    def other_text_encoders(self) -> list[TextEncoder]:
        """The text encoders whose tokens are not searched."""
        return [encoder for encoder in self.text_encoders if encoder not in self.vocabulary.text_encoders]

    def encode(
        self,
        ids: Tensor,
        embeddings: Tensor | None = None,
        texts: Sequence[str] | None = None,
        negative: bool = False,
    ) -> Tensor:
        """Encode prompts given as ids of the searched vocabulary; the other text encoders read text.

        Args:
            ids: Token ids with start, end and padding, (P, L).
            embeddings: Replace the tokens' embeddings, (P, L, D); gradients flow to them.
            texts: The P texts that the other text encoders read; None for the decoded ids.
            negative: Encode them as negative prompts, see `encode_text`.

        Returns:
            Encoded prompts, (P, R, D').
        """
        skip = self._skipped(negative)
        outputs = self.vocabulary.encode(ids, embeddings, skip)
        if others := self.other_text_encoders:
            texts = self.vocabulary.texts(ids) if texts is None else texts
            outputs |= {other: other.encode_text(texts, self.device, truncate=True, skip=skip) for other in others}
        encoded = self.combine([outputs[encoder] for encoder in self.text_encoders])
        return self._zeroed(encoded, self.vocabulary.empty(ids)) if negative else encoded

    def encode_text(self, texts: Sequence[str], negative: bool = False) -> Tensor:
        """Encode texts as the family's pipeline does.

        Texts that are too long for the text encoders whose tokens are searched are refused; for the other text encoders
        they are truncated. The single empty text, the usual negative prompt, is encoded once and cached.

        Args:
            texts: P texts.
            negative: Encode them as negative prompts: no layer of the text encoders is skipped, and the empty text is
                zeros if `zero_empty` is set.

        Returns:
            Encoded prompts, (P, R, D).
        """
        if list(texts) != [""]:
            return self._encode_text(texts, negative)
        kind = self.device.type
        key = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None, negative
        if key not in self._empty:
            with torch.inference_mode(False), torch.no_grad():  # so that a search can use it after a test has cached it
                self._empty[key] = self._encode_text(texts, negative)
        return self._empty[key]

    def _encode_text(self, texts: Sequence[str], negative: bool) -> Tensor:
        skip, searched = self._skipped(negative), self.vocabulary.text_encoders
        encoded = self.combine([
            encoder.encode_text(texts, self.device, truncate=encoder not in searched, skip=skip)
            for encoder in self.text_encoders
        ])  # fmt: skip
        return self._zeroed(encoded, torch.tensor([not text.strip() for text in texts])) if negative else encoded

    def _skipped(self, negative: bool) -> int:
        """Return how many layers of the CLIP text encoders to skip; diffusers skips none for negative prompts."""
        return 0 if negative else self.clip_skip or 0

    def _zeroed(self, encoded: Tensor, empty: Tensor) -> Tensor:
        """Return encoded negative prompts (P, R, D), with zeros for empty texts (P,) if `zero_empty` is set."""
        return encoded.masked_fill(empty.to(encoded.device).view(-1, 1, 1), 0) if self.zero_empty else encoded

    def split(self, prompt_embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split encoded prompts (..., R, D) into the hidden states (..., L, D) and the pooled vectors (..., D')."""
        if not self.pooled_width:
            return prompt_embeds, None
        below = -(-self.pooled_width // prompt_embeds.shape[-1])
        return prompt_embeds[..., :-below, :], prompt_embeds[..., -below:, :].flatten(-2)[..., : self.pooled_width]

    def join(self, hidden: Tensor, pooled: Tensor) -> Tensor:
        """Join hidden states (..., L, D) and pooled vectors (..., D') into encoded prompts (..., R, D)."""
        width = hidden.shape[-1]
        filled = F.pad(pooled, (0, -pooled.shape[-1] % width))
        return torch.cat([hidden, filled.unflatten(-1, (-1, width)).to(hidden.dtype)], dim=-2)

    def searchable_rows(self, prompt_embeds: Tensor, pooled: bool) -> Tensor:
        """Return which rows (R,) of encoded prompts (..., R, D) a search may change, pooled rows only if `pooled`."""
        searchable = torch.arange(prompt_embeds.shape[-2], device=prompt_embeds.device) >= self.fixed_rows
        if not pooled:
            searchable[self.split(prompt_embeds)[0].shape[-2] :] = False
        return searchable

    def summary_embedding(self, prompt_embeds: Tensor) -> Tensor:
        """Return the row (..., D) that summarizes encoded prompts (..., R, D), by default the last one."""
        return prompt_embeds[..., -1, :]


_FAMILIES: dict[str, type[Backbone]] = {}
"""The family of each diffusers pipeline, as far as the family is imported."""
