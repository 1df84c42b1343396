"""Activation checkpointing (Chen et al., 2016): blocks store only their input, and rerun their forward during backward.
"""

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Sequential):
    """Calls these blocks, one after the other; each keeps its input, and its buffers as they then were.

    Gradients, buffers and torch's random numbers are those of blocks that keep everything. In its backward a block must
    have the parameters of its forward. What it changes outside of buffers is changed twice.

    Args:
        blocks: as they are, under their own names.
        last: whether the last one runs again too. It need not where the backward follows at once.
    """

    def __init__(self, blocks: nn.Sequential, last: bool = True):
        super().__init__(OrderedDict(blocks._modules))  # a module may come twice
        self._last = last

    def forward(self, x: Tensor) -> Tensor:
        """What the blocks compute."""
        for block in list(self) if self._last else list(self)[:-1]:
            x = checkpoint(block, x, use_reentrant=False, context_fn=partial(_contexts, block))
        return x if self._last else self[-1](x)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For a block's forward, and for the same again."""
    return nullcontext(), _AsBefore(block)


class _AsBefore:
    """Within it, a block has copies of its buffers as they were when this was made."""

    def __init__(self, block: nn.Module):
        # The dictionaries themselves: a buffer may be None until a forward sets it, and have several names.
        self._places = [(module._buffers, name) for module in block.modules() for name in module._buffers]
        self._before = _copies(self._buffers())

    def __enter__(self) -> None:
        self._live = self._buffers()
        self._set(_copies(self._before))

    def __exit__(self, *error: object) -> None:
        self._set(self._live)

    def _buffers(self) -> list[Tensor | None]:
        return [buffers[name] for buffers, name in self._places]

    def _set(self, values: list[Tensor | None]) -> None:
        for (buffers, name), value in zip(self._places, values, strict=True):
            buffers[name] = value


def _copies(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """A copy of each tensor; one of a tensor that comes more than once."""
    different = {id(tensor): tensor for tensor in tensors if tensor is not None}
    made = {key: tensor.clone() for key, tensor in different.items()}
    return [made.get(id(tensor)) for tensor in tensors]
