"""Blocks that keep their input alone, and run again in their backward: activation checkpointing (Chen et al., 2016)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(blocks: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """What calls these blocks, one after the other, keeping each one's input, and its buffers as they then were.

    Gradients, buffers and torch's random numbers are those of blocks that keep everything. Parameters must not change
    before the backward; what a block changes outside of buffers is changed twice.
    """
    def run(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False, context_fn=partial(_contexts, block))
        return x

    return run


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
