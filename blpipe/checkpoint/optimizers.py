"""An optimizer's state in a checkpoint, by the names of its parameters: what it keeps in tensors and in numbers.

`optimizer/<parameter>/<key>` is of that parameter's state, and `optimizer/<parameter>/group/<key>` of the parameter's
group, where it is not as the config says: a count of steps, say. At numbers, `/number` follows. torch's own optimizers
have tensors of parameters alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blpipe.errors import ConfigError

_CONFIGURED = ("lr", "weight_decay")  # which differ by group, and from the defaults, as the config says
_TYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}
_GROUP, _NUMBER = "group/", "/number"

Names = Mapping[Tensor, str]  # in the checkpoint, of the optimizer's parameters


def optimizer_state(optimizer: Optimizer, names: Names) -> dict[str, Tensor]:
    """All that it has learnt, by key of the checkpoint.

    Raises:
        ConfigError: there is more of it than tensors and numbers.
    """
    state: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        of_group = {_GROUP + key: value for key, value in group.items()
                    if key not in _CONFIGURED and _has_changed(value, optimizer.defaults.get(key))}
        for parameter in group["params"]:
            kept = optimizer.state.get(parameter, {}) | of_group
            state |= {f"optimizer/{names[parameter]}/{key}": tensor for key, tensor in _tensors(kept)}
    return state


def _has_changed(value: Any, before: Any) -> bool:
    return value is not before and (type(value) not in _TYPES or value != before)


def _tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in values.items():
        if isinstance(value, Tensor):
            yield key, value
        elif type(value) in _TYPES:
            yield key + _NUMBER, torch.tensor(value, dtype=_TYPES[type(value)])
        elif value is not None and not key.startswith(_GROUP):
            raise ConfigError(f"optimizer: keeps a {type(value).__name__} in the {key!r} of a parameter's state, which "
                              "a checkpoint cannot hold; have it keep tensors and numbers there")


def load_optimizer(optimizer: Optimizer, names: Names, state: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave; parameters of which `state` has nothing begin anew."""
    loaded = optimizer.state_dict()
    loaded["state"] = {}
    for group, numbered in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
        for parameter, number in zip(group["params"], numbered["params"], strict=True):
            prefix = f"optimizer/{names[parameter]}/"
            own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
            values = {key.removesuffix(_NUMBER): tensor.item() if key.endswith(_NUMBER) else tensor
                      for key, tensor in own.items() if _is_a_key(key)}
            numbered |= {key.removeprefix(_GROUP): values.pop(key) for key in [*values] if key.startswith(_GROUP)}
            if values:
                loaded["state"][number] = values
    optimizer.load_state_dict(loaded)
    for parameter, values in optimizer.state.items():  # torch has given tensors the weights' types
        for key, value in values.items():
            saved = state.get(f"optimizer/{names[parameter]}/{key}")
            if saved is not None:
                values[key] = _as_saved(saved, parameter, value.device)


def _is_a_key(text: str) -> bool:
    """Whether it is one of a parameter's state or group; else it is of another parameter, whose name goes on here."""
    return "/" not in text.removeprefix(_GROUP).removesuffix(_NUMBER)


def _as_saved(value: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """On a device, laid out as the weights are, where it has their shape."""
    if value.shape != parameter.shape:
        return value.to(device)
    return torch.empty_like(parameter, dtype=value.dtype, device=device).copy_(value)
