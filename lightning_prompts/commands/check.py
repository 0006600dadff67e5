"""Check whether a search can work on a model before running it: `train.py check`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from lightning_prompts.backbones import repeat
from lightning_prompts.commands.dry_run import GIB, DryRun, peak_memory, reset_peak_memory, total_memory
from lightning_prompts.engine.method import PromptMethod
from lightning_prompts.methods.inversion.base import Inverter
from lightning_prompts.methods.inversion.init import random_tokens
from lightning_prompts.objectives import Denoising
from lightning_prompts.sampling import Microbatch
from lightning_prompts.sampling.seeding import CHECK, draw_noise, draw_timesteps

Verdict = Literal["ok", "weak", "no"]

IMAGES = 4  # images whose losses are measured
LEVELS = 20  # equal parts of the timesteps
SAMPLES = 2  # noise samples per image and level
SETS, SIZES = 4, (1, 2, 4, 8)  # independent sets of gradients, and the numbers of samples per step that are compared
LEAST_CHANGE = (
    0.02  # smallest change of a generated image (RMS on a scale of 0 to 1) that counts as a reaction to the prompt
)
NEARLY = 0.75  # share of the best quarter's mean gain that a level must reach to be suggested
ENOUGH = 0.3  # signal-to-noise ratio of a step's gradient that is enough
SLOW = 4.0  # seconds per call above which no larger microbatch is tried


@dataclass(frozen=True)
class Losses:
    """Denoising losses of P images at T timestep levels with three prompts, averaged over the noise.

    Attributes:
        right: With the image's own text, (P, T).
        wrong: With a wrong text, (P, T).
        empty: With the empty prompt, (P, T).
        num_train_timesteps: Number of timesteps, which the T levels divide.
    """

    right: Tensor
    wrong: Tensor
    empty: Tensor
    num_train_timesteps: int

    @property
    def gain(self) -> Tensor:
        """Return how much of the empty prompt's loss the right text removes at each level, (T,), at most 1."""
        return 1 - (self.right / self.empty).log().mean(0).exp()

    @property
    def accuracy(self) -> float:
        """Return the share of images and levels whose loss is lower with the right text than with the wrong one."""
        return float((self.right < self.wrong).float().mean())

    @property
    def verdict(self) -> Verdict:
        """Return whether the right text has a lower loss than the wrong one and, at some level, the empty prompt."""
        verdict = share_verdict(self.accuracy, self.right.numel(), chance=0.5)
        return verdict if (self.gain > 0).any() else "no"

    def timesteps(self) -> tuple[int, int]:
        """Return the range [low, high) of the levels whose gain is close to that of the best quarter."""
        gain = self.gain.nan_to_num(-torch.inf)
        best = gain.topk(max(len(gain) // 4, 1)).values.mean()  # a single level would depend on a few noise samples
        levels = (gain >= NEARLY * best).nonzero().squeeze(1)
        edges = level_edges(self.num_train_timesteps, len(gain))
        return edges[int(levels[0])], edges[int(levels[-1]) + 1]


@dataclass(frozen=True)
class Suggestion:
    """Settings that the measurements suggest; None where they suggest nothing."""

    timesteps: tuple[int, int] | None = None
    samples: int | None = None
    microbatch: int | None = None


@dataclass(frozen=True)
class Report:
    """The result of a check.

    Attributes:
        lines: The table to print.
        reacts: Whether the model reacts to its prompt; if not, a search cannot work.
        suggestion: Settings for `fit`.
    """

    lines: list[str]
    reacts: bool
    suggestion: Suggestion


def check(method: PromptMethod, seed: int, dry_run: DryRun) -> Report:
    """Measure whether a search can work, after one step.

    Args:
        method: The method, on its device, with the problems of that step.
        seed: Seed of every random draw.
        dry_run: Memory and time of that step.
    """
    inverter = method if isinstance(method, Inverter) else None
    rows = torch.arange(min(IMAGES, len(method.batch)))
    texts, source = right_texts(inverter, rows) if inverter else ([method.batch[0].record.target], "prompt")
    reset_peak_memory(method.device)
    change = image_change(method, texts[0], method.batch[0].record.key, seed)
    reacts: Verdict = "ok" if change >= LEAST_CHANGE else "no"
    reaction = f"leaving out the {source} changes the image by {change:.3f} (RMS on a scale of 0 to 1)"
    lines = [*_cost_lines(method, dry_run), _line("image", reaction, reacts)]
    reason = "" if reacts == "ok" else "the prompt does not change the generated image"
    suggestion = Suggestion()
    if inverter:
        losses, other = denoising_losses(inverter, rows, texts, seed)
        schedule = (inverter.data.timestep_range[0], inverter.data.timestep_range[1])
        if losses.verdict == "no":
            reason = reason or f"the denoising loss does not distinguish the {source} from {other}"
        else:
            schedule = losses.timesteps()
        ratios = gradient_ratios(inverter, rows[:2], schedule, seed)
        enough = next((size for size, ratio in zip(SIZES, ratios, strict=True) if ratio >= ENOUGH), SIZES[-1])
        samples = max(int(inverter.data.num_noise_samples), enough)
        microbatch, rate = fastest_microbatch(inverter, schedule, seed, inverter.batch_size * samples)
        lines += [
            *_loss_lines(losses, source, other),
            _clip_line(inverter, texts, source == "caption"),
            _gradient_line(ratios, schedule),
            _line("speed", f"{rate:.1f} samples/s with a gradient, {microbatch} per call"),
        ]
        if not reason:
            suggestion = Suggestion(schedule, samples, microbatch)
    lines.append(f"A search cannot work: {reason}." if reason else "A search can work.")
    if suggestion.timesteps:
        low, high = suggestion.timesteps
        lines.append(
            f"Suggested: --data.timestep_range '[{low},{high}]' --data.num_noise_samples {samples} --model.microbatch "
            f"{microbatch}"
        )
    return Report(lines, not reason, suggestion)


def _cost_lines(method: PromptMethod, dry_run: DryRun) -> list[str]:
    """Return the lines on the model, its memory and its time."""
    device, backbone = method.device, method.backbone
    peak = max([peak_memory(device), *(memory for memory, _ in dry_run.measured.values())])
    halved = method.microbatch.size < method.microbatch.asked and not method.microbatch.fitted
    dtype = str(next(backbone.denoiser.parameters()).dtype).removeprefix("torch.")
    memory = f"{peak / GIB:.2f} GiB at most, of {total_memory(device) / GIB:.1f} GiB on {device.type}"
    return [
        _line("model", f"{backbone.name} ({type(backbone).__name__}), {dtype} on {device}"),
        _line("memory", memory + ", with a smaller microbatch than requested" * halved, "weak" if halved else "ok"),
        _line("time", f"{dry_run.measured['a step'][1]:.2f} s per step. {dry_run.whole_search(method)}"),
    ]


def config_with(settings: dict[str, Any], suggestion: Suggestion) -> str:
    """Return a config for `fit` as YAML: the given settings of model and data, changed as a check suggests."""
    settings = copy.deepcopy(settings)
    data, model = settings["data"]["init_args"], settings["model"]["init_args"]
    if suggestion.timesteps:
        data |= {"timestep_range": list(suggestion.timesteps), "num_noise_samples": suggestion.samples}
        model["microbatch"] = suggestion.microbatch
    return (
        f"# Written by `train.py check` for {model['backbone']['name']}.\n{yaml.safe_dump(settings, sort_keys=False)}"
    )


# --- measurements


def right_texts(method: Inverter, rows: Tensor) -> tuple[list[str], str]:
    """Return a text per image, and its source: captions if all images have one, or the CLIP's most similar words."""
    captions = [method.batch[row].record.caption for row in rows.tolist()]
    if all(captions):
        return [str(caption) for caption in captions], "caption"
    return [found.prompt for found in method.prompt.decode(method.clip_words(rows).cpu())], "CLIP's words"


def wrong_texts(method: Inverter, texts: Sequence[str], seed: int) -> tuple[list[str], str]:
    """Return a wrong text for each image, and its source: another image's text, or random tokens if texts are equal."""
    if len(set(texts)) == len(texts) > 1:
        return [*texts[1:], texts[0]], "another's"
    keys = [problem.key for problem in method.batch.records[: len(texts)]]
    return [
        found.prompt for found in method.prompt.decode(random_tokens(method.prompt, keys, seed, CHECK).cpu())
    ], "random tokens"


@torch.no_grad()
def image_change(method: PromptMethod, text: str, key: str, seed: int) -> float:
    """Return how much a generated image changes without its prompt: RMS on a scale of 0 to 1; 0 if it is not finite."""
    noise = draw_noise(seed, [key], CHECK, 1, method.backbone.latent_shape, method.device)[0].expand(2, -1, -1, -1)
    with_text, without = method.generate([text, ""], noise)
    change = float((with_text - without).square().mean().sqrt()) / 2
    return change if math.isfinite(change) else 0.0


@torch.no_grad()
def denoising_losses(method: Inverter, rows: Tensor, texts: Sequence[str], seed: int) -> tuple[Losses, str]:
    """Measure the losses of images with their own text, a wrong one and the empty prompt, on the same noise.

    Returns:
        The losses, and the source of the wrong texts.
    """
    wrong, other = wrong_texts(method, texts, seed)
    backbone, denoising = method.backbone, Denoising(method.microbatch)
    keys = [method.batch[row].record.key for row in rows.tolist()]
    latents = torch.stack([method.latents[row][0] for row in rows.tolist()])
    prompts = [method.encode(some) for some in (texts, wrong, [""] * len(texts))]
    edges = level_edges(backbone.num_train_timesteps)
    by_prompt: list[list[Tensor]] = [[], [], []]
    for level in range(LEVELS):
        timesteps = draw_timesteps(seed, keys, CHECK - level, SAMPLES, edges[level], edges[level + 1]).to(method.device)
        noise = draw_noise(seed, keys, CHECK - level, SAMPLES, backbone.latent_shape, method.device)
        same = latents.unsqueeze(1).expand_as(noise)
        for losses, prompt_embeds in zip(by_prompt, prompts, strict=True):
            losses.append(denoising(backbone, prompt_embeds, same, timesteps, noise).cpu())
    right, of_wrong, empty = (torch.stack(losses, dim=1) for losses in by_prompt)
    return Losses(right, of_wrong, empty, backbone.num_train_timesteps), other


def level_edges(num_train_timesteps: int, levels: int = LEVELS) -> list[int]:
    """Return the `levels` + 1 edges of equal parts of the timesteps."""
    return [round(num_train_timesteps * i / levels) for i in range(levels + 1)]


def sample_gradients(method: Inverter, row: int, timesteps: Tensor, noise: Tensor, microbatch: Microbatch) -> Tensor:
    """Compute the gradient of each sample's denoising loss with respect to the prompt's M token embeddings.

    Args:
        method: The method.
        row: Which problem of the batch; the gradient is taken at its current embeddings.
        timesteps: (N,).
        noise: (N, C, h, w).
        microbatch: Samples per call.

    Returns:
        (N, M * D) float32, on the CPU.
    """
    backbone, latents, denoising = method.backbone, method.latents[row][:1], Denoising(microbatch)
    ids, embeddings = (tensor.detach() for tensor in method.prompt(torch.tensor([row], device=method.device)))

    def call(some: Tensor) -> Tensor:
        same = latents.expand(len(some), -1, -1, -1)
        with torch.enable_grad():
            own = repeat(embeddings, len(some)).clone().requires_grad_()
            prompt_embeds = backbone.encode(ids.expand(len(some), -1), own)
            each = (tensor.unsqueeze(1) for tensor in (same, timesteps[some], noise[some]))
            (gradient,) = torch.autograd.grad(denoising(backbone, prompt_embeds, *each).sum(), own)
        return gradient[:, method.prompt.positions].flatten(1).float().cpu()

    return microbatch.map(len(timesteps), call, method.device)


def gradient_ratios(method: Inverter, rows: Tensor, schedule: tuple[int, int], seed: int) -> list[float]:
    """Measure the signal-to-noise ratios of gradients of 1, 2, 4 and 8 samples, as root mean squares over problems."""
    ratios, most = torch.zeros(len(rows), len(SIZES)), SIZES[-1]
    for place, row in enumerate(rows.tolist()):
        key = [method.batch[row].record.key]
        steps = [CHECK - LEVELS - number for number in range(SETS)]
        timesteps = torch.cat([draw_timesteps(seed, key, step, most, *schedule)[0] for step in steps])
        noise = torch.cat(
            [draw_noise(seed, key, step, most, method.backbone.latent_shape, method.device)[0] for step in steps]
        )
        gradients = sample_gradients(method, row, timesteps.to(method.device), noise, method.microbatch)
        ratios[place] = torch.tensor(signal_to_noise(gradients.view(SETS, most, -1)))
    found: list[float] = ratios.square().mean(0).sqrt().tolist()
    return found


def signal_to_noise(gradients: Tensor) -> list[float]:
    """Estimate the signal-to-noise ratio of the mean gradient of n stratified samples, for each n of `SIZES`.

    The ratio is the norm of the expected gradient divided by the root mean square distance of a step's gradient from
    it.

    Args:
        gradients: S independent sets of 8 samples, the k-th from the k-th of 8 equal parts of the schedule, (S, 8, D).
    """
    ratios = []
    for size in SIZES:
        apart = gradients.shape[1] // size  # samples k, k + apart, ... are from different parts of the schedule
        steps = gradients.unflatten(1, (size, apart)).mean(1).flatten(0, 1).double()
        noise = steps.var(0).sum()
        signal = steps.mean(0).square().sum() - noise / len(steps)  # the mean itself is noisy
        ratios.append(float((signal.clamp(min=0) / noise.clamp(min=1e-300)).sqrt()))
    return ratios


def fastest_microbatch(method: Inverter, schedule: tuple[int, int], seed: int, most: int) -> tuple[int, float]:
    """Find the smallest microbatch whose throughput is within 5% of the best that fits into memory.

    Args:
        method: The method.
        schedule: Range of the timesteps.
        seed: Seed of the draws.
        most: Samples in a step.

    Returns:
        The microbatch, a power of two, and its samples per second.
    """
    key, rates = [method.batch[0].record.key], dict[int, float]()
    for size in (2**power for power in range(7)):
        timesteps = draw_timesteps(seed, key, CHECK, size, *schedule)[0].to(method.device)
        noise = draw_noise(seed, key, CHECK, size, method.backbone.latent_shape, method.device)[0]
        seconds, microbatch = math.inf, Microbatch(size)
        for _ in range(3):  # the first call with a shape selects its kernels
            start = time.perf_counter()
            sample_gradients(method, 0, timesteps, noise, microbatch)
            seconds = min(seconds, time.perf_counter() - start)
            if seconds > SLOW or microbatch.size < size:
                break
        if microbatch.size < size:  # halved because memory ran out
            break
        rates[size] = size / seconds
        if 2 * size > most or seconds > SLOW:
            break
    return next((size, rate) for size, rate in rates.items() if rate >= 0.95 * max(rates.values()))


# --- the table


def _line(name: str, text: str, verdict: Verdict | None = None) -> str:
    return f"{name:<10}{text:<88}{verdict or ''}".rstrip()


def _loss_lines(losses: Losses, source: str, other: str) -> list[str]:
    """Format the losses of pairs of levels, and whether they are lower with the right text than with a wrong one."""
    lines = [_line("loss", f"{'timesteps':<16}{source:>15}{other:>15}{'empty prompt':>15}{'gain':>8}")]
    edges, columns = level_edges(losses.num_train_timesteps), (losses.right, losses.wrong, losses.empty)
    for level in range(0, LEVELS, 2):
        means = "".join(f"{float(column[:, level : level + 2].mean()):>14.4g}" for column in columns)
        gain = float(losses.gain[level : level + 2].mean())
        lines.append(_line("", f"{f'[{edges[level]}, {edges[level + 2]})':<16}{means}{gain:>8.0%}"))
    text = f"lower with the {source} than with {other} in {losses.accuracy:.0%} of {losses.right.numel()} comparisons"
    return [*lines, _line("", text, losses.verdict)]


def _clip_line(method: Inverter, texts: Sequence[str], captioned: bool) -> str:
    """Format how well the CLIP distinguishes images: by their captions, or else by the largest cosine of two images."""
    features = method.features(torch.arange(len(method.batch)))
    if len(features) == 1:
        return _line("CLIP", "only one image, so there is nothing to distinguish")
    if captioned:
        nearest = (method.clip.features_of(texts) @ features[: len(texts)].T).argmax(1).tolist()
        share = sum(place == found for place, found in enumerate(nearest)) / len(texts)
        text = f"finds {share:.0%} of {len(texts)} images by their captions"
        return _line("CLIP", text, share_verdict(share, len(texts), 1 / len(texts)))
    alike = float((features @ features.T - 2 * torch.eye(len(features), device=features.device)).max())
    verdict: Verdict = "ok" if alike < 0.9 else "weak" if alike < 0.98 else "no"
    return _line("CLIP", f"the two most similar of {len(features)} images have a cosine of {alike:.3f}", verdict)


def _gradient_line(ratios: Sequence[float], schedule: tuple[int, int]) -> str:
    shown = f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} with {', '.join(map(str, SIZES))}"
    verdict: Verdict = "ok" if max(ratios) >= ENOUGH else "weak" if max(ratios) >= ENOUGH / 3 else "no"
    return _line("gradient", f"SNR in [{schedule[0]}, {schedule[1]}): {shown} samples per step", verdict)


def share_verdict(share: float, count: int, chance: float) -> Verdict:
    """Return `no` for a share within two standard errors of chance, `ok` for one of at least 0.8, and else `weak`."""
    if share <= chance + 2 * math.sqrt(chance * (1 - chance) / count):
        return "no"
    return "ok" if share >= 0.8 else "weak"
