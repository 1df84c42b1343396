"""A run, from its config to the folder that holds what came of it."""

import signal
import sys
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blpipe import launch, resume, weights
from blpipe.checkpoint.folders import manifest
from blpipe.checkpoint.saver import Saver
from blpipe.checkpoint.state import load
from blpipe.config import Config, PartitionConfig
from blpipe.data import Data, open_data
from blpipe.device import set_up
from blpipe.ending import Ending, OnEpoch, after_epoch, notes_on_end
from blpipe.engines.common import Engine, check_weights
from blpipe.engines.reports import StageReport
from blpipe.errors import StoppedError, UserError
from blpipe.forecast.costs import profile
from blpipe.forecast.stages import settle
from blpipe.metrics import (
    RunLog,
    check_tensorboard,
    epoch_line,
    notes_on_rows,
    run_line,
    stage_table,
)
from blpipe.plan import Plan, make_network, make_plan, notices
from blpipe.program import steps_ahead
from blpipe.progress import Progress
from blpipe.resume import StartPoint
from blpipe.run_folder import StartOptions, claimed, is_being_restarted, make_ready, run_folder_of
from blpipe.signals import Signals
from blpipe.specs import DataSpec
from blpipe.text import say, say_notes
from blpipe.trace import write_trace
from blpipe.trainer import Epoch, Reached, choose_engine, is_due, open_local, open_pipeline, train
from blpipe.transport.horizon import Horizon
from blpipe.transport.world import Meeting, choose_device, is_reporter, meet


def train_run(config: Config, *, overwrite: bool = False, resume_from: Path | None = None,
              auto_resume: bool = False, on_epoch: OnEpoch | None = None,
              outlived: bool = False) -> dict[str, Any] | None:
    """Train `config` into its run folder, in this process or in this one and its neighbours.

    Returns what `result.json` holds in the leading process, None in the others.

    Args:
        overwrite: replace what the run folder holds.
        resume_from: go on from this run folder's newest intact checkpoint, or from this checkpoint.
        auto_resume: go on where the run folder holds a checkpoint; else begin, in place of what is left of the same
            run.
        on_epoch: called after each epoch with its rows, in the leading process; that of the others does not count.
        outlived: whether this process goes on after a failure; the checkpoint under way is waited for then.

    Raises:
        UserError: anything wrong with config, data, launch or run folder; nothing was written then. Or `on_epoch` has
            raised in the leading process, which raises that itself.
        StageError: a stage failed while it ran.
        StoppedError: SIGTERM or Ctrl-C; the run is saved.
    """
    set_up(config)
    options = StartOptions(overwrite, resume_from, auto_resume)
    if choose_engine(config) == "local":
        plan, data, start_point = _prepare(config, options)
        with claimed(plan.config, options, start_point) as folder:
            run = _Run(plan, data, folder, start_point, _has_terminal(config), _may_end_early(config, on_epoch),
                       on_epoch)
            outcome = _train(open_local(plan, data), run, outlived)
    else:
        outcome = _train_in_pipeline(config, meet(config.runtime.timeout_seconds), options, on_epoch, outlived)
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


@dataclass(frozen=True)
class _Run:
    """A run that is about to begin.

    Args:
        data: in the processes of the first stage alone.
        shown: whether to draw the progress bars.
        may_end_early: whether after each epoch the leading process decides if it is the last.
        on_epoch: of the leading process.
        meeting: with the other processes; None where there is one.
    """

    plan: Plan
    data: Data | None
    folder: Path
    start_point: StartPoint
    shown: bool
    may_end_early: bool
    on_epoch: OnEpoch | None = None
    meeting: Meeting | None = None


@dataclass(frozen=True)
class _Outcome:
    """What became of a run: in the leading process its result, if it is finished; or what is to be raised once all
    processes have parted.
    """

    result: dict[str, Any] | None = None
    error: BaseException | None = None


def _may_end_early(config: Config, on_epoch: OnEpoch | None) -> bool:
    return on_epoch is not None or config.train.patience is not None


