"""Why a model could not be cut where most of its parameters are."""

from collections.abc import Mapping

from torch import fx, nn

from blpipe.models.nodes import inside, operation


def uncut_notes(model: nn.Module, blocks: Mapping[str, list[list[fx.Node]]]) -> list[str]:
    """Why the piece that holds more than half of the parameters cannot be cut, if there is such a one of many layers.

    Args:
        blocks: by name, the operations of every piece of a block; between pieces a single tensor is live.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    cuttable = {node for pieces in blocks.values() for nodes in pieces for node in nodes}
    cuttable |= {source for node in cuttable for source in node.all_input_nodes if source.op == "placeholder"}
    for name, pieces in blocks.items():
        for nodes in pieces:
            layers = [i for i, node in enumerate(nodes) if node.op == "call_module" and _weights(model, node)]
            held = sum({node.target: _weights(model, node) for node in nodes if node.op == "call_module"}.values())
            if 2 * held <= total or not layers:
                continue
            holds = f"block {name} holds {held / total:.0%} of the parameters in one piece: "
            whole = model.get_submodule(str(max((nodes[i] for i in layers), key=lambda n: _weights(model, n)).target))
            if isinstance(whole, nn.TransformerEncoder | nn.TransformerDecoder):
                return [f"{holds}an nn.{type(whole).__name__} is left whole; to have it cut, return the blocks as a "
                        "list, with each of its layers (those in its attribute layers) as one of them"]
            if len(layers) > 1:
                live = _least_live(nodes, layers, cuttable)
                return [f"{holds}a cut needs a place where a single tensor is live, and between its layers at least "
                        f"{len(live)} are ({', '.join(_described(model, node) for node in live[:3])}"
                        f"{', …' if len(live) > 3 else ''})"]
    return []


def _weights(model: nn.Module, node: fx.Node) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(str(node.target)).parameters())


def _least_live(nodes: list[fx.Node], layers: list[int], cuttable: set[fx.Node]) -> list[fx.Node]:
    """The values that are live between two layers, where they are fewest."""
    order = {node: i for i, node in enumerate(nodes)}
    made = dict.fromkeys(source for node in nodes for source in (*node.all_input_nodes, node) if source in cuttable)
    last_use = {node: max((order.get(user, len(nodes)) for user in node.users if user in cuttable), default=-1)
                for node in made}
    live = [[node for node in made if order.get(node, -1) < cut <= last_use[node]] for cut in layers[1:]]
    return min(live, key=lambda values: len(values))


def _described(model: nn.Module, node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the model's input"
    return f"{operation(node, model)} in {inside(node) or 'its forward'}"
