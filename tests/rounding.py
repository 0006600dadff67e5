"""Kernels that round by the shape of a call, so that tests of exactness can fail on every machine."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

STEP = 2**-22  # twice the relative distance of neighboring float32 numbers


@contextmanager
def rounding_by_shape():
    """Scale the output of every linear and convolutional layer by a factor of almost 1.

    The factor depends on the shape of the call and on the position of the row.
    Results are then equal only if they come from calls of the same shape with the same samples at the same positions.
    This is stricter than any processor: two shapes never return the same values.
    """
    with pytest.MonkeyPatch.context() as patch:
        for layer in (nn.Linear, nn.Conv2d):
            patch.setattr(layer, "forward", _rounding(layer.forward, layer is nn.Linear))
        yield


def _rounding(forward, is_linear):
    def rounded(self, x):
        y = forward(self, x)
        size = x.shape[:-1].numel() if is_linear else len(x)
        place = torch.arange(len(y), device=y.device) if y.dim() > 1 else torch.zeros((), device=y.device)
        factor = 1 + STEP * (1 + (3 * size + 5 * place) % 13)
        return y * factor.to(y.dtype).view(-1, *(1,) * (y.dim() - 1))

    return rounded
