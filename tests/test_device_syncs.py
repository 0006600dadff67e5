"""No step of an inversion method, and no sampling of images, makes the host wait for the device."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prompts.backbones import load_backbone, sampling_loop
from lightning_prompts.engine.batch import Row
from lightning_prompts.engine.datamodule import Step
from lightning_prompts.methods import PH2P, TextualInversion
from lightning_prompts.runs.record import Problem

pytestmark = pytest.mark.filterwarnings("ignore")

DEVICE = torch.device("meta")  # tensors without content: reading one, for which a GPU would have to wait, raises
PROBLEMS = [Problem("a", "a red cat"), Problem("b", "two dogs")]


class Copies(TorchDispatchMode):
    """Record copies to the device that wait for it, which are all but those marked non-blocking."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        host = [x for x in given if x.device != DEVICE and x.dim()]
        to_device = any(x.device == DEVICE for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
        non_blocking = kwargs.get("non_blocking", False) or (
            func is torch.ops.aten.copy_.default and len(args) > 2 and args[2]
        )
        if host and to_device and not non_blocking:
            self.waiting.append(str(func))
        return result


def prepare_batch(module, monkeypatch):
    """Fill the batch of a method with two problems at different steps, on the device."""
    module.to(DEVICE)
    module.batch.rows = [Row(PROBLEMS[0], steps=1), Row(PROBLEMS[1], steps=2, halvings=1)]
    module.batch.skipped = torch.zeros(2, dtype=torch.long, device=DEVICE)
    data = SimpleNamespace(seed=0, steps=100, negative_latents=lambda backbone: None)
    monkeypatch.setattr(type(module), "data", data)
    optimizer = module.configure_optimizers()
    monkeypatch.setattr(module, "optimizers", lambda: optimizer)
    monkeypatch.setattr(module, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # not supported by this device
    timesteps = torch.randint(1000, (2, 3))
    return Step([1, 2], timesteps), torch.arange(2)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (PH2P, {"optimizer": torch.optim.Adam, "restart_every": 0}),
        (TextualInversion, {}),
        (TextualInversion, {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.5)}),
        (TextualInversion, {"optimizer": torch.optim.NAdam}),
        (TextualInversion, {"optimizer": partial(torch.optim.RMSprop, lr=0.1, momentum=0.5)}),
    ],
)
def test_steps_do_not_sync_with_the_device(method, settings, tiny, monkeypatch):
    module = method(backbone=tiny, num_tokens=3, score_every_n_steps=10**6, **settings)
    module.prompt.embeddings = nn.Parameter(torch.zeros(2, 3, module.prompt.table.shape[1]))
    batch, rows = prepare_batch(module, monkeypatch)
    module.latents = [torch.zeros(1, *module.backbone.latent_shape, device=DEVICE)] * 2
    with Copies() as copies:
        module.step(batch, rows)
    assert not copies.waiting
    assert module.batch.parameter.device == DEVICE
    assert len(module.optimizers().state) == 1  # a step was taken


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LCMScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize("stop", [None, 2])
def test_sampling_does_not_sync_with_the_device(scheduler, stop, sd1, monkeypatch):
    monkeypatch.setattr(
        sampling_loop, "generators_of", lambda noise: None
    )  # these are seeded by the noise, which requires a sync
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    model = load_backbone(str(sd1), scheduler=scheduler).to(DEVICE)
    prompts = torch.zeros(2, 5, 32, device=DEVICE, requires_grad=True)
    noise = torch.zeros(2, *model.latent_shape, device=DEVICE)
    with Copies() as copies:
        model.sample(prompts, prompts, noise, 4, 5.0, 1, stop).sum().backward()
    assert not copies.waiting
    assert prompts.grad.shape == prompts.shape


def test_syncs_are_detected():
    host, device = torch.zeros(3), torch.zeros(3, device=DEVICE)
    with Copies() as copies:
        device + host.to(DEVICE, non_blocking=True)
        device.copy_(host, non_blocking=True)
        device[:2] * 3
        assert not copies.waiting
        device + host.to(DEVICE)
        device[torch.tensor([0, 1])]
        device.copy_(host)
    assert len(copies.waiting) == 3
    with pytest.raises(RuntimeError):
        device.sum().item()
    with pytest.raises(NotImplementedError):
        device.nonzero()
