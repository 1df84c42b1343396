"""blpipe from Python: `blpipe.train`, `blpipe.evaluate` and `blpipe.state_dict`. The command line calls them too."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from blpipe import runs, saved
from blpipe.config_file import Overrides, config_of_tree, load_config
from blpipe.device import settings_put_back
from blpipe.ending import OnEpoch
from blpipe.errors import ConfigError
from blpipe.plugins import target_text
from blpipe.resume import resumed_config
from blpipe.transport.world import left_at_failure


def train(config: str | Path | Mapping[str, Any] | None = None, overrides: Overrides = (), *,
          on_epoch: OnEpoch | None = None, overwrite: bool = False, resume: str | Path | None = None,
          auto_resume: bool = False) -> dict[str, Any] | None:
    """Train a config into its run folder, as the command `train` does; under torchrun all processes call it alike.

    Args:
        config: the path of a YAML file, or a dict of what is in one; there a `target` may be the function itself.
        overrides: keys to set over it, by their names: {"train.epochs": 3}.
        on_epoch: called in the leading process after each epoch, with the epoch's rows of `metrics.jsonl`, one a
            stage. Where it returns False, the run ends after this epoch. What it raises ends the run too.
        overwrite, auto_resume: as the command's options.
        resume: the run folder or checkpoint to go on from, instead of a config; `overrides` are what changes.

    Returns:
        What `result.json` holds, in the leading process (rank 0, or the only one); None in the others.

    Raises:
        UserError: anything wrong with config, data, launch or run folder, a line for each; nothing was written then.
            Or `on_epoch` has raised in rank 0, which raises that itself.
        StageError: a stage failed while it ran.
        PeerLostError: another process did.
        CheckpointError: the last checkpoint, or the result, could not be written.
        StoppedError: SIGTERM or Ctrl-C; the run is saved.
    """
    _refuse_while_imported("train")
    with settings_put_back(), left_at_failure():
        return start(None if config is None else _plain(config), _plain(overrides), on_epoch=on_epoch,
                     overwrite=overwrite, resume=resume, auto_resume=auto_resume, outlived=True)


def start(config: str | Mapping[str, Any] | None, overrides: Overrides, *, on_epoch: OnEpoch | None = None,
          overwrite: bool = False, resume: str | Path | None = None, auto_resume: bool = False,
          outlived: bool = False) -> dict[str, Any] | None:
    """As `train`, of plain keys and values; after a failure this process is to end, unless the run is `outlived`."""
    if resume:
        if config is not None or overwrite or auto_resume:
            raise ConfigError("--resume: goes on with what is there; leave CONFIG, --overwrite and --auto-resume out")
        path = Path(resume)
        return runs.train_run(resumed_config(path, overrides), resume_from=path, on_epoch=on_epoch,
                              outlived=outlived)
    if not config:
        raise ConfigError("CONFIG: which config? give one, such as configs/quickstart.yaml, or --resume RUN")
    read = load_config(config, overrides) if isinstance(config, str) else config_of_tree(config, overrides)
    return runs.train_run(read, overwrite=overwrite, auto_resume=auto_resume, on_epoch=on_epoch, outlived=outlived)


def evaluate(run: str | Path, overrides: Overrides = (), best: bool = False, raw: bool = False
             ) -> list[dict[str, Any]]:
    """Evaluate a run's newest checkpoint on the test samples, in this process alone, as the command `eval` does.

    Args:
        run: a run folder, or one of its checkpoints.
        overrides: keys to set over the run's own, by their names: of data, of runtime, and how it is computed.
        best: take the checkpoint that training evaluated as best, of those that were kept.
        raw: take the weights that training goes on with, where `train.ema` has averages of them.

    Returns:
        A dict for each stage: `blocks` (their names), `params`, and its head's `loss` and `accuracy` (0…1), which are
        None where there is no such thing.

    Raises:
        UserError: no run, no checkpoint, or no data; or a key that evaluation does not take.
    """
    _refuse_while_imported("evaluate")
    with settings_put_back():
        return saved.evaluate_run(Path(run), _plain(overrides), best, raw)


def state_dict(run: str | Path, best: bool = False, raw: bool = False) -> dict[str, Tensor]:
    """The plain model's weights of a run's newest checkpoint, or others as in `evaluate`, under the model's own names.

    It is what the command `export` writes. Raises UserError where there is no run or no checkpoint.
    """
    return saved.state_of_run(Path(run), best, raw)


def _plain(value: Any, key: str = "") -> Any:
    """Keys and values as YAML has them: functions as "module:name", NumPy's numbers as Python's, paths as text."""
    if isinstance(value, Mapping):
        return {name: _plain(each, f"{key}.{name}".removeprefix(".")) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, f"{key}.{index}") for index, each in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return target_text(key, value) if callable(value) and key.rpartition(".")[2] == "target" else value


def _refuse_while_imported(function: str) -> None:
    """A script whose functions a config has is imported, under its own name, to find them.

    Raises:
        ConfigError: this call stands at the top level of a module that is being imported.
    """
    frame = inspect.currentframe()
    while frame is not None:
        spec = frame.f_globals.get("__spec__")
        if frame.f_code.co_name == "<module>" and getattr(spec, "_initializing", False):
            raise ConfigError(f"{frame.f_globals['__name__']}: calls blpipe.{function} while it is imported, as a "
                              "script is whose functions a config has; put the call under "
                              "`if __name__ == \"__main__\":`")
        frame = frame.f_back
