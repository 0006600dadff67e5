"""Several processes give the results of one, whether they divide the problems or the samples of every call."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from inputs import noise
from ranks import FORKS, ROOT, run_ranks

from lightning_prompts.sampling import Microbatch

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SAMPLES = "--data.num_noise_samples 3 --data.num_validation_samples 5"
METHODS = {  # odd numbers of samples and seeds, so that the last call of a step is smaller
    "ph2p": (
        f"--model.restart_every 3 --model.score_every_n_steps 2 --model.microbatch 4 --model.steps 8 {SAMPLES}"
    ).split(),
    "ph2p_lbfgs": f"--model.microbatch 2 --model.steps 3 {SAMPLES}".split(),
    "invert": (
        "--model.init random --model.loss_weights.clip 0.5 --model.rerank.weight 0.5 "
        "--model.rerank.num_inference_steps 2 --model.rerank.images 3 --model.candidates 5 --model.prefilter 1 "
        f"--model.microbatch 4 --model.steps 3 {SAMPLES}"
    ).split(),
    "textual_inversion": f"--model.microbatch 2 --model.steps 3 {SAMPLES}".split(),
    "dpo_diff": (
        "--model.schedule fix-1 --model.gradient_share 0.3 --model.seeds 3 --model.budget 8 "
        "--model.sampler.guidance_scale 2 --model.microbatch 4"
    ).split(),
    "metric_guidance": (
        "--model.objective ClipText --model.seeds 3 --model.steps 4 --model.microbatch 4 --model.optimizer SGD "
        "--model.optimizer.lr 0.1"
    ).split(),
    "seed_invariance": "--model.seeds 3 --model.steps 2 --model.seeds_per_step 3 --model.microbatch 4".split(),
}
STEERED = ("dpo_diff", "metric_guidance", "seed_invariance")
DEFAULT = ("ph2p",)  # the other methods are slow
REDUNDANT = ("ph2p_lbfgs", "textual_inversion")  # left out of `make test-exact`, since other tests make the same calls


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Write three images and three prompts, an odd number, so that one rank has more problems than the other."""
    folder = tmp_path_factory.mktemp("inputs")
    for i in range(3):
        noise(32, 32, seed=i).save(folder / f"{i}.png")
    (folder / "prompts.txt").write_text("a red cat\ntwo dogs beside a tree\na small square\n")
    return folder


def arguments(tiny, inputs, run, method, *extra):
    given = ["--data.prompts", str(inputs / "prompts.txt")] if method in STEERED else ["--data.images", str(inputs)]
    command = [
        "train.py",
        "fit",
        "--config",
        f"configs/{method}.yaml",
        *given,
        "--run",
        str(run),
        "--model.backbone",
        str(tiny),
    ]
    return [
        *command,
        "--model.sampler.num_inference_steps",
        "2",
        "--trainer.accelerator",
        "cpu",
        *METHODS[method],
        *extra,
    ]


def fit(*args, ranks=1, launcher="torchrun", rounding=False):
    """Run a search with a number of processes and return its problems, see `run_ranks`."""
    run = Path(args[args.index("--run") + 1])
    codes = run_ranks(args[1:], run.with_suffix(".log"), ranks, launcher, rounding)
    assert codes == [0] * ranks, run.with_suffix(".log").read_text()[-3000:]
    return results_of(run)


def results_of(run):
    problems = json.loads((Path(run) / "result.json").read_text())["problems"]
    return [{name: value for name, value in problem.items() if name != "seconds"} for problem in problems]


@pytest.fixture(scope="module")
def alone(tiny, inputs, tmp_path_factory):
    """Return the results of a method in a single process."""
    results = {}

    def run(method):
        if method not in results:
            results[method] = fit(*arguments(tiny, inputs, tmp_path_factory.mktemp("alone") / "run", method))
        return results[method]

    return run


def marks(method):
    """Return the marks that decide when a test of a method runs."""
    exact = [] if method in REDUNDANT else [pytest.mark.exact]
    return exact if method in DEFAULT else [*exact, pytest.mark.slow]


