"""One graph of a model's forward, by `torch.fx`: right in training and in evaluation, and nothing in place."""

import operator
import os
import random
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from blpipe.errors import ConfigError, one_line

_TORCH = os.path.dirname(torch.__file__) + os.sep
_IN_PLACE_OPERATORS = {name: getattr(operator, name) for name in (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")}
# In-place functions whose namesake without "_" computes the same, given that the operands have one dtype.
_TWINS = {"add", "sub", "mul", "div", "relu", "relu6", "sigmoid", "tanh", "clamp", "hardtanh", "leaky_relu", "elu",
          "selu", "celu", "silu", "gelu", "exp", "sqrt", "abs", "neg"}
_VIEWS = {  # what may share its result's memory with its input
    "getitem", "getattr", "view", "view_as", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes",
    "movedim", "t", "squeeze", "unsqueeze", "expand", "expand_as", "chunk", "split", "unbind", "narrow", "select",
    "detach", "contiguous", "to", "float", "identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout",
    "stochastic_depth", "diagonal", "ravel", "moveaxis", "swapdims", "tensor_split", "split_with_sizes",
    "hsplit", "vsplit", "dsplit", "unfold", "broadcast_to", "as_strided", "type_as", "double", "squeeze_",
    "unsqueeze_", "real", "view_as_real", "view_as_complex"}
_SIZES = {"shape", "size", "dim", "ndim", "ndimension", "numel", "stride", "dtype", "device", "item",
          "is_floating_point"}


class _Untraceable(Exception):
    """A place in a model that `torch.fx` cannot see through.

    Args:
        reason: what is wrong there.
        place: "file:line", or "".
        path: of the module it is in; "" for the model itself.
    """

    def __init__(self, reason: str, place: str, path: str):
        super().__init__(reason)
        self.reason, self.place, self.path = reason, place, path


def trace(model: nn.Module) -> tuple[fx.Node, list[fx.Node], fx.Node]:
    """Trace `model` in both modes into one graph, in which flags that follow `training` read the graph's own.

    A module that cannot be traced becomes a single node if it holds no more than half of the parameters. Of
    several outputs (auxiliary logits) the first stays.

    Returns:
        Input, operations in order, and output.

    Raises:
        ConfigError: the model cannot be traced; it names the place and the ways out.
    """
    modes = [(module, module.training) for module in model.modules()]
    opaque: set[type[nn.Module]] = set()
    try:
        while True:
            try:
                return _merge(model, *(_trace(model, opaque, training) for training in (False, True)))
            except _Untraceable as problem:
                module = model.get_submodule(problem.path)
                if module is model or type(module) in opaque or 2 * _size(module) > _size(model):
                    raise ConfigError(_explain(problem)) from problem.__cause__
                opaque.add(type(module))
    finally:
        for module, training in modes:
            module.training = training


def by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """The constant of the present mode."""
    return in_training if training else in_evaluation


def operation(node: fx.Node, model: nn.Module) -> str:
    """The short name of what a node does: of its function, method or module class, in lower case."""
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__.lower()
    return str(getattr(node.target, "__name__", node.target)).lower()


def is_size(node: fx.Node) -> bool:
    """Whether a node is no tensor but a shape, a size, a dtype or computed from such."""
    if node.op == "call_method":
        return node.target in _SIZES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SIZES
    of_python = getattr(node.target, "__module__", None) in ("_operator", "math", "builtins")
    return of_python and bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))


