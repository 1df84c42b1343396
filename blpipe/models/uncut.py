"""Why a model could not be cut where most of its parameters are."""

from collections.abc import Mapping

from torch import fx, nn

from blpipe.models.nodes import inside, operation
from blpipe.models.packing import learned_nodes, packing_of


def uncut_notes(model: nn.Module, blocks: Mapping[str, list[list[fx.Node]]], live_tensors: int) -> list[str]:
    """Why the piece that holds more than half of the parameters cannot be cut, if there is such a one of many layers.

    Args:
        blocks: by name, the operations of every piece of a block.
        live_tensors: how many may be live between pieces.
    """
    allowed = "a single tensor is" if live_tensors == 1 else f"no more than {live_tensors} tensors are"
    total = sum(parameter.numel() for parameter in model.parameters())
    operations = [node for pieces in blocks.values() for nodes in pieces for node in nodes]
    cuttable = set(operations)
    cuttable |= {source for node in cuttable for source in node.all_input_nodes if source.op == "placeholder"}
    for name, pieces in blocks.items():
        for nodes in pieces:
            layers = [i for i, node in enumerate(nodes) if node.op == "call_module" and _weights(model, node)]
            held = sum({node.target: _weights(model, node) for node in nodes if node.op == "call_module"}.values())
            if 2 * held <= total or not layers:
                continue
            holds = f"block {name} holds {held / total:.0%} of the parameters in one piece: "
            whole = model.get_submodule(str(max((nodes[i] for i in layers), key=lambda n: _weights(model, n)).target))
            if type(whole) is nn.TransformerEncoder:
                return [f"{holds}an nn.TransformerEncoder that is given a padding mask is left whole, as in evaluation "
                        "it sets what is padded to 0; make it with enable_nested_tensor=False to have it cut"]
            if isinstance(whole, nn.TransformerEncoder | nn.TransformerDecoder):
                return [f"{holds}an nn.{type(whole).__name__} is left whole; to have it cut, return the blocks as a "
                        "list, with each of its layers (those in its attribute layers) as one of them"]
            if len(layers) > 1:
                learned = learned_nodes(model, operations)
                live = min(_live(nodes, layers, cuttable), key=lambda v: (len(v), packing_of(v, learned) is None))
                remedy = "" if packing_of(live, learned) is None else \
                    f"; model.live_tensors={len(live)} passes them on together"
                return [f"{holds}a cut needs a place where {allowed} live, and between its layers at least "
                        f"{len(live)} are ({', '.join(_described(model, node) for node in live[:3])}"
                        f"{', …' if len(live) > 3 else ''}){remedy}"]
    return []


def _weights(model: nn.Module, node: fx.Node) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(str(node.target)).parameters())


def _live(nodes: list[fx.Node], layers: list[int], cuttable: set[fx.Node]) -> list[list[fx.Node]]:
    """The values that are live before each layer but the first."""
    order = {node: i for i, node in enumerate(nodes)}
    made = dict.fromkeys(source for node in nodes for source in (*node.all_input_nodes, node) if source in cuttable)
    last_use = {node: max((order.get(user, len(nodes)) for user in node.users if user in cuttable), default=-1)
                for node in made}
    return [[node for node in made if order.get(node, -1) < cut <= last_use[node]] for cut in layers[1:]]


def _described(model: nn.Module, node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the model's input"
    return f"{operation(node, model)} in {inside(node) or 'its forward'}"
