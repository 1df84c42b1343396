"""One graph of a model's forward, by `torch.fx`: right in training and in evaluation, and nothing in place."""

import operator
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import checkpoint

from blpipe.errors import ConfigError, one_line
from blpipe.models import values
from blpipe.models.asserts import passing_truth
from blpipe.models.encoder import is_its_layers, layer_by_layer
from blpipe.models.modes import merge
from blpipe.models.nodes import (
    DECIDES_BY_BATCH,
    Untraceable,
    inside,
    is_size,
    module_path,
    operation,
    outputs_of,
    size_of,
)
from blpipe.models.unchanged import unchanged
from blpipe.models.values import (
    IN_PLACE_OPERATORS,
    Proxy,
    changes_under_autocast,
    compute_values,
    holds_for_any_batch,
    items_of,
    known_truth,
    samples_like,
)

_TORCH = os.path.dirname(torch.__file__) + os.sep
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


_OF_SIZES = ("empty", "ones", "rand", "randn", "zeros")  # functions of torch that take sizes one by one


class Traced(NamedTuple):
    """A forward as one graph.

    Args:
        given: its input.
        operations: in order.
        output: what it gives.
        notes: what of the model the graph leaves out, a line each.
    """

    given: fx.Node
    operations: list[fx.Node]
    output: fx.Node
    notes: list[str]


def trace(model: nn.Module, example: torch.Tensor | None) -> Traced:
    """Trace `model` in both modes into one graph, in which flags that follow `training` read the graph's own.

    A module that cannot be traced becomes a single node if it holds no more than half of the parameters. Of
    several outputs (auxiliary logits) the first stays.

    Args:
        example: a batch of samples, of which only shape and dtype matter; None if sizes are not to be known.

    Raises:
        ConfigError: the model cannot be traced; it names the place and the ways out.
    """
    if _is_hooked(model):
        raise ConfigError("model: it has hooks, which its blocks would not run; put it into a module of its own, or "
                          "return the blocks yourself, as an nn.Sequential, a list or a dict")
    modes = [(module, module.training) for module in model.modules()]
    try:
        return _trace_in_modes(model, example)
    except Untraceable as problem:
        with suppress(Untraceable):  # sizes that are numbers may be in the way too: random numbers of a known shape
            return _trace_in_modes(model, None)
        raise ConfigError(_explain(problem)) from problem.__cause__
    finally:
        for module, training in modes:
            module.training = training


def _trace_in_modes(model: nn.Module, example: torch.Tensor | None) -> Traced:
    opaque: set[type[nn.Module]] = set()
    while True:
        try:
            (evaluated, asserts), (trained, _) = (_trace(model, opaque, example, mode) for mode in (False, True))
            return Traced(*merge(model, evaluated, trained), _left_out([evaluated, trained], asserts))
        except Untraceable as problem:
            module = model.get_submodule(problem.path)
            if module is model or type(module) in opaque or 2 * size_of(module) > size_of(model):
                raise
            opaque.add(type(module))


def _left_out(graphs: list[fx.Graph], asserts: list[str]) -> list[str]:
    notes, outputs = [], max(len(set(outputs_of(graph))) for graph in graphs)
    if outputs > 1:
        notes.append(f"model: its forward returns {outputs} tensors; the blocks give one, the first that it returns in "
                     "evaluation, and what makes the others is not run")
    if any(node.meta.get("checkpointed") for graph in graphs for node in graph.nodes):
        notes.append("model: its own activation checkpointing is not kept; set train.recompute=true")
    if asserts:
        notes.append(f"model: asserts on values are not run ({', '.join(dict.fromkeys(asserts))})")
    return notes


