"""Every stage in one process on one device, their programs advanced in turn.

A microbatch enters once the one before has passed all stages, and a stage goes through forward and local
backward before another one runs: one body graph is alive at a time. An error is taken back as soon as it is
there: with a delay of 0 and one microbatch, two tails at most wait for theirs.

Replicas of the pipeline are in this process too, each with stages of its own: they compute what they do apart, and
save nothing here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from blpipe.data import Data
from blpipe.engines.build import build_stage, recording_stream
from blpipe.engines.common import (
    TRACED_STEPS,
    LossWatch,
    OnStep,
    OpWatch,
    ShouldRun,
    blame,
    factors,
    forward_with_graph,
    loss_with_graph,
    role,
    seconds_since,
)
from blpipe.engines.feed import Feed, TrainFeed, test_microbatches
from blpipe.engines.reports import EpochSums, StageProgress, StageReport, gpu_readings, replica_report, report
from blpipe.graphs import recorder_on
from blpipe.models.copies import copied
from blpipe.plan import Plan
from blpipe.program import Op, Ports, evaluation_program, execute, train_program
from blpipe.stage import Stage
from blpipe.steps import Step
from blpipe.tally import Tally
from blpipe.trace import Span, SpanLog
from blpipe.transport.memory import MemoryQueue, MemorySum

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


_Seat = tuple[int, int]  # a replica and the index of one of its stages


class LocalEngine:
    """See `Engine`."""

    name = "local"
    group = None

    def __init__(self, plan: Plan, data: Data, device: torch.device):
        self.plan, self.data, self.device = plan, data, device
        self._plans = [replace(plan, replica=r) for r in range(plan.config.train.replicas)]
        stream, indices = recording_stream(plan, device), range(len(plan.stages))
        own = [plan, *(replace(each, stages=copied(plan.stages)) for each in self._plans[1:])]
        self.replicas = {r: {k: build_stage(each, k, device, recorder_on(stream)) for k in indices}
                         for r, each in enumerate(own)}
        self.stages = self.replicas[0]
        self._seated: dict[_Seat, Stage] = {(r, k): stage for r, stages in self.replicas.items()
                                            for k, stage in stages.items()}
        self._add_up(lambda stage: stage.update.lead(), lambda stage, values: stage.update.follow(values))
        self._train_tallies = self._val_tallies = self._tallies_now()
        self._busy = dict.fromkeys(self._seated, 0.0)  # seconds of training, in the last epoch begun
        self._train_seconds = 0.0
        self._log = SpanLog(TRACED_STEPS) if plan.config.runtime.trace else None
        self._feeds = [TrainFeed(data, each) for each in self._plans]
        self._losses = LossWatch(plan, at_once=device.type == "cpu")

    def train(self, epoch: int, start: int, should_run: ShouldRun, on_step: OnStep) -> int:
        """See `Engine`."""
        first = self.plan.train_steps(epoch)[0].index
        if start == first:
            self.restore_sums({seat: EpochSums(Tally()) for seat in self._seated})
        next_step, started = start, perf_counter()

        def count() -> None:
            nonlocal next_step
            next_step += 1
            on_step()

        feeds = [feed.begin(epoch, start) for feed in self._feeds]
        steps = [plan.train_steps(epoch) for plan in self._plans]
        if self.plan.config.method.name == "bp":
            self._backpropagate([each[start - first:] for each in steps], feeds, should_run, count)
        else:
            self._run(lambda r, k: train_program(steps[r], role(self.plan, k), self.plan.delay, start, should_run),
                      feeds, steps, count, self._busy)
        for feed in self._feeds:
            feed.leave(epoch, next_step)
        self._train_seconds += seconds_since(started, self.device)
        self._losses.look()
        return next_step

    def epoch_sums(self) -> dict[_Seat, EpochSums]:
        """See `Engine`."""
        return {seat: EpochSums(self._train_tallies[seat], self._busy[seat], 0.0, self._train_seconds)
                for seat in self._seated}

    def restore_sums(self, sums: dict[_Seat, EpochSums]) -> None:
        """See `Engine`."""
        for seat, stage in self._seated.items():
            stage.train(True, sums[seat].tally)
        self._train_tallies, self._val_tallies = self._tallies_now(), {seat: Tally() for seat in self._seated}
        self._busy = {seat: sums[seat].busy_seconds for seat in self._seated}
        self._train_seconds = sums[0, 0].train_seconds

    def evaluate(self) -> None:
        """Evaluate every stage's head on all test samples, or those held out."""
        for stage in self._seated.values():
            stage.train(False)
        self._val_tallies = self._tallies_now()
        feeds = [Feed(test_microbatches(self.data, plan)) for plan in self._plans]
        self._run(lambda r, k: evaluation_program(len(self._plans[r].evaluation_sizes()), role(self.plan, k)),
                  feeds, [[] for _ in self._plans], lambda: None, dict.fromkeys(self._seated, 0.0))

    def progress(self) -> dict[int, StageProgress]:
        """See `Engine`."""
        readings = gpu_readings(self.device)
        return {k: StageProgress(self._train_tallies[0, k].loss, *self._seconds((0, k)), *readings)
                for k in self.stages}

    def reports(self) -> list[StageReport]:
        """One report a stage; no stage waits for another process."""
        return [report([replica_report(self._train_tallies[r, k], self._val_tallies[r, k], *self._seconds((r, k)),
                                       self._train_seconds, self.device)
                        for r in self.replicas]) for k in self.stages]

    def _seconds(self, seat: _Seat) -> tuple[float | None, float | None]:
        """A stage's busy and waiting seconds."""
        bp = self.plan.config.method.name == "bp"  # autograd runs all stages' backwards as one
        return (None, None) if bp else (self._busy[seat], 0.0)

    def spans(self) -> list[Span]:
        """The traced operations of all stages of the first replica."""
        return self._log.spans if self._log is not None else []

    def broadcast(self, value: Any) -> Any:
        """It is this process's."""
        return value

    def close(self) -> None:
        """Nothing to part from."""

    def _tallies_now(self) -> dict[_Seat, Tally]:
        return {seat: stage.tally for seat, stage in self._seated.items()}

    def _run(self, program: Callable[[int, int], Iterator[Op]], feeds: Sequence[Feed],
             steps: Sequence[Sequence[Step]], on_step: OnStep, busy: dict[_Seat, float]) -> None:
        """Advance every stage's program as far as it goes, in turn, until all are through.

        What a stage sent back is handled before the next stage runs: that ends the graph of an earlier stage's tail.

        Args:
            program: of a replica and a stage's index.
            feeds, steps: of each replica.
            busy: where the seconds that each stage takes are added.
        """
        watches = {(r, k): OpWatch(k, stage, steps[r], self._losses, None if r else self._log,
                                   on_step if (r, k) == (0, 0) else lambda: None)
                   for (r, k), stage in self._seated.items()}
        ports = self._ports(feeds)
        running = {(r, k): execute(program(r, k), stage, ports[r, k], steps[r], lambda s: factors(self.plan, s),
                                   watches[r, k]) for (r, k), stage in self._seated.items()}

        def advance(seat: _Seat) -> bool:
            """Whether the stage got any further."""
            if seat not in running:
                return False
            before, started = watches[seat].op, perf_counter()
            try:
                if next(running[seat], _ENDED) is _ENDED:
                    del running[seat]
            except Exception as error:
                raise blame(self._plans[seat[0]], seat[1], watches[seat].where, error) from error
            busy[seat] += perf_counter() - started
            watches[seat].pause()
            return watches[seat].op != before

        while running:
            before = [watch.op for watch in watches.values()]
            for r, k in self._seated:
                while k >= 0 and advance((r, k)):
                    k -= 1
            assert not running or [watch.op for watch in watches.values()] != before, \
                "the stages' programs wait for each other"

    def _ports(self, feeds: Sequence[Feed]) -> dict[_Seat, Ports]:
        """The queues between the stages of each replica, and what the replicas of each stage add up."""
        edges, ports = range(len(self.stages) - 1), {}
        sums = [MemorySum.ends(len(self.replicas)) for _ in self.stages]
        for r, feed in enumerate(feeds):
            forward, errors = ([MemoryQueue(self.plan.channels_last(k)) for k in edges] for _ in range(2))
            for k in self.stages:
                ports[r, k] = Ports(_Entry(feed, forward) if k == 0 else forward[k - 1],
                                    forward[k] if k in edges else None, errors[k] if k in edges else None,
                                    errors[k - 1] if k > 0 else None, sums[k][r])
        return ports

    def _backpropagate(self, steps: Sequence[Sequence[Step]], feeds: Sequence[Feed], should_run: ShouldRun,
                       on_step: OnStep) -> None:
        """Plain end-to-end backpropagation of the last stage's loss."""
        for step in zip(*steps, strict=True):
            index, stage = step[0].index, self.stages[0]
            if not should_run(index):
                return
            try:
                now = factors(self.plan, index)
                for part, feed, stages in zip(step, feeds, self.replicas.values(), strict=True):
                    for size in part.sizes:
                        stage = stages[0]
                        x, targets = feed.get()
                        for stage in stages.values():
                            with stage.stream:
                                x = forward_with_graph(stage, x)
                        with stage.stream:
                            loss = loss_with_graph(stage, x, targets, now.mix_ratio)
                        (loss * (size / part.samples)).backward()
                    self._losses.note(len(stages) - 1, stage, index)
                self._add_up(lambda stage: stage.to_reduce(), lambda stage, sums: stage.update.take_reduced(sums))
                for stage in self._seated.values():
                    stage.step(index, now.lr)
            except Exception as error:
                r, k = next(seat for seat, each in self._seated.items() if each is stage)
                raise blame(self._plans[r], k, f"step {index}", error) from error
            on_step()

    def _add_up(self, given: Callable[[Stage], list[Tensor]],
                take: Callable[[Stage, tuple[Tensor, ...]], None]) -> None:
        """What the replicas of each stage have: before they begin, and in each step of `bp`, which has no programs."""
        if len(self.replicas) == 1:
            return
        sums = [MemorySum.ends(len(self.replicas)) for _ in self.stages]
        for (r, k), stage in self._seated.items():
            sums[k][r].put(*given(stage))
        for (r, k), stage in self._seated.items():
            take(stage, sums[k][r].get())
