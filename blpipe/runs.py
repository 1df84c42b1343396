"""Run folders: what each subcommand does with one."""

import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from blpipe import checkpoint, launch
from blpipe.config import Config, PartitionConfig
from blpipe.config_file import dump_config, load_config
from blpipe.data import Data, DataSpec, open_data
from blpipe.engines.common import Engine
from blpipe.errors import ConfigError, UserError
from blpipe.forecast.costs import profile
from blpipe.forecast.stages import settle
from blpipe.metrics import Recorder, check_tensorboard, epoch_line, stage_rows, stage_table
from blpipe.plan import Plan, make_network, make_plan, notices
from blpipe.progress import Progress
from blpipe.trace import write_trace
from blpipe.trainer import choose_engine, is_due, open_local, open_pipeline, set_up, train
from blpipe.transport.world import Meeting, choose_device, meet

_PARTS = ("config.yaml", "metrics.jsonl", "result.json", "trace.json", "tensorboard", "checkpoints")


def train_run(config: Config, *, overwrite: bool = False, resume: bool = False) -> None:
    """Train `config` into its run folder, in this process or in this one and its neighbours.

    Raises:
        UserError: anything wrong with config, data, launch or run folder; nothing was written then.
        StageError: a stage failed while it ran.
    """
    set_up(config)
    if choose_engine(config) == "local":
        plan, data, run = _prepare(config, overwrite, resume)
        _train(open_local(plan, data), data, plan, run, resume, None, _has_terminal(config))
        return
    _train_in_pipeline(config, meet(config.runtime.timeout_seconds), overwrite, resume)


def evaluate_run(run: Path) -> str:
    """Evaluate a run's newest checkpoint on its test samples; returns the table of its stages.

    Raises:
        UserError: no run, no checkpoint, or no data.
    """
    config = _config_of(run)
    newest = checkpoint.latest(run)
    set_up(config)
    data = open_data(config.data, config.seed)
    plan = make_plan(config, data.spec)
    engine = open_local(plan, data)
    checkpoint.load_weights(newest, plan, engine.stages)
    engine.evaluate()
    reports = engine.reports()
    assert reports is not None
    for line in data.notes():
        print(f"note: {line}")
    return stage_table(stage_rows(plan), [report.val_accuracy for report in reports])


def export_run(run: Path, out: Path) -> None:
    """Write the plain model's state_dict of a run's newest checkpoint to `out`, by torch.save.

    Raises:
        UserError: no run or no checkpoint, or `out` cannot be written.
    """
    _config_of(run)
    state = checkpoint.model_state(checkpoint.latest(run))
    partial = out.with_name(f".{out.name}.partial")
    try:
        torch.save(state, partial)
        partial.replace(out)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"--out: cannot write {out}: {error}") from error


def _config_of(run: Path) -> Config:
    if not (run / "config.yaml").exists():
        raise UserError(f"{run}: is no run folder (it has no config.yaml); runs are in runs/<name> unless "
                        "runtime.runs says otherwise")
    return load_config(run / "config.yaml")


def resume_config(run: Path) -> Config:
    """The config of the run to go on with, set so that it goes on in this very folder.

    Raises:
        UserError: no run, or no checkpoint in it.
    """
    config = _config_of(run)
    checkpoint.latest(run)
    return config.model_copy(update={
        "name": run.name, "runtime": config.runtime.model_copy(update={"runs": str(run.parent)})})


def _prepare(config: Config, overwrite: bool, resume: bool) -> tuple[Plan, Data, Path]:
    """Check everything that can be checked, then make the run folder."""
    check_tensorboard(config)
    data = open_data(config.data, config.seed)
    network = make_network(config, data.spec)
    if config.partition.unsettled:
        device, _ = choose_device(config.runtime.device)
        costs = profile(network, device, data if config.partition.costs == "measured" else None)
        config = settle(config, network, costs)
    plan = make_plan(config, data.spec, network)
    data.check_labels(plan.classes)
    return plan, data, _run_folder(config, overwrite, resume)


def _run_folder(config: Config, overwrite: bool, resume: bool) -> Path:
    run = Path(config.runtime.runs) / config.name
    present = [run / part for part in _PARTS if (run / part).exists()]
    if resume:
        return run
    if present and not overwrite:
        go_on = f"go on with `train --resume {run}`, " if checkpoint.checkpoints(run) else ""
        raise ConfigError(f"name: {run} already holds a run; {go_on}replace it with --overwrite, or choose another "
                          "name=…")
    try:
        for path in present:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(dump_config(config))
    except OSError as error:
        raise ConfigError(f"runtime.runs: cannot write to {run}: {error.strerror}; choose another folder") from error
    return run


def _train_in_pipeline(config: Config, meeting: Meeting, overwrite: bool, resume: bool) -> None:
    data: Data | None = None
    if meeting.rank == 0:
        try:
            plan, data, run = _prepare(config, overwrite, resume)
        except UserError:
            meeting.is_reporter()  # before another rank can be
            meeting.announce(config.name, {"failed": True})
            raise
        shown = _has_terminal(config)
        meeting.announce(config.name, {"data": data.spec.to_json(), "run": str(run), "shown": shown,
                                       "partition": plan.config.partition.model_dump()})
    else:
        told = meeting.listen(config.name)
        if "failed" in told:
            raise UserError("rank 0 could not begin")
        config = config.model_copy(update={"partition": PartitionConfig(**told["partition"])})
        plan, run = make_plan(config, DataSpec.from_json(told["data"])), Path(told["run"])
        shown = told["shown"]
    engine = open_pipeline(plan, data, meeting)
    _train(engine, data, plan, run, resume, meeting, shown)
    engine.close()


def _has_terminal(config: Config) -> bool:
    """Whether progress is to be shown, and can be."""
    return config.runtime.progress and sys.stderr.isatty()


def _train(engine: Engine, data: Data | None, plan: Plan, run: Path, resume: bool, meeting: Meeting | None,
           shown: bool) -> None:
    first_epoch = _resume_from(run, plan, engine) if resume else 0
    recorder = Recorder(run, plan, engine.name, first_epoch) if launch.rank() == 0 else None
    if recorder is not None:
        for line in notices(plan):
            print(f"note: {line}")
    config, steps_done = plan.config, first_epoch * len(plan.step_sizes)
    with Progress(engine, plan, steps_done, meeting, shown) as progress:
        for epoch in train(engine, plan, first_epoch, progress.tick):
            if recorder is not None:
                recorder.add(epoch)
                tqdm.write(epoch_line(epoch, config.train.epochs, plan.samples_per_epoch))
            for line in () if data is None else data.notes():  # they are on rank 0 alone
                tqdm.write(f"note: {line}")
            if config.runtime.trace and epoch.index == first_epoch:
                spans = engine.spans()
                if spans is not None:
                    write_trace(run / "trace.json", spans, plan.stage_names)
            done = epoch.index + 1
            if is_due(done, config.checkpoint.every_epochs, config.train.epochs):
                checkpoint.save(run, done, plan, engine.stages, engine.group)
    if recorder is not None:
        result = recorder.finish()
        print(stage_table(result["stages"], result["stage_val_accuracy"]))
        print(f"run folder: {run}")


def _resume_from(run: Path, plan: Plan, engine: Engine) -> int:
    """Load the newest checkpoint; returns the epoch to begin with."""
    newest = checkpoint.latest(run)
    checkpoint.load(newest, plan, engine.stages)
    return checkpoint.epochs_done(newest)
