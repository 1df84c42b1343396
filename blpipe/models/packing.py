"""Several tensors that pass between two blocks, packed into one."""

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from blpipe.models.nodes import own_weights
from blpipe.models.values import known_values, rows_of, shape_text
from blpipe.specs import Shape, TensorSpec
from blpipe.text import dtype_name


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
        return self.rows == 1 and 1 <= len(self.shape) <= 3 and self.is_learned and not self.is_mask


class Packing(NamedTuple):
    """Where each tensor is in a packed one, [B, N], in the order in which the model makes them."""

    parts: tuple[Part, ...]

    @property
    def main(self) -> Part:
        """The one that heads and losses read: the last one that is [batch, …] and has weights before it."""
        return next(part for part in reversed(self.parts) if part.can_be_main)

    def read(self, spec: TensorSpec) -> TensorSpec:
        """What heads and losses read of a packed tensor [B, N]."""
        return spec._replace(shape=(spec.shape[0], *self.main.shape))

    @property
    def has_given_numbers(self) -> bool:
        """Whether there are numbers among them that no weights come before."""
        return any(not part.is_learned and not part.is_mask for part in self.parts)


def pack(batch: int, *tensors: Tensor) -> Tensor:
    """Tensors [B, …] or [B · rows, …] as one [B, N], of the floating-point type of the widest."""
    return torch.cat([tensor.reshape(batch, tensor.numel() // batch) for tensor in tensors], 1)


def part_of(packed: Tensor, start: int, rows: int, shape: Shape, is_mask: bool, is_learned: bool) -> Tensor:
    """The tensor [B · rows, *shape] that begins at `start` in `packed` [B, N]; see `Part`."""
    values = packed.narrow(1, start, rows * prod(shape)).reshape(packed.shape[0] * rows, *shape)
    if is_mask:
        return values.bool()
    values = values.contiguous()  # the model may view it otherwise
    return values if is_learned else values.detach()


def packing_of(tensors: Sequence[fx.Node], learned: set[fx.Node]) -> Packing | None:
    """How traced tensors would be packed; None where they cannot be.

    Args:
        learned: those with weights before them.
    """
    parts, start, types = [], 0, set[torch.dtype]()
    for node in tensors:
        known = rows_of(node)
        if known is None:
            return None
        rows, row = known
        parts.append(Part(start, rows, tuple(row.shape), row.dtype == torch.bool, node in learned))
        start += rows * row.numel()
        types.add(row.dtype)
    alike = all(map(_can_be_packed, types)) and len(types - {torch.bool}) == 1
    return Packing(tuple(parts)) if alike and any(part.can_be_main for part in parts) else None


def _can_be_packed(dtype: torch.dtype) -> bool:
    return dtype == torch.bool or dtype.is_floating_point


def number_types(tensors: Sequence[fx.Node]) -> set[str]:
    """The types of those that are no masks; one alone can be packed."""
    types = {row.dtype for _, row in filter(None, map(rows_of, tensors))}
    return set(map(dtype_name, types - {torch.bool}))


def obstacle(node: fx.Node) -> str:
    """Why a traced tensor cannot be packed, as what follows its name; empty if it can."""
    known = rows_of(node)
    if known is None:
        if shape := shape_text(node):
            return f"is {shape}, whose batch is not first"
        return "has no known shape" if known_values(node) is None else "is no tensor"
    dtype = known[1].dtype
    return "" if _can_be_packed(dtype) else f"is {dtype_name(dtype)}"


def learned_nodes(model: nn.Module, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Those of a graph's `nodes` that have weights before them."""
    found = set[fx.Node]()
    for node in nodes:
        if own_weights(node, model) or not found.isdisjoint(node.all_input_nodes):
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