def _explain(problem: _Untraceable) -> str:
    at = f" at {problem.place}" if problem.place else ""
    inside = f" (module {problem.path})" if problem.path else ""
    return (f"model: cannot be traced{at}{inside}: {problem.reason}; rewrite that line without reading values or "
            "shapes into control flow, put it in a function marked with torch.fx.wrap or in a small module of its "
            "own, or return the blocks yourself, as an nn.Sequential, a list or a dict")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is: plain proxies would compute x + y and leave the old x as it was."""


def _record_in_place(name: str) -> None:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", _IN_PLACE_OPERATORS[name], (self, other), {})
    setattr(_Proxy, f"__{name}__", method)


for _name in _IN_PLACE_OPERATORS:
    _record_in_place(_name)


class _Tracer(fx.Tracer):
    trace_asserts = True
    proxy_buffer_attributes = True  # reading a buffer is an operation too: it may change from step to step

    def __init__(self, opaque: set[type[nn.Module]]):
        super().__init__()
        self._opaque, self._streams, self._modes = opaque, _random_streams(), _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self._opaque or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # One tensor: further arguments keep their defaults, as when the model is called with one.
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _random_streams() != self._streams:
            raise RuntimeError("its forward draws random numbers that do not depend on the input, which tracing would "
                               "draw once and for all")
        if _modes() != self._modes:
            raise RuntimeError("its forward switches gradients or autocast on or off, which tracing would not see")
        node = super().create_node(*args, **kwargs)
        node.meta["place"] = _place(_frames_upward(sys._getframe(1)))
        return node


def _random_streams() -> tuple[Any, ...]:
    of_numpy: dict[str, Any] = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), of_numpy["key"].tobytes(), of_numpy["pos"]


def _modes() -> tuple[bool, ...]:
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            *map(torch.is_autocast_enabled, ("cpu", "cuda")))


def stack_of(node: fx.Node) -> tuple[str, ...]:
    """The module calls that a node was made in, outermost first: a path, with "@n" where it is called again."""
    return tuple(node.meta.get("nn_module_stack", ()))


def module_path(call: str) -> str:
    """The path of the module in a call."""
    return call.partition("@")[0]


def _trace(model: nn.Module, opaque: set[type[nn.Module]], training: bool) -> fx.Graph:
    tracer = _Tracer(opaque)
    model.train(training)
    try:
        graph = tracer.trace(model)
    except Exception as error:
        inside = [module_path(call) for call in tracer.module_stack]
        raise _Untraceable(f"{type(error).__name__}: {one_line(error)}",
                           _place(reversed(list(traceback.walk_tb(error.__traceback__)))),
                           inside[-1] if inside else "") from error
    _out_of_place(graph, model)
    return graph


def _frames_upward(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _place(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The first line outside torch and this file."""
    for frame, line in frames:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, "<")) and file != __file__:
            near = os.path.relpath(file)
            return f"{file if near.startswith('..') else near}:{line}"
    return ""


def _out_of_place(graph: fx.Graph, model: nn.Module) -> None:
    """Replace operations that overwrite a tensor by ones that make a new one, which its later users then get."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # what a node is a view of; itself if of nothing
    for node in order:
        memory[node] = memory[node.all_input_nodes[0]] if _is_view(node, model) else node
        overwritten = _overwritten(node, model)
        if overwritten is None:
            continue
        if not is_size(overwritten):
            def is_later(user: fx.Node, now: int = order[node]) -> bool:
                return order.get(user, -1) > now
            for other, base in memory.items():
                if base is memory[overwritten] and other not in (node, overwritten) \
                        and any(map(is_later, other.users)):
                    raise _Untraceable("it overwrites a tensor of which a view is used later; write it out of place",
                                       node.meta["place"], _inside(node))
            overwritten.replace_all_uses_with(node, is_later)
        _make_new(graph, node, overwritten)


def _is_view(node: fx.Node, model: nn.Module) -> bool:
    return node.op in ("call_function", "call_method", "call_module") and operation(node, model) in _VIEWS \
        and not is_size(node) and bool(node.all_input_nodes)


def _overwritten(node: fx.Node, model: nn.Module) -> fx.Node | None:
    """The tensor that a node writes into, unless it is one of the model's own (a counter in a buffer)."""
    first = next(iter((*node.args, *node.kwargs.values())), None)
    if node.op not in ("call_function", "call_method", "call_module") or not isinstance(first, fx.Node):
        return None
    name = str(getattr(node.target, "__name__", node.target))
    if isinstance(node.kwargs.get("out"), fx.Node):
        raise _Untraceable("out= overwrites a tensor", node.meta["place"], _inside(node))
    in_place = node.kwargs.get("inplace") is True or node.target in _IN_PLACE_OPERATORS.values()
    if node.op == "call_module":
        in_place |= getattr(model.get_submodule(str(node.target)), "inplace", False) is True
    elif name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
        in_place = True
    return first if in_place and first.op != "get_attr" else None


def _make_new(graph: fx.Graph, node: fx.Node, overwritten: fx.Node) -> None:
    name = str(getattr(node.target, "__name__", node.target))
    twin = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
    if node.op == "call_module":
        return  # the module's own flag is switched off with all others of the block
    if node.kwargs.get("inplace") is True:
        node.update_kwarg("inplace", False)
    elif name in _IN_PLACE_OPERATORS:
        node.target = getattr(operator, f"__{name[1:]}__")
    elif name[:-1] in _TWINS and twin is not None:
        node.op, node.target = "call_function", twin
    else:
        with graph.inserting_before(node):
            copy = graph.call_method("clone", (overwritten,))
        copy.meta.update(node.meta)
        node.replace_input_with(overwritten, copy)


def _inside(node: fx.Node) -> str:
    return module_path((*("",), *stack_of(node))[-1])


