"""From `model:` in a config to a plain model, an `nn.Sequential` of named blocks."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from blpipe import launch
from blpipe.config import ModelConfig
from blpipe.errors import ConfigError, one_line
from blpipe.models.blocks import TracedBlock, blocks_of, out_of_place
from blpipe.models.compare import check_same
from blpipe.models.mlp import mlp
from blpipe.models.packing import Packing
from blpipe.models.resnet_cifar import resnet_cifar
from blpipe.models.vgg_cifar import vgg_cifar
from blpipe.models.zoo import PREFIX, torchvision_model
from blpipe.plugins import call, resolve, takes
from blpipe.seeds import derive_seed, fixed_randomness
from blpipe.specs import DataSpec

BUILT_IN: dict[str, Callable[..., nn.Sequential]] = {"resnet_cifar": resnet_cifar, "vgg_cifar": vgg_cifar, "mlp": mlp}


def build_model(config: ModelConfig, data: DataSpec, seed: int, pretrained: bool = True) -> nn.Sequential:
    """The plain model as `nn.Sequential` of named blocks, initialised from `seed`.

    A built-in model takes the data's channels, shape and number of classes where `args` do not give them. A
    model of torchvision, and a module that a `target` returns, is cut into blocks by `blocks_of`.

    Args:
        pretrained: whether torchvision's own `weights` are wanted; not where a checkpoint gives all values.

    Raises:
        ConfigError: unknown name, arguments that do not fit, or a `target` whose result makes no blocks.
    """
    spec = data.batch(1)
    example = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    with fixed_randomness(derive_seed(seed, "model")):
        if config.name is not None and config.name.startswith(PREFIX):
            plain = torchvision_model(config.name, config.args, data.classes, pretrained)
            return blocks_of(plain, example, config.live_tensors)
        builder = resolve("model", config, BUILT_IN)
        args = dict(config.args) if config.name is None else _from_data(builder, data) | config.args
        try:
            built = call("model", builder, **args)
        except ConfigError as error:
            if pretrained or not isinstance(error.__cause__, OSError):
                raise
            raise ConfigError(f"{error}; it is called for eval and --resume too, whose weights are the checkpoint's: "
                              "have it do without that file, or put the file back") from error.__cause__
        if hasattr(built, "_orig_mod"):  # of torch.compile
            raise ConfigError("model: it returned a compiled module; return it uncompiled, and set train.compile=true")
        try:
            blocks = as_blocks(built, example, config.live_tensors)
        except ConfigError:
            raise
        except Exception as error:  # whatever a module of the user's does when its parts are looked at
            raise ConfigError(f"model: cannot be made into blocks: {type(error).__name__}: {one_line(error)}; return "
                              "the blocks yourself, as an nn.Sequential, a list or a dict") from error
    out_of_place(blocks)
    # The first process does so for all: they build the same.
    if config.name not in BUILT_IN and _has_forward(built) and type(built) is not nn.Sequential and launch.rank() == 0:
        blocks.notes_of_tracing = [*_notes_of_tracing(blocks), *check_same(built, blocks, data)]  # type: ignore[assignment]
    return blocks


def as_blocks(built: Any, example: torch.Tensor | None = None, live_tensors: int = 1) -> nn.Sequential:
    """Take an `nn.Sequential`, a list or a dict of modules as blocks; cut any other module into blocks.

    Raises:
        ConfigError: anything else, nothing in it, or a module that cannot be traced.
    """
    if isinstance(built, nn.Sequential) and type(built).forward is nn.Sequential.forward:
        blocks = nn.Sequential(OrderedDict(named_blocks(built)))  # a subclass's constructor takes no blocks
    elif isinstance(built, nn.ModuleDict | Mapping) and not _has_forward(built):
        blocks = nn.Sequential(OrderedDict(_checked(dict(built.items()))))
    elif isinstance(built, list | tuple | nn.ModuleList) and not _has_forward(built):
        blocks = nn.Sequential(OrderedDict(_checked({str(i): module for i, module in enumerate(built)})))
    elif isinstance(built, nn.Module):
        blocks = blocks_of(built, example, live_tensors)
    else:
        raise ConfigError(f"model: it returned a {type(built).__name__}; return an nn.Module, or a list or "
                          "dict of modules: the blocks in order")
    if len(blocks) == 0:
        raise ConfigError("model: it returned no blocks; return at least one module")
    if live_tensors > 1 and not any(isinstance(block, TracedBlock) for block in blocks):
        raise ConfigError(f"model.live_tensors: {live_tensors}, and the model comes as blocks, which pass one tensor "
                          "on; leave it at 1, or return the model as one nn.Module that is not an nn.Sequential")
    for name, tensor in (*blocks.named_parameters(), *blocks.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(f"model: {name} has no shape yet; give its layer the size of its input, instead of a "
                              "lazy layer")
    return blocks


def named_blocks(blocks: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """The blocks in order with their names; unlike `named_children`, a module used twice is there twice."""
    return list(zip(blocks._modules, blocks, strict=True))


def plain_names(blocks: nn.Sequential) -> dict[str, str]:
    """From the names in the state_dict of `blocks`, or of a run of them, to those in the plain model's.

    They differ in blocks that `blocks_of` cut out of a model: inside, names are that model's own.
    """
    return {f"{block}.{name}": name if isinstance(part, TracedBlock) else f"{block}.{name}"
            for block, part in named_blocks(blocks) for name in part.state_dict()}


def own_parts(blocks: nn.Sequential, head: nn.Module | None, loss: nn.Module) -> dict[str, nn.Module]:
    """The head and the loss of a stage, which are no part of the plain model, by their names' prefix in checkpoints."""
    boundary, _ = named_blocks(blocks)[-1]
    return ({} if head is None else {f"head/{boundary}/": head}) | {f"loss/{boundary}/": loss}