@pytest.mark.parametrize("method", [pytest.param(name, marks=marks(name)) for name in METHODS])
def test_ranks_that_share_samples_equal_one_process_exactly(method, tiny, inputs, tmp_path):
    """With at least one microbatch per rank, all ranks both make the calls of a single process."""
    one = fit(*arguments(tiny, inputs, tmp_path / "one", method), rounding=True)
    two = arguments(tiny, inputs, tmp_path / "two", method, "--trainer.strategy", "samples")
    assert fit(*two, ranks=2, rounding=True) == one
    assert [path.name.split("-")[0] for path in (tmp_path / "two" / "checkpoints").iterdir()] == ["rank0"] * 2


def answer(some):
    """Return a value that depends on the shape of the call, structured like a score."""
    size = torch.full_like(some, len(some))
    return some + size / 64, {"numbers": some.view(-1, 1).expand(-1, 2)}, [size.bool(), None]


def share_samples(rank, ranks, port, results):
    """Run one rank: collect its results and calls for many numbers of samples and call sizes."""
    try:
        dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=ranks)
        result = {}
        for count in (1, 2, 3, 4, 5, 7, 9, 10, 11, 13, 17, 18):
            for size in (1, 3, 4):
                microbatch, calls = Microbatch(size), []
                microbatch.ranks = ranks

                def work(some, calls=calls, microbatch=microbatch):
                    calls.append(some.tolist())
                    # Ranks that are at different samples must not wait for each other.
                    own = microbatch.map(int(some[-1]) + 1, torch.clone)
                    assert own.tolist() == list(range(int(some[-1]) + 1))
                    return answer(some)

                value, more, (flags, none) = microbatch.map(count, work)
                assert none is None
                assert microbatch.ranks == ranks
                result[count, size] = calls, value.tolist(), more["numbers"].tolist(), flags.tolist(), str(flags.dtype)
        results.put((rank, result))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))


