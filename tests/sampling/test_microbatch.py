"""When memory runs out, calls get smaller and results stay the same."""

import logging

import pytest
import pytorch_lightning as pl
import torch

from lightning_prompts.backbones import load_backbone
from lightning_prompts.backbones.vocabulary import encode_text
from lightning_prompts.engine.checkpoint import PromptCheckpoint, last_checkpoint
from lightning_prompts.engine.prompts import Prompts
from lightning_prompts.errors import UserError
from lightning_prompts.methods import TRAINER, MetricGuidance
from lightning_prompts.objectives import Denoising, Sharpness
from lightning_prompts.runs.record import Problem
from lightning_prompts.sampling import Microbatch, SamplerSettings, out_of_memory


def with_memory_for(most, work):
    """Return a function that runs out of memory with more than `most` samples."""

    def done(some):
        if len(some) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return work(some)

    return done


@pytest.mark.parametrize(
    ("size", "most", "final", "warnings"),
    [(16, 16, 16, 0), (16, 5, 4, 2), (3, 1, 1, 1), (100, 20, 11, 1), (1, 1, 1, 0)],
)
def test_every_sample_is_processed_once(size, most, final, warnings, caplog):
    microbatch = Microbatch(size)
    given, sizes = microbatch.map(
        23, with_memory_for(most, lambda some: (some, {"size": torch.full_like(some, len(some))}))
    )
    assert given.tolist() == list(range(23))
    assert microbatch.size == final
    assert int(sizes["size"].max()) <= most
    assert len(caplog.records) == warnings


def test_reduced_size_is_kept(caplog):
    microbatch = Microbatch(8)
    microbatch.map(8, with_memory_for(2, torch.clone))
    caplog.clear()
    assert microbatch.map(8, with_memory_for(2, torch.clone)).tolist() == list(range(8))
    assert caplog.records == []


def test_size_is_fitted_to_the_memory(caplog):
    caplog.set_level(logging.WARNING)
    microbatch = Microbatch(None)
    for count in (23, 50, 7):
        assert microbatch.map(count, with_memory_for(6, torch.clone)).tolist() == list(range(count))
    assert (microbatch.size, microbatch.most) == (5, 5)
    assert [record.message for record in caplog.records] == [
        "The memory does not hold 23 samples at once; continuing with 11.",
        "The memory does not hold 11 samples at once; continuing with 5.",
    ]


def test_fitted_size_is_kept_when_a_search_resumes(tiny, tmp_path, monkeypatch):
    """The CPU stands in for a device that reports when its memory is full."""
    monkeypatch.setattr("lightning_prompts.engine.method.NO_OOM_DEVICES", ())
    data = {"prompts": ["a red cat", "two dogs"]}
    sizes = []
    for path, steps in ((None, 2), ("last", 4)):
        module = MetricGuidance(
            backbone=tiny,
            microbatch=None,
            sampler=SamplerSettings(2),
            objective=Sharpness(),
            seeds=4,
            steps=steps,
            log_images_every_n_steps=0,
        )
        if path is None:
            too_small(monkeypatch, module.backbone, 6)
        else:
            path = last_checkpoint(tmp_path / "checkpoints")
        checkpoint = PromptCheckpoint(tmp_path / "checkpoints")
        trainer = pl.Trainer(
            **TRAINER
            | {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path, "enable_checkpointing": True},
            callbacks=[checkpoint],
        )
        trainer.fit(module, datamodule=Prompts(**data), ckpt_path=path)
        sizes.append(module.microbatch.size)
    assert sizes == [2, 2]


def test_memory_too_small_for_one_sample_is_an_error():
    with pytest.raises(UserError, match=r"out of memory; lower --model\.microbatch"):
        Microbatch(4).map(4, with_memory_for(0, torch.clone))


def test_other_errors_are_raised():
    def wrong(some):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    microbatch = Microbatch(4)
    with pytest.raises(RuntimeError, match="mat1"):
        microbatch.map(4, wrong)
    assert microbatch.size == 4


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA error: out of memory", True),  # of the driver, not a torch.OutOfMemoryError
        ("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to", True),
        ("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to", True),
        ("MPS backend out of memory (MPS allocated: 8 GB)", True),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if", True),  # from too little workspace memory
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_out_of_memory_errors_are_recognized(message, is_memory):
    assert out_of_memory(RuntimeError(message)) == is_memory
    assert not out_of_memory(ValueError(message))


def test_failed_allocation_on_the_cpu_reduces_the_size():
    def too_much(some):
        return torch.empty(2**62 if len(some) > 2 else 1, dtype=torch.uint8)

    microbatch = Microbatch(4)
    assert microbatch.map(4, too_much).shape == (2,)
    assert microbatch.size == 2


