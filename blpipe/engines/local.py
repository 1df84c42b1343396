"""Every stage in one process on one device, their programs advanced in turn.

A microbatch enters once the one before has passed all stages, and a stage goes through forward and local
backward before another one runs: one body graph is alive at a time. An error is taken back as soon as it is
there: with a delay of 0 and one microbatch, two tails at most wait for theirs.
"""

from collections.abc import Iterator, Sequence
from time import perf_counter

import torch
from torch import Tensor

from blpipe.data import Data
from blpipe.engines.common import (
    TRACED_STEPS,
    Feed,
    GoesOn,
    LossWatch,
    OnStep,
    OpWatch,
    SoFar,
    StageProgress,
    StageReport,
    TrainFeed,
    blame,
    build_stage,
    factors,
    gpu_readings,
    recording_stream,
    report,
    role,
    seconds_since,
    test_microbatches,
)
from blpipe.graphs import recorder_on
from blpipe.losses import Tally
from blpipe.plan import Plan, Step
from blpipe.program import Op, Ports, evaluation_program, execute, train_program
from blpipe.trace import Span, SpanLog
from blpipe.transport.memory import MemoryQueue

_ENDED = object()


class _Entry:
    """The first stage's inbox: a microbatch enters when no other one waits between two stages."""

    def __init__(self, feed: Feed, between: Sequence[MemoryQueue]):
        self._feed, self._between = feed, between

    def has_message(self) -> bool:
        """Whether the last one is through."""
        return not any(queue.has_message() for queue in self._between)

    def get(self) -> tuple[Tensor, ...]:
        """The next microbatch."""
        return self._feed.get()


