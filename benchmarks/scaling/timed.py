"""A model whose blocks and heads take a set time in place of computing, so that many processes can share a few cores.

What is left is what schedules differ in: who waits for whom, and what engine and messages cost.
"""

from math import prod
from time import sleep
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from blpipe.boundary import Boundary


class _Backward(Function):
    """Passes its input on, and takes its time in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        _take(ctx.seconds, gradients[0])
        return gradients[0], None


class Timed(nn.Module):
    """x + weight, in so many seconds a sample: forward, and the backward half for the input, half for the weight."""

    def __init__(self, forward_seconds: float, backward_seconds: float):
        super().__init__()
        self.forward_seconds, self.backward_seconds = forward_seconds, backward_seconds
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, …] to the same."""
        _take(len(x) * self.forward_seconds, x)
        half = len(x) * self.backward_seconds / 2
        return _Backward.apply(x, half) + _Backward.apply(self.weight, half)


def blocks(count: int, shape: list[int], classes: int, **seconds: float) -> list[nn.Module]:
    """So many equal blocks of samples of this shape, the classifier with the last one."""
    *rest, last = (Timed(**seconds) for _ in range(count))
    return [*rest, nn.Sequential(last, nn.Flatten(), nn.Linear(prod(shape), classes))]


def head(boundary: Boundary, **seconds: float) -> nn.Module:
    """A linear classifier that takes as long as a block."""
    return nn.Sequential(Timed(**seconds), nn.Flatten(), nn.Linear(prod(boundary.shape), boundary.classes))


def _take(seconds: float, tensor: Tensor) -> None:
    if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:  # not where only shapes or bytes are wanted
        sleep(seconds)
