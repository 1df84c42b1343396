"""Exponential moving averages of weights, which are evaluated in the place of the weights that are trained."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Average:
    """The moving average of a module's trained parameters and floating-point buffers, as BatchNorm's statistics are.

    It begins with the values that they have. Frozen parameters, other buffers, and what a state_dict does not hold are
    evaluated as they are.

    Args:
        decay: in (0, 1), the share that the average keeps in a step, once there have been enough of them.
    """

    def __init__(self, module: nn.Module, decay: float):
        self._module, self._decay = module, decay
        self.steps = 0
        """The optimizer steps that the average has seen."""
        state = module.state_dict(keep_vars=True)
        kept = {tensor for tensor in state.values() if _is_averaged(tensor)}
        copies: dict[Tensor, Tensor] = {}
        self._places: list[tuple[dict[str, Any], str]] = []  # of these, as a module may replace a buffer
        self._maybe_infinite: list[int] = []  # of these
        self._in_place: dict[str, Tensor] = {}  # by one name for each layer: to put tensors there and back works once
        for path, (layer, own, name) in _places(module).items():
            tensor = own[name]
            if tensor not in kept:
                continue
            if tensor not in copies:
                copies[tensor] = torch.empty_like(tensor, requires_grad=False)
                if own is layer._buffers and not isinstance(layer, nn.modules.batchnorm._NormBase):
                    self._maybe_infinite.append(len(self._places))
                self._places.append((own, name))
            self._in_place[path] = copies[tensor]
        self._own = [*copies.values()]
        self.tensors = {name: copies[tensor] for name, tensor in state.items() if tensor in copies}
        """The averages, by all of the names that they have in the module's state_dict."""
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew, with the weights as they are now."""
        self.steps = 0
        if self._own:
            torch._foreach_copy_(self._own, self._live())

    @torch.no_grad()
    def advance(self) -> None:
        """Take the weights in, as they are after an optimizer step."""
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))  # else short runs would stay where they began
        self.steps += 1
        if not self._own:
            return
        live = self._live()
        torch._foreach_lerp_(self._own, live, 1.0 - decay)  # to the last bit, what is constant stays as it is
        for own, tensor in ((self._own[i], live[i]) for i in self._maybe_infinite):
            own.copy_(torch.where(own.isnan(), tensor, own))  # −∞ − (−∞), as in a mask, is no number

    def restore(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Go on with what `tensors` and `steps` were; those without a value there begin anew."""
        self.restart()
        self.steps = steps
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)  # laid out as the weights are

    def __call__(self, *args: Any) -> Any:
        """What the module computes with the averages."""
        return functional_call(self._module, self._in_place, args, tie_weights=False)

    def _live(self) -> list[Tensor]:
        return [own[name] for own, name in self._places]


def _places(module: nn.Module) -> dict[str, tuple[nn.Module, dict[str, Any], str]]:
    """Where each layer has its parameters and buffers: the layer, its dictionary, and the name there."""
    return {f"{path}.{name}".removeprefix("."): (layer, own, name) for path, layer in module.named_modules()
            for own in (layer._parameters, layer._buffers) for name in own}


def _is_averaged(tensor: Tensor) -> bool:
    trained = tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    return trained and (tensor.is_floating_point() or tensor.is_complex())
