"""Measure large jobs: `python benchmarks/large_jobs.py scaling`, then `... processes`.

`scaling` measures the cost of many images, and `processes` the speedup by a second process. `processes` alternates
between the cases and needs a machine on which nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import jobs
import tables

COUNTS = (10, 100, 1000)
ROUNDS = 3
NUM_IMAGES = 32  # for two processes with batches of 16, as in a large job
SHORT = ("--model.steps", "4", "--data.num_noise_samples", "2", "--data.num_validation_samples", "4",
         "--model.score_every_n_steps", "4",
         "--model.sampler.num_inference_steps", "2", "--model.restart_every", "0", "--model.log_images_every_n_steps",
         "0")  # fmt: skip
LONG = ("--model.steps", "120", "--model.restart_every", "30", "--model.log_images_every_n_steps", "0")


def search(scratch: Path, count: int, name: str, *settings: str) -> tuple[float, float, list[dict[str, Any]]]:
    """Search this many images; return the seconds, the peak memory of the first process in MB, and the results."""
    inputs, run = jobs.write_images(scratch / f"images{count}", count), scratch / name
    args = ["train.py", "fit", "--config", "configs/ph2p.yaml", "--data.images", str(inputs), "--run", str(run),
            "--trainer.accelerator", "cpu", *settings]  # fmt: skip
    begun, process, most = time.perf_counter(), jobs.start(args), 0.0
    while process.poll() is None:
        most = max(most, memory(process.pid))
        time.sleep(0.2)
    seconds = time.perf_counter() - begun
    jobs.finish(process)
    return seconds, most, jobs.results(run)


def memory(pid: int) -> float:
    """Return the peak memory of a process so far, in MB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just finished
        return 0.0
    return int(status.split("VmHWM:")[1].split()[0]) / 1024 if "VmHWM:" in status else 0.0


def scaling(scratch: Path) -> None:
    """Measure one process with one thread."""
    done = [row["images"] for row in tables.read(FIGURES["scaling"])]
    for count in COUNTS:
        if count not in done:
            seconds, most, found = search(scratch, count, f"run{count}", *SHORT)
            samples = sum(problem["unet_samples"] for problem in found)
            row = {"images": count, "results": len(found), "samples": samples, "seconds": seconds, "megabytes": most}
            tables.add(FIGURES["scaling"], [row])


def processes(scratch: Path) -> None:
    """Measure one process and two, with one thread each, in turns."""
    for number in range(len(tables.read(FIGURES["processes"])) // 2, ROUNDS):
        for count in (1, 2):
            seconds, _, _ = search(scratch, NUM_IMAGES, f"{count}-{number}", *LONG, "--trainer.devices", str(count))
            # The processes do not share the loading of the model, which takes a larger part of the time here than in a
            # large job.
            problems = json.loads((scratch / f"{count}-{number}" / "result.json").read_text())["problems"]
            longest = max(sum(problem["seconds"] for problem in problems[rank::count]) for rank in range(count))
            samples = sum(problem["unet_samples"] for problem in problems)
            row = {"processes": count, "search": longest, "whole": seconds, "samples": samples}
            tables.add(FIGURES["processes"], [row])


FIGURES = {name: jobs.FIGURES / f"large_jobs_{name}.csv" for name in ("scaling", "processes")}
MEASURE = {"scaling": scaling, "processes": processes}


def scaling_table(rows: list[dict[str, Any]]) -> str:
    """Return a table with one line per number of images."""
    lines = ["| images | seconds | seconds per further image | memory, MB |", "|---|---|---|---|"]
    for before, row in zip([None, *rows], rows, strict=False):
        more = (row["seconds"] - before["seconds"]) / (row["images"] - before["images"]) if before else None
        cells = (
            f"{row['images']:.0f}",
            f"{row['seconds']:.0f}",
            f"{more:.3f}" if more else "",
            f"{row['megabytes']:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def processes_table(rows: list[dict[str, Any]]) -> str:
    """Return a table with one line per number of processes, with the medians of the rounds."""
    lines = [
        "| processes, one thread each | seconds of the search | speedup | seconds of the whole command |",
        "|---|---|---|---|",
    ]
    search, whole = (
        {count: median(row[name] for row in rows if row["processes"] == count) for count in (1, 2)}
        for name in ("search", "whole")
    )
    lines += [f"| {n} | {search[n]:.0f} | {search[1] / search[n]:.2f} | {whole[n]:.0f} |" for n in (1, 2)]
    return "\n".join(lines)


def plot_scaling(rows: list[dict[str, Any]]) -> None:
    """Plot seconds and memory against the number of images."""
    from matplotlib import pyplot as plt

    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(8, 3))
    counts = [row["images"] for row in rows]
    time_axis.loglog(counts, [row["seconds"] for row in rows], "o-")
    time_axis.set(xlabel="images", ylabel="seconds", title="time, one thread")
    memory_axis.semilogx(counts, [row["megabytes"] for row in rows], "o-")
    memory_axis.set(xlabel="images", ylabel="MB", title="peak memory", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(jobs.ROOT / "docs" / "images" / "large_jobs.png", dpi=110)


def plot_processes(rows: list[dict[str, Any]]) -> None:
    """Plot the speedup by two processes in each round."""
    from matplotlib import pyplot as plt

    one, two = ([row["search"] for row in rows if row["processes"] == count] for count in (1, 2))
    figure, axis = plt.subplots(figsize=(4, 3))
    axis.bar([str(number + 1) for number in range(len(two))], [a / b for a, b in zip(one, two, strict=True)])
    axis.axhline(2, color="grey", linestyle=":")
    axis.set(xlabel="round", ylabel="speedup", title="two processes against one", ylim=(0, 2.2))
    figure.tight_layout()
    figure.savefig(jobs.ROOT / "docs" / "images" / "processes.png", dpi=110)


PLOTS = {"scaling": plot_scaling, "processes": plot_processes}
TABLES = {"scaling": scaling_table, "processes": processes_table}


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=list(MEASURE))
    what = parser.parse_args().what
    with tempfile.TemporaryDirectory() as scratch:
        MEASURE[what](Path(scratch))
    rows = tables.read(FIGURES[what])
    PLOTS[what](rows)
    print(TABLES[what](rows))


if __name__ == "__main__":
    main()
