"""Any traceable model as blocks: its graph, cut where few tensors are live, in pieces that follow its modules."""

import operator
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from blpipe.errors import ConfigError
from blpipe.models.nodes import is_size, module_path, operation, size_of, stack_of
from blpipe.models.packing import Packing, learned_nodes, pack, packing_of, part_of
from blpipe.models.tracing import Traced, trace
from blpipe.models.uncut import shares, uncut_notes
from blpipe.models.values import is_batch_first

_TUPLES = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes", "hsplit", "vsplit", "dsplit", "meshgrid"}
_RANDOM = re.compile("drop|rand|bernoulli|normal|multinomial|poisson|exponential|stochastic")
_WEIGHING = re.compile("linear|conv|mm|matmul|einsum|embedding")


class TracedBlock(fx.GraphModule):
    """A block cut out of a traced model. Its submodules and parameters have their paths in that model."""


def blocks_of(model: nn.Module, example: torch.Tensor | None = None, live_tensors: int = 1) -> nn.Sequential:
    """`model` as an ordered sequence of named blocks, one tensor in and one out, that compute what it computes.

    The blocks share the model's own modules and parameters, which keep their names inside a block. They follow
    `train()` and `eval()` as the model does. A block is one of the model's modules where possible (a residual
    block), or a layer with weights and what follows it. Of several outputs the first stays: auxiliary classifiers
    are not run, but their parameters are carried along in a nearby block. Layers with `inplace=True` are switched
    to out of place.

    Args:
        example: a batch of samples, [batch, …], of which only shape and dtype matter; `device="meta"` will do. With
            it the blocks are for samples of that shape, in batches of any size: sizes are known, and the model may
            make decisions by them. Without it all sizes are computed as the blocks run.
        live_tensors: how many tensors may pass between two blocks. More than one are packed, as [batch, N], for
            which the example is needed.

    Raises:
        ConfigError: the model cannot be traced by `torch.fx`; it names the place and the ways out.
    """
    if live_tensors > 1 and example is None:
        raise ConfigError(f"live_tensors: {live_tensors} tensors are packed by their shapes; give an example too")
    own, persistent = set(vars(model)), set(model.state_dict())
    traced = trace(model, example)
    learned = learned_nodes(model, traced.operations)
    pieces, batched = _pieces(model, traced, learned, live_tensors)
    groups = _groups(model, pieces)
    passed = [_Passed((traced.given,)), *(group.pieces[-1].gives for group in groups)]
    read_later: set[fx.Node] = set()  # whose batch size a later block reads
    cut = []
    for group, start, end in reversed(list(zip(groups, passed, passed[1:], strict=False))):
        cut.append(_block(model, start, group.nodes(), end, batched, read_later, persistent))
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for group, block in zip(groups, reversed(cut), strict=True):
        blocks[_unused(group.name, blocks)] = block
        out_of_place(block)
    for constant in set(vars(model)) - own:  # tensors made in forward, which tracing leaves on the model
        delattr(model, constant)
    _carry_along(model, cut[::-1])
    sequence = nn.Sequential(blocks)
    sequence.plain_metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    sequence.notes_of_tracing = traced.notes  # type: ignore[assignment]
    sequence.packings = {name: gives.packing  # type: ignore[assignment]
                         for name, gives in zip(blocks, passed[1:], strict=True) if gives.packing}
    named = {name: [piece.nodes for piece in group.pieces] for name, group in zip(blocks, groups, strict=True)}

    def largest_share(count: int) -> float:
        found = _groups(model, _pieces(model, traced, learned, count)[0])
        return max(shares(model, traced.operations, [group.nodes() for group in found]))

    sequence.uncut = uncut_notes(model, named, live_tensors, largest_share)  # type: ignore[assignment]
    return sequence


def out_of_place(module: nn.Module) -> None:
    """Switch `inplace=True` off in `module`: in place, a stage's first operation would overwrite its input,
    which its neighbour or another graph still needs.

    In training it costs no memory: the normalisation before a ReLU does not keep its own output.
    """
    for part in module.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]


