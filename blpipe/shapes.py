"""What crosses each boundary: shapes, dtypes and where a map has its channels, without running anything."""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from blpipe.data import DataSpec
from blpipe.errors import ConfigError, one_line
from blpipe.heads import Shape
from blpipe.models.build import named_blocks

_CHANNELS_FIRST = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.MaxPool2d,
                   nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class TensorSpec(NamedTuple):
    """Shape and dtype of one tensor, batch included."""

    shape: Shape
    dtype: torch.dtype


def trace_shapes(model: nn.Sequential, data: DataSpec, size: int, training: bool) -> "OrderedDict[str, TensorSpec]":
    """The output of every block for `size` samples, computed on the meta device.

    Raises:
        ConfigError: a block that cannot take what the one before it gives, or gives no tensor.
    """
    spec = TensorSpec((size, *data.shape), getattr(torch, data.dtype))
    specs: OrderedDict[str, TensorSpec] = OrderedDict()
    for name, block in named_blocks(model):
        specs[name] = spec = trace_module(f"model: block {name}", block, spec, data, training)
    return specs


def trace_module(what: str, module: nn.Module, given: TensorSpec, data: DataSpec, training: bool) -> TensorSpec:
    """The output of `module`, which messages call `what`, for the input `given`, computed on the meta device.

    Raises:
        ConfigError: it cannot take that input, or gives no tensor [batch, …].
    """
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        state = {n: torch.empty_like(t, device="meta")
                 for n, t in (*module.named_parameters(), *module.named_buffers())}
        with torch.device("meta"), torch.no_grad():
            x = functional_call(module, state, (torch.empty(given.shape, dtype=given.dtype),))
    except Exception as error:
        raise ConfigError(_cannot_take(what, given.shape, data, training, error)) from error
    finally:
        for part, mode in modes:
            part.training = mode
    size = given.shape[0]
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[0] != size:
        shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ConfigError(f"{what} made {shape} of {list(given.shape)}; it must return one tensor [{size}, …] "
                          f"for a batch of {size}")
    return TensorSpec(tuple(x.shape), x.dtype)


def _cannot_take(what: str, given: Shape, data: DataSpec, training: bool, error: Exception) -> str:
    if training and given[0] == 1 and "more than 1 value per channel" in str(error):
        return (f"train.batch_size: BatchNorm in {what.removeprefix('model: ')} cannot train on a microbatch of "
                "1 sample; set train.drop_last=true, fewer train.microbatches, or another batch size")
    if "meta" in str(error):
        return (f"{what} cannot be traced: {one_line(error)}; blocks and heads must run on meta tensors: register "
                "their tensors as buffers, and read no values in forward")
    return (f"{what} cannot take an input of shape {list(given)} (samples of {list(data.shape)}): "
            f"{one_line(error)}; change model.args or the samples' size")


def channels_last(model: nn.Sequential, specs: "OrderedDict[str, TensorSpec]", data: DataSpec) -> list[bool]:
    """Whether the output of each block is a map with its channels last, [B, H, W, C].

    The first layer of the next block that knows, and takes the map as it is, tells; else the last one of the
    block itself that gives it; else the shape.
    """
    given = TensorSpec((next(iter(specs.values())).shape[0], *data.shape), getattr(torch, data.dtype))
    known: list[tuple[bool | None, bool | None]] = []  # by block: of its input, of its output
    for (name, block), made in zip(named_blocks(model), specs.values(), strict=True):
        known.append(_layouts(name, block, given, made, data))
        given = made
    answers = []
    for index, made in enumerate(specs.values()):
        of_next = known[index + 1][0] if index + 1 < len(known) else None
        of_block, by_shape = known[index][1], len(made.shape) == 4 and made.shape[1] == made.shape[2] != made.shape[3]
        known_layouts = [layout for layout in (of_next, of_block, by_shape) if layout is not None]
        answers.append(len(made.shape) == 4 and known_layouts[0])
    return answers


def _layouts(name: str, block: nn.Module, given: TensorSpec, made: TensorSpec,
             data: DataSpec) -> tuple[bool | None, bool | None]:
    """Whether the channels of a block's input and output are last, as far as its layers tell."""
    inputs: list[bool] = []
    outputs: list[bool] = []

    def look(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layout = _layout(layer)
        if layout is not None and args and args[0].shape == given.shape:
            inputs.append(layout)
        if layout is not None and output.shape == made.shape:
            outputs.append(layout)

    hooks = [layer.register_forward_hook(look) for layer in block.modules()]
    try:
        trace_module(f"model: block {name}", block, given, data, training=True)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs[0] if inputs else None, outputs[-1] if outputs else None


def _layout(layer: nn.Module) -> bool | None:
    """Whether a layer works on channels that are last; None if it does not care."""
    if type(layer) is nn.LayerNorm:  # a subclass may permute first
        return True if len(layer.normalized_shape) == 1 else None
    if isinstance(layer, nn.Linear):
        return True
    return False if isinstance(layer, _CHANNELS_FIRST) else None
