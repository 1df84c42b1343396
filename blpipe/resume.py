"""Where a run begins: at the start, or with a checkpoint; and whether its config is still that of the checkpoint."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blpipe.checkpoint.folders import best_of, check, checkpoints, config_of, is_checkpoint, manifest, newest_intact
from blpipe.config import Config
from blpipe.config_file import Overrides, load_config, parsed
from blpipe.config_types import folder_name
from blpipe.ending import ON_EPOCH, Ending, by_on_epoch, by_patience
from blpipe.errors import ConfigError, UserError
from blpipe.metrics import read_result, read_rows
from blpipe.optim import lr_factor
from blpipe.plan import Plan

_FREE = ("name", "runtime", "checkpoint")  # what a run computes does not depend on these
_CHANGEABLE = ("partition", "optimizer.lr", "optimizer.lr_factors", "schedule", "data.root", "data.download",
               "data.workers", "data.place", "data.bad_samples", "train.epochs", "train.replicas",
               "train.eval_batch_size", "train.eval_every_epochs", "train.patience", "train.on_nonfinite",
               "train.recompute", "method.link.keep")
_PER_STAGE = ("method.head", "method.loss", "method.link.weight")  # as lists these may change with the number of stages
_OF_EVALUATION = ("data", "train.eval_batch_size", "train.precision", "train.channels_last")


@dataclass(frozen=True)
class StartPoint:
    """Where a run begins.

    Args:
        checkpoint: that it goes on from; None where it begins anew.
        notes: what a user may want to know of that.
        last: of the run folder's checkpoints, where the newest intact one was chosen.
        weights: the file or the checkpoint with the model's values, where it begins anew with such.
        ended: why the run has ended there, before its last epoch, and is not to train on.
    """

    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)
    last: Path | None = None
    weights: Path | None = None
    ended: Ending | None = None


def find(path: Path, best: bool = False) -> StartPoint:
    """The checkpoint that `path` names: a run folder's newest intact one, or the one that it is the folder of, which
    may be a copy elsewhere.

    Args:
        best: the run folder's checkpoint of the best accuracy instead.

    Raises:
        UserError: no run, no checkpoint, or none that is intact.
    """
    checkpoint = _checkpoint_at(path) or (path if is_checkpoint(path) else None)
    if best and checkpoint:
        raise UserError(f"--best: {path} is one checkpoint; give its run folder, or leave --best out")
    if checkpoint:
        check(checkpoint)
        return StartPoint(checkpoint)
    config_of_run(path)
    if best:
        found = best_of(path)
        check(found)
        return StartPoint(found, [f"{found.name} is the best of those that were kept"])
    last = next(reversed(checkpoints(path)), None)
    newest, problems = newest_intact(path)
    return StartPoint(newest, [f"{problem}; {newest.name} is used" for problem in problems], last)


def run_of(path: Path) -> Path:
    """The run folder of a run folder or of one of its checkpoints; it has a name."""
    checkpoint = _checkpoint_at(path)
    run = checkpoint.parent.parent if checkpoint else path
    return run if run.name not in ("", "..") else run.resolve()


def config_of_run(run: Path, overrides: Overrides = ()) -> Config:
    """The config of a run folder, with changes. Raises UserError where it is none."""
    if not os.path.exists(run / "config.yaml"):  # False for a path that is none, too
        raise UserError(f"{run}: is no run folder (it has no config.yaml); runs are in runs/<name> unless "
                        "runtime.runs says otherwise")
    return load_config(run / "config.yaml", overrides)


def resumed_config(path: Path, overrides: Overrides) -> Config:
    """The config of the run to go on with, with changes, set so that it goes on in this very folder.

    Raises:
        UserError: no run, or another name or place for it.
    """
    if is_checkpoint(path) and _checkpoint_at(path) is None:
        raise UserError(f"--resume: {path}: is a checkpoint outside of its run folder, in which it would go on; give "
                        "that folder, or put it back into checkpoints/ there")
    run = run_of(path)
    saved, config = config_of_run(run), config_of_run(run, overrides)
    for key, before, now in (("name", saved.name, config.name), ("runtime.runs", saved.runtime.runs,
                                                                 config.runtime.runs)):
        if before != now:
            raise ConfigError(f"{key}: {now!r}, but --resume goes on in {run} itself; leave it out, or resume a copy "
                              "of that folder")
    try:
        folder_name(run.name)
    except ValueError as error:
        raise ConfigError(f"--resume: {run}: its name {error}; rename it") from error
    return config.model_copy(update={
        "name": run.name, "runtime": config.runtime.model_copy(update={"runs": str(run.parent)})})


def evaluated_config(checkpoint: Path, overrides: Overrides) -> Config:
    """The config of a checkpoint, with changes of its data and of how it is computed.

    It holds no training samples out, unless the changes say so: what is evaluated are the test samples.

    Raises:
        ConfigError: other changes.
    """
    held_out, values = "data.validation_samples", parsed(overrides)
    saved = config_of(checkpoint)
    config = config_of(checkpoint, values if held_out in values else {held_out: None, **values})
    refused = _but(_OF_EVALUATION, _changes(saved, config))
    if refused:
        raise ConfigError(*(f"{change.key}: is the checkpoint's own; eval takes data, runtime, train.eval_batch_size, "
                            "train.precision and train.channels_last" for change in refused))
    return config


def resume_from(config: Config, path: Path) -> tuple[Config, StartPoint]:
    """Go on from the checkpoint that `path` names; returns the config with the cuts that were found for it.

    Raises:
        UserError: see `find`.
        ConfigError: the config differs from the checkpoint's in what must not change.
    """
    found = find(path)
    assert found.checkpoint is not None
    saved = config_of(found.checkpoint)
    partition = saved.partition
    if config.partition.unsettled and partition == config.partition.model_copy(update={"cuts": partition.cuts}):
        config = config.model_copy(update={"partition": partition})
    later = [other.name for other in checkpoints(run_of(path)) if other.name > found.checkpoint.name]
    removed = [f"{', '.join(later)}: after {found.checkpoint.name}, and removed"] if later else []
    changes = _changes(saved, config)
    refused = _but(_CHANGEABLE, changes)
    if config.partition.stage_count != saved.partition.stage_count:
        refused = [change for change in refused if change.key not in _PER_STAGE or not change.of_list]
    if refused:
        raise ConfigError(*(f"{change.key}: {_told(change.now)}, but {_told(change.before)} in {found.checkpoint}; set "
                            "it back, or train anew under another name" for change in refused))
    return config, replace(found, notes=found.notes + removed + [
        f"{change.key}: {_told(change.now)}, was {_told(change.before)} before" for change in changes])


def resume_if_there(config: Config, run: Path) -> tuple[Config, StartPoint]:
    """As `resume_from` where the run folder holds a checkpoint; else the same run begins anew."""
    return resume_from(config, run) if checkpoints(run) else (config, StartPoint())


def refuse_other_lengths(start_point: StartPoint, plan: Plan) -> None:
    """Compare the steps that the checkpoint has behind it with those of the run that goes on.

    Raises:
        ConfigError: an epoch has other steps than before, or more is done than is to be; or nothing is left to train
            and the stages would be others, which nobody would evaluate.
    """
    if start_point.checkpoint is None:
        return
    found, per_epoch = manifest(start_point.checkpoint), len(plan.step_sizes)
    steps = plan.config.train.epochs * per_epoch
    if found.steps_per_epoch not in (None, per_epoch):
        raise ConfigError(f"data: an epoch has {per_epoch} steps, but {found.steps_per_epoch} in "
                          f"{start_point.checkpoint}; give the data that it had, or train anew under another name")
    if found.steps_done > steps:
        raise ConfigError(f"train.epochs: {plan.config.train.epochs} are {steps} steps, but {found.steps_done} are "
                          f"done in {start_point.checkpoint}; give more, or resume from an earlier checkpoint")
    ended = start_point.ended
    if (ended or found.steps_done >= steps) and found.stages != [plan.block_names(k) for k in range(len(plan.stages))]:
        raise ConfigError(f"partition: the run is done, with {len(found.stages)} stages"
                          f"{', cut elsewhere' * (len(found.stages) == len(plan.stages))}; "
                          f"{ended.remedy if ended else 'give it more epochs'}, or evaluate it")


def ended_before(run: Path, plan: Plan, checkpoint: Path, asked: bool) -> Ending | None:
    """Why the run of this folder has ended at this checkpoint, before its last epoch; None where it has not.

    Args:
        asked: whether the user wants it to go on; without, it stays ended where `on_epoch` has ended it.
    """
    steps, train = manifest(checkpoint).steps_done, plan.config.train
    epochs, more = divmod(steps, len(plan.step_sizes))
    if more or epochs >= train.epochs:
        return None
    ended = by_patience([row for row in read_rows(run) if row["epoch"] <= epochs], train.patience)
    result = {} if ended or asked else read_result(run) or {}
    return by_on_epoch() if (result.get("ended_by"), result.get("steps")) == (ON_EPOCH, steps) else ended


def notes_on_schedule(start_point: StartPoint, plan: Plan) -> list[str]:
    """A note where the schedule is over another number of epochs than before, and the learning rate jumps by that."""
    if start_point.checkpoint is None:
        return []
    saved, config, per_epoch = config_of(start_point.checkpoint), plan.config, len(plan.step_sizes)
    done = manifest(start_point.checkpoint).steps_done
    if saved.schedule != config.schedule:
        return []
    before, now = (lr_factor(saved.schedule, max(done - 1, 0), per_epoch, epochs)
                   for epochs in (saved.train.epochs, config.train.epochs))
    if before == now or done == per_epoch * config.train.epochs:
        return []
    begins = config.optimizer.lr * lr_factor(config.schedule, done, per_epoch, config.train.epochs)
    return [f"schedule: {config.schedule.called} is stretched over {config.train.epochs} epochs, instead of "
            f"{saved.train.epochs}; the learning rate goes on at {begins:.3g}, and was "
            f"{saved.optimizer.lr * before:.3g} before"]


def is_of(run: Path, config: Config) -> bool:
    """Whether what a run folder holds is of this config."""
    if not (run / "config.yaml").exists():
        return False
    return not _but(("partition",), _changes(load_config(run / "config.yaml"), config))


def _checkpoint_at(path: Path) -> Path | None:
    """The checkpoint that a path leads to, from where it is or by a symbolic link; None where it leads to none."""
    for place in (path, path.resolve()):
        if place.parent.name == "checkpoints" and place.name.startswith("step_"):
            return place
    return None


@dataclass(frozen=True)
class _Change:
    key: str
    before: Any
    now: Any

    @property
    def of_list(self) -> bool:
        """Whether a list was given before, or is now."""
        return isinstance(self.before, tuple) or isinstance(self.now, tuple)


def _told(value: Any) -> str:
    return "none" if value is None else repr(value)


def _changes(before: Config, now: Config) -> list[_Change]:
    return list(_differences(before.model_dump(), now.model_dump()))


def _but(keys: tuple[str, ...], changes: list[_Change]) -> list[_Change]:
    """The changes of other keys than these and those below them."""
    return [change for change in changes if not any(f"{change.key}.".startswith(f"{key}.") for key in keys)]


def _differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> Iterator[_Change]:
    """The keys in which two configs differ, but for those on which nothing depends."""
    for name in {**before, **now}:
        key, one, other = path + name, before.get(name), now.get(name)
        if key in _FREE or one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{key}.")
        else:
            yield _Change(key, one, other)