class _Passed(NamedTuple):
    """What is live at a cut: one tensor, or several that are packed."""

    tensors: tuple[fx.Node, ...]
    packing: Packing | None = None


class _Piece(NamedTuple):
    """Operations between two points where the model can be cut."""

    nodes: list[fx.Node]
    gives: _Passed

    def calls(self) -> tuple[str, ...]:
        """The module calls that all of it lies in, outermost first."""
        common: list[str] = []
        for level in zip(*map(stack_of, self.nodes), strict=False):
            if len(set(level)) > 1:
                break
            common.append(level[0])
        return tuple(common)


def _pieces(model: nn.Module, traced: Traced, learned: set[fx.Node],
            live_tensors: int) -> tuple[list[_Piece], set[fx.Node]]:
    """The model in pieces, and the tensors whose batch size any block can read from its own input."""
    batched = {traced.given}

    def passed(live: list[fx.Node]) -> _Passed | None:
        if len(live) > live_tensors or not all(_is_tensor(value, model) for value in live):
            return None
        if len(live) == 1:
            return _Passed((live[0],)) if is_batch_first(live[0]) else None
        packing = packing_of(live, learned)
        return _Passed(tuple(live), packing) if packing else None

    while True:  # `x.shape[0]` of a tensor at a cut is no reason not to cut later on, which makes more cuts
        movable = _movable(traced.operations, batched, model)
        fixed = [node for node in traced.operations if node not in movable]
        pieces = _cut(fixed, traced.given, traced.output, passed)
        found = {traced.given, *(value for piece in pieces for value in piece.gives.tensors if is_batch_first(value))}
        if found <= batched:
            return pieces, batched
        batched |= found


def _cut(fixed: list[fx.Node], given: fx.Node, output: fx.Node,
         passed: Callable[[list[fx.Node]], _Passed | None]) -> list[_Piece]:
    """Cut wherever what is live can be passed on."""
    last_use = {source: index for index, node in enumerate(fixed) for source in node.all_input_nodes}
    last_use[output] = len(fixed)
    live, pieces, start = [given], [_Piece([], _Passed((given,)))], 0
    for index, node in enumerate(fixed):
        live = [value for value in [*live, node] if last_use.get(value, -1) > index]
        gives = passed(live)
        if gives and gives != pieces[-1].gives:
            pieces.append(_Piece(fixed[start:index + 1], gives))
            start = index + 1
    if pieces[-1].gives.tensors == (output,):  # only asserts can follow
        pieces[-1].nodes.extend(fixed[start:])
    else:
        pieces.append(_Piece(fixed[start:], _Passed((output,))))
    return pieces[1:] or pieces


def _movable(nodes: list[fx.Node], batched: set[fx.Node], model: nn.Module) -> set[fx.Node]:
    """What any block can compute anew where it is used: parameters, the batch size, and what is made of them."""
    found: set[fx.Node] = set()
    for node in nodes:
        made_of_such = node.op in ("call_function", "call_method") and node.target is not torch._assert \
            and bool(node.all_input_nodes) and found.issuperset(node.all_input_nodes) \
            and not _RANDOM.search(operation(node, model)) and not str(node.target).endswith("_")
        if made_of_such or node.op == "get_attr" or _batch_of(node) in batched or _is_device(node):
            found.add(node)
    return found


def _batch_of(node: fx.Node) -> fx.Node | None:
    """The tensor x of `x.shape[0]`, `x.size(0)` or `x.size()[0]`."""
    if node.op == "call_method" and node.target == "size" and [*node.args[1:], *node.kwargs.values()] == [0]:
        return node.all_input_nodes[0]
    if node.target is operator.getitem and node.args[1] == 0:
        shape = node.all_input_nodes[0]
        if is_size(shape) and (shape.target == "size" or shape.args[1:] == ("shape",)):
            return shape.all_input_nodes[0]
    return None


def _is_device(node: fx.Node) -> bool:
    return node.target is getattr and str(node.args[1]) == "device"


