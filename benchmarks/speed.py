"""Measure how fast one process searches with the embedded model: `python benchmarks/speed.py`.

`--print` only prints the tables. There are four tables: the search compared with a plain loop, which takes one target
after the other and one noise sample per call, like the released code; the share of the machine's arithmetic rate in
large products; where the time of a step goes; and alternative computations. Alternatives are measured in turns, and the
tables have the medians of the rounds. If other programs are running, use `--threads 1`; both sides of a comparison
always have the same number of threads.
"""

from __future__ import annotations

import argparse
import logging
import platform
import random
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import tables
import torch
from diffusers.models.attention_processor import AttnProcessor
from inversion import TARGETS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from lightning_prompts.backbones import Backbone, load_backbone, repeat
from lightning_prompts.engine.images_to_prompts import ImagesToPrompts
from lightning_prompts.methods import PEZ, PH2P, TRAINER
from lightning_prompts.methods.inversion.token_embeddings import TokenEmbeddings
from lightning_prompts.objectives import Denoising
from lightning_prompts.sampling import Microbatch

FIGURES = Path(__file__).parent / "figures"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "speed.png"
TOKENS, SAMPLES, MICROBATCH, LOW, HIGH = 8, 2, 32, 450, 1000
WARM = 2  # steps that are not timed
COUNTS = (1, 4, 16)  # targets
BATCHES = (1, 4, 16, 32, 64)  # samples per denoiser call
HOW: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "PH2P, Adam": (PH2P, {"optimizer": partial(torch.optim.Adam, lr=0.02), "metric": "cosine"}),
    "PEZ": (PEZ, {"optimizer": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1)}),
}
KINDS = {  # parts of operation names in the profile; the first match counts
    "convolutions": ("convolution",),
    "matrix products": ("::mm", "::bmm", "addmm", "baddbmm"),
    "attention": ("scaled_dot_product",),
    "normalization, activation": ("norm", "silu", "gelu", "softmax"),
    "copies": ("copy_", "::cat", "fill_", "zero_", "upsample", "index", "slice_backward", "gather", "embedding"),
}
OTHER, PYTHON = "other operations", "Python and calls"


# --- measured functions


def targets(count: int) -> list[str]:
    return [str(path) for path in sorted((TARGETS / "development").glob("*.png"))[:count]]


