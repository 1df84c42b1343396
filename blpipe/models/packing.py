"""Several tensors that pass between two blocks, packed into one."""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from blpipe.models.values import is_batch_first, known_values
from blpipe.specs import Shape


class Part(NamedTuple):
    """A tensor in a packed one.

    Args:
        start: of its values among those of a sample.
        shape: of a sample.
        is_mask: whether it is of bools, packed as 0 and 1.
        is_learned: whether weights come before it; if not, no gradient goes back through it.
    """

    start: int
    shape: Shape
    is_mask: bool
    is_learned: bool


class Packing(NamedTuple):
    """Where each tensor is in a packed one, [B, N], in the order in which the model makes them."""

    parts: tuple[Part, ...]

    @property
    def main(self) -> Part:
        """The one that heads and losses read: the last one with weights before it."""
        return next(part for part in reversed(self.parts) if part.is_learned and not part.is_mask)


def pack(*tensors: Tensor) -> Tensor:
    """Tensors [B, …] as one [B, N], of the floating-point type of the widest."""
    return torch.cat([tensor.reshape(tensor.shape[0], -1) for tensor in tensors], 1)


def part_of(packed: Tensor, start: int, shape: Shape, is_mask: bool, is_learned: bool) -> Tensor:
    """The tensor [B, *shape] that begins at `start` in `packed` [B, N]; see `Part`."""
    values = packed.narrow(1, start, prod(shape)).reshape(packed.shape[0], *shape)
    if is_mask:
        return values.bool()
    values = values.contiguous()  # the model may view it otherwise
    return values if is_learned else values.detach()


def packing_of(tensors: Iterable[fx.Node], learned: set[fx.Node]) -> Packing | None:
    """How traced tensors would be packed.

    Args:
        learned: those with weights before them.

    Returns:
        None where they cannot be: one is no tensor [batch, …] of a known shape, or is of integers; two are of unlike
        floating-point types; or none has weights before it.
    """
    parts, start, types = [], 0, set()
    for node in tensors:
        few, many = known_values(node) or (None, None)
        if few is None or many is None or not is_batch_first(node) or few.shape[1:] != many.shape[1:]:
            return None
        is_mask = few.dtype == torch.bool
        if not is_mask:
            types.add(few.dtype)
        parts.append(Part(start, tuple(few.shape[1:]), is_mask, node in learned))
        start += prod(few.shape[1:])
    if len(types) != 1 or not types.pop().is_floating_point or \
            not any(part.is_learned and not part.is_mask for part in parts):
        return None
    return Packing(tuple(parts))


def learned_nodes(model: nn.Module, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Those of a graph's `nodes` that have weights before them."""
    parameters, found = dict(model.named_parameters()), set[fx.Node]()
    for node in nodes:
        own = node.op == "get_attr" and node.target in parameters
        if node.op == "call_module":
            own = any(True for _ in model.get_submodule(str(node.target)).parameters())
        if own or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


class MainPart(nn.Module):
    """From a packed tensor to the part that heads and losses read."""

    def __init__(self, packing: Packing):
        super().__init__()
        self.part = packing.main

    def forward(self, packed: Tensor) -> Tensor:
        """[B, N] to [B, *shape]."""
        return part_of(packed, *self.part)
