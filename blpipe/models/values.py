"""What is known of values while a model is traced: their shapes, for two batch sizes.

A size that is the same in both is a plain number from then on. One that is a multiple of the batch size is computed
from the batch size of the model's input, which every block can read from its own. Any other stays an operation.
"""

import operator
import re
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from blpipe.models.encoder import without_fast_path
from blpipe.models.nodes import is_size, operation
from blpipe.seeds import fixed_randomness

IN_PLACE_OPERATORS = {name: getattr(operator, name) for name in (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")}
_BATCH_SIZES = (2, 29)  # so unlike that what depends on them differs: the sizes of x[:8], of x[:x.shape[0] // 3]
_LOWERED = re.compile("linear|conv|mm|mv|matmul|einsum|attention|dot|bilinear|prelu|rnn|lstm|gru")


def samples_like(example: Tensor) -> list[Tensor]:
    """The model's input, without data, in both batch sizes.

    Args:
        example: a batch of samples; its size does not matter.
    """
    return [torch.empty((size, *example.shape[1:]), dtype=example.dtype, device="meta") for size in _BATCH_SIZES]


def known_values(node: fx.Node) -> list[Any] | None:
    """What `node` gives in both batch sizes, where tensors have no data; None where that could not be computed."""
    return node.meta.get("values")


def compute_values(node: fx.Node, root: nn.Module) -> list[Any] | None:
    """Run `node` without data, in both batch sizes; None if that cannot be, as in what reads numbers from tensors.

    What a user's module keeps, such as a table that it makes once, it keeps in a copy; a user's function is not run.
    """
    given = {source: known_values(source) for source in node.all_input_nodes}
    if any(values is None for values in given.values()) or not _can_run(node, root):
        return None
    try:
        with fixed_randomness(0), torch.no_grad(), without_fast_path(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [_run(node, root, {source: values[i] for source, values in given.items() if values})
                    for i in range(len(_BATCH_SIZES))]
    except Exception:  # whatever an operation or a user's module does with tensors that have no data
        return None


def _can_run(node: fx.Node, root: nn.Module) -> bool:
    """Whether what `node` runs calls no hook, and is torch's, torchvision's or Python's where it is a function."""
    if node.op == "call_module":
        parts = root.get_submodule(str(node.target)).modules()
        return not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    if node.op == "call_function":
        package = (getattr(node.target, "__module__", None) or "").partition(".")[0]
        return package in ("torch", "torchvision", "_operator", "math", "builtins", "")  # "": some that are in C
    return True


def changes_under_autocast(node: fx.Node, root: nn.Module) -> bool:
    """Whether `node` may give a tensor of another type under autocast: it, or what it is made of, is lowered."""
    if any(source.meta["autocast"] for source in node.all_input_nodes):
        return True
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return not isinstance(module, nn.Embedding) and (bool(_LOWERED.search(operation(node, root)))
                                                         or any(weight.dim() > 1 for weight in module.parameters()))
    return node.op in ("call_function", "call_method") and bool(_LOWERED.search(operation(node, root)))


def _run(node: fx.Node, root: nn.Module, given: dict[fx.Node, Any]) -> Any:
    args: Any = fx.node.map_arg(node.args, given.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, given.__getitem__)
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(root)
        return _without_data(value) if isinstance(value, Tensor) else value
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # computing it is slow, even without data
            return torch.empty_like(args[0])
        state = {name: _without_data(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        if not type(module).__module__.startswith("torch."):  # real tensors, should it make some and keep them
            return functional_call(deepcopy(module), state, args, kwargs)
        with torch.device("meta"):
            return functional_call(module, state, args, kwargs)
    with torch.device("meta"):
        return getattr(args[0], str(node.target))(*args[1:], **kwargs) if node.op == "call_method" \
            else node.target(*args, **kwargs)  # type: ignore[operator]


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def is_batch_first(node: fx.Node) -> bool:
    """Whether `node` gives a tensor [batch, …], as far as is known."""
    values = known_values(node)
    return values is None or all(isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
                                 for value, size in zip(values, _BATCH_SIZES, strict=True))


def rows_of(node: fx.Node) -> tuple[int, Tensor] | None:
    """How many rows of a tensor belong to each sample of any batch, and a row, without data; None if not known."""
    values = known_values(node) or []
    if not values or not all(isinstance(value, Tensor) and value.dim() > 0 for value in values):
        return None
    rows = _multiple([value.shape[0] for value in values])
    return None if rows is None or values[0].shape[1:] != values[1].shape[1:] else (rows, values[0][0])


def shape_text(node: fx.Node) -> str:
    """The shape of a tensor, with `batch` where a size is that of the batch; empty where it is not known."""
    values = known_values(node) or []
    if not values or not all(isinstance(value, Tensor) and value.dim() == values[0].dim() for value in values):
        return ""
    sizes = zip(*(value.shape for value in values), strict=True)
    return f"[{', '.join('batch' if size == _BATCH_SIZES else str(size[0]) for size in sizes)}]"


def known_truth(node: fx.Node) -> bool | None:
    """Whether what `node` computes of sizes is true, where it is so in both batch sizes, or in neither."""
    values = known_values(node)
    if values is None or not _of_sizes(node):
        return None
    few, many = map(bool, values)
    return few if few is many else None


def holds_for_any_batch(node: fx.Node) -> bool:
    """Whether `node` compares multiples of the batch size, which are equal in all batches if in one."""
    sides = [known_values(side) if isinstance(side, fx.Node) else None for side in node.args]
    return node.target in (operator.eq, operator.ne) and all(side is not None and _multiple(side) for side in sides)


def _of_sizes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "size"
    return is_size(node) and node.target is not getattr and all(map(_of_sizes, node.all_input_nodes))


def known_length(node: fx.Node) -> int | None:
    """How many items a value has at every batch size, where that is known."""
    values = known_values(node)
    if values is None or not all(isinstance(value, tuple | list) or _has_dimensions(value) for value in values):
        return None
    few, many = map(len, values)
    return few if few == many else None


def _are_sizes(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list | tuple) and all(type(size) is int for size in value))


def _has_dimensions(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _multiple(sizes: list[Any]) -> int | None:
    """The factor by which `sizes` are multiples of the batch sizes, if they are."""
    if not all(type(size) is int for size in sizes):
        return None
    factor = sizes[0] // _BATCH_SIZES[0]
    return factor if factor > 0 and sizes == [factor * size for size in _BATCH_SIZES] else None


class Sizes(tuple[Any, ...]):
    """A shape of which some sizes depend on the batch, and are proxies."""

    def numel(self) -> Any:
        """The product of the sizes."""
        product = 1
        for size in self:
            product = product * size
        return product

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Sizes(found) if isinstance(index, slice) else found

    def __fx_create_arg__(self, tracer: fx.Tracer) -> Any:
        return tracer.create_arg(tuple(self))


class Proxy(fx.Proxy):
    """A traced value that tells what is known of its shape.

    It records `x += y` as what it is: torch's proxies would compute x + y and leave the old x as it was.
    """

    @property
    def shape(self) -> Any:
        """As a tensor's."""
        return self.size() if self._tensors() else fx.proxy.Attribute(self, "shape")

    @property
    def ndim(self) -> Any:
        """As a tensor's."""
        return self.dim() if self._tensors() else fx.proxy.Attribute(self, "ndim")

    @property
    def dtype(self) -> Any:
        """As a tensor's."""
        tensors = self._tensors()
        settled = tensors and not self.node.meta["autocast"]
        return tensors[0].dtype if settled else fx.proxy.Attribute(self, "dtype")

    def dim(self) -> Any:
        """As a tensor's."""
        tensors = self._tensors()
        return tensors[0].dim() if tensors else self._call("dim")

    def numel(self) -> Any:
        """As a tensor's."""
        return self.size().numel() if self._tensors() else self._call("numel")

    def is_floating_point(self) -> Any:
        """As a tensor's."""
        tensors = self._tensors()
        return tensors[0].is_floating_point() if tensors else self._call("is_floating_point")

    def size(self, *args: Any, **kwargs: Any) -> Any:
        """As a tensor's."""
        tensors = self._tensors()
        if not tensors:
            return self._call("size", *args, **kwargs)
        dimension = next(iter((*args, *kwargs.values())), None)
        if dimension is not None:
            return self._size(tensors, dimension)
        sizes = [self._size(tensors, dimension) for dimension in range(tensors[0].dim())]
        return torch.Size(sizes) if all(isinstance(size, int) for size in sizes) else Sizes(sizes)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise AttributeError(f"it sets .{name} of a tensor, which tracing would not see")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # A part that is a tensor, such as x.mT, is known like any other; torch's proxies of attributes are not.
        if all(isinstance(getattr(value, name, None), Tensor) for value in known_values(self.node) or [None]):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __getitem__(self, index: Any) -> Any:
        item = self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})
        few, many = known_values(item.node) or (None, None)
        return few if _are_sizes(few) and few == many else item  # of what a module returns beside its tensor

    def __len__(self) -> int:
        length = known_length(self.node)
        return super().__len__() if length is None else length

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        # torch looks for proxies of the class that is asked, which those of attributes are not, and not inside shapes.
        given = [tuple(value) if isinstance(value, Sizes) else value for value in args or ()]
        named = {name: tuple(value) if isinstance(value, Sizes) else value for name, value in (kwargs or {}).items()}
        return fx.Proxy.__torch_function__(orig_method, types, tuple(given), named)

    def _tensors(self) -> list[Tensor]:
        """It in both batch sizes; none where it is no tensor, or not known."""
        values = known_values(self.node) or []
        alike = all(isinstance(value, Tensor) and value.dim() == values[0].dim() for value in values)
        return values if alike else []

    def _size(self, tensors: list[Tensor], dimension: int) -> Any:
        sizes = [tensor.shape[dimension] for tensor in tensors]
        if sizes[0] == sizes[1]:
            return sizes[0]
        factor = _multiple(sizes)
        if factor is None:
            return self._call("size", dimension)
        batch = self.tracer.batch  # type: ignore[attr-defined]
        return batch if factor == 1 else batch * factor

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", method, (self, *args), kwargs)


def _record_in_place(name: str) -> None:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", IN_PLACE_OPERATORS[name], (self, other), {})
    setattr(Proxy, f"__{name}__", method)


for _name in IN_PLACE_OPERATORS:
    _record_in_place(_name)


def items_of(proxy: Any) -> Iterator[fx.Proxy] | None:
    """The items of a traced value in a loop, where their number is known."""
    length = known_length(proxy.node)
    return None if length is None else iter([proxy[i] for i in range(length)])
