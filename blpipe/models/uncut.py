"""Why a model could not be cut where most of its parameters are."""

from collections.abc import Callable, Mapping

from torch import fx, nn

from blpipe.models.encoder import is_its_layers
from blpipe.models.nodes import inside, operation, own_weights, size_of
from blpipe.models.packing import number_types, obstacle

_MOST_LIVE = 16  # at a cut; with more, what is passed on is no longer small beside what is computed
_WORTH_IT = 0.9  # of the share of the largest block: what is packed is copied


def uncut_notes(model: nn.Module, blocks: Mapping[str, list[list[fx.Node]]], live_tensors: int,
                largest: Callable[[int], float]) -> list[str]:
    """Why the piece that holds more than half of the parameters cannot be cut, if there is such a one of many layers.

    Args:
        blocks: by name, the operations of every piece of a block.
        live_tensors: how many may be live between pieces.
        largest: the share of the parameters in the largest block, if so many may be.
    """
    total = size_of(model)
    operations = [node for pieces in blocks.values() for nodes in pieces for node in nodes]
    for name, pieces in blocks.items():
        for nodes in pieces:
            layers = [node for node in nodes if node.op == "call_module" and _weights(model, node)]
            held = sum({node.target: _weights(model, node) for node in layers}.values())
            if 2 * held <= total or not layers:
                continue
            holds = f"block {name} holds {held / total:.0%} of the parameters in one piece: "
            largest_layer = max(layers, key=lambda layer: _weights(model, layer))
            whole = model.get_submodule(str(largest_layer.target))
            by_layers = is_its_layers(whole, largest_layer.args, largest_layer.kwargs)
            if type(whole) is nn.TransformerEncoder and not by_layers:
                return [f"{holds}an nn.TransformerEncoder that is given a padding mask is left whole, as in evaluation "
                        "it sets what is padded to 0; make it with enable_nested_tensor=False to have it cut"]
            if isinstance(whole, nn.TransformerEncoder | nn.TransformerDecoder):
                return [f"{holds}an nn.{type(whole).__name__} is left whole; to have it cut, return the blocks as a "
                        "list, with each of its layers (those in its attribute layers) as one of them"]
            if len(layers) > 1:
                passing, remedy = _fewest_passing(layers, operations), _remedy(live_tensors, largest)
                return [holds + _why(model, passing, live_tensors) + (remedy or _problem(model, passing))]
    return []


def _why(model: nn.Module, passing: list[fx.Node], live_tensors: int) -> str:
    named = ", ".join(_described(model, node) for node in passing[:3]) + (", …" if len(passing) > 3 else "")
    if len(passing) <= live_tensors:
        return f"between its layers {named} cannot pass"
    allowed = "a single tensor is" if live_tensors == 1 else f"no more than {live_tensors} tensors are"
    return f"a cut needs a place where {allowed} live, and between its layers at least {len(passing)} are ({named})"


def _problem(model: nn.Module, passing: list[fx.Node]) -> str:
    """Why the values that pass between layers cannot be packed, where that is so."""
    for node in passing:
        if obstacle(node):
            return f"; {_described(model, node)} {obstacle(node)}"
    types = sorted(number_types(passing))
    return f"; they are {' and '.join(types)}" if len(types) > 1 else ""


def _remedy(live_tensors: int, largest: Callable[[int], float]) -> str:
    """The fewest tensors at a cut that leave no block with most of the parameters, or as little as can be."""
    now, found = largest(live_tensors), {}
    for count in range(live_tensors + 1, _MOST_LIVE + 1):
        found[count] = largest(count)
        if found[count] <= 0.5:
            break
    best = min(found, key=lambda count: found[count], default=live_tensors)
    if found.get(best, now) > _WORTH_IT * now:
        return ""
    return f"; with model.live_tensors={best} the largest block has {found[best]:.0%}"


def shares(model: nn.Module, operations: list[fx.Node], groups: list[list[fx.Node]]) -> list[float]:
    """Of the model's parameters, those that each group's modules have, and that it reads, or what is made of them.

    Args:
        operations: of the model, in order; what is in no group is computed by those that read it.
    """
    total, grouped = size_of(model), {node for nodes in groups for node in nodes}
    read: dict[fx.Node, set[nn.Parameter]] = {}
    for node in operations:
        before = (read[source] for source in node.all_input_nodes if source in read and source not in grouped)
        read[node] = own_weights(node, model).union(*before)
    return [sum(weight.numel() for weight in set[nn.Parameter]().union(*(read[node] for node in nodes))) / total
            for nodes in groups]


def _weights(model: nn.Module, node: fx.Node) -> int:
    return size_of(model.get_submodule(str(node.target)))


def _fewest_passing(layers: list[fx.Node], operations: list[fx.Node]) -> list[fx.Node]:
    """The values that are live before a layer, of all but the first that before which they are fewest."""
    order = {node: i for i, node in enumerate(operations)}
    given = dict.fromkeys(x for node in operations for x in node.all_input_nodes if x.op == "placeholder")
    last_use = {node: max((order.get(user, -1) for user in node.users), default=-1) for node in [*given, *operations]}
    passing = ([node for node in last_use if order.get(node, -1) < order[layer] <= last_use[node]]
               for layer in layers[1:])
    return min(passing, key=len)


def _described(model: nn.Module, node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the model's input"
    return f"{operation(node, model)} in {inside(node) or 'its forward'}"
