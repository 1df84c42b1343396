"""What the engines share: what each can do, and how it follows what its stages do."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from blpipe.config import Config
from blpipe.engines.reports import EpochSums, StageProgress, StageReport
from blpipe.errors import NonFiniteError, PeerLostError, StageError, UserError
from blpipe.gradients import norm_of
from blpipe.optim import lr_factor
from blpipe.plan import Plan
from blpipe.program import Factors, Kind, Op, Role, always
from blpipe.stage import Stage
from blpipe.steps import Step
from blpipe.tally import main_targets, mixed_loss
from blpipe.trace import Span, SpanLog

TRACED_STEPS = 50  # of a run; with `runtime.trace`

OnStep = Callable[[], object]  # called at each optimizer step of this process's first stage
ShouldRun = Callable[[int], bool]  # whether a step of the run is to be done


class Engine(Protocol):
    """Runs all stages of a plan, or this process's share of them."""

    name: str
    plan: Plan
    replicas: dict[int, dict[int, Stage]]  # the stages of this process, by index, of each of its replicas
    stages: dict[int, Stage]               # those of the first of these; the others equal them after every step
    group: Any                             # of all processes, for checkpoints alone; None where there is one

    def train(self, epoch: int, start: int, should_run: ShouldRun, on_step: OnStep) -> int:
        """Train the steps of one epoch, from 0, beginning with step `start` of the run, while `should_run` says so.

        Returns:
            The step to go on with.
        """

    def epoch_sums(self) -> dict[tuple[int, int], EpochSums]:
        """What each of this process's stages, by replica and index, has added up in the epoch; waits for the device."""

    def restore_sums(self, sums: dict[tuple[int, int], EpochSums]) -> None:
        """Be in the middle of an epoch, with these sums."""

    def evaluate(self) -> None:
        """Evaluate every stage's head on all test samples, or those held out."""

    def progress(self) -> dict[int, StageProgress]:
        """Of this process's stages of the first replica, by index, at any time; waits for the device."""

    def reports(self) -> list[StageReport] | None:
        """One report a stage on the leading process; None on the others."""

    def spans(self) -> list[Span] | None:
        """The operations of the run's first steps, of all stages of the first replica, on the leading process; None on
        the others.
        """

    def broadcast(self, value: Any) -> Any:
        """The leading process's value, in every process."""

    def close(self) -> None:
        """Part from the other processes."""


class LossWatch:
    """Ends a run whose loss is NaN or infinite, where `train.on_nonfinite` is `stop`.

    Args:
        at_once: whether to look in every step, which waits for the device; if not, `look` says which step it was.
    """

    MOST = 1000  # steps noted before it looks by itself

    def __init__(self, plan: Plan, at_once: bool):
        self._plan, self._at_once = plan, at_once
        self._on = plan.config.train.on_nonfinite == "stop"
        self._sums: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)  # by stage: steps, and losses up to them

    def note(self, index: int, stage: Stage, step: int) -> None:
        """The losses of this step have been counted. Raises NonFiniteError, or what `look` does."""
        if not self._on:
            return
        if self._at_once:
            if not stage.tally.is_finite():
                raise NonFiniteError
            return
        self._sums[index].append((step, torch.as_tensor(stage.tally.loss_sum)))
        if len(self._sums[index]) >= self.MOST:
            self.look()

    def look(self) -> None:
        """Waits for the device. Raises a StageError that names stage and step."""
        for index, noted in self._sums.items():
            finite = torch.stack([total for _, total in noted]).isfinite().tolist()
            for (step, _), is_finite in zip(noted, finite, strict=True):
                if not is_finite:
                    raise blame(self._plan, index, f"step {step}", NonFiniteError())
        self._sums.clear()