def _explain(problem: Untraceable) -> str:
    at = f" at {problem.place}" if problem.place else ""
    within = f" (module {problem.path})" if problem.path else ""
    own = "site-packages" not in problem.place
    rewrite = ("rewrite that line without reading values or shapes into control flow, put it in a function marked with "
               "torch.fx.wrap or in a small module of its own, or " if own else "")
    return (f"model: cannot be traced{at}{within}: {problem.reason}; {rewrite}return the blocks yourself, as an "
            "nn.Sequential, a list or a dict")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # reading a buffer is an operation too: it may change from step to step

    def __init__(self, opaque: set[type[nn.Module]], example: torch.Tensor | None):
        super().__init__()
        self._opaque, self._streams, self._modes = opaque, _random_streams(), _modes()
        self._opened: nn.Module | None = None  # a module of torch's that is not left whole
        self._given, self._computing = None if example is None else samples_like(example), False
        self.asserts: list[str] = []  # the places of those that were skipped

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _is_hooked(m) or type(m) in self._opaque:
            return True
        return m is not self._opened and super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # One tensor: further arguments keep their defaults, as when the model is called with one.
        x = self.create_proxy("placeholder", "x", (), {})
        self.batch = self.create_proxy("call_method", "size", (x, 0), {})  # read before anything can overwrite x
        return root_fn, [self.root, x]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return items_of(obj) or super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        truth, passing = known_truth(obj.node), passing_truth(sys._getframe(2))  # of the code that asks the proxy
        if truth is not None and holds_for_any_batch(obj.node):
            return truth
        if passing is not None:
            if truth is None:
                self.asserts.append(_place(_frames_upward(sys._getframe(2))))
            return passing
        if truth is not None:
            now = self.create_proxy("call_function", operator.ne, (obj, 0), {})
            as_traced = self.create_proxy("call_function", operator.eq, (now, truth), {})
            self.create_proxy("call_function", torch._assert, (as_traced, DECIDES_BY_BATCH), {})
        return super().to_bool(obj) if truth is None else truth

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made_here = m not in (self.submodule_paths or {}) and not any(True for _ in (*m.parameters(), *m.buffers()))
        if self._computing or made_here:
            return forward(*args, **kwargs)
        self._opened = None
        if is_its_layers(m, args, kwargs):
            self._opened, forward = m, partial(layer_by_layer, m)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _random_streams() != self._streams:
            raise RuntimeError("its forward draws random numbers that do not depend on the input, which tracing would "
                               "draw once and for all")
        if _modes() != self._modes:
            raise RuntimeError("its forward switches gradients or autocast on or off, which tracing would not see")
        node = super().create_node(*args, **kwargs)
        frames = list(_frames_upward(sys._getframe(1)))
        node.meta["place"] = _place(frames)
        node.meta["checkpointed"] = any(frame.f_code.co_filename == checkpoint.__file__ for frame, _ in frames)
        self._computing = True  # modules that run for it are not traced
        try:
            node.meta["values"] = self._given if node.op == "placeholder" else compute_values(node, self.root)
            node.meta["autocast"] = changes_under_autocast(node, self.root)
        finally:
            self._computing = False
        return node


def _random_streams() -> tuple[Any, ...]:
    of_numpy: dict[str, Any] = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), of_numpy["key"].tobytes(), of_numpy["pos"]


def _modes() -> tuple[bool, ...]:
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            *map(torch.is_autocast_enabled, ("cpu", "cuda")))


