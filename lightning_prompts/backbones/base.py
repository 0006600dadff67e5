"""What all frozen text-to-image models share: text encoders, noise schedule, autoencoder and sampling loop."""

from __future__ import annotations

import copy
import inspect
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_prompts.backbones.towers import Kind, Said, TextTower, Vocabulary, at_least_float32
from lightning_prompts.errors import UserError
from lightning_prompts.typed_module import TypedModule

if TYPE_CHECKING:
    from typing_extensions import Self


class Reads(NamedTuple):
    """A text encoder of a family: its component and class, and how the family reads it, see `TextTower`."""

    part: str
    network: Literal["CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"]
    layer: int = -1
    length: int | None = None
    masked: bool = False
    obeys_mask: bool = False
    optional: bool = False
    lower: bool = False  # the pipeline lowercases prompts

    @property
    def tokenizer(self) -> str:
        """Return the component of its tokenizer."""
        return self.part.replace("text_encoder", "tokenizer")


class Backbone(TypedModule, ABC):
    """A frozen text-to-image model: no parameter requires a gradient, and it never leaves evaluation mode.

    An encoded prompt is a tensor of rows (R, D): one row per token, which the denoiser attends to, followed by the pooled vector,
    padded with zeros, in families that have one. An operation on all rows thus covers all that the denoiser gets from a prompt.

    A family defines how these rows are built from the outputs of its text encoders (`combine`) and how the denoiser is called
    (`denoise`). Outside of the networks, latents, noise and images are float32, whatever the precision of the networks.

    Args:
        name: The name that the user gave.
        towers: The text encoders in the order of `reads`, without optional ones that are absent.
        denoiser: The diffusers model that predicts noise or velocity.
        vae: The diffusers autoencoder.
        scheduler: The diffusers scheduler: noise schedule, prediction type and sampler.
        vocabulary: Search the tokens of the `clip` or of the `t5` text encoders; None for the family's default.
        image_size: Height and width of drawn images, in pixels; None for the size that the model was trained on.
        zero_empty: Encode empty negative prompts as zeros.
        clip_skip: Number of last layers of the CLIP text encoders to skip for prompts, as in diffusers' pipelines; negative prompts
            use all layers. None for all layers.
    """

    pipelines: ClassVar[tuple[str, ...]]  # diffusers pipelines of the family
    reads: ClassVar[tuple[Reads, ...]]
    denoises: ClassVar[tuple[str, str]]  # the denoiser's component and class
    searched: ClassVar[Kind] = "clip"
    predicts: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")
    pipeline_steps: ClassVar[int]  # default sampling steps in diffusers
    pipeline_guidance: ClassVar[float]  # default guidance scale in diffusers
    fixed: ClassVar[int] = 1  # first rows of an encoded prompt, which are the same for all prompts
    cross_attends: ClassVar[bool] = False  # whether `attention_maps` is implemented
    patch: ClassVar[int] = 1  # side of the denoiser's patches, in latents
    takes_clip_skip: ClassVar[bool] = False  # whether diffusers' pipelines of the family take it
    # Config keys of the autoencoder for the mean and the deviation of latents; the family's pipeline uses them if all are set.
    vae_statistics: ClassVar[tuple[str, ...]] = ()

    offloaded = False  # see `save_memory`
    offline = False  # whether the hub must not be connected to, also for models that a search loads beside this one
    towers: Sequence[TextTower]
    alphas_cumprod: Tensor
    sigmas: Tensor

    def __init__(
        self,
        name: str,
        towers: Sequence[TextTower],
        denoiser: nn.Module,
        vae: nn.Module,
        scheduler: Any,
        vocabulary: Kind | None = None,
        image_size: int | None = None,
        zero_empty: bool = False,
        clip_skip: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.scheduler, self.zero_empty = name, scheduler, zero_empty
        self.clip_skip = clip_skip
        self.towers = cast("Sequence[TextTower]", nn.ModuleList(towers))
        self.denoiser: Any = denoiser
        self.vae: Any = vae
        kind = vocabulary or self.searched
        if not (same := [tower for tower in towers if tower.kind == kind]):
            raise UserError(
                f"The model {name!r} has no {kind} text encoder to search the tokens of; leave out --model.backbone.vocabulary."
            )
        if any(tower.tokenizer.get_vocab() != same[0].tokenizer.get_vocab() for tower in same[1:]):
            raise UserError(
                f"The {kind} text encoders of the model {name!r} have different tokenizers, so they come from different "
                "models; download or save the whole model again."
            )
        self.vocabulary = Vocabulary(same)
        if clip_skip is not None:
            self._check_clip_skip(clip_skip)
        self.prediction_type: str = scheduler.config.get("prediction_type", "flow_prediction")
        if self.prediction_type not in self.predicts:
            raise UserError(
                f"The model {name!r} has a scheduler for {self.prediction_type!r}, and its family predicts "
                f"{' or '.join(map(repr, self.predicts))}; choose another model."
            )
        for what, (given, taken) in self.widths().items():
            if given != taken:
                raise UserError(
                    f"The {what} of the model {name!r} are {given} wide, but its denoiser takes {taken}, so they come from "
                    "different models; download or save the whole model again."
                )
        alphas = getattr(scheduler, "alphas_cumprod", torch.empty(0))  # flows and EDM have none
        self.register_buffer("alphas_cumprod", alphas.float().clone(), persistent=False)
        sigmas = torch.empty(0)
        if self.sigma_data is not None:
            # In diffusers the largest sigma comes first, and EDMEulerScheduler has one sigma more than there are timesteps.
            sigmas = scheduler.sigmas[: self.num_train_timesteps].flip(0).float()
        self.register_buffer("sigmas", sigmas.clone(), persistent=False)
        self.image_size = image_size or self.trained_size
        if self.image_size % (self.factor * self.patch):
            raise UserError(
                f"--model.backbone.image_size must be a multiple of {self.factor * self.patch} for the model {name!r}, got "
                f"{self.image_size}; change it."
            )
        self.default_steps, self.default_guidance = self._defaults()
        self._empty: dict[tuple[torch.dtype | None, bool], Tensor] = {}
        self.requires_grad_(False).eval()

    def _check_clip_skip(self, clip_skip: int) -> None:
        """Refuse to skip fewer than one layer, or more than there are."""
        most = min(tower.most_skipped for tower in self.towers if tower.kind == "clip")
        if not 1 <= clip_skip <= most:
            raise UserError(
                f"--model.backbone.clip_skip must be between 1 and {most}, the most layers that the model {self.name!r} can skip, got "
                f"{clip_skip}; leave it out to skip none."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Apply a function, such as a move to a device, except to offloaded networks, which move when they are called."""
        self._empty = {}
        return cast("Self", super()._apply(fn, recurse and not self.offloaded))  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, even if the parent module enters training mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Return the device of the computation."""
        return self.alphas_cumprod.device

    @abstractmethod
    def widths(self) -> dict[str, tuple[int, int]]:
        """Return the widths that have to match the denoiser: for each input, the actual width and the one that it takes."""

    # --- text

    @abstractmethod
    def combine(self, said: Sequence[Said]) -> Tensor:
        """Build encoded prompts (P, R, D) from the output of each text encoder for P prompts."""

    @property
    def others(self) -> list[TextTower]:
        """Return the text encoders whose tokens are not searched."""
        return [tower for tower in self.towers if tower not in self.vocabulary.towers]

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
        said = self.vocabulary.say(ids, embeddings, skip)
        if others := self.others:
            texts = self.vocabulary.texts(ids) if texts is None else texts
            said |= {tower: tower.read(texts, self.device, cut=True, skip=skip) for tower in others}
        encoded = self.combine([said[tower] for tower in self.towers])
        return self._zeroed(encoded, self.vocabulary.empty(ids)) if negative else encoded

    def encode_text(self, texts: Sequence[str], negative: bool = False) -> Tensor:
        """Encode texts as the family's pipeline does.

        Texts that are too long for the text encoders whose tokens are searched are refused; for the other text encoders they are
        truncated. The single empty text, the usual negative prompt, is encoded once and cached.

        Args:
            texts: P texts.
            negative: Encode them as negative prompts: no layer of the text encoders is skipped, and the empty text is zeros if
                `zero_empty` is set.

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
        skip, searched = self._skipped(negative), self.vocabulary.towers
        parts = [tower.read(texts, self.device, cut=tower not in searched, skip=skip) for tower in self.towers]
        encoded = self.combine(parts)
        return self._zeroed(encoded, torch.tensor([not text.strip() for text in texts])) if negative else encoded

    def _skipped(self, negative: bool) -> int:
        """Return how many layers of the CLIP text encoders to skip; diffusers skips none for negative prompts."""
        return 0 if negative else self.clip_skip or 0

    def _zeroed(self, encoded: Tensor, empty: Tensor) -> Tensor:
        """Return encoded negative prompts (P, R, D), with zeros for empty texts (P,) if `zero_empty` is set."""
        return encoded.masked_fill(empty.to(encoded.device).view(-1, 1, 1), 0) if self.zero_empty else encoded

    def split(self, prompts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split encoded prompts (..., R, D) into the hidden states (..., L, D) and the pooled vectors (..., D')."""
        if not self.pooled_width:
            return prompts, None
        below = -(-self.pooled_width // prompts.shape[-1])
        return prompts[..., :-below, :], prompts[..., -below:, :].flatten(-2)[..., : self.pooled_width]

    def join(self, hidden: Tensor, pooled: Tensor) -> Tensor:
        """Join hidden states (..., L, D) and pooled vectors (..., D') into encoded prompts (..., R, D)."""
        width = hidden.shape[-1]
        filled = F.pad(pooled, (0, -pooled.shape[-1] % width))
        return torch.cat([hidden, filled.unflatten(-1, (-1, width)).to(hidden.dtype)], dim=-2)

    def moving(self, prompts: Tensor, pooled: bool) -> Tensor:
        """Return the rows (R,) of encoded prompts (..., R, D) that a search may change: no start token, pooled rows if `pooled`."""
        moving = torch.arange(prompts.shape[-2], device=prompts.device) >= self.fixed
        if not pooled:
            moving[self.split(prompts)[0].shape[-2] :] = False
        return moving

    def gist(self, prompts: Tensor) -> Tensor:
        """Return the row (..., D) that summarizes encoded prompts (..., R, D): the last of the pooled vector or of the tokens."""
        return prompts[..., -1, :]

    # --- denoiser

    @abstractmethod
    def denoise(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Call the denoiser.

        Args:
            noisy: Noisy latents, (B, C, h, w).
            timesteps: (B,), see `condition`.
            prompts: Encoded prompts, (B, R, D).
            guidance_scale: Input of models that embed the guidance scale; others ignore it.

        Returns:
            Its prediction, (B, C, h, w) float32.
        """

    def attention_maps(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        """Measure how much each location of an image attends to each token of its prompt in `denoise`; no gradient.

        Args:
            noisy: Noisy latents, (B, C, h, w).
            timesteps: (B,).
            prompts: Encoded prompts, (B, R, D).

        Returns:
            Cross-attention probabilities (B, L, h, w) float32, averaged over heads and layers; at each location they sum to one
            over the L tokens.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no cross-attention: image and text tokens share one attention."
        )

    def guided(self, guidance_scale: float) -> bool:
        """Return whether classifier-free guidance is used, which doubles the denoiser samples."""
        return guidance_scale > 1 and not self.guides_itself

    @property
    def guides_itself(self) -> bool:
        """Return whether the denoiser needs no classifier-free guidance; negative prompts then have no effect."""
        return False

    @property
    def pooled_width(self) -> int:
        """Return the width of the pooled vector; 0 in families without one."""
        return 0

    @property
    def num_train_timesteps(self) -> int:
        """Return the number of noise levels; timesteps are 0, ..., num_train_timesteps - 1."""
        count: int = self.scheduler.config.num_train_timesteps
        return count

    @property
    def factor(self) -> int:
        """Return the side of a latent in pixels."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def trained_size(self) -> int:
        """Return the height and width, in pixels, of the images that the denoiser was trained on."""
        return square_size(self.denoiser.config.sample_size, self.name) * self.factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of an image's latents."""
        side = self.image_size // self.factor
        return self.vae.config.latent_channels, side, side

    @property
    def sigma_data(self) -> float | None:
        """Return the data's standard deviation in EDM's preconditioning (arXiv 2206.00364, table 1); None for other schedules."""
        value: float | None = self.scheduler.config.get("sigma_data")
        return value

    def condition(self, timesteps: Tensor) -> Tensor:
        """Return the denoiser's input for the noise level, (B,): the timesteps or, with EDM, `c_noise` = ln(sigma) / 4.

        Args:
            timesteps: (B,). Integers 0, ..., num_train_timesteps - 1 are training timesteps; larger is noisier. With EDM they index
                the scheduler's sigmas in ascending order, and floating-point timesteps come from its sampler and are already
                `c_noise`.
        """
        if self.sigma_data is None or timesteps.is_floating_point():
            return timesteps
        return self.sigmas[timesteps.long()].log() / 4

    def _signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the latents and of the noise in noisy latents, (B, 1, 1, 1) each."""
        if self.prediction_type == "flow_prediction":
            sigma = (timesteps.to(self.alphas_cumprod) / self.num_train_timesteps).view(-1, 1, 1, 1)
            return 1 - sigma, sigma
        if self.sigma_data is not None:
            sigma = (4 * self.condition(timesteps).to(self.sigmas)).exp().view(-1, 1, 1, 1)
            c_in = (sigma**2 + self.sigma_data**2).rsqrt()
            return c_in, sigma * c_in
        before = timesteps.long()
        alphas = self.alphas_cumprod[before]
        if timesteps.is_floating_point():
            # Some samplers step between two training timesteps, where they interpolate sigma.
            after = self.alphas_cumprod[(before + 1).clamp(max=self.num_train_timesteps - 1)]
            low, high, share = (1 / alphas - 1).sqrt(), (1 / after - 1).sqrt(), (timesteps - before).to(alphas)
            alphas = torch.where(share > 0, 1 / (1 + low.lerp(high, share).square()), alphas)
        alphas = alphas.view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents (B, C, h, w) as the denoiser gets them; with EDM they are scaled by `c_in`.

        Args:
            latents: (B, C, h, w).
            noise: Standard normal, (B, C, h, w).
            timesteps: (B,), see `condition`.
        """
        a, s = self._signal_and_noise(timesteps)
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of the denoiser's output, (B, C, h, w).

        With EDM this is the target of the network F itself, `(x0 - c_skip * x) / c_out`. Its variance is 1 at every noise level, so
        all timesteps have equal weight in the squared error.

        Args:
            latents: (B, C, h, w).
            noise: Standard normal, (B, C, h, w).
            timesteps: (B,), see `condition`.
        """
        if self.prediction_type == "flow_prediction":
            return noise - latents
        a, s = self._signal_and_noise(timesteps)
        if self.sigma_data is not None:
            # With x0 / sigma_data in place of x0, EDM has the factors of a variance-preserving schedule, and F predicts its
            # velocity; "epsilon" means the opposite sign of c_out.
            velocity = self.sigma_data * a * noise - s / self.sigma_data * latents
            return -velocity if self.prediction_type == "epsilon" else velocity
        return noise if self.prediction_type == "epsilon" else a * noise - s * latents

    def predict_x0(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latents (B, C, h, w) that the denoiser's output implies.

        Args:
            noisy: Noisy latents that the denoiser got, (B, C, h, w).
            output: Its output, (B, C, h, w).
            timesteps: (B,), see `condition`.
        """
        a, s = self._signal_and_noise(timesteps)
        if self.prediction_type == "flow_prediction":
            return noisy - s * output
        if self.sigma_data is not None:
            velocity = -output if self.prediction_type == "epsilon" else output
            return self.sigma_data * (self.sigma_data * a * noisy - s * velocity)
        return (noisy - s * output) / a if self.prediction_type == "epsilon" else a * noisy - s * output

    # --- pictures

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as latents (B, C, h, w), the mean of the posterior."""
        latents = at_least_float32(self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean)
        mean, std = self._latent_statistics(latents)
        return cast("Tensor", (latents - mean) * (self.vae.config.scaling_factor / std))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1].

        Values outside of this range are clamped, as in a saved image, so clamped pixels have no gradient.
        """
        mean, std = self._latent_statistics(latents)
        images: Tensor = self.vae.decode(
            (latents * std / self.vae.config.scaling_factor + mean).to(self.vae.dtype)
        ).sample
        return at_least_float32(images).clamp(-1, 1)

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of latents by channel, as far as the family's pipeline uses them."""
        stated = [self.vae.config.get(key) for key in self.vae_statistics]
        mean, std = (*stated, 1.0)[:2] if stated and None not in stated else (0.0, 1.0)
        return torch.as_tensor(mean).to(like).view(-1, 1, 1), torch.as_tensor(std).to(like).view(-1, 1, 1)

    def sample(
        self,
        prompts: Tensor,
        negative: Tensor,
        noise: Tensor,
        steps: int = 25,
        guidance_scale: float = 7.5,
        grad_steps: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Draw P images with the model's sampler; other rows of the batch affect an image only through rounding.

        With `stop`, this is the shortcut of DPO-Diff (arXiv 2407.01606, section 3.3): the clean latents are predicted from the
        output of the last call. With `grad_steps` 1, only that call propagates a gradient, so that memory and the backward pass do
        not depend on the number of steps.

        Args:
            prompts: P encoded prompts, (P, R, D).
            negative: 1 or P encoded negative prompts; not used without guidance.
            noise: Standard normal, (P, C, h, w). It also seeds the noise that some samplers add later.
            steps: Sampling steps.
            guidance_scale: Classifier-free guidance scale; up to 1 there is no guidance, as in diffusers.
            grad_steps: How many of the last denoiser calls propagate a gradient; `steps` or more for all. Their activations are
                recomputed in the backward pass.
            stop: Predict the clean latents after this many denoiser calls; None to sample to the end.

        Returns:
            Latents, (P, C, h, w).
        """
        scheduler = self._sampler(steps)  # on the CPU, so that the host never waits for a timestep
        # Diffusers' pipelines set eta, the noise that DDIM and TCD add, to 0 whatever the default of the class.
        taken = inspect.signature(scheduler.step).parameters
        extra: dict[str, Any] = {"eta": 0.0} if "eta" in taken else {}
        if "generator" in taken:
            extra["generator"] = generators_of(noise)
        scale = getattr(scheduler, "scale_model_input", lambda latents, t: latents)  # flow schedulers have none
        calls = len(scheduler.timesteps) if stop is None else stop
        first = 0 if grad_steps >= steps else calls - grad_steps
        tracking, guided = torch.is_grad_enabled(), self.guided(guidance_scale)
        if guided:
            prompts = torch.cat([repeat(negative, len(noise)) if len(negative) == 1 else negative, prompts])
        latents: Tensor = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for i, t in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(tracking and i >= first):
                scaled = scale(latents, t)
                output = self._denoise_lean(
                    torch.cat([scaled, scaled]) if guided else scaled, t, prompts, guidance_scale
                )
                if guided:
                    unconditional, conditional = output.chunk(2)
                    output = unconditional + guidance_scale * (conditional - unconditional)
                if i + 1 == stop:
                    # Some samplers scale their latents; the denoiser's input is never scaled.
                    timesteps = t.expand(len(scaled)).to(noise.device, non_blocking=True)
                    return self.predict_x0(scaled, output, timesteps)
                latents = scheduler.step(output, t, latents, **extra).prev_sample
        return latents

    def calls(self, steps: int) -> int:
        """Return the denoiser calls that `sample` makes per image; some schedulers make several per step."""
        return len(self._sampler(steps).timesteps)

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return what the family's pipeline passes to `set_timesteps` besides the number of steps."""
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        tokens = (self.latent_shape[1] // self.patch) ** 2
        short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return {"mu": low + (high - low) * (tokens - short) / (long - short)}

    def _defaults(self) -> tuple[int, float]:
        """Return the default sampling steps and guidance: the family's, or those of few-step models, known by their scheduler."""
        config = self.scheduler.config
        if type(self.scheduler).__name__ == "LCMScheduler":
            return 4, 8.5 if self.guides_itself else 1.0
        # Turbo models; models that predict velocity also use this spacing, to start from pure noise.
        trailing = config.get("timestep_spacing") == "trailing" and self.prediction_type == "epsilon"
        if trailing and "Euler" in type(self.scheduler).__name__:
            return 1, 1.0
        return self.pipeline_steps, self.pipeline_guidance

    def replace_scheduler(self, scheduler: Any) -> None:
        """Draw with another scheduler that has the same noise levels.

        The model keeps its default steps and guidance, unless the scheduler is LCMScheduler.
        """
        self.scheduler = scheduler
        if type(scheduler).__name__ == "LCMScheduler":
            self.default_steps, self.default_guidance = self._defaults()

    def _sampler(self, steps: int) -> Any:
        """Return a new scheduler with `steps` timesteps; schedulers keep state between steps."""
        if steps > self.num_train_timesteps:
            raise UserError(
                f"Images cannot be drawn in {steps} steps, as the model has {self.num_train_timesteps} noise levels; give fewer."
            )
        scheduler = copy.deepcopy(self.scheduler)
        try:
            known = inspect.signature(scheduler.set_timesteps).parameters
            told = {name: value for name, value in self.schedule(steps).items() if name in known}
            scheduler.set_timesteps(steps, device="cpu", **told)
        except ValueError as error:
            raise UserError(
                f"The {type(scheduler).__name__} of the model {self.name!r} cannot draw in {steps} steps ({error}); give "
                "another number."
            ) from error
        return scheduler

    def _denoise_lean(self, noisy: Tensor, t: Tensor, prompts: Tensor, guidance_scale: float) -> Tensor:
        """Call `denoise` without keeping activations; unlike a scheduler's step, it has no state and may run twice."""
        timesteps = t.expand(len(noisy)).to(noisy.device, non_blocking=True)
        arguments = noisy, timesteps, prompts, guidance_scale
        if not torch.is_grad_enabled():
            return self.denoise(*arguments)
        return checkpoint(self.denoise, *arguments, use_reentrant=False, preserve_rng_state=False)


def square_size(sample_size: int | Sequence[int] | None, name: str) -> int:
    """Return the latents per side that a denoiser's config states, as a number or as height and width.

    Args:
        sample_size: The value in the config.
        name: The model's name, for messages.

    Raises:
        UserError: The config states no size, or height and width differ.
    """
    if sample_size is None:
        raise UserError(
            f"The denoiser of the model {name!r} does not state the size of its pictures; give --model.backbone.image_size in pixels."
        )
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if height != width:
        raise UserError(
            f"The model {name!r} was trained on {height} x {width} latents, and only square pictures are drawn; give "
            "--model.backbone.image_size in pixels."
        )
    return height


def repeat(x: Tensor, times: int) -> Tensor:
    """Repeat each row for its samples: a, b becomes a, a, b, b."""
    # The gradient of `expand` is a sum, which is deterministic on every device.
    return x.unsqueeze(1).expand(-1, times, *x.shape[1:]).flatten(0, 1)


def generators_of(noise: Tensor) -> list[torch.Generator]:
    """Return one generator per row, seeded by the row, for samplers that add noise at each step."""
    rows = noise.detach().float().cpu().numpy()
    return [torch.Generator().manual_seed(zlib.crc32(row.tobytes())) for row in rows]
