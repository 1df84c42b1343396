"""What is asked of a node in a traced graph, and the error that names its place."""

import operator
from typing import Any

from torch import fx, nn

DECIDES_BY_BATCH = "its forward decides by the size of the batch, and with this one other than with most"

_SIZES = {"shape", "size", "dim", "ndim", "ndimension", "numel", "stride", "dtype", "device", "item",
          "is_floating_point"}


class Untraceable(Exception):
    """A place in a model that `torch.fx` cannot see through.

    Args:
        reason: what is wrong there.
        place: "file:line", or "".
        path: of the module it is in; "" for the model itself.
    """

    def __init__(self, reason: str, place: str, path: str):
        super().__init__(reason)
        self.reason, self.place, self.path = reason, place, path


def size_of(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def own_weights(node: fx.Node, model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the module that a node calls, or the one that it reads."""
    if node.op == "call_module":
        return {*model.get_submodule(str(node.target)).parameters()}
    value = operator.attrgetter(str(node.target))(model) if node.op == "get_attr" else None
    return {value} if isinstance(value, nn.Parameter) else set()


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


def stack_of(node: fx.Node) -> tuple[str, ...]:
    """The module calls that a node was made in, outermost first: a path, with "@n" where it is called again."""
    return tuple(node.meta.get("nn_module_stack", ()))


def module_path(call: str) -> str:
    """The path of the module in a call."""
    return call.partition("@")[0]


def inside(node: fx.Node) -> str:
    """The path of the module whose forward made a node; "" for the model itself."""
    return module_path((*("",), *stack_of(node))[-1])


def outputs_of(graph: fx.Graph) -> list[fx.Node]:
    """What a model returns: one tensor, or those in a tuple, a named tuple, a dict or a dataclass.

    Raises:
        Untraceable: it returns none.
    """
    value: Any = next(iter(reversed(graph.nodes))).args[0]
    if isinstance(value, fx.Node) and value.op == "call_function" and isinstance(value.target, type):
        value = [*value.args, *value.kwargs.values()]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else [value]
    found = [value for value in values if isinstance(value, fx.Node)]
    if not found:
        raise Untraceable("its forward returns no tensor made of its input", "", "")
    return found