def _is_tensor(node: fx.Node, model: nn.Module) -> bool:
    def takes_apart(user: fx.Node) -> bool:
        if user.target is getattr:
            return user.args[1] in ("values", "indices") or not hasattr(torch.Tensor, str(user.args[1]))
        return user.target is operator.getitem and user.args[0] is node and isinstance(user.args[1], int | str)
    return not is_size(node) and operation(node, model) not in _TUPLES and not any(map(takes_apart, node.users))


@dataclass
class _Unit:
    """Pieces that stay together: a module, or a single piece of functional code.

    Args:
        calls: the module calls that lead to it.
        parent: the call that it is a direct part of.
        whole: it is a module that has submodules, a block of its own.
        weighs: it holds a weight (≥ 2 dimensions).
    """

    pieces: list[_Piece]
    calls: tuple[str, ...]
    parent: tuple[str, ...]
    whole: bool
    weighs: bool


@dataclass
class _Group:
    """Pieces that become one block."""

    name: str
    pieces: list[_Piece]

    def nodes(self) -> list[fx.Node]:
        """Their operations, in order."""
        return [node for piece in self.pieces for node in piece.nodes]


def _groups(model: nn.Module, pieces: list[_Piece]) -> list[_Group]:
    """Units in runs: a layer with a weight, or a module, begins a block; what has no weight joins a neighbour."""
    blocks: list[list[_Unit]] = []
    waiting: list[_Unit] = []
    for (_, whole), run in groupby(_units(model, pieces), key=lambda unit: (unit.parent, unit.whole)):
        units = list(run)
        if waiting and whole and blocks:
            blocks[-1] += waiting
            waiting = []
        begins = False  # of a run's layers without a weight, only those at its beginning wait for the next
        for unit in units:
            if whole or unit.weighs:
                blocks.append([*waiting, unit])
                waiting, begins = [], True
            else:
                (blocks[-1] if begins else waiting).append(unit)
    if blocks:
        blocks[-1] += waiting
    else:
        blocks = [waiting]
    for before, after in zip(blocks, blocks[1:], strict=False):
        _cut_where_fewest_pass(before, after)
    return [_Group(_name(units, pieces), [piece for unit in units for piece in unit.pieces]) for units in blocks]


def _cut_where_fewest_pass(before: list[_Unit], after: list[_Unit]) -> None:
    """Move units without a weight from the end of a block to the next one, where fewer tensors pass then."""
    weights = [i for i, unit in enumerate(before) if unit.whole or unit.weighs]
    passing = {i: len(before[i].pieces[-1].gives.tensors) for i in range(max(weights, default=0), len(before))}
    end = min(reversed(passing), key=passing.__getitem__) + 1
    after[:0] = before[end:]
    del before[end:]


def _units(model: nn.Module, pieces: list[_Piece], parent: tuple[str, ...] = (), total: int = 0) -> Iterator[_Unit]:
    depth, total = len(parent), total or len(pieces)
    for call, run in groupby(pieces, key=lambda piece: next(iter(piece.calls()[depth:]), None)):
        inner = list(run)
        if call is None:
            yield from (_functional(model, piece, parent) for piece in inner)
            continue
        module, calls = model.get_submodule(module_path(call)), (*parent, call)
        if _is_container(module) or (_is_custom(module) and (
                _blocks_inside(model, inner, depth + 1) >= 2 or 1 < total < 2 * len(inner)
                or 2 * size_of(module) > size_of(model))):
            yield from _units(model, inner, calls, total)
        else:
            yield _Unit(inner, calls, parent, any(True for _ in module.children()) and _is_custom(module),
                        any(parameter.dim() > 1 for parameter in module.parameters()))


def _functional(model: nn.Module, piece: _Piece, parent: tuple[str, ...]) -> _Unit:
    """A piece that no single module holds, with the name of the first module with a weight in it."""
    for node in piece.nodes:
        calls = stack_of(node)[:len(parent) + 1]
        if node.op == "call_module":
            weighs = any(p.dim() > 1 for p in model.get_submodule(str(node.target)).parameters())
        else:
            weighs = any(source.op == "get_attr" and bool(_WEIGHING.search(operation(node, model)))
                         for source in node.all_input_nodes)
        if weighs:
            return _Unit([piece], calls, parent, False, True)
    return _Unit([piece], parent, parent, False, False)