def too_small(monkeypatch, backbone, most):
    """Make the denoiser run out of memory in larger calls, alternately before and after its work."""
    denoise, sizes = backbone.denoise, []

    def limited(noisy, *args):
        sizes.append(len(noisy))
        if len(noisy) > most and len(sizes) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        output = denoise(noisy, *args)
        if len(noisy) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return output

    monkeypatch.setattr(backbone, "denoise", limited)
    return sizes


@pytest.mark.parametrize("size", [1, 3, 7, None])
def test_values_and_gradients_equal_those_of_one_call(size):
    torch.manual_seed(0)
    x, y, unused = (torch.randn(7, 4, requires_grad=True) for _ in range(3))

    def terms(inputs, indices):
        return (inputs[0] * inputs[1]).sin() * (1 + indices[:, None]), {"indices": indices, "sums": inputs[0].sum(1)}

    values, others = Microbatch(size).value_and_grad(terms, x, y, unused)
    (values * torch.arange(7)).sum().backward()
    inputs = [value.detach().clone().requires_grad_() for value in (x, y)]
    expected = terms(inputs, torch.arange(7))[0].mean(1)
    torch.testing.assert_close(values, expected)
    (expected * torch.arange(7)).sum().backward()
    for leaf, one in zip((x, y), inputs, strict=True):
        torch.testing.assert_close(leaf.grad, one.grad)
    assert unused.grad is None
    assert others["indices"].tolist() == list(range(7))
    assert not others["sums"].requires_grad
    with torch.no_grad():
        assert not Microbatch(size).value_and_grad(terms, x, y, unused)[0].requires_grad


def test_infinite_gradient_keeps_the_value_finite():
    x = torch.zeros(2, 1, requires_grad=True)
    values, _ = Microbatch(1).value_and_grad(lambda inputs, indices: (inputs[0].sqrt(), {}), x)
    assert values.tolist() == [0, 0]
    values.sum().backward()
    assert x.grad.isinf().all()


def test_gradients_do_not_underflow_in_half_precision():
    """The gradient of a mean over 2^20 terms is below the smallest float16; that of their sum is not."""
    x = torch.full((1, 1), 0.5, dtype=torch.float16, requires_grad=True)
    steep = torch.full((1, 1), 0.5, requires_grad=True)

    def terms(inputs, indices):
        return (inputs[0] * 1e-3).expand(len(indices), 2**20).float().square(), {}

    for value in (x, steep):
        values, _ = Microbatch(1).value_and_grad(terms, value)
        values.sum().backward()
    assert float(x.grad) == pytest.approx(float(steep.grad), rel=0.05) != 0


def test_denoising_with_too_little_memory_gives_the_same_results(tiny, monkeypatch):
    backbone = load_backbone(tiny)
    ids = encode_text(backbone.vocabulary.tokenizer, ["a red cat", "two dogs"], backbone.vocabulary.length)
    latents, noise = torch.randn(2, 2, 6, *backbone.latent_shape)
    timesteps = torch.randint(1000, (2, 6))

    def slope(microbatch):
        prompt_embeds = backbone.encode(ids).requires_grad_()
        losses = Denoising(microbatch)(backbone, prompt_embeds, latents, timesteps, noise)
        return losses.detach(), torch.autograd.grad(losses.sum(), prompt_embeds)[0]

    expected = slope(Microbatch(3))
    sizes = too_small(monkeypatch, backbone, 3)
    result = slope(Microbatch(12))
    assert sizes == [12, 6, 3, 3, 3, 3]
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grad_steps", [0, 1, 3])
def test_sampling_with_too_little_memory_gives_the_same_results(tiny, monkeypatch, grad_steps):
    how = {"sampler": SamplerSettings(3, 3.0), "objective": Sharpness()}
    problems = [Problem("a", "a red cat"), Problem("b", "two dogs")]

    def evaluate(module):
        embeds = module.initial(problems).requires_grad_()
        losses, values = module.evaluate(embeds, noise, problems, grad_steps)
        gradient = torch.autograd.grad(losses.sum(), embeds)[0] if grad_steps else losses
        return (
            losses.detach(),
            values["Sharpness"],
            gradient,
            module.sampler.generate_from_embeds(embeds.detach(), noise),
        )

    module = MetricGuidance(backbone=tiny, microbatch=2, **how)
    noise = torch.randn(2, 4, *module.backbone.latent_shape)
    expected = evaluate(module)
    limited = MetricGuidance(backbone=tiny, microbatch=8, **how)
    sizes = too_small(monkeypatch, limited.backbone, 4)  # with guidance, two samples per image
    result = evaluate(limited)
    assert max(sizes) == 16
    assert limited.microbatch.size == 2
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


def test_each_new_size_is_logged_once(tiny, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    module = MetricGuidance(backbone=tiny, microbatch=8, sampler=SamplerSettings(2), objective=Sharpness())
    too_small(monkeypatch, module.backbone, 8)
    module.generate(["a red cat"] * 20, torch.randn(20, *module.backbone.latent_shape))
    assert [record.message for record in caplog.records] == [
        "The memory does not hold 8 samples at once; continuing with 4."
    ]
