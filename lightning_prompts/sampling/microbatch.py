"""Split work on many samples into calls that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from pytorch_lightning.utilities.memory import is_oom_error
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from lightning_prompts.distributed import all_gather, broadcast, shard_indices
from lightning_prompts.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

NO_OOM_DEVICES = ("cpu",)  # devices that do not report when their memory is full
UNLIMITED = 2**31  # more than any number of samples

OUT_OF_MEMORY = (
    "The device is out of memory; lower --model.microbatch, or give --model.backbone.dtype bfloat16 or "
    "--model.backbone.save_memory [gradient_checkpointing,cpu_offload]."
)


class Microbatch:
    """Split work into calls of at most `size` samples; the size is halved whenever the device runs out of memory.

    Args:
        size: Samples per call; None for as many as the memory holds, found by halving in the first calls.
    """

    def __init__(self, size: int | None) -> None:
        self.fitted = size is None
        self.size = self.asked = UNLIMITED if size is None else int(size)
        self.most = 0  # samples of the largest call so far
        self.ranks = 1  # ranks that divide the samples

    def check_device(self, device: torch.device) -> None:
        """Refuse to find the size by halving on a device that does not report when its memory is full.

        Raises:
            UserError: The size is None and the device is a CPU.
        """
        if self.fitted and device.type in NO_OOM_DEVICES:
            raise UserError(
                "--model.microbatch null needs a GPU, since a CPU does not report when its memory is full; give "
                "--model.microbatch 16."
            )

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on all ranks that divide the samples; see `distributed.broadcast`."""
        return value if self.ranks == 1 else broadcast(value)

    def map(self, samples: int, function: Callable[[Tensor], T], device: torch.device | None = None) -> T:
        """Call `function` on the indices (b,) of each microbatch and concatenate what it returns.

        With several ranks, each computes its share (see `shard_indices`) and gathers the results of the others. A
        nested `map` is not divided, since the other ranks work on other samples. A call that runs out of memory is
        repeated with fewer samples, so `function` must have no side effects before it returns.

        Args:
            samples: B, the number of samples.
            function: Returns tensors (b, ...), or tuples, lists or dictionaries of them.
            device: Device of the indices.

        Returns:
            What a single call on all B samples would return.

        Raises:
            UserError: The memory does not hold a single sample.
        """
        if self.ranks == 1:
            return self._map(torch.arange(samples, device=device), function)
        own, share = shard_indices(samples, self.asked)
        ranks, self.ranks = self.ranks, 1
        try:
            results = self._map(torch.arange(own.start, own.stop, device=device), function)
        finally:
            self.ranks = ranks
        return all_gather(results, share, samples)

    def _map(self, indices: Tensor, function: Callable[[Tensor], T]) -> T:
        results: list[T] = []
        done = 0
        while done < len(indices):
            some = indices[done : done + self.size]
            try:
                results.append(function(some))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(some) == 1:
                    raise UserError(OUT_OF_MEMORY) from error
            else:
                done, self.most = done + len(some), max(self.most, len(some))
                continue
            # Outside the except clause, so that the error is gone, whose traceback holds tensors.
            self.size = len(some) // 2
            torch.cuda.empty_cache()
            log.warning("The memory does not hold %d samples at once; continuing with %d.", len(some), self.size)
        whole: T = pytree.tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), *results)
        return whole

    def value_and_grad(
        self, function: Callable[[list[Tensor], Tensor], tuple[Tensor, dict[str, Tensor]]], *inputs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a value for each of B samples, differentiable with respect to `inputs`.

        Each microbatch computes its gradients immediately, so that memory does not grow with B.

        Args:
            function: Given the inputs (b, ...) and the indices (b,) of a microbatch, returns terms (b, ...), whose mean
                is the value of a sample, and other tensors (b, ...) by name.
            inputs: Tensors (B, ...).

        Returns:
            The values (B,), with gradients to the inputs where gradients are enabled, and the other tensors (B, ...),
            detached.
        """
        leaves = [value.detach().requires_grad_(torch.is_grad_enabled()) for value in inputs]

        def call(indices: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
            parts = [leaf[indices] for leaf in leaves]
            terms, others = function(parts, indices)
            terms, gradients = terms.flatten(1) if terms.dim() > 1 else terms.unsqueeze(1), list[Tensor | None]()
            if terms.requires_grad:
                # Of the sum, since in a float16 network the gradient of the mean would vanish. An input may be unused,
                # such as negative prompts without guidance.
                slopes = torch.autograd.grad(terms.sum(), parts, allow_unused=True)
                gradients = [None if slope is None else _in_float32(slope) / terms.shape[1] for slope in slopes]
            return terms.detach().mean(1), {name: value.detach() for name, value in others.items()}, gradients

        values, others, gradients = self.map(len(leaves[0]), call, leaves[0].device)
        if gradients:
            values = _PrecomputedGradients.apply(values, gradients, *inputs)
        return values, others


class _PrecomputedGradients(torch.autograd.Function):
    """Attach precomputed gradients to values (B,): a tensor (B, ...) or None per input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        def times(gradient: Tensor | None) -> Tensor | None:
            return None if gradient is None else grad_output.view(-1, *(1,) * (gradient.dim() - 1)) * gradient

        return None, None, *map(times, ctx.saved_tensors)


def _in_float32(tensor: Tensor) -> Tensor:
    """Convert to float32; keep float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the machine ran out of memory."""
    messages = ("not enough memory", "backend out of memory")  # of a CPU on Windows, and of MPS, which Lightning omits
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    known = is_oom_error(RuntimeError(text))  # as text, since it fails on errors whose first argument is none
    return known or isinstance(error, torch.OutOfMemoryError) or any(part in text for part in messages)
