"""Test whether two machines give the results of one process: `python benchmarks/two_machines.py`.

This needs root on Linux. The machines are network namespaces with a virtual cable between them, each with its own
torchrun; the processes connect with gloo.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jobs
import tables

FIGURES = jobs.FIGURES / "two_machines.csv"
METHODS = ("PH2P", "DPO-Diff", "MetricGuidance")
WAYS = ("two processes", "two machines")
STRATEGIES = ("problems", "samples")
MICROBATCH = ("--model.microbatch", "4")
NAMES, ADDRESSES = ("first", "second"), ("10.77.0.1", "10.77.0.2")


def main() -> None:
    """Measure what is missing and print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    done = [(row["method"], row["way"], row["strategy"]) for row in tables.read(FIGURES)]
    with tempfile.TemporaryDirectory() as scratch:
        connect()
        try:
            for method in METHODS:
                left = [(way, how) for way in WAYS for how in STRATEGIES if (method, way, how) not in done]
                if left:
                    one = Path(scratch) / method
                    jobs.finish(jobs.start(jobs.command(method, Path(scratch), one, *MICROBATCH)))
                for way, strategy in left:
                    run = Path(scratch) / f"{method}-{way}-{strategy}"
                    args = jobs.command(method, Path(scratch), run, *MICROBATCH, "--trainer.strategy", strategy)
                    search(way, args)
                    compared = compare(jobs.results(one), jobs.results(run))
                    tables.add(FIGURES, [{"method": method, "way": way, "strategy": strategy, **compared}])
        finally:
            disconnect()
    plot(tables.read(FIGURES))
    print(table(tables.read(FIGURES)))


def search(way: str, args: list[str]) -> None:
    """Search with two processes, on one machine or on two."""
    if way == "two processes":
        jobs.finish(jobs.start([*args, "--trainer.devices", "2"]))
        return
    processes = []
    for number, name in enumerate(NAMES):
        torchrun = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(number),
                    "--master_addr", ADDRESSES[0], "--master_port", "29511", "--")  # fmt: skip
        inside = ("ip", "netns", "exec", name)
        processes.append(jobs.start(args, torchrun, inside, GLOO_SOCKET_IFNAME=f"to-{name}"))
    for process in processes:
        jobs.finish(process)


def compare(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the prompts and losses of two results."""
    pairs = list(zip(one, other, strict=True))
    losses = [abs(b["validation_loss"] / a["validation_loss"] - 1) for a, b in pairs]
    return {
        "prompts": len(pairs),
        "same_prompts": sum(_texts(a) == _texts(b) for a, b in pairs),
        "largest_difference": f"{max(losses):.1e}",
        "identical": int(one == other),
    }


def _texts(problem: dict[str, Any]) -> tuple[str, str | None]:
    return problem["prompt"], problem.get("negative_prompt")


def connect() -> None:
    """Create two network namespaces with a virtual cable between them."""
    disconnect()
    for name in NAMES:
        _ip("netns", "add", name)
    _ip("link", "add", "to-first", "netns", "first", "type", "veth", "peer", "name", "to-second", "netns", "second")
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", f"to-{name}")
        for device in (f"to-{name}", "lo"):
            _ip("-n", name, "link", "set", device, "up")


def disconnect() -> None:
    """Delete the network namespaces."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table with one line per method and setup."""
    lines = [
        "| method | processes | strategy | same prompts as one process | largest relative difference of a loss | "
        "everything identical |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = f"{row['same_prompts']:.0f} of {row['prompts']:.0f}"
        cells = (
            row["method"],
            row["way"],
            row["strategy"],
            same,
            f"{float(row['largest_difference']):.0e}",
            "yes" if row["identical"] else "no",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]]) -> None:
    """Plot the differences of the losses from those of one process."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 2.6))
    lines = [(way, strategy) for way in WAYS for strategy in STRATEGIES]
    for method in METHODS:
        some = [row for row in rows if row["method"] == method]
        places = [lines.index((row["way"], row["strategy"])) + 0.15 * (METHODS.index(method) - 1) for row in some]
        axis.scatter([float(row["largest_difference"]) for row in some], places, s=24, label=method)
    axis.axvline(0.01, color="grey", linestyle=":")
    axis.set_xscale("symlog", linthresh=1e-8)
    axis.set(xlabel="largest relative difference of a loss; the line is at 1%", xlim=(-1e-9, 0.1),
             yticks=range(len(lines)),
             yticklabels=[f"{way}, {strategy}" for way, strategy in lines],
             title="Two processes against one")  # fmt: skip
    axis.invert_yaxis()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(jobs.ROOT / "docs" / "images" / "two_machines.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