def _prepare(config: Config, options: StartOptions) -> tuple[Plan, Data, StartPoint]:
    """Check everything that can be checked; writes nothing."""
    check_tensorboard(config)
    start_point = StartPoint()
    run = run_folder_of(config)
    restarted = is_being_restarted(run, config, options)
    if restarted:  # from the last checkpoint, whatever it began with
        config, start_point = resume.resume_if_there(config, run)
    elif options.resume_from is not None:
        config, start_point = resume.resume_from(config, options.resume_from)
    elif options.auto_resume:
        config, start_point = resume.resume_if_there(config, run)
    if start_point.checkpoint is None:
        start_point = weights.given(config)
    data = open_data(config.data, config.seed)
    network = make_network(config, data.spec, pretrained=start_point.checkpoint is None)
    weights.load(start_point, config.model, network.model)
    if config.partition.unsettled:
        device, _ = choose_device(config.runtime.device)
        costs = profile(network, device, data if config.partition.costs == "measured" else None)
        config = settle(config, network, costs)
    plan = make_plan(config, data.spec, network)
    if start_point.checkpoint is not None:
        asked = options.resume_from is not None and not restarted
        start_point = replace(start_point, ended=resume.ended_before(run, plan, start_point.checkpoint, asked))
    resume.refuse_other_lengths(start_point, plan)
    if start_point.checkpoint is not None:
        epochs_done = manifest(start_point.checkpoint).steps_done // len(plan.step_sizes)
        start_point = replace(start_point, notes=[
            *start_point.notes, *resume.notes_on_schedule(start_point, plan), *notes_on_rows(run, epochs_done)])
    data.check_fits_model(plan.classes)
    return plan, data, start_point


def _train_in_pipeline(config: Config, meeting: Meeting, options: StartOptions, on_epoch: OnEpoch | None,
                       outlived: bool) -> _Outcome:
    with ExitStack() as claim:
        run = _lead(config, meeting, options, on_epoch, claim) if meeting.rank == 0 else _follow(config, meeting)
        engine = open_pipeline(run.plan, run.data, meeting)
        outcome = _train(engine, run, outlived)
        engine.close()
    return outcome


def _lead(config: Config, meeting: Meeting, options: StartOptions, on_epoch: OnEpoch | None, claim: ExitStack) -> _Run:
    """Prepare the run and tell the others, or that there is none."""
    try:
        plan, data, start_point = _prepare(config, options)
        folder = claim.enter_context(claimed(plan.config, options, start_point))
    except UserError as error:
        is_reporter(meeting.timeout_seconds)  # before another rank can be
        meeting.announce({"failed": str(error)})
        raise
    may_end_early, ended = _may_end_early(plan.config, on_epoch), start_point.ended
    shown, found, source = _has_terminal(config), start_point.checkpoint, start_point.weights
    meeting.announce({
        "data": data.spec.to_json(), "run": str(folder), "shown": shown, "checkpoint": found and str(found),
        "weights": source and str(source), "partition": plan.config.partition.model_dump(),
        "may_end_early": may_end_early, "ended": ended and asdict(ended)})
    return _Run(plan, data, folder, start_point, shown, may_end_early, on_epoch, meeting)


def _follow(config: Config, meeting: Meeting) -> _Run:
    """The run that the first process has prepared."""
    told = meeting.listen()
    if "failed" in told:
        raise UserError(told["failed"])
    config = config.model_copy(update={"partition": PartitionConfig(**told["partition"])})
    replica, stage = divmod(meeting.rank, config.partition.stage_count)
    spec, found, source = DataSpec.from_json(told["data"]), told["checkpoint"], told["weights"]
    start_point = StartPoint(found and Path(found), weights=source and Path(source),
                             ended=told["ended"] and Ending(**told["ended"]))
    data = None if stage else open_data(config.data, config.seed)
    network = make_network(config, spec, pretrained=found is None)
    weights.load(start_point, config.model, network.model)
    return _Run(make_plan(config, spec, network, replica), data, Path(told["run"]), start_point, told["shown"],
                told["may_end_early"], meeting=meeting)


def _has_terminal(config: Config) -> bool:
    """Whether progress is to be shown, and can be."""
    return config.runtime.progress and sys.stderr.isatty()