@pytest.mark.exact
def test_ranks_that_share_samples_make_the_calls_of_one_process():
    ranks = 3
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = FORKS.Queue()
    processes = [FORKS.Process(target=share_samples, args=(rank, ranks, port, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    actual = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert [one for one in actual.values() if isinstance(one, str)] == []
    for count, size in actual[0]:
        expected, calls = [], [one[count, size][0] for _, one in sorted(actual.items())]
        value, more, _ = Microbatch(size).map(count, lambda some, e=expected: e.append(some.tolist()) or answer(some))
        made = list(calls[0])
        for own in calls[1:]:
            if made[-1][-1] == count - 1:
                assert own == [[count - 1]]  # no sample is left for this rank
            else:
                made += own
        for _, numbers, *others in (one[count, size] for one in actual.values()):
            assert others == [more["numbers"].tolist(), [True] * count, "torch.bool"]
            assert [round(number) for number in numbers] == list(range(count))
            assert numbers == value.tolist() or -(-count // ranks) < size
        if -(-count // ranks) >= size:
            assert made == expected
        else:  # one call per rank, with equal numbers of samples
            assert [number for call in made for number in call] == list(range(count))
            assert {len(call) for call in made[:-1]} <= {-(-count // ranks)}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["invert", "dpo_diff", "metric_guidance"])
def test_ranks_that_share_problems_equal_one_process(method, tiny, inputs, alone, tmp_path):
    both = fit(*arguments(tiny, inputs, tmp_path / "two", method), ranks=2)  # the strategy is chosen
    for one, other in zip(both, alone(method), strict=True):
        assert (one["key"], one["prompt"], one["unet_samples"]) == (
            other["key"],
            other["prompt"],
            other["unet_samples"],
        )
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)
    assert {path.name.split("-")[0] for path in (tmp_path / "two" / "checkpoints").iterdir()} == {"rank0", "rank1"}
    lines = (tmp_path / "two" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [problem["key"] for problem in both]
    assert not list((tmp_path / "two").glob("results-rank*"))
    assert fit(*arguments(tiny, inputs, tmp_path / "two", method, "--ckpt_path", "last")) == both  # one process resumes


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ph2p", "metric_guidance"])
def test_ranks_with_less_than_a_microbatch_are_close_to_one_process(method, tiny, inputs, alone, tmp_path):
    """The samples are then divided evenly, so the calls are smaller."""
    how = ("--trainer.strategy", "samples", "--model.microbatch", "32")
    two = fit(*arguments(tiny, inputs, tmp_path / "two", method, *how), ranks=2)
    assert_close(two, alone(method))
    for one, other in zip(two, alone(method), strict=True):
        assert one["initial_validation_loss"] == pytest.approx(other["initial_validation_loss"], rel=1e-4)
        for name in ("metric_after", "fresh_metric_after") if method == "metric_guidance" else ():
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_ranks_started_by_slurm_equal_one_process(tiny, inputs, alone, tmp_path):
    both = fit(*arguments(tiny, inputs, tmp_path / "two", "ph2p"), ranks=2, launcher="srun")
    assert_close(both, alone("ph2p"))


@pytest.mark.slow
def test_ranks_may_take_different_numbers_of_steps(tiny, inputs, alone, tmp_path):
    """One rank has nothing to do; Lightning starts the ranks."""
    one = ("--data.images", str(inputs / "0.png"), "--trainer.devices", "2", "--trainer.strategy", "problems")
    process = start_search(*arguments(tiny, inputs, tmp_path / "two", "ph2p", *one))
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors[-3000:]
    (both,) = results_of(tmp_path / "two")
    assert both["prompt"] == alone("ph2p")[0]["prompt"]


def start_search(*args, launcher=()):
    """Start a search in its own process group, which can be killed as a whole."""
    return subprocess.Popen(
        [sys.executable, *launcher, *args], cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(done, process, seconds=200):
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.05)


def checkpoints(run, rank):
    return list((run / "checkpoints").glob(f"rank{rank}-*.ckpt"))


def assert_close(some, others):
    for one, other in zip(some, others, strict=True):
        assert (one["key"], one["prompt"], one["unet_samples"]) == (
            other["key"],
            other["prompt"],
            other["unet_samples"],
        )
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)


@pytest.mark.slow
def test_other_number_of_ranks_resumes_a_killed_run(tiny, inputs, alone, tmp_path):
    run = tmp_path / "run"
    how = arguments(tiny, inputs, run, "ph2p", "--trainer.strategy", "problems", "--ckpt_path", "last")
    process = start_search(*how, "--trainer.devices", "2")
    wait_for(lambda: checkpoints(run, 0) and checkpoints(run, 1), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert_close(fit(*how, ranks=3), alone("ph2p"))


@pytest.mark.slow
def test_restarted_rank_loses_nothing(tiny, inputs, alone, tmp_path):
    """No --ckpt_path is needed, since torchrun sets a variable in restarted processes."""
    run = tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1", "--")
    process = start_search(*arguments(tiny, inputs, run, "ph2p", "--trainer.strategy", "problems"), launcher=torchrun)
    wait_for(lambda: checkpoints(run, 0) and checkpoints(run, 1), process)
    (pid,) = process_of_rank(process.pid, 1)
    os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors[-3000:]
    assert_close(results_of(run), alone("ph2p"))


@pytest.mark.slow
def test_ranks_that_share_samples_stop_together(tiny, inputs, tmp_path):
    """Any rank may get the signal; if ranks stopped at different steps, they would wait for each other forever."""
    run = tmp_path / "run"
    how = arguments(
        tiny, inputs, run, "ph2p", "--trainer.strategy", "samples", "--ckpt_path", "last", "--model.steps", "400"
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--")
    process = start_search(*how, launcher=torchrun)
    wait_for(lambda: checkpoints(run, 0), process)
    (pid,) = process_of_rank(process.pid, 1)
    os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert [json.loads(file.read_text())["status"] for file in (run / "problems").glob("*.json")] == ["open"] * 3


def process_of_rank(agent, rank):
    """Return the process of a rank that torchrun started."""
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == agent and f"RANK={rank}".encode() in environment:
            yield int(entry.name)
