"""Run folders: what each subcommand does with one."""

import fcntl
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TextIO

import torch
from tqdm import tqdm

from blpipe import launch, resume
from blpipe.checkpoint.folders import checkpoints, config_of, forget_after, manifest
from blpipe.checkpoint.saver import Saver
from blpipe.checkpoint.state import load, load_weights, model_state
from blpipe.config import Config, PartitionConfig
from blpipe.config_file import dump_config
from blpipe.data import Data, DataSpec, open_data
from blpipe.engines.common import Engine
from blpipe.engines.pipeline import steps_ahead
from blpipe.errors import ConfigError, StoppedError, UserError
from blpipe.forecast.costs import profile
from blpipe.forecast.stages import settle
from blpipe.metrics import Recorder, check_tensorboard, epoch_line, stage_rows, stage_table
from blpipe.plan import Plan, make_network, make_plan, notices
from blpipe.progress import Progress
from blpipe.resume import Beginning
from blpipe.trace import write_trace
from blpipe.trainer import Epoch, Reached, choose_engine, is_due, open_local, open_pipeline, set_up, train
from blpipe.transport.horizon import Horizon
from blpipe.transport.world import Meeting, choose_device, meet

_PARTS = ("config.yaml", "metrics.jsonl", "result.json", "trace.json", "tensorboard", "checkpoints")


def train_run(config: Config, *, overwrite: bool = False, resume_from: Path | None = None,
              auto_resume: bool = False) -> None:
    """Train `config` into its run folder, in this process or in this one and its neighbours.

    Args:
        overwrite: replace what the run folder holds.
        resume_from: go on from this run folder's newest intact checkpoint, or from this checkpoint.
        auto_resume: go on where the run folder holds a checkpoint; else begin, in place of what is left of the same
            run.

    Raises:
        UserError: anything wrong with config, data, launch or run folder; nothing was written then.
        StageError: a stage failed while it ran.
        StoppedError: SIGTERM; the run is saved.
    """
    set_up(config)
    how = _How(overwrite, resume_from, auto_resume)
    if choose_engine(config) == "local":
        plan, data, beginning = _prepare(config, how)
        with _run_folder(plan.config, how, beginning) as run:
            stopped = _train(open_local(plan, data), plan, run, beginning, None, _has_terminal(config))
    else:
        run, stopped = _train_in_pipeline(config, meet(config.runtime.timeout_seconds), how)
    if stopped is not None:
        raise StoppedError(f"stopped by SIGTERM after step {stopped}, and saved; `train --resume {run}` goes on")


def evaluate_run(path: Path) -> str:
    """Evaluate a run's newest checkpoint, or the one at `path`, on its test samples; returns the table of its stages.

    Raises:
        UserError: no run, no checkpoint, or no data.
    """
    found = _found(path)
    config = config_of(found)
    set_up(config)
    data = open_data(config.data, config.seed)
    plan = make_plan(config, data.spec)
    engine = open_local(plan, data)
    load_weights(found, plan, engine.stages)
    engine.evaluate()
    reports = engine.reports()
    assert reports is not None
    return stage_table(stage_rows(plan), [report.val_accuracy for report in reports])


def export_run(path: Path, out: Path) -> None:
    """Write the plain model's state_dict of a run's newest checkpoint, or of the one at `path`, by torch.save.

    Raises:
        UserError: no run or no checkpoint, or `out` cannot be written.
    """
    state = model_state(_found(path))
    partial = out.with_name(f".{out.name}.partial")
    try:
        torch.save(state, partial)
        partial.replace(out)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"--out: cannot write {out}: {error}") from error


def _found(path: Path) -> Path:
    beginning = resume.find(path)
    _tell(beginning.notes)
    assert beginning.checkpoint is not None
    return beginning.checkpoint


def _tell(notes: list[str]) -> None:
    for line in notes:
        print(f"note: {line}", flush=True)


@dataclass(frozen=True)
class _How:
    """See `train_run`."""

    overwrite: bool
    resume_from: Path | None
    auto_resume: bool


def _prepare(config: Config, how: _How) -> tuple[Plan, Data, Beginning]:
    """Check everything that can be checked; writes nothing."""
    check_tensorboard(config)
    beginning = Beginning()
    if how.resume_from is not None:
        config, beginning = resume.go_on(config, how.resume_from)
    elif how.auto_resume:
        config, beginning = resume.go_on_if_there(config, _folder(config))
    data = open_data(config.data, config.seed)
    network = make_network(config, data.spec)
    if config.partition.unsettled:
        device, _ = choose_device(config.runtime.device)
        costs = profile(network, device, data if config.partition.costs == "measured" else None)
        config = settle(config, network, costs)
    plan = make_plan(config, data.spec, network)
    data.check_labels(plan.classes)
    return plan, data, beginning


def _folder(config: Config) -> Path:
    return Path(config.runtime.runs) / config.name


@contextmanager
def _run_folder(config: Config, how: _How, beginning: Beginning) -> Iterator[Path]:
    """The run folder, this process's alone, which holds nothing that is to be kept. Raises ConfigError."""
    run = _folder(config)
    with _writing_to(run):
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("w")
    with lock:
        try:
            with _writing_to(run):
                _take(lock, run)
            _refuse_another_run(run, config, how, beginning)
            yield run
        finally:
            if not any(path.name != ".lock" for path in run.iterdir()):  # nothing came of it
                shutil.rmtree(run)


def _make_ready(run: Path, config: Config, beginning: Beginning) -> None:
    """Remove what is not to be gone on with, and write the config. Raises ConfigError."""
    with _writing_to(run):
        if beginning.checkpoint is None:
            for path in _parts(run):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            forget_after(run, beginning.checkpoint)
        partial = run / ".config.yaml.partial"
        partial.write_text(dump_config(config))
        partial.replace(run / "config.yaml")


