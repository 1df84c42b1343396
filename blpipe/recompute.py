"""Blocks that keep their input alone, and run again in their backward: activation checkpointing (Chen et al., 2016)."""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Sequential):
    """Calls these blocks, one after the other; each keeps its input, its parameters, and its buffers as they then were.

    Gradients, buffers and torch's random numbers are those of blocks that keep everything. Other parameters may take
    the places of a block's before its backward; its own must not be written to. What a block changes outside of
    buffers is changed twice.

    Args:
        blocks: as they are, under their own names.
        last: whether the last one runs again too. It need not where the backward follows at once.
    """

    def __init__(self, blocks: nn.Sequential, last: bool = True):
        super().__init__(OrderedDict(blocks._modules))  # a module may come twice
        self._again = len(self) if last else len(self) - 1

    def forward(self, x: Tensor) -> Tensor:
        """What the blocks compute."""
        for index, block in enumerate(self):
            if index < self._again:
                x = checkpoint(block, x, use_reentrant=False, context_fn=partial(_contexts, block))
            else:
                x = block(x)
        return x


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For a block's forward, and for the same again."""
    return nullcontext(), _AsBefore(block)


class _AsBefore:
    """Within it, a block has the parameters that it had when this was made, and copies of its buffers as they were."""

    def __init__(self, block: nn.Module):
        # The dictionaries themselves: a buffer may be None until a forward sets it, and have several names.
        parameters, buffers = ([(getattr(module, kind), name) for module in block.modules()
                                for name in getattr(module, kind)] for kind in ("_parameters", "_buffers"))
        self._parameters, self._places = len(parameters), parameters + buffers
        self._before = self._copied(self._tensors())

    def __enter__(self) -> None:
        self._live = self._tensors()
        self._put(self._copied(self._before))  # a forward may write to a buffer

    def __exit__(self, *error: object) -> None:
        self._put(self._live)

    def _tensors(self) -> list[Tensor | None]:
        return [tensors[name] for tensors, name in self._places]

    def _copied(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """The same parameters, and copies of the buffers."""
        return tensors[:self._parameters] + _copies(tensors[self._parameters:])

    def _put(self, values: list[Tensor | None]) -> None:
        for (tensors, name), value in zip(self._places, values, strict=True):
            tensors[name] = value


def _copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A copy of each tensor; one of a tensor that comes more than once."""
    different = {id(tensor): tensor for tensor in tensors if tensor is not None}
    made = {key: tensor.clone() for key, tensor in different.items()}
    return [made.get(id(tensor)) for tensor in tensors]
