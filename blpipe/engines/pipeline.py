"""One process per stage: the same programs as in the local engine, over queues between processes."""

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

from blpipe.data import Data
from blpipe.engines.backprop import Backprop
from blpipe.engines.common import (
    TRACED_STEPS,
    Feed,
    OnStep,
    StageReport,
    blame,
    build_stage,
    factors,
    report,
    role,
    seconds_since,
    test_microbatches,
    train_microbatches,
)
from blpipe.losses import Tally
from blpipe.plan import Plan, Step
from blpipe.program import Inbox, Kind, Op, Ports, evaluation_program, execute, train_program
from blpipe.trace import Span, SpanLog
from blpipe.transport.queues import Layout
from blpipe.transport.world import World

ACTIVATIONS_AHEAD = 2  # receives of activations posted before they are asked for


class PipelineEngine:
    """See `Engine`. This process runs the stage whose index is its rank.

    Args:
        data: on the first stage's process; None on the others, which read none.
    """

    name = "pipeline"

    def __init__(self, plan: Plan, data: Data | None, world: World):
        self.plan, self.data, self.world = plan, data, world
        self.group = world.control
        self.index = k = world.rank
        self.stage = build_stage(plan, k, world.device)
        self.stages = {k: self.stage}
        self.role = role(plan, k)
        first, last = k == 0, k == world.size - 1
        self._activations_in = None if first else world.receiver(k - 1)
        self._activations_out = None if last else world.sender(k + 1)
        self._errors_in = None if last else world.receiver(k + 1)
        self._errors_out = None if first else world.sender(k - 1)
        queues: list[Any] = [self._activations_in, self._activations_out, self._errors_in, self._errors_out]
        self.queues = [queue for queue in queues if queue is not None]
        self._backprop = Backprop(plan, self.stage, world) if plan.config.method.name == "bp" else None
        self._train_tally = self._val_tally = self.stage.tally
        self._train_seconds = self._wait_seconds = 0.0
        self._log = SpanLog(TRACED_STEPS) if plan.config.runtime.trace else None

    def train_epoch(self, epoch: int, on_step: OnStep) -> None:
        """Train all steps of one epoch, from 0."""
        self.stage.train(True)
        self._train_tally, self._val_tally = self.stage.tally, Tally()
        steps = self.plan.train_steps(epoch)
        feed = None
        if self.data is not None:
            feed = Feed(train_microbatches(self.data, self.plan, epoch, self.world.device))
        waited, started = self._waited(), perf_counter()
        if self._backprop is not None:
            self._train_by_backprop(self._backprop, steps, feed, on_step)
        else:
            self._expect_activations([size for step in steps for size in step.sizes])
            self._expect_errors(steps)
            self._run(self._program(steps), feed, steps, on_step)
        self._wait_seconds = self._waited() - waited
        self._train_seconds = seconds_since(started, self.world.device)

    def evaluate(self) -> None:
        """Evaluate every stage's head on all test samples."""
        self.stage.train(False)
        self._val_tally = self.stage.tally
        sizes = self.plan.evaluation_sizes()
        self._expect_activations(sizes)
        feed = None
        if self.data is not None:
            feed = Feed(test_microbatches(self.data, self.plan, self.world.device))
        self._run(evaluation_program(len(sizes), self.role), feed, [], lambda: None)

    def reports(self) -> list[StageReport] | None:
        """One report a stage, on rank 0."""
        train, val = self._train_tally, self._val_tally
        # torch's schedules do not tell computing from waiting.
        measured = self._backprop is None
        return self.world.gather(report(
            train, val, self._train_seconds - self._wait_seconds if measured else None,
            self._wait_seconds if measured else None, self._train_seconds, self.world.device))

    def spans(self) -> list[Span] | None:
        """The traced operations of all stages, on rank 0."""
        gathered = self.world.gather(self._log.spans if self._log is not None else [])
        return None if gathered is None else [span for spans in gathered for span in spans]

    def close(self) -> None:
        """Part from the other processes."""
        self.world.barrier()
        self.world.close()

    def _run(self, program: Iterator[Op], feed: Feed | None, steps: Sequence[Step],
             on_step: OnStep) -> None:
        inbox: Inbox | None = feed or self._activations_in
        assert inbox is not None
        ports = Ports(inbox, self._activations_out, self._errors_in, self._errors_out)
        now = Op(Kind.RECEIVE, steps[0].index if steps else 0)
        log = self._log if steps else None

        def watch(op: Op) -> None:
            nonlocal now
            now = op
            if log is not None:
                log.begin(self.index, op)
            if op.kind is Kind.STEP:
                on_step()

        try:
            for _ in execute(program, self.stage, ports, steps, lambda s: factors(self.plan, s), watch):
                raise AssertionError("queues between processes wait by themselves")
            if log is not None:
                log.end(self.index)
            for queue in (self._activations_out, self._errors_out):
                if queue is not None:
                    queue.drain()
        except Exception as error:
            raise blame(self.plan, self.index, f"step {now.step}", error) from error

    def _train_by_backprop(self, backprop: Backprop, steps: Sequence[Step], feed: Feed | None,
                           on_step: OnStep) -> None:
        where = "start"
        try:
            for step in steps:
                where = f"step {step.index}"
                backprop.train_step(step, feed)
                self.stage.step(factors(self.plan, step.index).lr)
                on_step()
            backprop.drain()
        except Exception as error:
            raise blame(self.plan, self.index, where, error) from error

    def _expect_activations(self, sizes: Sequence[int]) -> None:
        if self._activations_in is not None:
            self._activations_in.expect([self._activation_layout(size) for size in sizes], ACTIVATIONS_AHEAD)

    def _program(self, steps: Sequence[Step]) -> Iterator[Op]:
        return train_program(steps, self.role, self.plan.config.method.link.delay)

    def _expect_errors(self, steps: Sequence[Step]) -> None:
        if self._errors_in is not None:
            sizes = {step.index: step.sizes for step in steps}
            layouts = [(self.plan.error(sizes[op.step][op.microbatch], self.index),)
                       for op in self._program(steps) if op.kind is Kind.RECEIVE_ERROR]
            config = self.plan.config
            self._errors_in.expect(layouts, errors_ahead(config.method.link.delay, config.train.microbatches,
                                                         self.role.hops_in))

    def _activation_layout(self, size: int) -> Layout:
        return self.plan.outputs[size][self.index - 1], self.plan.targets(size)

    def _waited(self) -> float:
        return sum(queue.wait_seconds for queue in self.queues)


def errors_ahead(delay: int, microbatches: int, hops: int) -> int:
    """Receives of errors posted ahead: one for every error that can be under way, so that no sender ever waits."""
    return hops * (delay + 1) * microbatches + 1


def contract(plan: Plan) -> dict[str, Any]:
    """What neighbours must agree on before the first message: the config and every layout on the wire."""
    outputs = {str(size): [[list(spec.shape), str(spec.dtype)] for spec in specs]
               for size, specs in sorted(plan.outputs.items())}
    config = plan.config.model_dump(mode="json", exclude={"runtime"})
    return {"config": config, "outputs": outputs}