def _is_hooked(module: nn.Module) -> bool:
    """Whether something runs with the module that its forward does not tell."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


def _trace(model: nn.Module, opaque: set[type[nn.Module]], example: torch.Tensor | None,
           training: bool) -> tuple[fx.Graph, list[str]]:
    """The graph of a mode, and the places of asserts that were skipped."""
    model.train(training)
    tracer, counters = _Tracer(opaque, example), _numbers(model)
    with unchanged(model):
        graph = _graph_of(model, tracer)
        _refuse_new_buffers(model)
        once = _numbers(model)
        made = {name: value for name, value in vars(model).items() if name.startswith("_tensor_constant")}
    vars(model).update(made)  # fx keeps tensors that a forward makes there
    if once != counters:  # of what is counted, or kept: the latter changes once
        with unchanged(model):
            for (path, name), number in once.items():
                setattr(model.get_submodule(path), name, number)
            _graph_of(model, _Tracer(opaque, example))
            twice = _numbers(model)
        for (path, name), number in once.items():
            if twice.get((path, name)) != number:
                raise Untraceable(f"its forward counts in the attribute {name}", "", path)
    _out_of_place(graph, model)
    return graph, tracer.asserts


def _numbers(model: nn.Module) -> dict[tuple[str, str], int | float]:
    """The attributes that are numbers, by the paths of modules and their names."""
    return {(path, name): value for path, module in model.named_modules() for name, value in vars(module).items()
            if type(value) in (int, float)}


def _refuse_new_buffers(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for name, value in module._buffers.items():
            if isinstance(value, fx.Proxy):
                raise Untraceable(f"its forward replaces the buffer {name}; write into it", "", path)


def _graph_of(model: nn.Module, tracer: _Tracer) -> fx.Graph:
    try:
        with _sizes_in_tuples():
            return tracer.trace(model)
    except Exception as error:
        modules = [module_path(call) for call in tracer.module_stack]
        raise Untraceable(f"{type(error).__name__}: {one_line(error)}",
                          _place(reversed(list(traceback.walk_tb(error.__traceback__)))),
                          modules[-1] if modules else "") from error


@contextmanager
def _sizes_in_tuples() -> Iterator[None]:
    """`torch.zeros(batch, 4)` can be traced: where the first size is a proxy, torch takes sizes in a tuple alone."""
    originals = {name: getattr(torch, name) for name in _OF_SIZES}
    with torch.device("meta"):  # when first used it lists the functions that take a device: those of torch, not ours
        torch.empty(0)
    try:
        for name, function in originals.items():
            setattr(torch, name, _with_sizes_in_a_tuple(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


def _with_sizes_in_a_tuple(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*sizes: Any, **more: Any) -> Any:
        one_by_one = len(sizes) > 1 and isinstance(sizes[0], fx.Proxy)
        return function(sizes, **more) if one_by_one else function(*sizes, **more)
    return called


def _frames_upward(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _place(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The first line outside torch and this package's tracing."""
    for frame, line in frames:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, "<")) and file not in (__file__, values.__file__):
            near = os.path.relpath(file)
            return f"{file if near.startswith('..') else near}:{line}"
    return ""


def _out_of_place(graph: fx.Graph, model: nn.Module) -> None:
    """Replace operations that overwrite a tensor by ones that make a new one, which its later users then get."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # what a node is a view of; itself if of nothing
    for node in order:
        first = node.all_input_nodes[0] if node.all_input_nodes else node
        shares = _is_view(node, model) or (memory.get(first, first).op == "get_attr" and _writes(node, model))
        memory[node] = memory[first] if shares else node
        overwritten = _overwritten(node, model)
        if overwritten is None:
            continue
        if memory[overwritten].op == "get_attr":
            raise Untraceable("it writes to a parameter or buffer by another name", node.meta["place"], inside(node))
        if not is_size(overwritten):
            def is_later(user: fx.Node, now: int = order[node]) -> bool:
                return order.get(user, -1) > now
            for other, base in memory.items():
                if base is memory[overwritten] and other not in (node, overwritten) \
                        and any(map(is_later, other.users)):
                    raise Untraceable("it overwrites a tensor of which a view is used later; write it out of place",
                                       node.meta["place"], inside(node))
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
    if isinstance(node.kwargs.get("out"), fx.Node):
        raise Untraceable("out= overwrites a tensor", node.meta["place"], inside(node))
    return first if first.op != "get_attr" and _writes(node, model) else None


def _writes(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node writes into its first tensor."""
    name = str(getattr(node.target, "__name__", node.target))
    in_place = node.kwargs.get("inplace") is True or node.target in IN_PLACE_OPERATORS.values()
    if node.op == "call_module":
        in_place |= getattr(model.get_submodule(str(node.target)), "inplace", False) is True
    elif name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
        in_place |= getattr(node.target, "__module__", None) != "_operator"  # whose and_ and or_ write nowhere
    return in_place


def _make_new(graph: fx.Graph, node: fx.Node, overwritten: fx.Node) -> None:
    name = str(getattr(node.target, "__name__", node.target))
    twin = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
    if node.op == "call_module":
        return  # the module's own flag is switched off with all others of the block
    if node.kwargs.get("inplace") is True:
        node.update_kwarg("inplace", False)
    elif name in IN_PLACE_OPERATORS:
        node.target = getattr(operator, f"__{name[1:]}__")
    elif name[:-1] in _TWINS and twin is not None:
        node.op, node.target = "call_function", twin
    else:
        with graph.inserting_before(node):
            copy = graph.call_method("clone", (overwritten,))
        copy.meta.update(node.meta)
        node.replace_input_with(overwritten, copy)