def _train(engine: Engine, run: _Run, outlived: bool) -> _Outcome:
    """Train to the end of the run, or to where it is stopped."""
    plan, start, notes = run.plan, 0, [*notices(run.plan), *run.start_point.notes]
    notes += run.data.notes_on_layout() if run.data is not None else []
    found, ending, per_epoch = run.start_point.checkpoint, run.start_point.ended, len(run.plan.step_sizes)
    if found is not None:
        start = manifest(found).steps_done
        notes += load(found, plan, engine)
        notes += notes_on_end(start // per_epoch, plan.config.train.epochs, ending)
    log = None
    if launch.rank() == 0:
        make_ready(run.folder, plan.config, run.start_point)
        log = RunLog(run.folder, plan, engine.name, start // per_epoch)
        say(run_line(plan, choose_device(plan.config.runtime.device)[0], engine.name))
        say_notes(notes)
    reached = Reached(start, None, stopped=False)
    saver = Saver(run.folder, plan, engine, start if found else -1, outlived)
    with Signals() as signals, closing(saver):
        if ending is None:
            reached, ending = _train_epochs(engine, run, reached, log, saver, signals)
        saver.finish()
        if ending is not None and ending.error is not None:
            return _Outcome(error=ending.error)
        if not reached.stopped:
            by = ending.by if ending else "train.epochs"
            return _Outcome(_finish(log, run.folder, reached.steps_done // per_epoch, by) if log else None)
    by_signal = signals.asked_by or signal.SIGTERM  # or another process was
    return _Outcome(error=StoppedError(reached.steps_done, run.folder, by_signal))


def _train_epochs(engine: Engine, run: _Run, reached: Reached, log: RunLog | None, saver: Saver,
                  signals: Signals) -> tuple[Reached, Ending | None]:
    """Go on from there; returns where training is then, and why it has ended early, if it has."""
    plan, start, model, ended, ending = run.plan, reached.steps_done, None, -1, None
    with Progress(engine, plan, start, run.meeting, run.shown) as progress:
        for reached in train(engine, plan, start, _horizon(run, start, signals), progress.tick):
            if reached.epoch is not None:
                _tell_of(reached.epoch, run, log)
                if plan.config.runtime.trace and reached.epoch.index == start // len(plan.step_sizes):
                    _write_trace(run.folder, engine, plan)
                epoch, ending = _after(reached.epoch, engine, run, log)
                if ending is not None and ending.error is not None:
                    break
                ended, model = reached.steps_done, _of_model(epoch)
            if ending is not None or _is_save_due(plan, reached):
                check_weights(plan, engine.stages, reached.steps_done)
                if log is not None:
                    log.catch_up()
                # Of an epoch that has just ended, should a stop have been asked for while it was evaluated.
                saver.save(reached.steps_done, model if reached.steps_done == ended else None)
            if ending is not None:
                break
    return reached, ending


def _after(epoch: Epoch, engine: Engine, run: _Run, log: RunLog | None) -> tuple[Epoch, Ending | None]:
    """Decide whether the run ends with this epoch, in the leading process, and tell the others.

    Returns the epoch, evaluated if it is the last, and why it is, if it is before `train.epochs`.
    """
    config = run.plan.config.train
    if not run.may_end_early:
        return epoch, None
    ending = None
    if log is not None:
        ending = after_epoch(log.rows(), config.patience, run.on_epoch)
    told = engine.broadcast(ending and ending.told())
    ending = ending or told
    if ending is None or ending.error is not None:
        return epoch, ending
    if epoch.index + 1 == config.epochs:
        return epoch, None
    if not is_due(epoch.index + 1, config.eval_every_epochs, config.epochs):
        engine.evaluate()
        epoch = Epoch(epoch.index, engine.reports())
        _tell_of(epoch, run, log)
    if log is not None:
        say(f"ended after epoch {epoch.index + 1}/{config.epochs}: {ending.why}")
    return epoch, ending


def _horizon(run: _Run, start: int, signals: Signals) -> Horizon:
    plan = run.plan
    if run.meeting is None:
        return Horizon(start, signals.stop_asked)
    ahead = steps_ahead([links.hops_in for links in plan.links], plan.delay, plan.config.train.microbatches)
    replicated = plan.config.train.replicas > 1  # another replica's first stage may be in the next step already
    return Horizon(start, signals.stop_asked, run.meeting, ahead + replicated)


def _finish(log: RunLog, folder: Path, epochs: int, ended_by: str) -> dict[str, Any]:
    result = log.finish(epochs, ended_by)
    say(stage_table(result))
    say(f"run folder: {folder}")
    return result


def _tell_of(epoch: Epoch, run: _Run, log: RunLog | None) -> None:
    if log is not None:  # in the first process
        plan = run.plan
        say_notes(log.add(epoch))
        say(epoch_line(epoch, plan))
        for number, report in enumerate(epoch.reports or [], start=1):
            if report.skipped_steps:
                say(f"note: stage {number} ({plan.stage_names[number - 1]}) skipped step "
                    f"{', '.join(map(str, report.skipped_steps))}: loss or gradients NaN or infinite")
    say_notes(run.data.notes() if run.data is not None else [])


def _write_trace(run: Path, engine: Engine, plan: Plan) -> None:
    spans, path = engine.spans(), run / "trace.json"  # all processes take part
    if not spans:  # of a run that goes on, the steps that are traced have been
        return
    try:
        write_trace(path, spans, plan.stage_names)
    except OSError as error:
        say_notes([f"cannot write {path}: {error.strerror}; training goes on"])


def _is_save_due(plan: Plan, reached: Reached) -> bool:
    config = plan.config.checkpoint
    if reached.stopped or (config.every_steps and reached.steps_done % config.every_steps == 0):
        return True
    return reached.epoch is not None and is_due(reached.epoch.index + 1, config.every_epochs, plan.config.train.epochs)


def _of_model(epoch: Epoch) -> StageReport | None:
    return epoch.reports[-1] if epoch.reports else None
