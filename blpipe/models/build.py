"""From `model:` in a config to a plain model, an `nn.Sequential` of named blocks."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from blpipe.config import Named
from blpipe.data import DataSpec
from blpipe.errors import ConfigError
from blpipe.models.mlp import mlp
from blpipe.models.resnet_cifar import resnet_cifar
from blpipe.models.vgg_cifar import vgg_cifar
from blpipe.plugins import call, resolve
from blpipe.seeds import derive_seed

BUILT_IN: dict[str, Callable[..., nn.Sequential]] = {"resnet_cifar": resnet_cifar, "vgg_cifar": vgg_cifar, "mlp": mlp}


def build_model(config: Named, data: DataSpec, seed: int) -> nn.Sequential:
    """The plain model as `nn.Sequential` of named blocks, initialised from `seed`.

    A built-in model takes the data's channels, shape and number of classes where `args` do not give them.

    Raises:
        ConfigError: unknown name, arguments that do not fit, or a `target` that returns no blocks.
    """
    builder = resolve("model", config, BUILT_IN)
    args = dict(config.args)
    if config.name is not None:
        args = _from_data(builder, data) | args
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        built = call("model", builder, **args)
    blocks = as_blocks(built)
    out_of_place(blocks)
    return blocks


def out_of_place(module: nn.Module) -> None:
    """Switch `inplace=True` off in `module`: in place, a stage's first operation would overwrite its input,
    which its neighbour or another graph still needs.

    In training it costs no memory: the normalisation before a ReLU does not keep its own output.
    """
    for part in module.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]


def as_blocks(built: Any) -> nn.Sequential:
    """Take an `nn.Sequential`, a list or a dict of modules as blocks; parameter names stay as they are.

    Raises:
        ConfigError: anything else, or nothing in it.
    """
    if isinstance(built, nn.Sequential) and type(built).forward is nn.Sequential.forward:
        blocks = nn.Sequential(OrderedDict(named_blocks(built)))  # a subclass's constructor takes no blocks
    elif isinstance(built, nn.ModuleDict | Mapping):
        blocks = nn.Sequential(OrderedDict(_checked(dict(built.items()))))
    elif isinstance(built, list | tuple | nn.ModuleList):
        blocks = nn.Sequential(OrderedDict(_checked({str(i): module for i, module in enumerate(built)})))
    else:
        raise ConfigError(f"model.target: it returned a {type(built).__name__}; return an nn.Sequential, "
                          "or a list or dict of modules: the blocks in order")
    if len(blocks) == 0:
        raise ConfigError("model.target: it returned no blocks; return at least one module")
    return blocks


def named_blocks(blocks: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """The blocks in order with their names; unlike `named_children`, a module used twice is there twice."""
    return list(zip(blocks._modules, blocks, strict=True))


def _checked(modules: dict[Any, Any]) -> dict[str, nn.Module]:
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model.target: its block {name!r} is a {type(module).__name__}, not an nn.Module")
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.Sequential, name):
            raise ConfigError(f"model.target: the block name {name!r} must be a text without dots, and no name that "
                              "nn.Module uses itself")
    return modules


def _from_data(builder: Any, data: DataSpec) -> dict[str, Any]:
    known = {"in_channels": data.shape[0], "in_shape": list(data.shape), "classes": data.classes}
    return {name: value for name, value in known.items() if name in inspect.signature(builder).parameters}