class Clock(pl.Callback):
    """Record when each step starts, without the scoring before the first step and the warm-up.

    Args:
        steps: Steps of the search.
        recorder: Profiler that records the timed steps.
    """

    def __init__(self, steps: int, recorder: Any = None) -> None:
        self.steps, self.recorder = steps, recorder
        self.begun: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record the time."""
        if self.recorder and batch_idx in (WARM, self.steps - 1):
            (self.recorder.start if batch_idx == WARM else self.recorder.stop)()
        if batch_idx >= WARM:
            self.begun.append(time.perf_counter())


def search(backbone: Backbone, name: str, count: int, steps: int, recorder: Any = None) -> float:
    """Measure the seconds per step of a search, without scoring."""
    kind, settings = HOW[name]
    method = kind(
        backbone=backbone,
        num_tokens=TOKENS,
        steps=steps + WARM + 1,
        microbatch=MICROBATCH,
        score_every_n_steps=10**9,
        log_images_every_n_steps=0,
        **settings,
    )
    data = ImagesToPrompts(
        targets(count), num_noise_samples=SAMPLES, timestep_range=(LOW, HIGH), num_validation_samples=1
    )
    clock = Clock(method.steps, recorder)
    with tempfile.TemporaryDirectory() as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(**TRAINER | {"accelerator": "cpu"}, logger=False, callbacks=[clock], default_root_dir=run)
        trainer.fit(method, datamodule=data)
    return (clock.begun[-1] - clock.begun[0]) / (len(clock.begun) - 1)


def plain(backbone: Backbone, name: str, latents: Tensor, steps: int) -> float:
    """Measure the seconds per step of the plain loop.

    It does what the released code of PH2P and PEZ does: one target after the other and one noise sample per call. The
    code of PH2P computes gradients of the network's weights, and searches the nearest tokens at each call in NumPy,
    token by token through the whole vocabulary; that of PEZ computes no gradients of weights and looks tokens up in
    torch. Other costs of released code are left out, such as encoding the image again at each call.

    Args:
        backbone: The model.
        name: Name of the method.
        latents: Latents of the targets, (P, C, h, w).
        steps: Steps per target.
    """
    prompt, projected = TokenEmbeddings(backbone.vocabulary, tokens=TOKENS), name == "PEZ"
    table, allowed = prompt.table, prompt.allowed
    backbone.denoiser.requires_grad_(not projected)
    begun = time.perf_counter()
    for latent in latents:
        start = allowed.nonzero().squeeze(1)[torch.randint(int(allowed.sum()), (TOKENS,))]
        embeddings = nn.Parameter(table[start].clone())
        optimizer = HOW[name][1]["optimizer"]([embeddings])
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(SAMPLES):
                if projected:
                    nearest = nearest_in_torch(embeddings.detach(), table, allowed)
                else:
                    nearest = torch.tensor([nearest_in_numpy(row, table, allowed) for row in embeddings.detach()])
                ids = prompt.ids(nearest.unsqueeze(0))
                inserted = table[nearest] + embeddings - embeddings.detach() if projected else embeddings
                prompt_embeds = backbone.encode(ids, table[ids].index_copy(1, prompt.positions, inserted.unsqueeze(0)))
                t, noise = torch.randint(LOW, HIGH, (1,)), torch.randn(1, *latent.shape)
                output = backbone.denoise(backbone.add_noise(latent.unsqueeze(0), noise, t), t, prompt_embeds)
                (F.mse_loss(output, noise) / SAMPLES).backward()
            optimizer.step()
    return (time.perf_counter() - begun) / steps


def nearest_in_numpy(row: Tensor, table: Tensor, allowed: Tensor) -> int:
    """Return the nearest token of an embedding (D,), by cosine."""
    rows = table.cpu().numpy()
    cosines = rows @ row.numpy() / np.linalg.norm(rows, axis=1)
    return int(np.where(allowed.numpy(), cosines, -np.inf).argmax())


def nearest_in_torch(embeddings: Tensor, table: Tensor, allowed: Tensor) -> Tensor:
    """Return the nearest tokens (M,) of embeddings (M, D), by cosine."""
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(table, dim=1).T
    return cosines.masked_fill(~allowed, -torch.inf).argmax(1)


def gradient(
    backbone: Backbone,
    count: int,
    samples: int = SAMPLES,
    microbatch: int = MICROBATCH,
    objective: Callable[..., Tensor] | None = None,
) -> Callable[[], Tensor]:
    """Return the arithmetic of a step as a function: text encoder and denoiser, forward and backward.

    Returns:
        A function that returns gradients (P, L, D), always the same.
    """
    draw, denoising = torch.Generator().manual_seed(0), objective or Denoising(Microbatch(microbatch))
    prompt = TokenEmbeddings(backbone.vocabulary, tokens=TOKENS).to(backbone.device)
    ids = prompt.ids(prompt.allowed.nonzero().squeeze(1)[: count * TOKENS].view(count, TOKENS))
    latents, noise = torch.randn(2, count, samples, *backbone.latent_shape, generator=draw).to(backbone.device)
    timesteps = torch.randint(LOW, HIGH, (count, samples), generator=draw).to(backbone.device)

    def compute() -> Tensor:
        embeddings = prompt.table[ids].float().requires_grad_()
        loss = denoising(backbone, backbone.encode(ids, embeddings), latents, timesteps, noise)
        loss.sum().backward()
        slope: Tensor = embeddings.grad  # type: ignore[assignment]
        return slope

    return compute


def whole_graph(backbone: Backbone, prompts: Tensor, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Compute the loss of `Denoising` in one call, with a graph that includes everything that requires a gradient."""
    x, eps, t = latents.flatten(0, 1), noise.flatten(0, 1), timesteps.flatten()
    output = backbone.denoise(backbone.add_noise(x, eps, t), t, repeat(prompts, timesteps.shape[1]))
    return (output - eps).square().flatten(1).mean(1).view(timesteps.shape).mean(1)


