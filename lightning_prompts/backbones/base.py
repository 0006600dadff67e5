"""What every frozen text-to-image model has: text towers, noise schedule, image coding and the sampling loop."""

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

if TYPE_CHECKING:
    from typing_extensions import Self


class Reads(NamedTuple):
    """A text tower of a family: the component's name, its class, and how the family reads it, see `TextTower`."""

    part: str
    network: Literal["CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"]
    layer: int = -1
    length: int | None = None
    masked: bool = False
    obeys_mask: bool = False
    optional: bool = False
    lower: bool = False  # the pipeline lower-cases what it is told

    @property
    def tokenizer(self) -> str:
        """The component of its tokenizer."""
        return self.part.replace("text_encoder", "tokenizer")


class Backbone(nn.Module, ABC):
    """A frozen text-to-image model: no parameter requires a gradient and it never leaves evaluation mode.

    An encoded prompt is rows (R, D): one a token, which the denoiser attends to, and below them, in families that have one, the
    pooled vector, filled up with zeros. So whatever is done row by row is done with all that the denoiser is told.

    A family says how these rows come from what its towers say (`combine`) and how the denoiser is called (`denoise`). Latents,
    noise and images outside of the networks are float32, whatever the networks' precision.

    Args:
        name: How the person named it.
        towers: The text encoders, in the order of `reads`, less those that are optional and absent.
        denoiser: The diffusers model that predicts noise or velocity.
        vae: The diffusers autoencoder.
        scheduler: The diffusers scheduler: noise schedule, prediction type and sampler.
        vocabulary: Whose tokens are searched, the `clip` or the `t5` encoders'; None for the family's choice.
        image_size: Height and width, in pixels, of what is drawn; None for what the model was trained on.
        zero_empty: The encoding of an empty text to lead away from is zeros.
        clip_skip: How many of the CLIP text encoders' last layers are skipped when a prompt is encoded, as diffusers' pipelines
            do; a negative prompt is encoded with all layers, as theirs is. None for all layers.
    """

    pipelines: ClassVar[tuple[str, ...]]  # of diffusers, that the family reads
    reads: ClassVar[tuple[Reads, ...]]
    denoises: ClassVar[tuple[str, str]]  # the denoiser's component and class
    searched: ClassVar[Kind] = "clip"
    predicts: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")
    pipeline_steps: ClassVar[int]  # sampling steps that diffusers takes unless told otherwise
    pipeline_guidance: ClassVar[float]  # and its guidance
    fixed: ClassVar[int] = 1  # rows at the beginning of an encoded prompt that are the same for all
    cross_attends: ClassVar[bool] = False  # whether it has `attention_maps`
    patch: ClassVar[int] = 1  # latents that the denoiser takes together, a side
    takes_clip_skip: ClassVar[bool] = False  # whether diffusers' pipelines of the family do
    # The autoencoder's config keys for mean and deviation of its latents that the family's pipeline obeys, if all of them are set.
    vae_statistics: ClassVar[tuple[str, ...]] = ()

    offloaded = False  # see `save_memory`
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
                f"The model {name!r} has no {kind} text encoder whose tokens could be searched; leave out --model.vocabulary."
            )
        if any(tower.tokenizer.get_vocab() != same[0].tokenizer.get_vocab() for tower in same[1:]):
            raise UserError(
                f"The {kind} text encoders of the model {name!r} have different tokenizers; they are of different models, so fetch or "
                "write the whole model again."
            )
        self.vocabulary = Vocabulary(same)
        if clip_skip is not None:
            self._check_clip_skip(clip_skip)
        self.prediction_type: str = scheduler.config.get("prediction_type", "flow_prediction")
        if self.prediction_type not in self.predicts:
            raise UserError(
                f"The model {name!r} has a scheduler for {self.prediction_type!r}, and its family predicts "
                f"{' or '.join(map(repr, self.predicts))}; choose another."
            )
        for what, (given, taken) in self.widths().items():
            if given != taken:
                raise UserError(
                    f"The {what} of the model {name!r} are {given} wide and its denoiser takes {taken}; they are of different models, so "
                    "fetch or write the whole model again."
                )
        alphas = getattr(scheduler, "alphas_cumprod", torch.empty(0))  # flows and EDM have none
        self.register_buffer("alphas_cumprod", alphas.float().clone(), persistent=False)
        sigmas = torch.empty(0)
        if self.sigma_data is not None:
            # diffusers' table begins with the largest, and EDMEulerScheduler's has one row more than there are timesteps.
            sigmas = scheduler.sigmas[: self.num_train_timesteps].flip(0).float()
        self.register_buffer("sigmas", sigmas.clone(), persistent=False)
        self.image_size = image_size or self.trained_size
        if self.image_size % (self.factor * self.patch):
            raise UserError(
                f"Pictures of {self.image_size} pixels were asked for, and the model {name!r} draws multiples of "
                f"{self.factor * self.patch}; change --model.image_size."
            )
        self.default_steps, self.default_guidance = self._defaults()
        self._empty: dict[tuple[torch.dtype | None, bool], Tensor] = {}
        self.requires_grad_(False).eval()

    def _check_clip_skip(self, clip_skip: int) -> None:
        """Refuse to skip no layers, and more than there are."""
        most = min(tower.most_skipped for tower in self.towers if tower.kind == "clip")
        if not 1 <= clip_skip <= most:
            raise UserError(
                f"--model.clip_skip must be between 1 and {most}, the layers of the text encoders of the model {self.name!r} that can be "
                f"skipped, got {clip_skip}; leave it out to skip none."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves what it holds to a device, but for networks that come there only when they are called."""
        self._empty = {}
        return cast("Self", super()._apply(fn, recurse and not self.offloaded))  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, also when the module that holds it is put into training mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.alphas_cumprod.device

    @abstractmethod
    def widths(self) -> dict[str, tuple[int, int]]:
        """What has to fit the denoiser: the width that there is and the one that it takes."""

    # --- text

    @abstractmethod
    def combine(self, said: Sequence[Said]) -> Tensor:
        """Encoded prompts (P, R, D) of what each tower says of P prompts."""

    @property
    def others(self) -> list[TextTower]:
        """The text encoders whose tokens are not searched."""
        return [tower for tower in self.towers if tower not in self.vocabulary.towers]

    def encode(
        self,
        ids: Tensor,
        embeddings: Tensor | None = None,
        texts: Sequence[str] | None = None,
        negative: bool = False,
    ) -> Tensor:
        """Encodes prompts of the vocabulary that is searched; the other text encoders read text.

        Args:
            ids: Token ids with start, end and padding, (P, L).
            embeddings: What stands in place of the tokens' embeddings, (P, L, D); gradients flow to it.
            texts: What the other text encoders read, P texts; None for what the ids spell.
            negative: These are negative prompts, see `encode_text`.

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

        A text that is too long for what is searched is refused. Of what is too long for the other towers the end is cut off. The
        empty text alone, which is led away from again and again, is encoded once.

        Args:
            texts: P texts.
            negative: These are negative prompts: no layer of the text encoders is skipped, and the empty text is zeros with
                `zero_empty`.

        Returns:
            Encoded prompts, (P, R, D).
        """
        if list(texts) != [""]:
            return self._encode_text(texts, negative)
        kind = self.device.type
        key = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None, negative
        if key not in self._empty:
            with torch.inference_mode(False), torch.no_grad():  # a search may use what a test has encoded
                self._empty[key] = self._encode_text(texts, negative)
        return self._empty[key]

    def _encode_text(self, texts: Sequence[str], negative: bool) -> Tensor:
        skip, searched = self._skipped(negative), self.vocabulary.towers
        parts = [tower.read(texts, self.device, cut=tower not in searched, skip=skip) for tower in self.towers]
        encoded = self.combine(parts)
        return self._zeroed(encoded, torch.tensor([not text.strip() for text in texts])) if negative else encoded

    def _skipped(self, negative: bool) -> int:
        """Return how many layers of the CLIP text encoders are skipped; diffusers skips none for negative prompts."""
        return 0 if negative else self.clip_skip or 0

    def _zeroed(self, encoded: Tensor, empty: Tensor) -> Tensor:
        """Return encoded negative prompts (P, R, D), those of empty texts (P,) as zeros if the model was trained so."""
        return encoded.masked_fill(empty.to(encoded.device).view(-1, 1, 1), 0) if self.zero_empty else encoded

    def split(self, prompts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encoded prompts (..., R, D) as what the denoiser attends to, (..., L, D), and the pooled vectors (..., D')."""
        if not self.pooled_width:
            return prompts, None
        below = -(-self.pooled_width // prompts.shape[-1])
        return prompts[..., :-below, :], prompts[..., -below:, :].flatten(-2)[..., : self.pooled_width]

    def join(self, hidden: Tensor, pooled: Tensor) -> Tensor:
        """Encoded prompts (..., R, D) of what the denoiser attends to, (..., L, D), and the pooled vectors (..., D')."""
        width = hidden.shape[-1]
        filled = F.pad(pooled, (0, -pooled.shape[-1] % width))
        return torch.cat([hidden, filled.unflatten(-1, (-1, width)).to(hidden.dtype)], dim=-2)

    def moving(self, prompts: Tensor, pooled: bool) -> Tensor:
        """Which rows of encoded prompts (..., R, D) a search may move, (R,): not CLIP's start of the text, and the pooled if told to."""
        moving = torch.arange(prompts.shape[-2], device=prompts.device) >= self.fixed
        if not pooled:
            moving[self.split(prompts)[0].shape[-2] :] = False
        return moving

    def gist(self, prompts: Tensor) -> Tensor:
        """The one row (..., D) of encoded prompts (..., R, D) that says most: the pooled vector's, or the last token's."""
        return prompts[..., -1, :]

    # --- denoiser

    @abstractmethod
    def denoise(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Calls the denoiser.

        Args:
            noisy: Noisy latents, (B, C, h, w).
            timesteps: (B,), see `condition`.
            prompts: Encoded, (B, R, D).
            guidance_scale: What models are told that have learned to guide themselves.

        Returns:
            What it predicts, (B, C, h, w) float32.
        """

    def attention_maps(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        """How much each place of a picture looks at each token of its prompt while `denoise` runs; no gradient.

        Args:
            noisy: Noisy latents, (B, C, h, w).
            timesteps: (B,).
            prompts: Encoded, (B, R, D).

        Returns:
            Cross-attention probabilities (B, L, h, w) float32, the mean over heads and layers; in [0, 1], and over the L tokens of
            a place they sum to one.
        """
        raise NotImplementedError(f"The places and the tokens of a {type(self).__name__} share one attention.")

    def guided(self, guidance_scale: float) -> bool:
        """Whether a picture is led away from a negative prompt, which takes two calls of the denoiser a step."""
        return guidance_scale > 1 and not self.guides_itself

    @property
    def guides_itself(self) -> bool:
        """Whether the denoiser has learned what guidance does; then nothing can be led away from."""
        return False

    @property
    def pooled_width(self) -> int:
        """Numbers of the pooled vector; 0 in families without one."""
        return 0

    @property
    def num_train_timesteps(self) -> int:
        """How many noise levels there are; timesteps are 0, ..., num_train_timesteps - 1."""
        count: int = self.scheduler.config.num_train_timesteps
        return count

    @property
    def factor(self) -> int:
        """Pixels of a latent, a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def trained_size(self) -> int:
        """Height and width, in pixels, of the images that the denoiser was trained on."""
        return square_size(self.denoiser.config.sample_size, self.name) * self.factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of what is drawn."""
        side = self.image_size // self.factor
        return self.vae.config.latent_channels, side, side

    @property
    def sigma_data(self) -> float | None:
        """The data's standard deviation in EDM's preconditioning (arXiv 2206.00364, table 1); None for other noise schedules."""
        value: float | None = self.scheduler.config.get("sigma_data")
        return value

    def condition(self, timesteps: Tensor) -> Tensor:
        """Return what the denoiser is told of the noise level, (B,): the timesteps, or with EDM `c_noise`, ln(sigma) / 4.

        Args:
            timesteps: (B,). Integers 0, ..., num_train_timesteps - 1 are those of training, a larger one is noisier; with EDM they
                number the rows of the scheduler's table of sigmas, from the smallest on. With EDM, floating-point timesteps are those
                of its sampler, which are `c_noise` already.
        """
        if self.sigma_data is None or timesteps.is_floating_point():
            return timesteps
        return self.sigmas[timesteps.long()].log() / 4

    def _signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of latents and noise in noisy latents, (B, 1, 1, 1) each."""
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
            # Some samplers step between two timesteps of training, where they interpolate sigma.
            after = self.alphas_cumprod[(before + 1).clamp(max=self.num_train_timesteps - 1)]
            low, high, share = (1 / alphas - 1).sqrt(), (1 / after - 1).sqrt(), (timesteps - before).to(alphas)
            alphas = torch.where(share > 0, 1 / (1 + low.lerp(high, share).square()), alphas)
        alphas = alphas.view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents (B, C, h, w) as the denoiser is shown them, with EDM times `c_in`.

        Args:
            latents: (B, C, h, w).
            noise: Standard normal, (B, C, h, w).
            timesteps: (B,), see `condition`.
        """
        a, s = self._signal_and_noise(timesteps)
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser should answer, (B, C, h, w).

        With EDM it is the target of the network F itself, `(x0 - c_skip * x) / c_out`, whose variance is 1 at every noise level, so that
        squared errors of all timesteps weigh alike.

        Args:
            latents: (B, C, h, w).
            noise: Standard normal, (B, C, h, w).
            timesteps: (B,), see `condition`.
        """
        if self.prediction_type == "flow_prediction":
            return noise - latents
        a, s = self._signal_and_noise(timesteps)
        if self.sigma_data is not None:
            # With x0 / sigma_data for x0, EDM's factors are those of a variance-preserving schedule, and F is its velocity; "epsilon"
            # has the other sign of c_out.
            velocity = self.sigma_data * a * noise - s / self.sigma_data * latents
            return -velocity if self.prediction_type == "epsilon" else velocity
        return noise if self.prediction_type == "epsilon" else a * noise - s * latents

    def predict_x0(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latents (B, C, h, w) that the denoiser's output stands for.

        Args:
            noisy: Noisy latents as the denoiser was shown them, (B, C, h, w).
            output: What it has answered, (B, C, h, w).
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
        """Latents (B, C, h, w), the mean of the posterior, of images (B, 3, H, W) in [-1, 1]."""
        latents = at_least_float32(self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean)
        mean, std = self._latent_statistics(latents)
        return cast("Tensor", (latents - mean) * (self.vae.config.scaling_factor / std))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of latents (B, C, h, w).

        What is scored is what can be saved: values beyond the range are cut off, and no gradient comes from those pixels.
        """
        mean, std = self._latent_statistics(latents)
        images: Tensor = self.vae.decode(
            (latents * std / self.vae.config.scaling_factor + mean).to(self.vae.dtype)
        ).sample
        return at_least_float32(images).clamp(-1, 1)

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, by channel, of what the autoencoder gives, as far as the family's pipeline obeys its config."""
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
        """Draws P images with the model's own sampler; what a row becomes depends on the rows beside it by rounding alone.

        With `stop` it is the shortcut of DPO-Diff (arXiv 2407.01606, section 3.3): from what the denoiser says at the last call the
        clean latents are predicted at once. With `grad_steps` 1 no more than that call passes a gradient on, so that memory and the
        backward pass do not depend on the number of steps.

        Args:
            prompts: P encoded prompts, (P, R, D).
            negative: What to lead away from, 1 or P encoded prompts; not used without guidance.
            noise: Standard normal, (P, C, h, w). It decides everything, also what samplers such as ancestral ones add later.
            steps: Sampling steps.
            guidance_scale: Weight of the prompt against the negative one; up to 1 there is no guidance, as in diffusers.
            grad_steps: How many of the last calls of the denoiser pass a gradient on; `steps` or more for all. Their activations
                are computed a second time in the backward pass instead of kept.
            stop: Calls of the denoiser after which the clean latents are predicted; None to draw to the end.

        Returns:
            Latents, (P, C, h, w).
        """
        scheduler = self._sampler(
            steps
        )  # on the CPU, where samplers look noise levels up; the host waits for no timestep
        # Of eta, how much noise DDIM and TCD add, diffusers' pipelines make 0 whatever the class's default is.
        taken = inspect.signature(scheduler.step).parameters
        extra: dict[str, Any] = {"eta": 0.0} if "eta" in taken else {}
        if "generator" in taken:
            extra["generator"] = generators_of(noise)
        scale = getattr(scheduler, "scale_model_input", lambda latents, t: latents)  # those of flows have none
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
                    # Some samplers' latents are scaled; what the denoiser is shown never is.
                    timesteps = t.expand(len(scaled)).to(noise.device, non_blocking=True)
                    return self.predict_x0(scaled, output, timesteps)
                latents = scheduler.step(output, t, latents, **extra).prev_sample
        return latents

    def calls(self, steps: int, guidance_scale: float = 7.5) -> int:
        """Denoiser samples that `sample` spends on a picture; some samplers call the denoiser more often than they take steps."""
        return len(self._sampler(steps).timesteps) * (2 if self.guided(guidance_scale) else 1)

    def schedule(self, steps: int) -> dict[str, Any]:
        """What the family's pipeline tells the scheduler beside the number of steps."""
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        tokens = (self.latent_shape[1] // self.patch) ** 2
        short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return {"mu": low + (high - low) * (tokens - short) / (long - short)}

    def _defaults(self) -> tuple[int, float]:
        """Sampling steps and guidance: the family's, or those of models that draw in a few steps, which their schedulers tell."""
        config = self.scheduler.config
        if type(self.scheduler).__name__ == "LCMScheduler":
            return 4, 8.5 if self.guides_itself else 1.0
        # Turbo; models that predict velocity use the spacing too, to begin at pure noise.
        trailing = config.get("timestep_spacing") == "trailing" and self.prediction_type == "epsilon"
        if trailing and "Euler" in type(self.scheduler).__name__:
            return 1, 1.0
        return self.pipeline_steps, self.pipeline_guidance

    def replace_scheduler(self, scheduler: Any) -> None:
        """Draw with another scheduler of the same noise levels.

        The default steps and guidance stay those of the model, unless the scheduler is for latent consistency models.
        """
        self.scheduler = scheduler
        if type(scheduler).__name__ == "LCMScheduler":
            self.default_steps, self.default_guidance = self._defaults()

    def _sampler(self, steps: int) -> Any:
        """A fresh one, for samplers keep state between steps."""
        if steps > self.num_train_timesteps:
            raise UserError(
                f"Pictures were to be drawn in {steps} steps and the model has {self.num_train_timesteps} noise levels; give fewer."
            )
        scheduler = copy.deepcopy(self.scheduler)
        try:
            known = inspect.signature(scheduler.set_timesteps).parameters
            told = {name: value for name, value in self.schedule(steps).items() if name in known}
            scheduler.set_timesteps(steps, device="cpu", **told)
        except ValueError as error:
            raise UserError(
                f"The {type(scheduler).__name__} of the model {self.name!r} cannot draw in {steps} steps ({error})."
            ) from error
        return scheduler

    def _denoise_lean(self, noisy: Tensor, t: Tensor, prompts: Tensor, guidance_scale: float) -> Tensor:
        """`denoise` without keeping activations; a scheduler's step has a state and must not run twice, this may."""
        timesteps = t.expand(len(noisy)).to(noisy.device, non_blocking=True)
        arguments = noisy, timesteps, prompts, guidance_scale
        if not torch.is_grad_enabled():
            return self.denoise(*arguments)
        return checkpoint(self.denoise, *arguments, use_reentrant=False, preserve_rng_state=False)


def square_size(sample_size: int | Sequence[int] | None, name: str) -> int:
    """Return the latents a side that a denoiser's config states, as a number or as height and width.

    Args:
        sample_size: What the config states.
        name: The model's, for messages.

    Raises:
        UserError: Nothing is stated, or height and width differ.
    """
    if sample_size is None:
        raise UserError(
            f"The denoiser of the model {name!r} does not state the size of its pictures; give --model.image_size in pixels."
        )
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if height != width:
        raise UserError(
            f"The model {name!r} was trained on {height} x {width} latents, and only square pictures are drawn; give --model.image_size "
            "in pixels."
        )
    return height


def repeat(x: Tensor, times: int) -> Tensor:
    """Repeats each row for its samples: a, b becomes a, a, b, b."""
    # The gradient of `expand` is a sum, which is deterministic on every device.
    return x.unsqueeze(1).expand(-1, times, *x.shape[1:]).flatten(0, 1)


def generators_of(noise: Tensor) -> list[torch.Generator]:
    """One generator a row, seeded by the row, for samplers that add noise at each step."""
    rows = noise.detach().float().cpu().numpy()
    return [torch.Generator().manual_seed(zlib.crc32(row.tobytes())) for row in rows]
