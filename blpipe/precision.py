"""The precision that parts of a model compute in, and that of what stages send each other."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from blpipe.config_types import WirePrecision


class Precision:
    """How a part of the model is run: in the types of its weights, or as bf16, under torch's autocast.

    Wherever the graph is cut (between stages, before a tail, before a loss), tensors are float32 again. So what
    crosses a boundary has the same type whatever the precision, and losses are computed in float32.

    Args:
        name: `train.precision`; "float32" and "tf32" change nothing here, see `blpipe.device.use_precision`.
        device: where the part runs.
    """

    def __init__(self, name: str = "float32", device: torch.device | None = None):
        self._bf16 = name == "bf16"
        self._context: AbstractContextManager[object] = nullcontext()
        if self._bf16:
            self._context = torch.autocast((device or torch.device("cpu")).type, torch.bfloat16)

    def run(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`part(x)`, in float32 where autocast made it bfloat16."""
        with self._context:
            out = part(x)
        return out.float() if self._bf16 and out.dtype == torch.bfloat16 else out


def widened(x: Tensor, wire: WirePrecision) -> Tensor:
    """A received tensor, in the precision that a stage computes in."""
    return x.float() if wire == "bf16" and x.dtype == torch.bfloat16 else x


def narrowed(x: Tensor, wire: WirePrecision) -> Tensor:
    """A tensor in the precision in which it is sent."""
    return x.to(torch.bfloat16) if wire == "bf16" else x
