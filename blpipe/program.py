"""The asynchrony: in which order a stage receives, computes, sends and updates.

A stage's life is one program, a sequence of `Op`s that depends on nothing but the steps ahead, the stage's
neighbours and the link's delay d, here in microbatches: a delay in batches is that of all their microbatches.
It never depends on timing, so a run is reproducible and every engine that executes the same programs computes
the same numbers. For microbatch n, counted through all batches:

    receive n → forward → send → local backward → send error → receive error of n−d → link backward

and after the last microbatch of a batch its optimizer step. Where the pipeline has replicas, each with a share of
the batch, those of a stage add their gradients up before it. A joint link backward is the local one through the
tail too. With d ≥ 1 nothing waits for the next stage: it has had the time of a microbatch or more for the
error. An error that reaches further is passed on as soon as its link backward is done, and is due one delay
later there: hop j of a microbatch is due j · d after it. After the last step of an epoch no link is left over:
the pending ones go into that step (the flush), and the pipeline is drained. d = 0 is d = 1 with a flush in
every step, so that all but one round trip of its wait is hidden.

A program can also be left between two steps of an epoch, for a checkpoint, without a trace in its results. Then
the errors under way are waited for at once, and the gradients of their links held until the step that they are
due in, which belongs to the program that goes on from there.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import NamedTuple, Protocol

from torch import Tensor

from blpipe.stage import Stage
from blpipe.steps import Step


class Kind(Enum):
    """What an `Op` does."""

    RECEIVE = "receive"
    FORWARD = "forward"
    SEND = "send"
    LOCAL_BACKWARD = "local backward"
    SEND_ERROR = "send error"
    RECEIVE_ERROR = "receive error"
    LINK_BACKWARD = "link backward"
    HOLD_LINK = "hold link"  # a link backward whose gradient waits for its step
    ADD_HELD = "add held link"
    ALL_REDUCE = "all-reduce gradients"  # over the replicas of the stage
    STEP = "step"
    EVALUATE = "evaluate"


class Op(NamedTuple):
    """One operation, of a `Kind` where a stage runs it, on one microbatch (from 0; −1 for a whole step).

    `hop` is that of an error: 1 for the next stage's own, j + 1 where j stages have passed it on.
    """

    kind: Enum
    step: int
    microbatch: int = -1
    hop: int = 0


@dataclass(frozen=True)
class Role:
    """What a stage exchanges with its neighbours, and whether gradients are summed over replicas of it."""

    sends: bool    # activations, to the next stage
    hops_out: tuple[int, ...]  # errors of each microbatch for the stage before: 1 is its own, others it passes on
    hops_in: tuple[int, ...]   # errors of each microbatch from the next stage
    replicated: bool = False


class _Link(NamedTuple):
    """An error to come. Stages handle these in this order, so that each edge's messages are taken as sent."""

    due: int  # the microbatch, counted through all steps, after whose local backward it is handled
    hop: int
    step: int
    microbatch: int


def always(step: int) -> bool:
    """Go on with every step."""
    return True


def train_program(steps: Sequence[Step], role: Role, delay: int, start: int = 0,
                  should_run: Callable[[int], bool] = always) -> Iterator[Op]:
    """The ops of one stage over the steps of an epoch, drained at the end.

    Args:
        delay: in microbatches.
        start: the step to begin with; those before it have been done, and what they left is held.
        should_run: whether a step is to be done, asked before each; the program ends before the first that is not.
    """
    awaiting: list[_Link] = []  # a heap
    counter = count()
    for step in steps:
        done = step.index < start
        if not done and not should_run(step.index):
            break
        for micro in range(len(step.sizes)):
            now = next(counter)
            if not done:
                yield from _microbatch(step.index, micro, role)
            for hop in role.hops_in:
                heappush(awaiting, _Link(now + hop * max(delay, 1), hop, step.index, micro))
            due = _pop_due(awaiting, now)
            if not done:
                yield from _links(due, role, start)
        flush = _pop_due(awaiting, inf) if delay == 0 or step is steps[-1] else []
        if not done:
            yield from _links(flush, role, start)
            if role.replicated:
                yield Op(Kind.ALL_REDUCE, step.index)
            yield Op(Kind.STEP, step.index)
    yield from _links([link for link in _pop_due(awaiting, inf) if link.step >= start], role, start, hold=True)


def _microbatch(step: int, micro: int, role: Role) -> Iterator[Op]:
    yield Op(Kind.RECEIVE, step, micro)
    yield Op(Kind.FORWARD, step, micro)
    if role.sends:
        yield Op(Kind.SEND, step, micro)
    yield Op(Kind.LOCAL_BACKWARD, step, micro)
    if 1 in role.hops_out:
        yield Op(Kind.SEND_ERROR, step, micro, 1)


def evaluation_program(batches: int, role: Role) -> Iterator[Op]:
    """The ops of one stage over an evaluation: forwards only."""
    for index in range(batches):
        yield Op(Kind.RECEIVE, index, 0)
        yield Op(Kind.EVALUATE, index, 0)
        if role.sends:
            yield Op(Kind.SEND, index, 0)