def parameter_names(blocks: nn.Sequential, head: nn.Module | None, loss: nn.Module) -> dict[nn.Parameter, str]:
    """The names of a stage's parameters, as checkpoints have them: the plain model's, and those of `own_parts`."""
    plain = plain_names(blocks)
    return {parameter: plain[name] for name, parameter in blocks.named_parameters()} | {
        parameter: prefix + name for prefix, part in own_parts(blocks, head, loss).items()
        for name, parameter in part.named_parameters()}


def plain_metadata(blocks: nn.Sequential) -> dict[str, Any]:
    """The versions of the plain model's modules, by path, which its state_dict carries as `_metadata`."""
    kept = getattr(blocks, "plain_metadata", None)
    return dict(blocks.state_dict()._metadata if kept is None else kept)  # type: ignore[attr-defined]


def model_notes(blocks: nn.Sequential) -> list[str]:
    """What a user may want to know of how `blocks` were made of a model, a line each."""
    return [*_notes_of_tracing(blocks), *(f"model: {why}" for why in why_uncut(blocks))]


def packings(blocks: nn.Sequential) -> dict[str, Packing]:
    """By the names of blocks that pass several tensors on, how these are packed."""
    return getattr(blocks, "packings", {})


def why_uncut(blocks: nn.Sequential) -> list[str]:
    """Why most of a model is in one block, where that is so: at most a line."""
    return list(getattr(blocks, "uncut", ()))


def _notes_of_tracing(blocks: nn.Sequential) -> list[str]:
    return list(getattr(blocks, "notes_of_tracing", ()))


def _has_forward(built: Any) -> bool:
    return isinstance(built, nn.Module) and type(built).forward is not nn.Module.forward


def _checked(modules: dict[Any, Any]) -> dict[str, nn.Module]:
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model: its block {name!r} is a {type(module).__name__}, not an nn.Module")
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.Sequential(), name):
            raise ConfigError(f"model: the block name {name!r} must be a text without dots, and no name that "
                              "nn.Module uses itself")
    return modules


def _from_data(builder: Any, data: DataSpec) -> dict[str, Any]:
    channels = data.shape[0] if data.shape else 1
    known = {"in_channels": channels, "in_shape": list(data.shape), "classes": data.classes}
    return {name: value for name, value in known.items() if takes(builder, name)}
