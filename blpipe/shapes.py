"""What crosses each boundary: shapes, dtypes and where the channels are, without running anything."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from blpipe.boundary import Boundary, Pixels, channels_first, tokens_of
from blpipe.errors import ConfigError, one_line
from blpipe.models.build import named_blocks, packings
from blpipe.models.encoder import without_fast_path
from blpipe.models.nodes import DECIDES_BY_BATCH
from blpipe.models.unchanged import unchanged
from blpipe.specs import DataSpec, Shape, TensorSpec

_CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.MaxPool1d, nn.AvgPool1d,
                   nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.GroupNorm,
                   nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.MaxPool2d, nn.AvgPool2d,
                   nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)

EVERY_MODULE = vars(nn.Module()).keys()
"""What a module has besides what its class gives it."""


def trace_shapes(model: nn.Sequential, data: DataSpec, size: int, training: bool,
                 calls: "dict[str, list[LayerCall]] | None" = None) -> "OrderedDict[str, TensorSpec]":
    """The output of every block for `size` samples, computed on the meta device.

    Args:
        calls: from `layer_calls`. Of blocks that are alike, with alike inputs, one is run, and the others get
            its calls.

    Raises:
        ConfigError: a block that cannot take what the one before it gives, or gives no tensor.
    """
    spec = data.batch(size)
    specs: OrderedDict[str, TensorSpec] = OrderedDict()
    known: dict[Hashable, str] = {}
    for name, block in named_blocks(model):
        first = known.setdefault((likeness(block), spec), name)
        if first == name:
            spec = trace_module(f"model: block {name}", block, spec, data, training)
        else:
            spec = specs[first]
            if calls is not None:
                calls[name] = calls[first]
        specs[name] = spec
    return specs


def likeness(module: nn.Module) -> Hashable:
    """Equal for modules that do the same work: the same classes, settings and shapes throughout."""
    parts = []
    for name, part in module.named_modules():
        settings = {key: value for key, value in vars(part).items() if key not in EVERY_MODULE}
        tensors = [(key, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
                   for key, tensor in (*part._parameters.items(), *part._buffers.items()) if tensor is not None]
        parts.append((name, type(part), repr(settings), str(tensors)))
    return tuple(parts)


def trace_module(what: str, module: nn.Module, given: TensorSpec, data: DataSpec, training: bool) -> TensorSpec:
    """The output of `module`, which messages call `what`, for the input `given`, computed on the meta device.

    Raises:
        ConfigError: it cannot take that input, or gives no tensor [batch, …].
    """
    state = {n: torch.empty_like(t, device="meta") for n, t in (*module.named_parameters(), *module.named_buffers())}
    try:
        with unchanged(module), without_fast_path(), torch.device("meta"), torch.no_grad():
            x = functional_call(module.train(training), state, (torch.empty(given.shape, dtype=given.dtype),))
    except Exception as error:
        raise ConfigError(_cannot_take(what, given.shape, data, training, error)) from error
    size = given.shape[0]
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[0] != size:
        shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        wanted = f"it must return one tensor [{size}, …] for a batch of {size}"
        if shape == [size]:
            wanted = f"have it return [{size}, classes]" if data.labelled else (
                f"have it return [{size}, 1], as without a squeeze; targets of [N] and of [N, 1] go with that")
        raise ConfigError(f"{what} made {shape} of {list(given.shape)}; {wanted}")
    return TensorSpec(tuple(x.shape), x.dtype)


def _cannot_take(what: str, given: Shape, data: DataSpec, training: bool, error: Exception) -> str:
    if training and given[0] == 1 and "more than 1 value per channel" in str(error):
        return (f"train.batch_size: BatchNorm in {what.removeprefix('model: ')} cannot train on a microbatch of "
                "1 sample; set train.drop_last=true, fewer train.microbatches, or another batch size")
    if DECIDES_BY_BATCH in str(error):
        return (f"train.batch_size: {what.removeprefix('model: ')} cannot take a batch of {given[0]}: "
                f"{one_line(error)}; set sizes, microbatches and train.drop_last so that none of {given[0]} is left")
    if "meta" in str(error).lower():
        return (f"{what} cannot be traced: {one_line(error)}; blocks and heads must run on meta tensors: register "
                "their tensors as buffers, and read no values in forward")
    remedy = "change model.args or the samples' size" if what.startswith("model") else "make it for this shape"
    return (f"{what} cannot take an input of shape {list(given)} (samples of {list(data.shape)}): "
            f"{one_line(error)}; {remedy}")


class LayerCall(NamedTuple):
    """A call of a layer that works on channels in a known place."""

    channels_last: bool
    taken: Shape
    given: Shape


@contextmanager
def layer_calls(model: nn.Sequential) -> Iterator[dict[str, list[LayerCall]]]:
    """Record, by block, the calls of layers that tell where their input has its channels."""
    calls: dict[str, list[LayerCall]] = {name: [] for name, _ in named_blocks(model)}

    def recorder(name: str, last: bool) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(out, torch.Tensor):
                calls[name].append(LayerCall(last, tuple(args[0].shape), tuple(out.shape)))
        return record

    hooks = [layer.register_forward_hook(recorder(name, last)) for name, block in named_blocks(model)
             for layer in block.modules() if (last := _works_on_last(layer)) is not None]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def make_boundaries(model: nn.Sequential, specs: "OrderedDict[str, TensorSpec]", calls: dict[str, list[LayerCall]],
                    data: DataSpec) -> list[Boundary]:
    """What a head after each block is built for; the last one is the model's own output.

    Args:
        specs: the output of each block, for any number of samples.
        calls: from `layer_calls`.

    Raises:
        ConfigError: an output that does not fit the targets.
    """
    packed, classes = packings(model), _classes(specs, data)
    read = OrderedDict((name, packed[name].read(spec) if name in packed else spec) for name, spec in specs.items())
    shapes = [spec.shape[1:] for spec in read.values()]
    last, signal = _channels_last(read, calls), _signals(read, calls)
    if signal[-1] and not data.labelled:  # heads give such values along T, for each of the channels
        signal = [False] * len(shapes)
    signal[-1] = False  # logits are [T, classes]
    last[-1] = len(shapes[-1]) == 3 and (data.labelled or last[-1])  # logits are [H, W, classes]
    later = [tokens_of(channels_first(shape, last[i]), signal[i]) for i, shape in enumerate(shapes)]
    pixels = Pixels(later[-1][0], (later[-1][1], later[-1][2]), last[-1]) if len(later[-1]) == 3 else None
    return [Boundary(shape, classes, tuple(later[i + 1:]), last[i], shapes[-1][:-1], i, data.labelled, signal[i],
                     pixels if len(shape) == 3 else None, packed.get(name))
            for i, (name, shape) in enumerate(zip(read, shapes, strict=True))]


def _channels_last(specs: "OrderedDict[str, TensorSpec]", calls: dict[str, list[LayerCall]]) -> list[bool]:
    """Whether the output of each block is a map with its channels last, [B, H, W, C].

    The first layer in the next block that takes the map as it is tells; else the last one in the block itself
    that gives it; else the shape.
    """
    return [len(shape) == 4 and [*said, shape[1] == shape[2] != shape[3]][0]
            for shape, said in _witnesses(specs, calls)]


def _signals(specs: "OrderedDict[str, TensorSpec]", calls: dict[str, list[LayerCall]]) -> list[bool]:
    """Whether the output of each block is a signal with its channels first, [B, C, T], and not tokens [B, T, D].

    The layers tell as they do of maps; where none does, it is tokens.
    """
    return [len(shape) == 3 and not [*said, True][0] for shape, said in _witnesses(specs, calls)]


def _witnesses(specs: "OrderedDict[str, TensorSpec]", calls: dict[str, list[LayerCall]]
          ) -> Iterator[tuple[Shape, list[bool]]]:
    """The output of each block, and whether its channels are last to the layers that tell, the best witness first."""
    for (name, (shape, _)), following in zip_longest(specs.items(), list(specs)[1:]):
        by_next = [call.channels_last for call in calls.get(following, []) if call.taken == shape]
        by_block = [call.channels_last for call in calls[name] if call.given == shape]
        yield shape, [*by_next, *reversed(by_block)]


def _works_on_last(layer: nn.Module) -> bool | None:
    """Whether a layer works on channels that are last; None if it does not care."""
    if type(layer) is nn.LayerNorm:  # a subclass may permute first
        return True if len(layer.normalized_shape) == 1 else None
    if isinstance(layer, nn.Linear):
        return True
    return False if isinstance(layer, _CHANNELS_FIRST) else None


def _classes(specs: "OrderedDict[str, TensorSpec]", data: DataSpec) -> int:
    name, output = next(reversed(specs.items()))
    size = output.shape[0]
    if data.labelled and output.shape[:-1] != (size, *data.target_shape):
        rows = len(output.shape) == 2 and len(data.target_shape) == 1
        remedy = "; or give one label a sample: y.squeeze(1), or y.argmax(1) of one-hot rows" if rows else ""
        if len(output.shape) == 4 and output.shape[2:] == data.target_shape:
            remedy = "; return y.permute(0, 2, 3, 1)"
        wanted = ", ".join(map(str, [size, *data.target_shape, "classes"]))
        raise ConfigError(f"model: its last block {name} gives {list(output.shape)}; for targets of "
                          f"{[size, *data.target_shape]} it must give [{wanted}]{remedy}")
    return output.shape[-1]