# --- measurement


def seconds(compute: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    compute()
    return time.perf_counter() - begun


def flops(compute: Callable[[], Any], device: str = "cpu") -> int:
    """Count the floating-point operations of products and convolutions; attention counts as its products.

    The counter supports the fused attention of a GPU, but not that of a CPU, which is replaced by its products.
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = (
        Everything()
    )  # the default tracker fails on calls without a gradient on tensors that require one
    with counter, sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():
        compute()
    return int(counter.get_total_flops())


class Everything(ModuleTracker):
    """A tracker that counts operations without assigning them to modules."""

    def __enter__(self) -> Everything:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


@torch.no_grad()
def rates() -> tuple[float, float]:
    """Measure operations per second: of a large float32 matrix product, and of this or a faster convolution.

    They differ on some processors, because matrix products and convolutions come from different libraries.
    """
    size, channels, images, side = 2048, 128, 64, 16
    a, b = torch.randn(2, size, size)
    x = torch.randn(images, channels, side, side).to(memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    product = 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(8))
    operations = 2 * images * channels**2 * 9 * side**2
    convolution = operations / min(seconds(lambda: F.conv2d(x, kernel, padding=1)) for _ in range(8))
    return product, max(product, convolution)


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Compute float32 matrix products in another precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- figures


def measure_throughput(backbone: Backbone, rounds: int) -> list[dict[str, Any]]:
    """Measure samples per second of the search and the plain loop, and the median ratio of rounds with both."""
    unfrozen, rows = load_backbone("emoji"), []
    unfrozen.denoiser.requires_grad_(True).to(memory_format=torch.contiguous_format)
    for name in HOW:
        for count in COUNTS:
            latents = torch.randn(count, *backbone.latent_shape)
            pairs = [
                (
                    search(backbone, name, count, max(40 // count, 5)),
                    plain(unfrozen, name, latents, max(16 // count, 2)),
                )
                for _ in range(rounds)
            ]
            samples = 2 * count * SAMPLES  # a backward pass counts as one sample
            ours, theirs = (samples / statistics.median(times) for times in zip(*pairs, strict=True))
            ratio = statistics.median(loop / step for step, loop in pairs)
            rows.append({"method": name, "targets": count, "search": ours, "plain": theirs, "ratio": ratio})
    return rows


def measure_share(backbone: Backbone, rounds: int) -> list[dict[str, Any]]:
    """Measure operations per second of gradients and of whole steps, and their shares of the machine's rates."""
    product, best = (statistics.median(found) for found in zip(*(rates() for _ in range(rounds)), strict=True))
    measured = []
    for batch in BATCHES:
        compute = gradient(backbone, batch, 1, batch)
        compute()
        measured.append((f"gradient, {batch}", batch, flops(compute), [seconds(compute) for _ in range(2 * rounds)]))
    count = COUNTS[-1]
    for name in HOW:
        whole = flops(gradient(backbone, count))
        measured.append(
            (
                f"{name}, {count} targets",
                count * SAMPLES,
                whole,
                [search(backbone, name, count, 8) for _ in range(rounds)],
            )
        )
    return [
        {
            "what": what,
            "samples": samples,
            "gigaflop_a_sample": operations / samples / 1e9,
            "samples_a_second": 2 * samples / statistics.median(times),
            "gigaflops": (rate := operations / statistics.median(times)) / 1e9,
            "product_gigaflops": product / 1e9,
            "best_gigaflops": best / 1e9,
            "share": rate / product,
            "share_of_best": rate / best,
        }
        for what, samples, operations, times in measured
    ]


def measure_profile(backbone: Backbone, steps: int = 12) -> list[dict[str, Any]]:
    """Measure the milliseconds per step of PH2P with Adam by kind of operation."""
    recorder = profile(activities=[ProfilerActivity.CPU])
    step = 1000 * search(backbone, "PH2P, Adam", COUNTS[-1], steps, recorder)
    spent = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in recorder.key_averages():
        if event.key.startswith(("aten::", "mkldnn::")):
            kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), OTHER)
            spent[kind] += event.self_cpu_time_total / 1000 / steps
    spent[PYTHON] = step - sum(spent.values())
    return [{"kind": kind, "milliseconds": time, "share": time / step} for kind, time in spent.items()]


