"""The GPU benchmark works, as far as a CPU can show."""

import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import round_trip, token_lists
from lightning_prompts.errors import UserError
from lightning_prompts.objectives import ClipSimilarity
from lightning_prompts.objectives.clip import default_clip
from lightning_prompts.sampling import OUT_OF_MEMORY

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("benchmarks")]


@pytest.fixture
def gpu():
    import gpu

    return gpu


@pytest.fixture
def call(gpu, monkeypatch, tmp_path, capsys):
    """Run the command in this process; return its exit code and output."""

    def main(*args):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--folder", str(tmp_path), *args])
        with pytest.raises(SystemExit) as end:
            gpu.main()
        return end.value.code, *capsys.readouterr()

    return main


def rows_of(folder, part):
    import tables

    return tables.read(folder / f"gpu_{part}.csv")


@pytest.mark.parametrize(("kind", "size", "end"), [("clip", 49408, 49407), ("t5", 32128, 1)])
def test_tokenizers_have_the_published_sizes_and_round_trip(kind, size, end, tmp_path):
    import memory

    tokenizer = getattr(memory, f"{kind}_tokenizer")()
    assert len(tokenizer) == len(tokenizer.get_vocab()) == size
    assert tokenizer.eos_token_id == end
    tokens = torch.arange(600, size - 2)  # after letters, bytes and special tokens
    prompts = tokens[torch.randperm(len(tokens))[:4000]].view(-1, 8)
    _, survives = round_trip(tokenizer, prompts)
    assert survives.all()
    (ids,) = token_lists(tokenizer, ["red dog blurry"])
    assert len(ids) > 3  # longer words are spelled
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert token_lists(again, ["red dog blurry"], add_special_tokens=True) == [
        *token_lists(tokenizer, ["red dog blurry"], add_special_tokens=True)
    ]


def test_models_are_built_in_bfloat16_with_the_same_weights_each_time():
    import memory
    import random_models

    for build in random_models.TINY.values():
        model, other = (random_models.backbone(build, torch.device("cpu")) for _ in range(2))
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert not any(weight.requires_grad for weight in model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        expected = getattr(model.scheduler, "alphas_cumprod", torch.empty(0))
        if model.prediction_type != "flow_prediction":
            assert torch.equal(model.alphas_cumprod, expected.float())
        assert model.alphas_cumprod.dtype == torch.float32
        assert torch.get_default_dtype() == torch.float32
        encoded = model.encode_text(["a red dog"])
        assert encoded.isfinite().all()
        assert encoded.std() > 0
        empty = memory.on_meta(build)  # models whose memory is counted
        assert memory.weights(empty) == memory.weights(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["SDXL", "FLUX.1 dev"])
def test_throughput_of_searches_and_plain_loops_is_measured(family, gpu, call, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WORK", {family: gpu.TINY_WORK})
    code, output, _ = call("--tiny", "--part", "throughput")
    rows = rows_of(tmp_path, "throughput")
    assert [row["what"] for row in rows] == list(gpu.cases(gpu.TINY_WORK, False))
    assert code == 0
    for row in rows:
        assert row["model"] == family
        assert min(row["search"], row["plain"], row["teraflops"], row["product"], row["peak"]) > 0
        assert row["ratio"] == pytest.approx(row["search"] / row["plain"], rel=1e-3)
        assert row["share"] == pytest.approx(row["teraflops"] / row["product"], rel=0.1)  # both have six decimals
    assert gpu.table("throughput", rows) in output
    again, output, _ = call("--tiny", "--part", "throughput")  # nothing is left to measure
    assert (again, rows_of(tmp_path, "throughput")) == (0, rows)
    assert "measured in" not in output


@pytest.fixture
def bench(gpu):
    """Measure on the CPU, with a CLIP in place."""
    bench = gpu.Bench(tiny=True)
    with gpu.random_clip(bench.device, True):
        yield bench


def test_plain_loop_processes_as_many_samples_as_the_search(gpu, bench, tmp_path):
    model = bench.model(gpu.SD15)
    for name, case in gpu.cases(gpu.TINY_WORK, False).items():
        steps = []

        class Recording(gpu.Clock):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, steps=steps):
                super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
                steps.append([problem.unet_samples for problem in pl_module.batch.records])

        method = gpu.search(model, case, 10**9, str(tmp_path / name), Recording(bench.device, 0))
        (before, *_), (after, *_) = steps[1:3]
        assert next(case.plain(method)) == after - before, name


def test_counted_operations_are_those_of_denoiser_and_text_encoder(gpu, bench, tmp_path):
    import speed

    model, case, clock = bench.model(gpu.SD15), gpu.cases(gpu.TINY_WORK, False)["PH2P"], gpu.Clock(bench.device, 0)
    gpu.search(model, case, 10**9, str(tmp_path), clock)
    alone = speed.flops(speed.gradient(model, 2, microbatch=2)) / (2 * 2 * speed.SAMPLES)
    assert clock.operations == pytest.approx(alone, rel=1e-6)


def test_memory_is_counted_and_measured(gpu, bench):
    import memory

    model = bench.model(gpu.SD15)
    rows = {what: bench.memory(gpu.SD15, what) for what in gpu.MEMORY}
    assert rows["weights"]["counted"] * memory.GIB == sum(weight.nbytes for weight in model.parameters())
    with memory.fused_attention():
        counted = [row["counted"] * memory.GIB for row in rows.values()][1:]
        assert counted == memory.activations(memory.on_meta(bench.models[gpu.SD15]))
    assert rows["a call"]["counted"] > rows["a call, checkpointed"]["counted"] > 0
    assert not bench.model(gpu.SD15).denoiser.is_gradient_checkpointing


@pytest.mark.slow
def test_compiled_gradients_are_equal_and_the_model_is_restored(gpu, bench):
    row = bench.compiled(gpu.FLUX, "repeated blocks")
    assert row["difference"] < 0.02
    assert row["first"] > 0
    assert row["ratio"] == pytest.approx(row["compiled"] / row["plain"])
    assert all(module._compiled_call_impl is None for module in bench.model(gpu.FLUX).modules())


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(gpu, bench):
    for strategy in gpu.STRATEGIES:
        row = bench.two_processes(gpu.SD15, strategy)
        assert (row["prompts"], row["same_prompts"]) == (2, 2)
        assert float(row["largest_difference"]) < 1e-2


def test_measurement_without_time_left_is_made_by_the_next_call(gpu, bench, tmp_path, capsys):
    cells = [
        gpu.Cell("memory", "a model", "weights", 60, lambda *args: {"counted": 1.0, "measured": 2.0, "ratio": 2.0})
    ]
    assert gpu.run(bench, cells, tmp_path, minutes=0.9)
    assert capsys.readouterr().out == "a model, memory, weights: not measured: no time left\n"
    assert not rows_of(tmp_path, "memory")
    assert gpu.run(bench, cells, tmp_path, minutes=1.1)
    assert [row["ratio"] for row in rows_of(tmp_path, "memory")] == [2.0]


@pytest.mark.slow
def test_failed_measurement_does_not_affect_the_others(gpu, bench, tmp_path, capsys):
    measured = []

    def measure(name, what):
        measured.append(name)
        if name == "slow":
            time.sleep(60)
        if name in problems:
            raise problems[name]
        return {"counted": 1.0, "measured": 2.0, "ratio": 2.0}

    problems = {
        "large": torch.OutOfMemoryError("CUDA out of memory."),
        "larger": UserError(OUT_OF_MEMORY),
        "broken": ValueError("something else"),
    }
    limits = {"slow": 0.2, "large": 60, "larger": 60, "broken": 60, "sound": 60}
    cells = [gpu.Cell("memory", name, "weights", limit, measure) for name, limit in limits.items()]
    assert not gpu.run(bench, cells, tmp_path, minutes=5)
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "slow, memory, weights: not measured: no time left of its 0 s",
        "large, memory, weights: out of memory",
        "larger, memory, weights: out of memory",
        "broken, memory, weights: failed",
        "sound, memory, weights: measured in 0 s",
    ]
    assert "something else" in output.err
    rows = rows_of(tmp_path, "memory")
    assert [(row["model"], row["ratio"]) for row in rows] == [
        ("large", "out of memory"), ("larger", "out of memory"), ("sound", 2.0)
    ]  # fmt: skip
    assert "| CPU, tiny | large | weights | out of memory | out of memory | out of memory |" in gpu.table(
        "memory", rows
    )
    gpu.run(bench, cells, tmp_path, minutes=5)  # retries measurements that may succeed
    assert measured == [*limits, "slow", "broken"]