def _pop_due(awaiting: list[_Link], until: float) -> list[_Link]:
    due = []
    while awaiting and awaiting[0].due <= until:
        due.append(heappop(awaiting))
    return due


def _links(links: Iterable[_Link], role: Role, start: int, hold: bool = False) -> Iterator[Op]:
    """Handle these errors, and pass on those that reach further; those of steps before `start` have been."""
    for _, hop, step, micro in links:
        if step < start:
            yield Op(Kind.ADD_HELD, step, micro, hop)
            continue
        yield Op(Kind.RECEIVE_ERROR, step, micro, hop)
        yield Op(Kind.HOLD_LINK if hold else Kind.LINK_BACKWARD, step, micro, hop)
        if hop + 1 in role.hops_out:
            yield Op(Kind.SEND_ERROR, step, micro, hop + 1)


ACTIVATIONS_AHEAD = 2  # receives of activations posted before they are asked for


def steps_ahead(hops_in: Sequence[Sequence[int]], delay: int, microbatches: int) -> int:
    """How many steps ahead of the first stage any stage may ask whether one is to be done, to post its receives.

    Args:
        hops_in: the errors that come to each stage.
        delay: in microbatches, of which a batch has so many.
    """
    farthest = max(max(hops, default=0) for hops in hops_in)
    ahead = max(ACTIVATIONS_AHEAD, (farthest + 1) * max(delay, 1) + 1)
    return -(-ahead // microbatches) + 1


def errors_ahead(delay: int, microbatches: int, hops: int) -> int:
    """Receives of errors posted ahead: as many as can be under way, if no stage waits, before the flush.

    Args:
        delay: in microbatches.
        microbatches: of a batch, after which d = 0 has a flush.
        hops: how many errors come for each microbatch.
    """
    return hops * (delay + 1 if delay else min(2, microbatches))


class Inbox(Protocol):
    """Where tensors come from, in the order in which they were sent."""

    def has_message(self) -> bool:
        """False if `get` would find nothing until this process has run other stages."""

    def get(self) -> tuple[Tensor, ...]:
        """The next message; waits for it."""


class Outbox(Protocol):
    """Where tensors go, in order."""

    def put(self, *tensors: Tensor) -> None:
        """Send a message; may wait for room."""


class Sum(Inbox, Outbox, Protocol):
    """Adds up what the replicas of a stage put, tensor by tensor; each gets the sums."""


_STEPS_AT_HAND = 64


class Factors(NamedTuple):
    """What one step is done with: factors on the learning rate, and on the links of its microbatches.

    mix_ratio: the share of an image's own label in its loss, where images are mixed.
    """

    lr: float = 1.0
    link: float = 1.0
    mix_ratio: float | None = None


@dataclass
class Ports:
    """A stage's queues; None where it has no such neighbour."""

    inbox: Inbox
    outbox: Outbox | None = None
    errors_in: Inbox | None = None
    errors_out: Outbox | None = None
    replicas: Sum | None = None


def execute(program: Iterator[Op], stage: Stage, ports: Ports, steps: Sequence[Step],
            factors: Callable[[int], Factors], on_op: Callable[[Op], None]) -> Iterator[None]:
    """Run `program` on `stage`; yields whenever other stages of this process must run first.

    `on_op` is called before each op. Activations travel with the targets: (x, targets).
    """
    batch_sizes = {step.index: step.samples for step in steps}
    factors = lru_cache(_STEPS_AT_HAND)(factors)  # asked for with every microbatch, of several steps in turn
    for op in program:
        on_op(op)
        match op.kind:
            case Kind.RECEIVE:
                while not ports.inbox.has_message():
                    yield
                x, targets = ports.inbox.get()
            case Kind.FORWARD:
                x = stage.forward(x)
            case Kind.EVALUATE:
                x = stage.evaluate(x, targets)
            case Kind.SEND:
                assert ports.outbox is not None
                ports.outbox.put(x, targets)
                del x  # what is sent is not held here until the next batch, nor are errors below
            case Kind.LOCAL_BACKWARD:
                error = stage.local_backward(targets, len(targets) / batch_sizes[op.step], factors(op.step).mix_ratio)
                del targets  # they share their buffer with the input
            case Kind.SEND_ERROR:
                assert ports.errors_out is not None and error is not None
                ports.errors_out.put(error)
                del error
            case Kind.RECEIVE_ERROR:
                assert ports.errors_in is not None
                while not ports.errors_in.has_message():
                    yield
                link_error, = ports.errors_in.get()
            case Kind.LINK_BACKWARD | Kind.HOLD_LINK:
                held_as = (op.step, op.microbatch) if op.kind is Kind.HOLD_LINK else None
                error = stage.link_backward(link_error, op.hop, factors(op.step).link, held_as)
                del link_error
            case Kind.ADD_HELD:
                stage.add_held((op.step, op.microbatch), op.hop)
            case Kind.ALL_REDUCE:
                assert ports.replicas is not None
                ports.replicas.put(*stage.to_reduce())
                while not ports.replicas.has_message():
                    yield
                stage.update.take_reduced(ports.replicas.get())
            case Kind.STEP:
                stage.step(op.step, factors(op.step).lr)