def measure_settings(backbone: Backbone, rounds: int) -> list[dict[str, Any]]:
    """Compare alternative computations of a step, and of the gradients of images with respect to latents."""
    count = COUNTS[-1]

    def other(change: Callable[[Any], Any], dtype: Any = "float32") -> Backbone:
        changed = load_backbone("emoji", dtype)
        change(changed)
        return changed

    def unfused(changed: Backbone) -> None:
        changed.denoiser.set_attn_processor(AttnProcessor())

    def contiguous(changed: Backbone) -> None:
        changed.to(memory_format=torch.contiguous_format)

    torch.compiler.config.force_disable_caches = True  # so that the first call compiles
    weights = other(lambda changed: changed.denoiser.requires_grad_(True))
    checkpointed = other(lambda changed: changed.denoiser.enable_gradient_checkpointing())
    steps = {
        "default": gradient(backbone, count),
        "one sample per call": gradient(backbone, count, microbatch=1),
        "gradients of the denoiser's weights": gradient(weights, count, objective=whole_graph),
        "contiguous instead of channels-last": gradient(other(contiguous), count),
        "unfused attention": gradient(other(unfused), count),
        "torch.compile": gradient(other(lambda changed: changed.denoiser.compile()), count),
        "bfloat16 autocast": within(gradient(backbone, count), lambda: torch.autocast("cpu", torch.bfloat16)),
        "bfloat16 weights": gradient(other(lambda changed: None, "bfloat16"), count),
        "bfloat16 weights, unfused attention": gradient(other(unfused, "bfloat16"), count),
        "float32 products in bfloat16": within(gradient(backbone, count), lambda: products_in("medium")),
        "linear layers as convolutions": gradient(other(lambda changed: convolve(changed.denoiser)), count),
        "denormals to zero": within(gradient(backbone, count), flushed),
        "gradient checkpointing": gradient(checkpointed, count),
    }
    images = {
        "four images, default": decoded(backbone),
        "four images, contiguous instead of channels-last": decoded(other(contiguous)),
    }
    return compared(steps, rounds) + compared(images, rounds)


def compared(ways: dict[str, Callable[[], Tensor]], rounds: int) -> list[dict[str, Any]]:
    """Compare the speed of each alternative, round by round, and its gradient with the first one's."""
    first = {name: seconds(compute) for name, compute in ways.items()}
    gradients = {name: compute() for name, compute in ways.items()}
    times, base = [], next(iter(ways))
    for _ in range(4 * rounds):
        names = random.sample(list(ways), len(ways))  # a random order, since each affects the caches of the next
        times.append({name: seconds(ways[name]) for name in names})
    return [
        {
            "setting": name,
            "speed": statistics.median(turn[base] / turn[name] for turn in times),
            "difference": float((gradients[name] - gradients[base]).norm() / gradients[base].norm()),
            "first_call": first[name],
        }
        for name in ways
    ]


def decoded(backbone: Backbone) -> Callable[[], Tensor]:
    """Return a function that computes gradients (4, C, h, w) of decoded images with respect to their latents."""
    latents = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))

    def compute() -> Tensor:
        leaf = latents.clone().requires_grad_()
        (slope,) = torch.autograd.grad(backbone.decode(leaf).square().sum(), leaf)
        return slope

    return compute


