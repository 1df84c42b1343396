"""The schedules of end-to-end backpropagation, as programs to simulate beside the stage program.

Their operations carry the same names: an activation is received, a forward run and sent on; the error that comes
back is the end-to-end gradient.
"""

from collections.abc import Callable, Iterator
from enum import Enum

from blpipe.program import Kind, Op


class Backward(Enum):
    """The parts of a backward through all blocks of a stage."""

    FULL = "backward"
    INPUT = "input backward"
    WEIGHT = "weight backward"


Schedule = Callable[[int, int, int, int], Iterator[Op]]  # (stage from 0, stages, steps, microbatches)


def gpipe(stage: int, stages: int, steps: int, microbatches: int) -> Iterator[Op]:
    """All forwards, then all backwards: "GPipe" (Huang et al., arXiv 1811.06965)."""
    for step in range(steps):
        for micro in range(microbatches):
            yield from _forward(stage, stages, step, micro)
        for micro in range(microbatches):
            yield from _backward(stage, stages, step, micro, Backward.FULL)
        yield Op(Kind.STEP, step)


def one_f_one_b(stage: int, stages: int, steps: int, microbatches: int) -> Iterator[Op]:
    """One forward, one backward in turn: "PipeDream-Flush" (Narayanan et al., arXiv 2006.09503)."""
    for step in range(steps):
        yield from _in_turn(stage, stages, step, microbatches, Backward.FULL)
        yield Op(Kind.STEP, step)


def zero_bubble(stage: int, stages: int, steps: int, microbatches: int) -> Iterator[Op]:
    """1F1B with the weights' gradients put off into the bubble: ZB-H1 of "Zero Bubble Pipeline Parallelism"
    (Qi et al., arXiv 2401.10241). Stage k runs k of them behind the inputs' gradients.
    """
    for step in range(steps):
        done = behind = 0
        for op in _in_turn(stage, stages, step, microbatches, Backward.INPUT):
            if op.kind in (Kind.RECEIVE, Kind.RECEIVE_ERROR) and behind > stage:  # what it has to send is sent
                yield Op(Backward.WEIGHT, step, done)
                done, behind = done + 1, behind - 1
            yield op
            behind += op.kind is Backward.INPUT
        for micro in range(done, microbatches):
            yield Op(Backward.WEIGHT, step, micro)
        yield Op(Kind.STEP, step)


SCHEDULES: dict[str, Schedule] = {"GPipe": gpipe, "1F1B": one_f_one_b, "zero-bubble": zero_bubble}


def _in_turn(stage: int, stages: int, step: int, microbatches: int, backward: Backward) -> Iterator[Op]:
    ahead = min(stages - stage, microbatches)  # forwards before the first backward
    for micro in range(ahead):
        yield from _forward(stage, stages, step, micro)
    for micro in range(microbatches):
        yield from _backward(stage, stages, step, micro, backward)
        if ahead + micro < microbatches:
            yield from _forward(stage, stages, step, ahead + micro)


def _forward(stage: int, stages: int, step: int, micro: int) -> Iterator[Op]:
    yield Op(Kind.RECEIVE, step, micro)
    yield Op(Kind.FORWARD, step, micro)
    if stage < stages - 1:
        yield Op(Kind.SEND, step, micro)


def _backward(stage: int, stages: int, step: int, micro: int, kind: Backward) -> Iterator[Op]:
    if stage < stages - 1:
        yield Op(Kind.RECEIVE_ERROR, step, micro)
    yield Op(kind, step, micro)
    if stage > 0:
        yield Op(Kind.SEND_ERROR, step, micro)
