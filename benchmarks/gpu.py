"""Measure searches on a GPU at the sizes of Stable Diffusion 1.5, SDXL and FLUX.1: `python benchmarks/gpu.py`.

Models have random weights made on the GPU, in bfloat16 except for the CLIP, so nothing is downloaded. The benchmark
compares methods in their Trainer with plain loops and with the rate of a matrix product, peak memory with the count of
`benchmarks/memory.py`, the denoiser with and without torch.compile and, if there are two GPUs, two processes with one.

Each measurement has a time limit in seconds and is skipped, with a message, if less than that is left of `--minutes`.
Results are written after each measurement; run the same command again for the missing ones. `--print` only prints the
tables; `--tiny` runs everything with small models on a CPU, as a test.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import memory
import plain_loops
import random_models
import speed
import tables
import torch
from timed_search import Case, Clock, rate, search, synchronize
from two_machines import compare

from lightning_prompts.backbones import Backbone
from lightning_prompts.commands.dry_run import peak_memory, reset_peak_memory
from lightning_prompts.methods import GCG, PH2P, DPODiff, MetricGuidance
from lightning_prompts.methods.dpo_diff.semantic_similarity import Similarity
from lightning_prompts.objectives import Sharpness, clip
from lightning_prompts.objectives.image_processor import ImageProcessor
from lightning_prompts.runs.folder import RunFolder
from lightning_prompts.sampling import OUT_OF_MEMORY, SamplerSettings, out_of_memory

FIGURES = Path(__file__).parent / "figures"


class Work(NamedTuple):
    """Sizes of the work that fill a GPU of 80 GB while a step takes no more than a few seconds."""

    images: int  # in a batch of PH2P
    problems: int  # in a batch of the other methods
    microbatch: int  # of the inversion methods
    image_microbatch: int  # microbatch of methods that generate images, whose gradients pass through the decoder
    steps: int  # num_inference_steps
    seeds: int
    population: int
    candidates: int


SD15, SDXL, FLUX = "Stable Diffusion 1.5", "SDXL", "FLUX.1 dev"
WORK = {
    SD15: Work(
        images=16, problems=4, microbatch=32, image_microbatch=8, steps=10, seeds=4, population=4, candidates=24
    ),
    SDXL: Work(images=8, problems=1, microbatch=8, image_microbatch=4, steps=10, seeds=4, population=2, candidates=24),
    FLUX: Work(images=2, problems=1, microbatch=1, image_microbatch=1, steps=4, seeds=2, population=2, candidates=4),
}
TINY_WORK = Work(images=2, problems=2, microbatch=2, image_microbatch=2, steps=2, seeds=1, population=2, candidates=2)


def cases(work: Work, has_distilled_guidance: bool) -> dict[str, Case]:
    """Return the methods to measure; DPO-Diff's gradient steps and its evaluation of candidates are separate cases."""
    tokens = {"microbatch": work.microbatch}
    generates = {"microbatch": work.image_microbatch, "sampler": SamplerSettings(work.steps), "seeds": work.seeds}
    unguided = {"negative": [], "positive": ["neighbors"], "similarity": Similarity(-1)}
    words = generates | (unguided if has_distilled_guidance else {})
    learning = words | {"solver": "gradient", "gradient_share": 1.0, "budget": 1000, "schedule": "fix-1"}
    evaluating = words | {"solver": "evolution", "population": work.population, "budget": 10**6}
    metric = generates | {"objective": Sharpness(), "steps": 10**6, "grad_steps": 1}
    return {
        "PH2P": Case(PH2P, "ph2p", work.images, tokens, plain_loops.ph2p),
        "GCG": Case(GCG, "gcg", work.problems, tokens | {"candidates": work.candidates}, plain_loops.gcg),
        "DPO-Diff, gradients": Case(DPODiff, "dpo_diff", work.problems, learning, plain_loops.dpo_diff_gradients),
        "DPO-Diff, candidates": Case(DPODiff, "dpo_diff", work.problems, evaluating, plain_loops.dpo_diff_candidates),
        "MetricGuidance": Case(MetricGuidance, "metric_guidance", work.problems, metric, plain_loops.metric_guidance),
    }


# --- measurements

MEMORY = (
    "weights",
    "a call",
    "a call, checkpointed",
    "a decoding",
    "a decoding, checkpointed",
)  # in the order of `Bench.counted`
COMPILED = ("repeated blocks", "whole denoiser")
STRATEGIES = ("problems", "samples")