def _is_container(module: nn.Module) -> bool:
    sequence = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return sequence or type(module) is nn.TransformerEncoder


def _is_custom(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.nn")


def _blocks_inside(model: nn.Module, pieces: list[_Piece], depth: int) -> int:
    """How many modules of the model's own kinds, with parts of their own, cover whole pieces at the next level."""
    count = 0
    for call, run in groupby(pieces, key=lambda piece: next(iter(piece.calls()[depth:]), None)):
        if call is not None:
            module = model.get_submodule(module_path(call))
            if _is_container(module):
                count += _blocks_inside(model, list(run), depth + 1)
            else:
                count += _is_custom(module) and any(True for _ in module.children())
    return count


def _name(units: list[_Unit], pieces: list[_Piece]) -> str:
    """The path of the outermost module that lies in the group as a whole, else of the group's main part."""
    main = next((unit for unit in units if unit.whole or unit.weighs), units[0])
    inside = [id(piece) for unit in units for piece in unit.pieces]
    for depth, call in enumerate(main.calls, start=1):
        if all(id(piece) in inside for piece in pieces if piece.calls()[:depth] == main.calls[:depth]):
            return call
    return main.calls[-1] if main.calls else "model"


def _unused(name: str, taken: dict[str, Any]) -> str:
    name = re.sub("[.@]", "_", name)
    while name in taken or hasattr(nn.Sequential(), name):
        name += "_"
    return name


def _block(model: nn.Module, takes: _Passed, nodes: list[fx.Node], gives: _Passed, batched: set[fx.Node],
           read_later: set[fx.Node], persistent: set[str]) -> TracedBlock:
    """The operations `nodes` on what is passed to them, up to what they pass on, as a module.

    Args:
        batched: tensors whose batch size is that of any block's input.
        read_later: those of which a later block reads it so; this block's own are added.
        persistent: the names in the model's state_dict.
    """
    graph = fx.Graph()
    x = graph.placeholder("x")
    if takes.packing:
        copies = {node: graph.call_function(part_of, (x, *part))
                  for node, part in zip(takes.tensors, takes.packing.parts, strict=True)}
    else:
        copies = {takes.tensors[0]: x}

    def copy_of(node: fx.Node) -> fx.Node:
        source = _batch_of(node)
        if node not in copies and source in batched and source not in copies:
            read_later.add(source)
            copies[node] = graph.call_method("size", (x, 0))
        elif node not in copies and _is_device(node):
            copies[node] = graph.call_function(getattr, (x, "device"))
        elif node not in copies:
            copies[node] = graph.node_copy(node, copy_of)
            copies[node].meta.pop("values", None)
        return copies[node]

    for node in nodes:
        copied = copy_of(node)
        if node in read_later:
            same = graph.call_function(operator.eq, (graph.call_method("size", (copied, 0)),
                                                     graph.call_method("size", (x, 0))))
            graph.call_function(torch._assert, (same, f"the size read of {node.name} is used as the batch size, "
                                                      "but it is another"))
    outputs = tuple(copy_of(value) for value in gives.tensors)
    graph.output(graph.call_function(pack, (graph.call_method("size", (x, 0)), *outputs)) if gives.packing
                 else outputs[0])
    block = TracedBlock(model, graph)
    for name, _ in list(block.named_buffers()):
        if name not in persistent:
            owner, _, tensor = name.rpartition(".")
            block.get_submodule(owner)._non_persistent_buffers_set.add(tensor)
    return block


def _carry_along(model: nn.Module, blocks: list[TracedBlock]) -> None:
    """Put parameters and buffers that no block uses into the block of those before them in the model."""
    holders = {name: block for block in blocks for name in block.state_dict()}
    nearest = blocks[0]
    for name, tensor in model.state_dict(keep_vars=True).items():
        nearest = holders.get(name, nearest)
        if name not in holders:
            module: nn.Module = nearest
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(last, tensor)
            else:
                module.register_buffer(last, tensor)