def _merge(model: nn.Module, evaluation: fx.Graph, training: fx.Graph) -> tuple[fx.Node, list[fx.Node], fx.Node]:
    """The graph of evaluation, with the constants that differ in training made to follow the mode."""
    output = _outputs(evaluation)[0]
    nodes = _needed(evaluation, output)
    problems = []
    for candidate in _outputs(training):
        try:
            merged = _align(model, nodes, _needed(training, candidate))
            break
        except _Untraceable as problem:
            problems.append(problem)
    else:
        raise problems[0]
    for node, (args, kwargs) in merged.items():
        node.args, node.kwargs = _follow_mode(evaluation, node, args), _follow_mode(evaluation, node, kwargs)
    return nodes[0], nodes[1:], output


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    """What a model returns: one tensor, or those in a tuple, a named tuple, a dict or a dataclass."""
    value: Any = next(iter(reversed(graph.nodes))).args[0]
    if isinstance(value, fx.Node) and value.op == "call_function" and isinstance(value.target, type):
        value = [*value.args, *value.kwargs.values()]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else [value]
    found = [value for value in values if isinstance(value, fx.Node)]
    if not found:
        raise _Untraceable("its forward returns no tensor made of its input", "", "")
    return found


def _needed(graph: fx.Graph, output: fx.Node) -> list[fx.Node]:
    """The input and what `output` is made of, in order, with the asserts and updates of buffers among them."""
    def ancestors(node: fx.Node, known: set[fx.Node]) -> set[fx.Node]:
        found, missing = set(), [node]
        while missing:
            found.add(missing[-1])
            missing += [source for source in missing.pop().all_input_nodes if source not in known | found]
        return found
    needed = ancestors(output, set()) | {next(iter(graph.nodes))}
    for node in graph.nodes:
        if _has_effect(node):
            more = ancestors(node, needed)
            if all(n.op != "call_module" for n in more):  # else it belongs to a part that is left out
                needed |= more
    return [node for node in graph.nodes if node in needed]


def _has_effect(node: fx.Node) -> bool:
    name = str(node.target)
    return node.target is torch._assert or (node.op == "call_method" and name.endswith("_") and name[:2] != "__"
                                            and node.all_input_nodes[0].op == "get_attr")


@dataclass(frozen=True)
class _Choice:
    """A constant that depends on the mode."""

    in_training: Any
    in_evaluation: Any


def _align(model: nn.Module, evaluation: list[fx.Node], training: list[fx.Node]) -> dict[fx.Node, tuple[Any, Any]]:
    """The arguments of every node of `evaluation`, with a `_Choice` where only a constant differs in training."""
    partner: dict[fx.Node, fx.Node] = {}
    merged = {}
    for node, other in zip_longest(evaluation, training):
        if node is None or other is None or not _same_target(model, node, other):
            raise _differs(node, other)
        try:
            merged[node] = _matched(node.args, other.args, partner), _matched(node.kwargs, other.kwargs, partner)
        except LookupError:
            raise _differs(node, other) from None
        partner[other] = node
    return merged


def _same_target(model: nn.Module, node: fx.Node, other: fx.Node) -> bool:
    if node.op == other.op == "get_attr" and node.target != other.target:  # constants that each trace made anew
        one, two = (operator.attrgetter(str(n.target))(model) for n in (node, other))
        return isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) and torch.equal(one, two)
    return (node.op, node.target) == (other.op, other.target)


def _matched(value: Any, other: Any, partner: dict[fx.Node, fx.Node]) -> Any:
    if isinstance(value, fx.Node) and isinstance(other, fx.Node) and partner.get(other) is value:
        return value
    if isinstance(value, tuple | list) and isinstance(other, tuple | list) and len(value) == len(other):
        return type(value)([_matched(*pair, partner) for pair in zip(value, other, strict=True)])
    if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
        return {key: _matched(value[key], other[key], partner) for key in value}
    if isinstance(value, slice) and isinstance(other, slice):
        return slice(*(_matched(getattr(value, part), getattr(other, part), partner)
                       for part in ("start", "stop", "step")))
    if _holds_nodes(value) or _holds_nodes(other):
        raise LookupError
    return value if type(value) is type(other) and value == other else _Choice(other, value)


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)


def _differs(node: fx.Node | None, other: fx.Node | None) -> _Untraceable:
    deepest = max((n for n in (other, node) if n is not None), key=lambda n: len(stack_of(n)))
    return _Untraceable("its forward computes something else in training than in evaluation", deepest.meta["place"],
                        _inside(deepest))


def _follow_mode(graph: fx.Graph, node: fx.Node, arguments: Any) -> Any:
    """`arguments` with a node for each `_Choice`, which reads the mode when it runs."""
    def node_for(value: Any) -> Any:
        if not isinstance(value, _Choice):
            return value
        with graph.inserting_before(node):
            training = graph.create_node("get_attr", "training")
            if (value.in_training, value.in_evaluation) == (True, False):
                return training
            return graph.call_function(by_mode, (training, value.in_training, value.in_evaluation))
    return fx.node.map_aggregate(arguments, node_for)