class LocalEngine:
    """See `Engine`."""

    name = "local"
    group = None

    def __init__(self, plan: Plan, data: Data, device: torch.device):
        self.plan, self.data, self.device = plan, data, device
        stream = recording_stream(plan, device)
        self.stages = {k: build_stage(plan, k, device, recorder_on(stream)) for k in range(len(plan.stages))}
        self._tallies = {True: self._tallies_now(), False: self._tallies_now()}
        self._busy = [0.0] * len(self.stages)  # seconds of training, in the last epoch begun
        self._train_seconds = 0.0
        self._log = SpanLog(TRACED_STEPS) if plan.config.runtime.trace else None
        self._feed = TrainFeed(data, plan, device)
        self._losses = LossWatch(plan, at_once=device.type == "cpu")

    def train(self, epoch: int, start: int, goes_on: GoesOn, on_step: OnStep) -> int:
        """See `Engine`."""
        steps = self.plan.train_steps(epoch)
        if start == steps[0].index:
            self.go_on_from({k: SoFar(Tally()) for k in self.stages})
        next_step, started = start, perf_counter()

        def count() -> None:
            nonlocal next_step
            next_step += 1
            on_step()

        feed = self._feed.begin(epoch, start)
        if self.plan.config.method.name == "bp":
            self._backpropagate(steps[start - steps[0].index:], feed, goes_on, count)
        else:
            programs = [train_program(steps, role(self.plan, k), self.plan.delay, start, goes_on) for k in self.stages]
            self._run(programs, feed, steps, count, self._busy)
        self._feed.leave(epoch, next_step)
        self._train_seconds += seconds_since(started, self.device)
        self._losses.look()
        return next_step

    def so_far(self) -> dict[int, SoFar]:
        """See `Engine`."""
        return {k: SoFar(self._tallies[True][k], self._busy[k], 0.0, self._train_seconds) for k in self.stages}

    def go_on_from(self, sums: dict[int, SoFar]) -> None:
        """See `Engine`."""
        for k, stage in self.stages.items():
            stage.train(True, sums[k].tally)
        self._tallies = {True: self._tallies_now(), False: [Tally() for _ in self.stages]}
        self._busy = [sums[k].busy_seconds for k in self.stages]
        self._train_seconds = sums[0].train_seconds

    def evaluate(self) -> None:
        """Evaluate every stage's head on all test samples."""
        self._set_mode(training=False)
        batches = len(self.plan.evaluation_sizes())
        feed = Feed(test_microbatches(self.data, self.plan, self.device))
        self._run([evaluation_program(batches, role(self.plan, k)) for k in self.stages], feed, [], lambda: None,
                  [0.0] * len(self.stages))

    def progress(self) -> list[StageProgress]:
        """See `Engine`."""
        readings = gpu_readings(self.device)
        return [StageProgress(tally.loss, busy, wait, *readings)
                for tally, (busy, wait) in zip(self._tallies[True], self._seconds(), strict=True)]

    def reports(self) -> list[StageReport]:
        """One report a stage; no stage waits for another process."""
        return [report(train, val, busy, wait, self._train_seconds, self.device) for train, val, (busy, wait)
                in zip(self._tallies[True], self._tallies[False], self._seconds(), strict=True)]

    def _seconds(self) -> list[tuple[float | None, float | None]]:
        """Each stage's busy and waiting seconds."""
        if self.plan.config.method.name == "bp":  # autograd runs all stages' backwards as one
            return [(None, None)] * len(self.stages)
        return [(busy, 0.0) for busy in self._busy]

    def spans(self) -> list[Span]:
        """The traced operations of all stages."""
        return self._log.spans if self._log is not None else []

    def close(self) -> None:
        """Nothing to part from."""

    def _tallies_now(self) -> list[Tally]:
        return [stage.tally for stage in self.stages.values()]

    def _set_mode(self, training: bool) -> None:
        for stage in self.stages.values():
            stage.train(training)
        self._tallies[training] = self._tallies_now()

    def _run(self, programs: Sequence[Iterator[Op]], feed: Feed, steps: Sequence[Step],
             on_step: OnStep, busy: list[float]) -> None:
        """Advance every stage's program as far as it goes, in turn, until all are through.

        What a stage sent back is handled before the next stage runs: that ends the graph of an earlier stage's tail.

        Args:
            busy: where the seconds that each stage takes are added.
        """
        edges = range(len(self.stages) - 1)
        forward, errors = ([MemoryQueue(self.plan.channels_last(k)) for k in edges] for _ in range(2))
        watches = [OpWatch(k, stage, steps, self._losses, self._log, on_step if k == 0 else lambda: None)
                   for k, stage in self.stages.items()]
        running = {}
        for k, program in enumerate(programs):
            ports = Ports(_Entry(feed, forward) if k == 0 else forward[k - 1], forward[k] if k < len(edges) else None,
                          errors[k] if k < len(edges) else None, errors[k - 1] if k > 0 else None)
            running[k] = execute(program, self.stages[k], ports, steps, lambda s: factors(self.plan, s), watches[k])

        def advance(k: int) -> bool:
            """Whether the stage got any further."""
            if k not in running:
                return False
            before, started = watches[k].op, perf_counter()
            try:
                if next(running[k], _ENDED) is _ENDED:
                    del running[k]
            except Exception as error:
                raise blame(self.plan, k, watches[k].where, error) from error
            busy[k] += perf_counter() - started
            watches[k].pause()
            return watches[k].op != before

        while running:
            before = [watch.op for watch in watches]
            for k in range(len(programs)):
                while k >= 0 and advance(k):
                    k -= 1
            assert not running or [watch.op for watch in watches] != before, "the stages' programs wait for each other"

    def _backpropagate(self, steps: Sequence[Step], feed: Feed, goes_on: GoesOn, on_step: OnStep) -> None:
        """Plain end-to-end backpropagation of the last stage's loss."""
        stages = list(self.stages.values())
        for step in steps:
            if not goes_on(step.index):
                return
            stage = stages[0]
            try:
                for size in step.sizes:
                    x, targets = feed.get()
                    for stage in stages:
                        with stage.stream:
                            x = stage.forward_with_graph(x)
                    loss = stage.loss(x, targets, x)
                    stage.tally.add(loss, x, targets)
                    (loss * (size / sum(step.sizes))).backward()
                self._losses.note(len(stages) - 1, stage, step.index)
                for stage in stages:
                    stage.step(step.index, factors(self.plan, step.index).lr)
            except Exception as error:
                raise blame(self.plan, stages.index(stage), f"step {step.index}", error) from error
            on_step()