def test_search_without_time_left_writes_no_row(gpu, bench, tmp_path, capsys):
    bench.seconds = 60.0  # seconds for the search, of which the cell gets one
    cells = [gpu.Cell("throughput", gpu.SD15, "PH2P", 1, bench.throughput)]
    assert gpu.run(bench, cells, tmp_path, minutes=5)
    assert "no time left of its 1 s" in capsys.readouterr().out
    bench.seconds = 0.01
    assert gpu.run(bench, [cells[0]._replace(limit=60)], tmp_path, minutes=5)
    assert rows_of(tmp_path, "throughput")[0]["search"] > 0


def test_missing_gpu_is_reported(call, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output, error = call()
    assert (code, output) == (2, "")
    assert error == "There is no GPU here; give --tiny to test this benchmark with small models on the CPU.\n"
    assert not list(tmp_path.iterdir())


def test_one_gpu_leaves_out_two_processes(gpu, bench, call, monkeypatch):
    bench.tiny, bench.product, devices = False, 1.0, 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert {cell.part for cell in gpu.plan(bench)} == {"throughput", "memory", "compile"}
    monkeypatch.setattr(gpu, "Bench", lambda tiny, device: bench)
    monkeypatch.setattr(gpu.random_models, "clip", lambda device, tiny: (None, None))
    code, output, _ = call("--part", "processes")
    assert code == 0
    assert output.splitlines()[:2] == [
        "Two processes are not measured, as this machine has only one GPU.",
        f"CPU, tiny, torch {torch.__version__}, matrix product 1 TFLOP/s",
    ]
    devices = 2
    assert [cell.what for cell in gpu.plan(bench) if cell.part == "processes"] == ["problems", "samples"]


def test_model_written_for_memory_can_be_loaded(tmp_path, monkeypatch):
    import memory
    import random_models

    monkeypatch.setitem(memory.MODELS, "Stable Diffusion 1.5", random_models.TINY["Stable Diffusion 1.5"])
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(memory, "VIT_L", {**small, "image_size": 32, "patch_size": 8})
    memory.write_model(tmp_path)
    model = load_backbone(str(tmp_path / "model"), "bfloat16")
    clip = ClipSimilarity(default_clip(model))
    ids = clip.encode(["a red dog"])
    assert ids[0].tolist() == token_lists(model.vocabulary.tokenizer, ["a red dog"], add_special_tokens=True)[0]
    assert clip.vocab_size == len(model.vocabulary.table)
    assert clip.text_features(ids).isfinite().all()
