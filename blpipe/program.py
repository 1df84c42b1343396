"""The asynchrony: in which order a stage receives, computes, sends and updates.

A stage's life is one program, a sequence of `Op`s that depends on nothing but the steps ahead, the stage's
neighbours and the link's delay d. It never depends on timing, so a run is reproducible and every engine
that executes the same programs computes the same numbers. For microbatch m of batch t:

    receive (t, m) → forward → send → local backward → send error → receive error of (t−d, m) → link backward

and after the last microbatch the optimizer step of batch t. With d = 0 the link of a microbatch comes
after the local backward of the next one, so that all but one round trip of its wait is hidden. With
d ≥ 1 nothing waits for the next stage. After the last step given, no link is left over: the pending ones
go into that step (the flush), and the pipeline is drained.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from torch import Tensor

from blpipe.plan import Step
from blpipe.stage import Stage


class Kind(Enum):
    """What an `Op` does."""

    RECEIVE = "receive"
    FORWARD = "forward"
    SEND = "send"
    LOCAL_BACKWARD = "local backward"
    SEND_ERROR = "send error"
    RECEIVE_ERROR = "receive error"
    LINK_BACKWARD = "link backward"
    STEP = "step"
    EVALUATE = "evaluate"


class Op(NamedTuple):
    """One operation, of a `Kind` where a stage runs it, on one microbatch (from 0; −1 for a whole step)."""

    kind: Enum
    step: int
    microbatch: int = -1


@dataclass(frozen=True)
class Role:
    """Which of its neighbours a stage talks to."""

    sends: bool         # activations, to the next stage
    sends_error: bool   # to the stage before
    linked: bool        # receives errors from the next stage


def train_program(steps: Sequence[Step], role: Role, delay: int) -> Iterator[Op]:
    """The ops of one stage over `steps`, drained at the end."""
    awaiting: deque[tuple[int, int]] = deque()  # (step, microbatch) whose error is still to come
    for step in steps:
        for micro in range(len(step.sizes)):
            yield Op(Kind.RECEIVE, step.index, micro)
            yield Op(Kind.FORWARD, step.index, micro)
            if role.sends:
                yield Op(Kind.SEND, step.index, micro)
            yield Op(Kind.LOCAL_BACKWARD, step.index, micro)
            if role.sends_error:
                yield Op(Kind.SEND_ERROR, step.index, micro)
            while awaiting and awaiting[0] <= (step.index - delay, micro):
                yield from _link(*awaiting.popleft())
            if role.linked:
                awaiting.append((step.index, micro))
        newest_step = step.index if step is steps[-1] else step.index - delay
        while awaiting and awaiting[0][0] <= newest_step:
            yield from _link(*awaiting.popleft())
        yield Op(Kind.STEP, step.index)


def evaluation_program(batches: int, role: Role) -> Iterator[Op]:
    """The ops of one stage over an evaluation: forwards only."""
    for index in range(batches):
        yield Op(Kind.RECEIVE, index, 0)
        yield Op(Kind.EVALUATE, index, 0)
        if role.sends:
            yield Op(Kind.SEND, index, 0)


def _link(step: int, micro: int) -> Iterator[Op]:
    yield Op(Kind.RECEIVE_ERROR, step, micro)
    yield Op(Kind.LINK_BACKWARD, step, micro)


class Inbox(Protocol):
    """Where tensors come from, in the order in which they were sent."""

    def has_message(self) -> bool:
        """False if `get` would find nothing until this process has run other stages."""

    def get(self) -> tuple[Tensor, ...]:
        """The next message; waits for it."""


class Outbox(Protocol):
    """Where tensors go, in order."""

    def has_room(self) -> bool:
        """False if there is no room for a message until this process has run other stages."""

    def put(self, *tensors: Tensor) -> None:
        """Send a message; may wait for room."""


@dataclass
class Ports:
    """A stage's queues; None where it has no such neighbour."""

    inbox: Inbox
    outbox: Outbox | None = None
    errors_in: Inbox | None = None
    errors_out: Outbox | None = None


def execute(program: Iterator[Op], stage: Stage, ports: Ports, steps: Sequence[Step],
            lr_factor: Callable[[int], float], on_op: Callable[[Op], None]) -> Iterator[None]:
    """Run `program` on `stage`; yields whenever other stages of this process must run first.

    `on_op` is called before each op. Activations travel with the targets: (x, targets).
    """
    batch_sizes = {step.index: sum(step.sizes) for step in steps}
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
                while not ports.outbox.has_room():
                    yield
                ports.outbox.put(x, targets)
            case Kind.LOCAL_BACKWARD:
                error = stage.local_backward(targets, len(targets) / batch_sizes[op.step])
            case Kind.SEND_ERROR:
                assert ports.errors_out is not None and error is not None
                ports.errors_out.put(error)
            case Kind.RECEIVE_ERROR:
                assert ports.errors_in is not None
                while not ports.errors_in.has_message():
                    yield
                link_error, = ports.errors_in.get()
            case Kind.LINK_BACKWARD:
                stage.link_backward(link_error)
            case Kind.STEP:
                stage.step(lr_factor(op.step))
