"""Test whether interrupted searches find the same prompts as uninterrupted ones: `python benchmarks/interruptions.py`.

Fifty searches are killed at random times (SIGKILL), ten get SIGTERM, and in five with two processes under torchrun one
process is killed. Each is resumed by the same command. Existing rows are not measured again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import jobs
import tables

FIGURES = jobs.FIGURES / "interruptions.csv"
COUNTS = {"SIGKILL": 50, "SIGTERM": 10, "a rank killed": 5}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "3", "--")


def main() -> None:
    """Measure what is missing, draw the plot and print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    done = tables.read(FIGURES)
    with tempfile.TemporaryDirectory() as scratch:
        whole: dict[tuple[str, bool], tuple[float, list[dict[str, Any]]]] = {}
        for kind, count in COUNTS.items():
            for number in range(sum(row["kind"] == kind for row in done), count):
                method = list(jobs.METHODS)[number % len(jobs.METHODS)]
                ranks = kind == "a rank killed"
                if (method, ranks) not in whole:
                    whole[method, ranks] = unbroken(method, ranks, Path(scratch))
                tables.add(FIGURES, [interrupted(kind, number, method, *whole[method, ranks], Path(scratch))])
    plot(tables.read(FIGURES))
    print(table(tables.read(FIGURES)))


def unbroken(method: str, ranks: bool, scratch: Path) -> tuple[float, list[dict[str, Any]]]:
    """Run a search without interruption; return its seconds and results."""
    begun, run = time.perf_counter(), scratch / f"{method}-{ranks}"
    jobs.finish(jobs.start(jobs.command(method, scratch, run), TORCHRUN if ranks else ()))
    return time.perf_counter() - begun, jobs.results(run)


def interrupted(
    kind: str, number: int, method: str, seconds: float, expected: list[dict[str, Any]], scratch: Path
) -> dict[str, Any]:
    """Interrupt a search at a given time, resume it, and compare the results."""
    run = scratch / f"{kind}-{number}"
    moment = random.Random(f"{kind}{number}").uniform(0.1, 1) * seconds
    args, ranks = jobs.command(method, scratch, run, "--ckpt_path", "last"), kind == "a rank killed"
    process = jobs.start(args, TORCHRUN if ranks else ())
    time.sleep(moment)
    broken, reached = 0, process.poll() is None
    if ranks and reached:
        reached = kill_rank(process.pid)
        jobs.finish(process)
    elif reached:
        os.killpg(process.pid, getattr(signal, kind))
        process.communicate()
        broken = len([file for file in jobs.unreadable(run) if not file.endswith(".tmp")])  # as other readers see it
        jobs.finish(jobs.start(args))
    else:
        jobs.finish(process)
    return {
        "kind": kind, "method": method, "moment": moment / seconds, "reached": int(reached), "code": process.returncode,
        "identical": int(jobs.results(run) == expected), "unreadable": broken + len(jobs.unreadable(run)),
    }  # fmt: skip


def kill_rank(agent: int) -> bool:
    """Kill the second process that torchrun started; return whether there was one."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environ = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == agent and b"RANK=1" in environ:
            os.kill(int(entry.name), signal.SIGKILL)
            return True
    return False


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table with one line per kind of interruption."""
    lines = [
        "| interruption | searches | stopped before their end | identical results | unreadable files |",
        "|---|---|---|---|---|",
    ]
    for kind in COUNTS:
        some = [row for row in rows if row["kind"] == kind]
        sums = (sum(int(row[name]) for row in some) for name in ("reached", "identical", "unreadable"))
        lines.append(f"| {kind} | {len(some)} | " + " | ".join(map(str, sums)) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]]) -> None:
    """Plot when each search was interrupted, and whether its results were identical."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 2.6))
    kinds = list(COUNTS)
    for method in jobs.METHODS:
        some = [row for row in rows if row["method"] == method and row["identical"]]
        places = [kinds.index(row["kind"]) + 0.1 * (list(jobs.METHODS).index(method) - 2) for row in some]
        axis.scatter([100 * row["moment"] for row in some], places, s=18, label=method)
    others = [row for row in rows if not row["identical"]]
    axis.scatter(
        [100 * row["moment"] for row in others],
        [kinds.index(row["kind"]) for row in others],
        c="red",
        marker="x",
        label="not identical",
    )
    axis.set(
        xlabel="% of the time of an uninterrupted search",
        xlim=(0, 100),
        yticks=range(len(kinds)),
        yticklabels=kinds,
        title="Searches that were interrupted and resumed",
    )
    axis.invert_yaxis()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(jobs.ROOT / "docs" / "images" / "interruptions.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
