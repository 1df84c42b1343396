"""The run folder: whose it is, whether what it holds may go, and making it ready."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from blpipe import launch
from blpipe.checkpoint.folders import checkpoints, forget_after
from blpipe.config import Config
from blpipe.config_file import dump_config
from blpipe.errors import ConfigError
from blpipe.files import write_text
from blpipe.resume import StartPoint, is_of

_LOCK, _LAUNCH = ".lock", ".launch"  # the latter holds the name of the launch that made the folder ready
_PARTS = ("checkpoints", "tensorboard", "trace.json", "result.json", "metrics.jsonl", "config.yaml")
"""Of a run, in the order in which they go: until the last one, the folder says whose it is."""


@dataclass(frozen=True)
class StartOptions:
    """What becomes of what a run folder holds: see `train_run`."""

    overwrite: bool = False
    resume_from: Path | None = None
    auto_resume: bool = False


def run_folder_of(config: Config) -> Path:
    """Where a run's folder is."""
    return Path(config.runtime.runs) / config.name


@contextmanager
def claimed(config: Config, options: StartOptions, start_point: StartPoint) -> Iterator[Path]:
    """The run folder, this process's alone, which holds nothing that is to be kept. Raises ConfigError."""
    run = run_folder_of(config)
    with _writing_to(run):
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / _LOCK).open("w")
    with lock:
        with _writing_to(run):
            _take(lock, run)  # one that is another process's is not ours to remove
        try:
            _refuse_another_run(run, config, options, start_point)
            yield run
        finally:
            with suppress(OSError):
                if not any(path.name != _LOCK for path in run.iterdir()):  # nothing came of it
                    shutil.rmtree(run)


def make_ready(run: Path, config: Config, start_point: StartPoint) -> None:
    """Remove what is not to be gone on with, and write the config. Raises ConfigError."""
    with _writing_to(run):
        if start_point.checkpoint is None:
            for path in _parts(run):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        else:
            forget_after(run, start_point.checkpoint)
            (run / "result.json").unlink(missing_ok=True)  # of the run that had ended
        write_text(run / "config.yaml", dump_config(config))
        write_text(run / _LAUNCH, launch.run_name())


def is_being_restarted(run: Path, config: Config, options: StartOptions) -> bool:
    """Whether torchrun has started these processes again, and what the run folder holds is of the time before.

    Where it was to be replaced, what a launch of the same id has left of the same config is taken for that too: the
    first process may be on another node now, and a restart removes no checkpoint.
    """
    noted = run / _LAUNCH
    if not launch.is_restarted() or not noted.exists():
        return False
    name = noted.read_text()
    return name == launch.run_name() or (options.overwrite and launch.has_this_id(name) and is_of(run, config))


@contextmanager
def _writing_to(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"runtime.runs: cannot write to {run}: {why}; choose another folder") from error


def _take(lock: TextIO, run: Path) -> None:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"name: another process is training in {run}; wait for it, or choose another "
                          "name=…") from None


def _refuse_another_run(run: Path, config: Config, options: StartOptions, start_point: StartPoint) -> None:
    same = (options.auto_resume or is_being_restarted(run, config, options)) and is_of(run, config)
    own = same and not _has_checkpoints(run)
    if start_point.last is not None and [path.name for path in checkpoints(run)[-1:]] != [start_point.last.name]:
        raise ConfigError(f"name: another process has trained in {run} meanwhile; start again, to go on from there")
    if not _has_come_to_anything(run) or options.overwrite or start_point.checkpoint or own:
        return
    go_on = f"go on with `train --resume {run}`, " if checkpoints(run) else ""
    raise ConfigError(f"name: {run} already holds a run; {go_on}replace it with --overwrite, or choose another name=…")


def _has_come_to_anything(run: Path) -> bool:
    """Whether a run has left more than its config: it may have failed before its first epoch was over."""
    rows = run / "metrics.jsonl"
    return _has_checkpoints(run) or (run / "result.json").exists() or (rows.exists() and rows.stat().st_size > 0)


def _has_checkpoints(run: Path) -> bool:
    return any(run.glob("checkpoints/[!.]*"))


def _parts(run: Path) -> list[Path]:
    """What a run folder holds of a run."""
    return [run / part for part in _PARTS if (run / part).exists()]
