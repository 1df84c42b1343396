"""Blocks that keep their input alone, and run again in their backward: activation checkpointing (Chen et al., 2016)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(blocks: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """What calls these blocks, one after the other, keeping each one's input, and its buffers as they then were.

    Gradients, buffers and random numbers are those of blocks that keep everything. Parameters must not change before
    the backward.
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
        self._before = [(module, name, buffer.clone()) for module in block.modules()
                        for name, buffer in module.named_buffers(recurse=False)]

    def __enter__(self) -> None:
        self._live = [getattr(module, name) for module, name, _ in self._before]
        for module, name, before in self._before:
            setattr(module, name, before.clone())

    def __exit__(self, *error: object) -> None:
        for (module, name, _), live in zip(self._before, self._live, strict=True):
            setattr(module, name, live)
