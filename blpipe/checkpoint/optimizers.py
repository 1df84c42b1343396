"""An optimizer's state in a checkpoint, by the names of its parameters: what it keeps in tensors and in numbers.

`optimizer/<parameter>/<key>` is of that parameter's state, and `optimizer/<parameter>/group/<key>` of the parameter's
group, where it is not as the config says: a count of steps, say. At numbers, `/number` follows, and at tensors that are
on the host while the parameter is not, `/host`. torch's own optimizers have tensors of parameters alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blpipe.errors import ConfigError

_CONFIGURED = ("lr", "weight_decay")  # which differ by group, and from the defaults, as the config says
_TYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}
_GROUP, _NUMBER, _HOST = "group/", "/number", "/host"
_CPU = torch.device("cpu")

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
            state |= {f"optimizer/{names[parameter]}/{key}": tensor for key, tensor in _tensors(kept, parameter)}
    return state


def _has_changed(value: Any, before: Any) -> bool:
    return value is not before and (type(value) not in _TYPES or value != before)


def _tensors(values: Mapping[str, Any], parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    for key, value in values.items():
        if isinstance(value, Tensor):
            on_host = value.device == _CPU != parameter.device and key != "step"  # which torch knows where to put
            yield key + _HOST * on_host, value
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
            values = {_without_marks(key): _value(key, tensor, parameter) for key, tensor in own.items()
                      if "/" not in _without_marks(key).removeprefix(_GROUP)}  # else it is of a name that goes on here
            numbered |= {key.removeprefix(_GROUP): values.pop(key) for key in [*values] if key.startswith(_GROUP)}
            if values:
                loaded["state"][number] = values
    optimizer.load_state_dict(loaded)
    for parameter, values in optimizer.state.items():  # torch has given tensors the weights' types
        for key, value in values.items():
            name = f"optimizer/{names[parameter]}/{key}"
            if name in state:
                values[key] = _as_saved(state[name], parameter, value.device)
            elif name + _HOST in state:
                values[key] = _as_saved(state[name + _HOST], parameter, _CPU)


def _without_marks(key: str) -> str:
    return key.removesuffix(_NUMBER).removesuffix(_HOST)


def _value(key: str, saved: Tensor, parameter: Tensor) -> Any:
    """What was saved under this key of a parameter; of its state, torch puts tensors in their places itself."""
    if key.endswith(_NUMBER):
        return saved.item()
    return saved.to(parameter.device) if key.startswith(_GROUP) and not key.endswith(_HOST) else saved


def _as_saved(value: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """On a device, laid out as the weights are, where it has their shape."""
    if value.shape != parameter.shape:
        return value.to(device)
    return torch.empty_like(parameter, dtype=value.dtype, device=device).copy_(value)