class Bench:
    """The device, the seconds per measurement, and the one model that is loaded.

    Args:
        tiny: Use small models on the CPU.
        device: The device otherwise.
    """

    def __init__(self, tiny: bool, device: str = "cuda:0") -> None:
        self.tiny, self.seconds = tiny, 0.01 if tiny else 3.0
        self.device = torch.device("cpu" if tiny else device)
        self.name = "CPU, tiny" if tiny else torch.cuda.get_device_name(self.device)
        self.models = random_models.TINY if tiny else memory.MODELS
        self.work = dict.fromkeys(WORK, TINY_WORK) if tiny else WORK
        self.loaded: dict[str, Backbone] = {}
        self.counts: dict[str, list[int]] = {}  # by model, see `counted`
        self.compared: dict[str, dict[str, Any]] = {}  # by strategy, see `two_processes`

    def model(self, name: str) -> Backbone:
        """Load a model in place of the previous one."""
        if name not in self.loaded:
            self.free(models=True)
            self.loaded[name] = random_models.backbone(self.models[name], self.device)
        return self.loaded[name]

    def free(self, models: bool = False) -> None:
        """Release unused memory, with `models` also the loaded model."""
        if models:
            self.loaded.clear()
        gc.collect()
        torch.cuda.empty_cache()

    @cached_property
    def product(self) -> float:
        """Measure the TFLOP/s of the product of two bfloat16 matrices."""
        size = 256 if self.tiny else 8192
        a, b = torch.randn(2, size, size, device=self.device).bfloat16()
        return 2e-12 * size**3 / self.repeated(lambda: a @ b)

    def once(self, compute: Callable[[], Any]) -> float:
        """Measure the seconds of a computation."""
        synchronize(self.device)
        begun = time.perf_counter()
        compute()
        synchronize(self.device)
        return time.perf_counter() - begun

    def repeated(self, compute: Callable[[], Any]) -> float:
        """Measure the seconds of a computation: the median of several runs, without the first."""
        times, begun = list[float](), time.perf_counter()
        while len(times) < 4 or time.perf_counter() - begun < self.seconds / 2:
            times.append(self.once(compute))
        return statistics.median(times[1:])

    def throughput(self, name: str, what: str) -> dict[str, Any]:
        """Measure the samples per second of a search and of its plain loop, and its share of a product's rate."""
        model = self.model(name)
        clock, case = Clock(self.device, self.seconds), cases(self.work[name], model.guides_itself)[what]
        with tempfile.TemporaryDirectory() as folder:
            method = search(model, case, 10**9, folder, clock)
        if not clock.operations:
            raise RuntimeError(f"The search with {what} ended before it was timed.")
        plain, teraflops = rate(case.plain(method), self.device, self.seconds), clock.rate * clock.operations / 1e12
        size = {"problems": case.problems, "microbatch": method.microbatch.size, "peak": clock.peak / memory.GIB}
        rates = {"search": clock.rate, "plain": plain, "ratio": clock.rate / plain, "teraflops": teraflops}
        return size | rates | {"product": self.product, "share": teraflops / self.product}

    def memory(self, name: str, what: str) -> dict[str, Any]:
        """Measure the peak memory in GiB beyond what was allocated, and compare it with the counted memory."""
        place = MEMORY.index(what)
        if not place:
            self.free(models=True)
            taken = self.taken(lambda: self.model(name))
        else:
            network, call = memory.calls(self.model(name))[(place - 1) // 2]
            if not place % 2:
                network.enable_gradient_checkpointing()
            try:
                taken = self.taken(lambda: call().sum().backward())
            finally:
                network.disable_gradient_checkpointing()
        counted = self.counted(name)[place]
        return {"counted": counted / memory.GIB, "measured": taken / memory.GIB, "ratio": taken / counted}

    def counted(self, name: str) -> list[int]:
        """Return the bytes that `benchmarks/memory.py` counts, in the order of `MEMORY`."""
        if name not in self.counts:
            model = memory.on_meta(self.models[name])
            weights = sum(map(memory.weights, (model.text_encoders, model.denoiser, model.vae)))
            self.counts[name] = [weights, *memory.activations(model)]
        return self.counts[name]

    def taken(self, work: Callable[[], Any]) -> int:
        """Measure the peak memory of some work, in bytes."""
        reset_peak_memory(self.device)
        before = peak_memory(self.device)
        work()
        synchronize(self.device)
        return peak_memory(self.device) - before

    def compiled(self, name: str, what: str) -> dict[str, Any]:
        """Measure gradient samples per second without and with torch.compile; time the first call separately."""
        work, model = self.work[name], self.model(name)
        compute = speed.gradient(model, work.images, microbatch=work.microbatch)
        operations, gradient = speed.flops(compute, self.device.type) / 1e12, compute()
        plain = self.repeated(compute)
        compile = model.denoiser.compile if what == COMPILED[1] else model.denoiser.compile_repeated_blocks
        compile(dynamic=False, backend="aot_eager" if self.tiny else "inductor")
        try:
            first, other = self.once(compute), compute()
            compiled = self.repeated(compute)
        finally:
            for module in model.denoiser.modules():
                module._compiled_call_impl = None
            torch.compiler.reset()
        samples, difference = 2 * work.images * speed.SAMPLES, float((other - gradient).norm() / gradient.norm())
        rates = {"microbatch": work.microbatch, "plain": samples / plain, "compiled": samples / compiled}
        shares = {"plain_share": operations / plain / self.product, "share": operations / compiled / self.product}
        return rates | {"ratio": plain / compiled} | shares | {"difference": difference, "first": first}

    def two_processes(self, name: str, strategy: str) -> dict[str, Any]:
        """Compare PH2P's prompts of two processes with those of one; one pair of processes runs all strategies."""
        if not self.compared:
            with tempfile.TemporaryDirectory() as scratch:
                self.fixed(name, f"{scratch}/one")
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
                program = [*torchrun, __file__, "--rank-in", scratch, *["--tiny"] * self.tiny]
                process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
                try:
                    _, errors = process.communicate()
                finally:
                    process.terminate()  # torchrun then ends the processes that it started
                    process.wait()
                if process.returncode:
                    raise RuntimeError(f"The processes ended with exit code {process.returncode}:\n{errors[-3000:]}")
                one, *others = (prompts_in(f"{scratch}/{run}") for run in ("one", *STRATEGIES))
            self.compared = {how: compare(one, other) for how, other in zip(STRATEGIES, others, strict=True)}
        return self.compared[strategy]

    def fixed(self, name: str, folder: str, **trainer: Any) -> None:
        """Search with PH2P for a fixed number of steps."""
        settings = {"microbatch": self.work[name].microbatch, "score_every_n_steps": 2}
        case = Case(PH2P, "ph2p", self.work[name].images, settings, plain_loops.ph2p)
        search(self.model(name), case, 4, folder, **trainer)


def prompts_in(folder: str) -> list[dict[str, Any]]:
    """Return the prompts that a search found, in the order of its images."""
    records = sorted(RunFolder(folder).load().values(), key=lambda record: record.index)
    return [{"prompt": record.prompt, "validation_loss": record.validation_loss} for record in records]


# --- schedule of the measurements


class OutOfTime(BaseException):
    """Raised when a measurement reaches its time limit; not an Exception, which libraries might catch."""


class Cell(NamedTuple):
    """A measurement: its part, model and line, its limit in seconds, and the function that measures."""

    part: str
    model: str
    what: str
    limit: float
    measure: Callable[[str, str], dict[str, Any]]


def plan(bench: Bench) -> list[Cell]:
    """Return the measurements in order; compiling takes long and comes last."""
    cells = list[Cell]()
    for name in WORK:
        cells += [Cell("throughput", name, what, 45, bench.throughput) for what in cases(TINY_WORK, False)]
        cells += [Cell("memory", name, what, 20, bench.memory) for what in MEMORY]
    if bench.tiny or torch.cuda.device_count() > 1:
        cells += [Cell("processes", SD15, strategy, 90, bench.two_processes) for strategy in STRATEGIES]
    for what, limit in zip(COMPILED, (60, 240), strict=True):
        cells += [Cell("compile", name, what, limit, bench.compiled) for name in WORK]
    return cells


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` after so many seconds."""

    def stop(signum: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(bench: Bench, cells: list[Cell], folder: Path, minutes: float) -> bool:
    """Run the missing measurements that fit into the time; return False if one failed, other than by time or memory."""
    end, succeeded = time.monotonic() + 60 * minutes, True
    for cell in cells:
        file, key = file_of(folder, cell.part), {"device": bench.name, "model": cell.model, "what": cell.what}
        if any(key.items() <= row.items() for row in tables.read(file)):
            continue
        row, outcome, begun = dict[str, Any](), "not measured: no time left", time.monotonic()
        if begun + cell.limit <= end:
            try:
                with limited(cell.limit):
                    row = cell.measure(cell.model, cell.what)
                outcome = f"measured in {time.monotonic() - begun:.0f} s"
            except OutOfTime:
                outcome = f"not measured: no time left of its {cell.limit:.0f} s"
            except Exception as error:
                if out_of_memory(error) or str(error) == OUT_OF_MEMORY:
                    outcome, row = "out of memory", dict.fromkeys(FORMATS[cell.part], "out of memory")
                else:
                    traceback.print_exc()
                    outcome, succeeded = "failed", False
            bench.free()
        if row:
            tables.add(file, [key | {column: row[column] for column in FORMATS[cell.part]}])
        print(f"{cell.model}, {cell.part}, {cell.what}: {outcome}", flush=True)
    return succeeded


# --- tables

FORMATS: dict[str, dict[str, tuple[str, str]]] = {  # by part and column, heading and format
    "throughput": {
        "problems": ("batch size", ".0f"), "microbatch": ("microbatch", ".0f"), "search": ("search, samples/s", ".1f"),
        "plain": ("plain loop, samples/s", ".1f"), "ratio": ("ratio", ".1f"), "teraflops": ("TFLOP/s", ".0f"),
        "product": ("matrix product, TFLOP/s", ".0f"), "share": ("share", ".0%"), "peak": ("peak memory, GiB", ".1f"),
    },
    "memory": {"counted": ("counted, GiB", ".2f"), "measured": ("measured, GiB", ".2f"), "ratio": ("ratio", ".2f")},
    "compile": {
        "microbatch": ("microbatch", ".0f"), "plain": ("off, samples/s", ".1f"), "compiled": ("on, samples/s", ".1f"),
        "ratio": ("ratio", ".2f"), "plain_share": ("share of the product, off", ".0%"), "share": ("on", ".0%"),
        "difference": ("difference of the gradient", ".0e"), "first": ("first call, s", ".0f"),
    },
    "processes": {
        "prompts": ("prompts", ".0f"), "same_prompts": ("the same as one process", ".0f"),
        "largest_difference": ("largest relative difference of a loss", ".0e"),
    },
}  # fmt: skip


def file_of(folder: Path, part: str) -> Path:
    """Return the file with the figures of a part."""
    return folder / f"gpu_{part}.csv"


def table(part: str, rows: list[dict[str, Any]]) -> str:
    """Return a part's table, with one line per measurement."""
    columns = FORMATS[part]
    lines = [f"| device | model | {part} | {' | '.join(heading for heading, _ in columns.values())} |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    for row in rows:
        cells = (
            row[name] if isinstance(row[name], str) else f"{row[name]:{how}}" for name, (_, how) in columns.items()
        )
        lines.append(f"| {row['device']} | {row['model']} | {row['what']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0, help="time limit, not counting imports")
    parser.add_argument("--part", choices=list(FORMATS), nargs="+", default=list(FORMATS))
    parser.add_argument("--folder", type=Path, default=FIGURES, help="folder of the figures")
    parser.add_argument("--tiny", action="store_true", help="test with small models on a CPU")
    parser.add_argument("--print", action="store_true", help="only print the tables")
    parser.add_argument("--rank-in", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    succeeded = args.print or measure(args)
    for part in () if args.rank_in else args.part:
        print(f"\n{table(part, tables.read(file_of(args.folder, part)))}")
    sys.exit(0 if succeeded else 1)


@contextmanager
def random_clip(device: torch.device, tiny: bool) -> Iterator[None]:
    """Replace every CLIP with one of random weights and the image processing of the published CLIP."""
    tokenizer, network = random_models.clip(device, tiny)

    def pixels(name: str, size: int, offline: bool) -> ImageProcessor:
        return ImageProcessor.from_config({"size": size, "crop_size": size})

    with (
        mock.patch.object(clip, "load_clip", return_value=network),
        mock.patch.object(clip, "load_tokenizer", return_value=tokenizer),
        mock.patch.object(clip, "load_image_processor", pixels),
    ):
        yield


def measure(args: argparse.Namespace) -> bool:
    """Run the measurements, either as the main process or as one of the processes that it started."""
    if not args.tiny and not torch.cuda.is_available():
        print("There is no GPU here; give --tiny to test this benchmark with small models on the CPU.", file=sys.stderr)
        sys.exit(2)
    warnings.filterwarnings("ignore", module="torch")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.ERROR)
    if args.tiny:
        torch.set_num_threads(1)  # networks this small do not benefit from a second thread
    bench = Bench(args.tiny, f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    with random_clip(bench.device, args.tiny):
        if args.rank_in:
            for strategy in STRATEGIES:
                bench.fixed(SD15, f"{args.rank_in}/{strategy}", strategy=strategy, devices=2)
            return True
        if not args.tiny and torch.cuda.device_count() < 2 and "processes" in args.part:
            print("Two processes are not measured, as this machine has only one GPU.")
        print(f"{bench.name}, torch {torch.__version__}, matrix product {bench.product:.0f} TFLOP/s", flush=True)
        return run(bench, [cell for cell in plan(bench) if cell.part in args.part], args.folder, args.minutes)


if __name__ == "__main__":
    main()