class OpWatch:
    """Follows what a stage does: for messages, for the trace, and for the losses of every step.

    Args:
        steps: that are trained; none in an evaluation.
        log: of the trace, if there is one.
        on_step: called at each optimizer step.
    """

    def __init__(self, index: int, stage: Stage, steps: Sequence[Step], losses: LossWatch, log: SpanLog | None,
                 on_step: OnStep):
        self._index, self._stage, self._losses, self._on_step = index, stage, losses, on_step
        self._phase = "step" if steps else "evaluation, batch"
        self._log = log if steps else None
        self.op = Op(Kind.RECEIVE, steps[0].index if steps else 0)

    def __call__(self, op: Op) -> None:
        """The stage begins this operation."""
        self.op = op
        if self._log is not None:
            self._log.begin(self._index, op)
        if op.kind is Kind.STEP:
            self._losses.note(self._index, self._stage, op.step)
            self._on_step()

    def pause(self) -> None:
        """The stage stops for now: for other stages of the process, or at its end."""
        if self._log is not None:
            self._log.end(self._index)

    @property
    def where(self) -> str:
        """Where the stage is, for messages."""
        return f"{self._phase} {self.op.step}"


def check_weights(plan: Plan, stages: dict[int, Stage], steps_done: int) -> None:
    """Look at all weights that are trained, where `train.on_nonfinite` is `stop`; waits for the device.

    Others may be infinite, as masks are, or of types that have no norm.

    Raises:
        StageError: some are NaN or infinite.
    """
    if plan.config.train.on_nonfinite == "stop":
        for index, stage in stages.items():
            if not norm_of(p.detach() for part in stage.parts for p in part.parameters() if p.requires_grad).isfinite():
                raise blame(plan, index, f"step {steps_done - 1}", NonFiniteError())


def train_epoch(engine: Engine, epoch: int, on_step: OnStep = lambda: None) -> None:
    """Train all steps of one epoch, from 0."""
    engine.train(epoch, engine.plan.train_steps(epoch)[0].index, always, on_step)


def forward_with_graph(stage: Stage, x: Tensor) -> Tensor:
    """For `bp`, run a stage's blocks on one microbatch: the graph goes on through x and the output."""
    return stage.precision.run(stage.run_blocks, x)


def loss_with_graph(stage: Stage, logits: Tensor, targets: Tensor, mix_ratio: float | None) -> Tensor:
    """For `bp`, the last stage's loss on one microbatch, counted: the graph goes on from the logits.

    Args:
        mix_ratio: see `Stage.local_backward`.
    """
    loss = mixed_loss(stage.loss, logits, targets, logits, mix_ratio)
    stage.tally.add(loss, logits, main_targets(targets, mix_ratio))
    return loss


def role(plan: Plan, index: int) -> Role:
    """What the stage with this index, from 0, exchanges with its neighbours."""
    return Role(index < len(plan.stages) - 1, plan.links[index].hops_out, plan.links[index].hops_in,
                replicated=plan.config.train.replicas > 1)


def factors(plan: Plan, step: int) -> Factors:
    """What a step of the run, from 0, is done with."""
    length = len(plan.step_sizes), plan.config.train.epochs
    return Factors(lr_factor(plan.config.schedule, step, *length),
                   lr_factor(plan.config.method.link.schedule, step, *length),
                   plan.mixing.of_step(step).ratio if plan.mixing else None)


def seconds_since(started: float, device: torch.device) -> float:
    """Seconds since `perf_counter()` was `started`, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


def blame(plan: Plan, index: int, where: str, error: Exception) -> Exception:
    """`error` as the error of the stage with this index; a user's or a lost neighbour's stays what it is."""
    if isinstance(error, PeerLostError):
        return PeerLostError(f"{error} (at {where})")
    if isinstance(error, UserError | StageError):
        return error
    remedy = _for_less_memory(plan.config) if isinstance(error, torch.OutOfMemoryError) else ""
    rank = plan.replica * len(plan.stages) + index
    return StageError(index + 1, rank, plan.block_names(index), where, error, remedy)


def _for_less_memory(config: Config) -> str:
    train, link = config.train, config.method.link
    ways = ["runtime.cuda_graphs=false"] if config.runtime.cuda_graphs else []
    ways += [] if train.recompute or train.compile or config.runtime.cuda_graphs else ["train.recompute=true"]
    ways += ["method.link.keep=recompute"] if config.method.linked and link.delay and link.keep == "graph" else []
    return f"use {', '.join([*ways, 'more microbatches'])} or more stages; `blpipe plan` shows what each stage needs"
