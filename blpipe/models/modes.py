"""The graphs of a forward in training and in evaluation as one, which follows the mode."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn

from blpipe.models.nodes import Untraceable, inside, outputs_of, stack_of


def merge(model: nn.Module, evaluation: fx.Graph, training: fx.Graph) -> tuple[fx.Node, list[fx.Node], fx.Node]:
    """The graph of evaluation, with the constants that differ in training made to follow the mode."""
    output = outputs_of(evaluation)[0]
    nodes = _needed(evaluation, output)
    problems = []
    for candidate in outputs_of(training):
        try:
            merged = _align(model, nodes, _needed(training, candidate))
            break
        except Untraceable as problem:
            problems.append(problem)
    else:
        raise problems[0]
    for node, (args, kwargs) in merged.items():
        node.args, node.kwargs = _follow_mode(evaluation, node, args), _follow_mode(evaluation, node, kwargs)
    return nodes[0], nodes[1:], output


def by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """The constant of the present mode."""
    return in_training if training else in_evaluation


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
            raise _differs(evaluation, training, (node, other))
        try:
            merged[node] = _matched(node.args, other.args, partner), _matched(node.kwargs, other.kwargs, partner)
        except LookupError:
            raise _differs(evaluation, training, (node, other)) from None
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


def _differs(evaluation: list[fx.Node], training: list[fx.Node],
             first: tuple[fx.Node | None, fx.Node | None]) -> Untraceable:
    """It blames the innermost module that does something else itself: what comes after it is only out of step.

    Args:
        first: the first two operations that differ, which may only be out of step.
    """
    one, other = _by_call(evaluation), _by_call(training)
    pairs: list[tuple[fx.Node | None, fx.Node | None]] = [first]
    differing = [key for key in {**one, **other} if _kinds(one.get(key, [])) != _kinds(other.get(key, []))]
    if differing:
        key = max(differing, key=operator.itemgetter(0))
        pairs = [*zip_longest(one.get(key, []), other.get(key, [])), first]
    found = next((pair for pair in pairs if _kinds(pair[:1]) != _kinds(pair[1:])), first)
    deepest = max((node for node in reversed(found) if node is not None), key=lambda node: len(stack_of(node)))
    return Untraceable("its forward computes something else in training than in evaluation", deepest.meta["place"],
                       inside(deepest))


def _by_call(nodes: list[fx.Node]) -> dict[tuple[int, str], list[fx.Node]]:
    """The operations in each module call, with its level; the model itself is at level 0."""
    found: dict[tuple[int, str], list[fx.Node]] = {}
    for node in nodes:
        for key in enumerate(("", *stack_of(node))):
            found.setdefault(key, []).append(node)
    return found


def _kinds(nodes: Iterable[fx.Node | None]) -> list[Any]:
    """What nodes do, but for the names of tensors: each trace names anew those that it makes."""
    return [node and (node.op, None if node.op == "get_attr" else node.target) for node in nodes]


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
