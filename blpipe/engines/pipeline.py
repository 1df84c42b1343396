"""One process per stage: the same programs as in the local engine, over queues between processes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from time import perf_counter
from typing import Any

import torch

from blpipe.data import Data
from blpipe.engines.alone import load_kernels
from blpipe.engines.backprop import Backprop
from blpipe.engines.build import build_stage, recording_stream
from blpipe.engines.common import (
    TRACED_STEPS,
    LossWatch,
    OnStep,
    OpWatch,
    ShouldRun,
    blame,
    factors,
    role,
    seconds_since,
)
from blpipe.engines.feed import Feed, TrainFeed, test_microbatches
from blpipe.engines.reports import EpochSums, StageProgress, StageReport, gpu_readings, replica_report, report
from blpipe.graphs import recorder_on
from blpipe.plan import Plan
from blpipe.program import (
    ACTIVATIONS_AHEAD,
    Inbox,
    Kind,
    Op,
    Ports,
    errors_ahead,
    evaluation_program,
    execute,
    train_program,
)
from blpipe.specs import TensorSpec
from blpipe.steps import Step
from blpipe.tally import Tally
from blpipe.trace import Span, SpanLog
from blpipe.transport.world import World

STEPS_AHEAD = 2  # of the GPU, that the host may launch


class PipelineEngine:
    """See `Engine`. This process runs one stage of one replica, as `world` says.

    Args:
        data: on the processes of the first stage; None on the others, which read none.
    """

    name = "pipeline"

    def __init__(self, plan: Plan, data: Data | None, world: World):
        self.plan, self.data, self.world = plan, data, world
        self.group = world.saving
        self.index = k = world.stage
        over_nccl = world.via.type == "cuda"
        self.stage = build_stage(plan, k, world.device, recorder_on(recording_stream(plan, world.device)), over_nccl)
        self.stages = {k: self.stage}
        self.replicas = {world.replica: self.stages}
        self.role = role(plan, k)
        first, last = k == 0, k == world.stages - 1
        self._activations_in = None if first else world.receiver(k - 1, plan.channels_last(k - 1))
        self._activations_out = None if last else world.sender(k + 1, plan.channels_last(k), {
            (spec, plan.targets(size)) for size in plan.outputs for spec in (plan.activation(size, k),
                                                                             plan.outputs[size][k])})
        self._errors_in = None if last else world.receiver(k + 1, plan.channels_last(k))
        self._errors_out = None if first else world.sender(k - 1, plan.channels_last(k - 1), {
            (plan.error(size, k - 1),) for size in plan.outputs})
        self._sum = world.replicas_sum()
        if self._sum is not None:
            self._sum.put(*self.stage.update.lead())
            self.stage.update.follow(self._sum.get())
            self._sum.put(*self.stage.to_reduce())  # of a step's sizes, which NCCL sets up before any receive is posted
            self._sum.get()
        queues: list[Any] = [self._activations_in, self._activations_out, self._errors_in, self._errors_out, self._sum]
        self.queues = [queue for queue in queues if queue is not None]
        self._backprop = Backprop(plan, self.stage, world) if plan.config.method.name == "bp" else None
        self._train_tally = self._val_tally = self.stage.tally
        self._train_seconds = self._wait_seconds = 0.0  # in the epoch, without the part under way
        self._untold_seconds = 0.0  # of these, neither busy nor waiting: the epoch's part in other stages
        self._started = self._waited_before = 0.0  # of that part
        self._log = SpanLog(TRACED_STEPS) if plan.config.runtime.trace else None
        self._feed = TrainFeed(data, plan) if data is not None else None
        self._losses = LossWatch(plan, at_once=world.device.type == "cpu")
        self._steps_begun: deque[torch.cuda.Event] = deque()  # on the GPU
        if over_nccl and self._backprop is None:
            try:
                load_kernels(self.stage, plan, k, world.device, data)
            except Exception as error:
                raise blame(plan, k, "start", error) from error

    def train(self, epoch: int, start: int, should_run: ShouldRun, on_step: OnStep) -> int:
        """See `Engine`."""
        steps = self.plan.train_steps(epoch)
        if start == steps[0].index:
            self.restore_sums({(self.plan.replica, self.index): EpochSums(Tally())})
        next_step = start

        def count() -> None:
            nonlocal next_step
            next_step += 1
            self._stay_near()
            on_step()

        feed = self._feed.begin(epoch, start) if self._feed is not None else None
        self._waited_before, self._started = self._waited(), perf_counter()
        left = steps[start - steps[0].index:]
        if self._backprop is not None:
            self._train_by_backprop(self._backprop, left, should_run, feed, count)
        else:
            self._expect_activations((size for step in takewhile(lambda step: should_run(step.index), left)
                                      for size in step.sizes), self.plan.activation)
            self._expect_errors(steps, start, should_run)
            self._run(self._program(steps, start, should_run), feed, steps, count)
        if self._feed is not None:
            self._feed.leave(epoch, next_step)
        self._wait_seconds += self._waited() - self._waited_before
        try:
            self._train_seconds += seconds_since(self._started, self.world.device)
        except RuntimeError as error:  # of a kernel that the GPU has only run now
            raise blame(self.plan, self.index, f"step {next_step - 1} or before", error) from error
        self._losses.look()
        return next_step

    def epoch_sums(self) -> dict[tuple[int, int], EpochSums]:
        """See `Engine`."""
        busy = self._train_seconds - self._wait_seconds - self._untold_seconds
        sums = EpochSums(self._train_tally, busy, self._wait_seconds, self._train_seconds)
        return {(self.plan.replica, self.index): sums}

    def restore_sums(self, sums: dict[tuple[int, int], EpochSums]) -> None:
        """See `Engine`."""
        mine = sums[self.plan.replica, self.index]
        self.stage.train(True, mine.tally)
        self._train_tally = mine.tally
        self._val_tally = Tally()
        self._train_seconds, self._wait_seconds = mine.train_seconds, mine.wait_seconds
        self._untold_seconds = mine.train_seconds - mine.busy_seconds - mine.wait_seconds

    def evaluate(self) -> None:
        """Evaluate every stage's head on all test samples, or those held out."""
        self.stage.train(False)
        self._val_tally = self.stage.tally
        sizes = self.plan.evaluation_sizes()
        self._expect_activations(sizes, lambda size, stage: self.plan.outputs[size][stage])
        feed = None
        if self.data is not None:
            feed = Feed(test_microbatches(self.data, self.plan))
        self._run(evaluation_program(len(sizes), self.role), feed, [], lambda: None)

    def progress(self) -> dict[int, StageProgress]:
        """See `Engine`."""
        seconds = self._seconds(self._train_seconds + perf_counter() - self._started,
                                self._wait_seconds + self._waited() - self._waited_before)
        if self.world.replica:
            return {}
        return {self.index: StageProgress(self._train_tally.loss, *seconds, *gpu_readings(self.world.device))}

    def reports(self) -> list[StageReport] | None:
        """One report a stage, on rank 0."""
        gathered = self.world.gather(replica_report(
            self._train_tally, self._val_tally, *self._seconds(self._train_seconds, self._wait_seconds),
            self._train_seconds, self.world.device))
        return None if gathered is None else [report(gathered[k::self.world.stages])
                                              for k in range(self.world.stages)]

    def _seconds(self, total: float, waited: float) -> tuple[float | None, float | None]:
        """Busy and waiting; torch's schedules do not tell one from the other."""
        return (total - waited - self._untold_seconds, waited) if self._backprop is None else (None, None)

    def spans(self) -> list[Span] | None:
        """The traced operations of all stages of the first replica, on rank 0."""
        gathered = self.world.gather(self._log.spans if self._log is not None and not self.world.replica else [])
        return None if gathered is None else [span for spans in gathered for span in spans]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, in every process."""
        return self.world.broadcast(value)

    def close(self) -> None:
        """Part from the other processes."""
        self.world.barrier()
        self.world.close()

    def _run(self, program: Iterator[Op], feed: Feed | None, steps: Sequence[Step],
             on_step: OnStep) -> None:
        inbox: Inbox | None = feed or self._activations_in
        assert inbox is not None
        ports = Ports(inbox, self._activations_out, self._errors_in, self._errors_out, self._sum)
        watch = OpWatch(self.index, self.stage, steps, self._losses, self._log, on_step)
        try:
            for _ in execute(program, self.stage, ports, steps, lambda s: factors(self.plan, s), watch):
                raise AssertionError("queues between processes wait by themselves")
            watch.pause()
            for queue in (self._activations_out, self._errors_out):
                if queue is not None:
                    queue.drain()
        except Exception as error:
            raise blame(self.plan, self.index, watch.where, error) from error

    def _train_by_backprop(self, backprop: Backprop, steps: Sequence[Step], should_run: ShouldRun, feed: Feed | None,
                           on_step: OnStep) -> None:
        where = "start"
        try:
            for step in takewhile(lambda step: should_run(step.index), steps):
                where = f"step {step.index}"
                backprop.train_step(step, feed)
                self._losses.note(self.index, self.stage, step.index)
                if self._sum is not None:
                    self._sum.put(*self.stage.to_reduce())
                    self.stage.update.take_reduced(self._sum.get())
                self.stage.step(step.index, factors(self.plan, step.index).lr)
                on_step()
            backprop.drain()
        except Exception as error:
            raise blame(self.plan, self.index, where, error) from error

    def _stay_near(self) -> None:
        """Wait until the GPU has reached a step of not long ago: what the host launches ahead holds memory for it."""
        if self.world.device.type == "cuda":
            self._steps_begun.append(torch.cuda.Event(blocking=True))
            self._steps_begun[-1].record()
            if len(self._steps_begun) > STEPS_AHEAD:
                self._steps_begun.popleft().synchronize()

    def _expect_activations(self, sizes: Iterable[int], spec: Callable[[int, int], TensorSpec]) -> None:
        if self._activations_in is not None:
            layouts = ((spec(size, self.index - 1), self.plan.targets(size)) for size in sizes)
            self._activations_in.expect(layouts, ACTIVATIONS_AHEAD)

    def _program(self, steps: Sequence[Step], start: int, should_run: ShouldRun) -> Iterator[Op]:
        return train_program(steps, self.role, self.plan.delay, start, should_run)

    def _expect_errors(self, steps: Sequence[Step], start: int, should_run: ShouldRun) -> None:
        if self._errors_in is not None:
            sizes = {step.index: step.sizes for step in steps}
            layouts = ((self.plan.error(sizes[op.step][op.microbatch], self.index),)
                       for op in self._program(steps, start, should_run) if op.kind is Kind.RECEIVE_ERROR)
            self._errors_in.expect(layouts, errors_ahead(self.plan.delay, self.plan.config.train.microbatches,
                                                         len(self.role.hops_in)))

    def _waited(self) -> float:
        return sum(queue.wait_seconds for queue in self.queues)


def contract(plan: Plan) -> dict[str, Any]:
    """What neighbours must agree on before the first message: the config and every layout on the wire."""
    outputs = {str(size): [[list(spec.shape), str(spec.dtype)] for spec in specs]
               for size, specs in sorted(plan.outputs.items())}
    config = plan.config.model_dump(mode="json", exclude={"runtime"})
    return {"config": config, "outputs": outputs, "runtime.trace": plan.config.runtime.trace}

