"""Several tensors that pass between two blocks, packed into one."""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from blpipe.models.values import rows_of
from blpipe.specs import Shape


class Part(NamedTuple):
    """A tensor in a packed one.

    Args:
        start: of its values among those of a sample.
        rows: how many it has for each sample; 1 but for such as [batch · windows, …].
        shape: of a row.
        is_mask: whether it is of bools, packed as 0 and 1.
        is_learned: whether weights come before it; if not, no gradient goes back through it.
    """

    start: int
    rows: int
    shape: Shape
    is_mask: bool
    is_learned: bool

    @property
    def can_be_main(self) -> bool:
        """Whether heads and losses can read it."""
        return self.rows == 1 and self.is_learned and not self.is_mask


class Packing(NamedTuple):
    """Where each tensor is in a packed one, [B, N], in the order in which the model makes them."""

    parts: tuple[Part, ...]

    @property
    def main(self) -> Part:
        """The one that heads and losses read: the last one that is [batch, …] and has weights before it."""
        return next(part for part in reversed(self.parts) if part.can_be_main)


def pack(batch: int, *tensors: Tensor) -> Tensor:
    """Tensors [B, …] or [B · rows, …] as one [B, N], of the floating-point type of the widest."""
    return torch.cat([tensor.reshape(batch, -1) for tensor in tensors], 1)


def part_of(packed: Tensor, start: int, rows: int, shape: Shape, is_mask: bool, is_learned: bool) -> Tensor:
    """The tensor [B · rows, *shape] that begins at `start` in `packed` [B, N]; see `Part`."""
    values = packed.narrow(1, start, rows * prod(shape)).reshape(packed.shape[0] * rows, *shape)
    if is_mask:
        return values.bool()
    values = values.contiguous()  # the model may view it otherwise
    return values if is_learned else values.detach()


def packing_of(tensors: Iterable[fx.Node], learned: set[fx.Node]) -> Packing | None:
    """How traced tensors would be packed.

    Args:
        learned: those with weights before them.

    Returns:
        None where they cannot be: the rows of one are not known, or it is of integers; two are of unlike
        floating-point types; or heads and losses could read none.
    """
    parts, start, types = [], 0, set()
    for node in tensors:
        known = rows_of(node)
        if known is None:
            return None
        rows, row = known
        is_mask = row.dtype == torch.bool
        if not is_mask:
            types.add(row.dtype)
        parts.append(Part(start, rows, tuple(row.shape), is_mask, node in learned))
        start += rows * row.numel()
    alike = len(types) == 1 and types.pop().is_floating_point
    return Packing(tuple(parts)) if alike and any(part.can_be_main for part in parts) else None


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
