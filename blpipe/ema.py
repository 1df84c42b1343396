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
        # Each layer once: to put an average in the place of a weight, and later that back, works once. Dictionaries, as
        # a module may put another buffer in the place of one.
        places = {f"{path}.{name}" if path else name: (layer, own, name) for path, layer in module.named_modules()
                  for own in (layer._parameters, layer._buffers) for name in own}
        self._places: list[tuple[dict[str, Any], str]] = []
        self._own: list[Tensor] = []
        self._maybe_infinite: list[int] = []  # of these
        copies, kept = dict[Tensor, Tensor](), set(state.values())
        for layer, own, name in places.values():
            tensor = own[name]
            if tensor is None or tensor not in kept or tensor in copies or not _is_averaged(tensor):
                continue
            if own is layer._buffers and not isinstance(layer, nn.modules.batchnorm._NormBase):
                self._maybe_infinite.append(len(self._own))
            copies[tensor] = torch.empty_like(tensor, requires_grad=False)
            self._own.append(copies[tensor])
            self._places.append((own, name))
        self.tensors = {name: copies[tensor] for name, tensor in state.items() if tensor in copies}
        """The averages, by all of the names that they have in the module's state_dict."""
        self._in_place = {path: copies[own[name]] for path, (_, own, name) in places.items() if own[name] in copies}
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


def _is_averaged(tensor: Tensor) -> bool:
    trained = tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    return trained and (tensor.is_floating_point() or tensor.is_complex())
