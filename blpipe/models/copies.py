"""Copies of modules whose forwards keep what they compute, as `torch.nn.utils.weight_norm` does."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def computed(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The tensors in their attributes that have a graph, which cannot be copied; every forward makes them anew."""
    return (value for module in modules for part in module.modules() for value in vars(part).values()
            if isinstance(value, Tensor) and not value.is_leaf)


def copied(modules: list[Module]) -> list[Module]:
    """Copies of them all, which share what the modules share."""
    return deepcopy(modules, {id(tensor): tensor.detach().clone() for tensor in computed(modules)})
