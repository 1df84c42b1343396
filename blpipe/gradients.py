"""Gradients, and sets of tensors by name: what a stage's arithmetic is made of."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call


def first_names(module: nn.Module) -> dict[str, str]:
    """Of every parameter and buffer of every layer, the name, and the first name of the same tensor.

    Layers may share a tensor. A layer that is there more than once has one name: to put another tensor in its place,
    and later its own back, works once.
    """
    first: dict[Tensor, str] = {}
    named = (each for prefix, layer in module.named_modules()
             for each in chain(layer.named_parameters(prefix, recurse=False, remove_duplicate=False),
                               layer.named_buffers(prefix, recurse=False, remove_duplicate=False)))
    return {name: first.setdefault(tensor, name) for name, tensor in named}


def with_tensors(module: nn.Module) -> Callable[[dict[str, Tensor], Any], Any]:
    """Calls `module` with tensors, by every name, in place of its own."""
    return lambda tensors, given: functional_call(module, tensors, (given,), tie_weights=False)


class Within(nn.Sequential):
    """Calls a function while its blocks have the tensors that `with_tensors` puts there."""

    def __init__(self, blocks: nn.Sequential):
        super().__init__(OrderedDict(blocks._modules))

    def forward(self, function: Callable[[], Any]) -> Any:
        """function()."""
        return function()


@torch.no_grad()
def copies_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies by name, with the layouts of the originals; on a GPU in one kernel, where they have one type."""
    copies = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    if copies:
        torch._foreach_copy_([*copies.values()], [*tensors.values()])
    return copies


def trainable_copies_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, as leaves that get gradients."""
    return {name: own.requires_grad_() for name, own in copies_of(tensors).items()}


def edge_of(out: Tensor) -> GradientEdge | None:
    """Where the graph of `out` begins, without its values; None where it has no graph."""
    return get_gradient_edge(out) if out.requires_grad else None


def gradients_of(out: GradientEdge | None, parameters: Sequence[Tensor], x: Tensor | None, error: Tensor | None,
                 keep: bool = False) -> tuple[Sequence[Tensor | None], Tensor | None]:
    """The gradients of `parameters` and of `x`, the latter None if it wants none.

    Args:
        out: see `edge_of`.
        error: the gradient of `out`; None where that is a loss.
        keep: whether the graph is kept.
    """
    inputs = [*parameters, *([x] if x is not None and x.requires_grad else [])]
    if not inputs or out is None:
        return [None] * len(parameters), None
    found = torch.autograd.grad(out, inputs, error, retain_graph=keep, allow_unused=True)
    gradients, of_x = found[:len(parameters)], found[-1] if len(found) > len(parameters) else None
    if of_x is not None and any(gradient is of_x for gradient in gradients):
        of_x = of_x.clone()  # of x + p autograd gives one for both, and an optimizer may write to a gradient
    return gradients, of_x


def weighted(gradients: Iterable[Tensor | None], weight: float | Tensor) -> Iterator[Tensor | None]:
    """weight · gradient of each, made when it is asked for."""
    as_they_are = isinstance(weight, float) and weight == 1.0
    return (gradient if gradient is None or as_they_are else weight * gradient for gradient in gradients)


def norm_of(gradients: Iterable[Tensor | None]) -> Tensor:
    """The norm of all of them together."""
    return torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])


def ratio(norm: Tensor, other: Tensor) -> Tensor:
    """norm / other, 0 where there is nothing to scale."""
    return torch.where(other > 0, norm / other, torch.zeros_like(other))


class GradientSums:
    """Adds what each backward gives to the gradients of parameters, up to the next step."""

    def __init__(self) -> None:
        self._own: set[Tensor] = set()  # the parameters whose gradient nobody else holds

    def add(self, live: Iterable[Tensor], gradients: Iterable[Tensor | None], reused: bool = False) -> None:
        """Add to each parameter's gradient.

        Args:
            reused: whether the memory of `gradients` is written again before the step.
        """
        given: set[int] = set()
        copies: list[tuple[Tensor, Tensor]] = []
        for parameter, gradient in zip(live, gradients, strict=True):
            if gradient is None:
                continue
            if parameter in self._own:
                assert parameter.grad is not None
                parameter.grad += gradient
                continue
            if parameter.grad is not None:  # autograd may share what it gave with others
                gradient = parameter.grad + gradient
                self._own.add(parameter)
            # Fused optimizers read a gradient in its parameter's layout, and some write to it: two must not share one.
            if reused or gradient.stride() != parameter.stride() or id(gradient) in given:
                parameter.grad = torch.empty_like(parameter)
                copies.append((parameter.grad, gradient))
                self._own.add(parameter)
            else:
                parameter.grad = gradient
            given.add(id(gradient))
        if copies:
            torch._foreach_copy_([own for own, _ in copies], [gradient for _, gradient in copies])

    def clear(self) -> None:
        """Begin anew, after the step."""
        self._own.clear()