def convolve(network: nn.Module) -> None:
    """Compute linear layers as convolutions without copies, which is faster on some processors."""

    def convolved(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        kernel = layer.weight[..., None, None]

        def forward(x: Tensor) -> Tensor:
            if x.dim() != 3:
                return F.linear(x, layer.weight, layer.bias)
            return F.conv2d(x.transpose(1, 2).unsqueeze(2), kernel, layer.bias).squeeze(2).transpose(1, 2)

        return forward

    for module in network.modules():
        if isinstance(module, nn.Linear):
            setattr(module, "forward", convolved(module))  # noqa: B010


def within(compute: Callable[[], Tensor], context: Callable[[], Any]) -> Callable[[], Tensor]:
    """Return the same function, called within a context."""

    def inside() -> Tensor:
        with context():
            return compute()

    return inside


@contextmanager
def flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# --- tables


def throughput_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | targets | search, samples/s | plain loop, samples/s | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['method']} | {row['targets']:.0f} | {row['search']:.0f} | {row['plain']:.0f} | {row['ratio']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def share_table(rows: list[dict[str, Any]]) -> str:
    product, best = rows[0]["product_gigaflops"], rows[0]["best_gigaflops"]
    lines = [
        f"| | samples/s | GFLOP/s | of the matrix product's {product:.0f} | of the machine's best, {best:.0f} |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {row['samples_a_second']:.0f} | {row['gigaflops']:.0f} | {row['share']:.0%} | "
        f"{row['share_of_best']:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


def profile_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| operations | ms per step | share |", "|---|---|---|"]
    lines += [f"| {row['kind']} | {row['milliseconds']:.1f} | {row['share']:.0%} |" for row in rows]
    return "\n".join(lines)


def settings_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | speed | difference of the gradient | first call, s |", "|---|---|---|---|"]
    lines += [
        f"| {row['setting']} | {row['speed']:.2f} | {row['difference']:.0e} | {row['first_call']:.1f} |" for row in rows
    ]
    return "\n".join(lines)


PARTS: dict[str, tuple[Callable[[Backbone, int], list[dict[str, Any]]], Callable[[list[dict[str, Any]]], str]]] = {
    "throughput": (measure_throughput, throughput_table),
    "share": (measure_share, share_table),
    "profile": (lambda backbone, rounds: measure_profile(backbone), profile_table),
    "settings": (measure_settings, settings_table),
}


def figures(part: str) -> Path:
    return FIGURES / f"speed_{part}.csv"


def plot() -> None:
    """Plot the speed by targets, the share of the arithmetic, the time by operation, and the alternatives."""
    import matplotlib.pyplot as plt

    figure, ((first, share), (profile, settings)) = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    rows = tables.read(figures("throughput"))
    for method, style in (("PH2P, Adam", "o-"), ("PEZ", "s--")):
        own = [row for row in rows if row["method"] == method]
        for name, color in (("search", "C0"), ("plain", "C1")):
            label = f"{method}, {'search' if name == 'search' else 'plain loop'}"
            first.plot(
                [str(int(row["targets"])) for row in own], [row[name] for row in own], style, color=color, label=label
            )
    first.set(xlabel="targets", ylabel="denoiser samples per second", ylim=(0, None), title="Against a plain loop")
    first.legend(fontsize="small")
    _bars(share, "share", "what", "share_of_best", "percent of the machine's best", "Share of the arithmetic")
    share.axvline(30, color="gray", linestyle=":")
    _bars(profile, "profile", "kind", "share", "percent of a step, 16 targets", "Where the time goes")
    _bars(settings, "settings", "setting", "speed", "percent of the default speed", "Alternative computations")
    settings.axvline(100, color="gray", linestyle=":")
    settings.tick_params("y", labelsize="x-small")
    figure.savefig(IMAGE, dpi=80)


def _bars(axis: Any, part: str, name: str, value: str, label: str, title: str) -> None:
    rows = tables.read(figures(part))[::-1]
    axis.barh([row[name] for row in rows], [100 * row[value] for row in rows])
    axis.set(xlabel=label, title=title)


def main() -> None:
    """Measure what is selected and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--print", action="store_true", help="only print the tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    backbone = load_backbone("emoji")
    print(f"{machine()}, {args.threads} threads, torch {torch.__version__}, float32\n")
    for part in args.part:
        measure, table = PARTS[part]
        if not args.print:
            rows = measure(backbone, args.rounds)
            figures(part).unlink(missing_ok=True)
            tables.add(figures(part), rows)
        print(f"{table(tables.read(figures(part)))}\n", flush=True)
    if not args.print and all(figures(part).exists() for part in PARTS):
        plot()


def machine() -> str:
    """Return the name of the processor, if available."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