@contextmanager
def _writing_to(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"runtime.runs: cannot write to {run}: {error.strerror}; choose another folder") from error


def _take(lock: TextIO, run: Path) -> None:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"name: another process is training in {run}; wait for it, or choose another "
                          "name=…") from None


def _refuse_another_run(run: Path, config: Config, how: _How, beginning: Beginning) -> None:
    if not _parts(run) or how.overwrite or beginning.checkpoint or (how.auto_resume and resume.is_of(run, config)):
        return
    go_on = f"go on with `train --resume {run}`, " if checkpoints(run) else ""
    raise ConfigError(f"name: {run} already holds a run; {go_on}replace it with --overwrite, or choose another name=…")


def _parts(run: Path) -> list[Path]:
    """What a run folder holds of a run."""
    return [run / part for part in _PARTS if (run / part).exists()]


def _train_in_pipeline(config: Config, meeting: Meeting, how: _How) -> tuple[Path, int | None]:
    """Returns the run folder, and what `_train` does."""
    data: Data | None = None
    with ExitStack() as claim:
        if meeting.rank == 0:
            try:
                plan, data, beginning = _prepare(config, how)
                run = claim.enter_context(_run_folder(plan.config, how, beginning))
            except UserError:
                meeting.is_reporter()  # before another rank can be
                meeting.announce(config.name, {"failed": True})
                raise
            shown = _has_terminal(config)
            meeting.announce(config.name, {
                "data": data.spec.to_json(), "run": str(run), "shown": shown,
                "partition": plan.config.partition.model_dump(),
                "checkpoint": None if beginning.checkpoint is None else str(beginning.checkpoint)})
        else:
            told = meeting.listen(config.name)
            if "failed" in told:
                raise UserError("rank 0 could not begin")
            config = config.model_copy(update={"partition": PartitionConfig(**told["partition"])})
            plan, run = make_plan(config, DataSpec.from_json(told["data"])), Path(told["run"])
            shown = told["shown"]
            beginning = Beginning(None if told["checkpoint"] is None else Path(told["checkpoint"]))
        engine = open_pipeline(plan, data, meeting)
        stopped = _train(engine, plan, run, beginning, meeting, shown)
        engine.close()
    return run, stopped


def _has_terminal(config: Config) -> bool:
    """Whether progress is to be shown, and can be."""
    return config.runtime.progress and sys.stderr.isatty()


def _train(engine: Engine, plan: Plan, run: Path, beginning: Beginning, meeting: Meeting | None,
           shown: bool) -> int | None:
    """Train to the end; returns the step after which SIGTERM stopped it, if it did."""
    start, notes = 0, [*beginning.notes]
    if beginning.checkpoint is not None:
        start = manifest(beginning.checkpoint).steps_done
        notes += load(beginning.checkpoint, plan, engine)
    recorder = None
    if launch.rank() == 0:
        _make_ready(run, plan.config, beginning)
        recorder = Recorder(run, plan, engine.name, start // len(plan.step_sizes))
        _tell([*notices(plan), *notes])
    saver, reached = Saver(run, plan, engine), None
    with _stop_requests() as stop, Progress(engine, plan, start, meeting, shown) as progress:
        horizon = Horizon(start, stop.is_set, meeting, plan.config.name, steps_ahead(plan))
        for reached in train(engine, plan, start, horizon, progress.tick):
            if reached.epoch is not None:
                _tell_of(reached.epoch, plan, recorder)
                if plan.config.runtime.trace and reached.epoch.index == start // len(plan.step_sizes):
                    _write_trace(run, engine, plan)
            if _is_save_due(plan, reached):
                saver.save(reached.steps_done, _val_accuracy(reached))
    saver.finish()
    if reached is not None and reached.stopped:
        return reached.steps_done
    if recorder is not None:
        result = recorder.finish()
        print(stage_table(result["stages"], result["stage_val_accuracy"]))
        print(f"run folder: {run}")
    return None


def _tell_of(epoch: Epoch, plan: Plan, recorder: Recorder | None) -> None:
    if recorder is not None:
        recorder.add(epoch)
        tqdm.write(epoch_line(epoch, plan.config.train.epochs, plan.samples_per_epoch))
        for number, report in enumerate(epoch.reports or [], start=1):
            if report.skipped_steps:
                tqdm.write(f"note: stage {number} ({plan.stage_names[number - 1]}) skipped step "
                           f"{', '.join(map(str, report.skipped_steps))}: loss or gradients NaN or infinite")


def _write_trace(run: Path, engine: Engine, plan: Plan) -> None:
    spans = engine.spans()  # all processes take part
    if spans is not None:
        write_trace(run / "trace.json", spans, plan.stage_names)


def _is_save_due(plan: Plan, reached: Reached) -> bool:
    config = plan.config.checkpoint
    if reached.stopped or (config.every_steps and reached.steps_done % config.every_steps == 0):
        return True
    return reached.epoch is not None and is_due(reached.epoch.index + 1, config.every_epochs, plan.config.train.epochs)


def _val_accuracy(reached: Reached) -> float | None:
    reports = reached.epoch.reports if reached.epoch is not None else None
    return reports[-1].val_accuracy if reports else None


@contextmanager
def _stop_requests() -> Iterator[Event]:
    """Set by SIGTERM."""
    found = Event()
    before = signal.signal(signal.SIGTERM, lambda *_: found.set())
    try:
        yield found
    finally:
        signal.signal(signal.SIGTERM, before)
