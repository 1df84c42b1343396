"""The folders of checkpoints: complete or not, intact or not, and which are kept.

A checkpoint `checkpoints/step_<steps done>/` holds what DCP writes, the run's `config.yaml` and, written last,
`checkpoint.json` with the size and the SHA-256 of every other file and its own. It is written aside, and renamed when
complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from blpipe.config import Config
from blpipe.config_file import Overrides, load_config
from blpipe.errors import DamagedError, UserError, one_line
from blpipe.files import sync

CONFIG, _MANIFEST = "config.yaml", "checkpoint.json"

FileSeal = tuple[int, str]
"""Bytes and SHA-256 of a file."""


@dataclass(frozen=True)
class Manifest:
    """What `checkpoint.json` says.

    Args:
        steps_done: optimizer steps of the run that it has behind it.
        val_accuracy: of the model, where it stands at the end of an epoch that was evaluated, and has labels.
        stages: the names of the blocks of every stage.
        metadata: the versions of the plain model's modules.
        files: the seals of all other files, by name.
        steps_per_epoch: of the run; None in what earlier versions wrote.
        val_loss: likewise, of the model at the end of an epoch that was evaluated.
    """

    steps_done: int
    val_accuracy: float | None
    stages: list[list[str]]
    metadata: dict[str, Any]
    files: dict[str, FileSeal]
    steps_per_epoch: int | None = None
    val_loss: float | None = None


def checkpoint_after(run: Path, steps_done: int) -> Path:
    """Where the checkpoint after so many steps is, or will be."""
    return run / "checkpoints" / f"step_{steps_done:09d}"


def aside(checkpoint: Path) -> Path:
    """Where it is written."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def seals(folder: Path, pattern: str) -> dict[str, FileSeal]:
    """The seals of the files in `folder` that match."""
    return {path.name: (path.stat().st_size, _digest(path)) for path in sorted(folder.glob(pattern))}


def complete(checkpoint: Path, manifest: Manifest) -> None:
    """Give what was written aside its manifest, and its name. Raises OSError."""
    partial = aside(checkpoint)
    missing = [name for name in manifest.files if not (partial / name).exists()]
    if missing:
        raise OSError(f"{missing[0]} is not there; all nodes must see the run folder")
    write_manifest(partial, manifest)
    partial.rename(checkpoint)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it, with a checksum of its own. Raises OSError."""
    body = asdict(manifest)
    with (folder / _MANIFEST).open("w") as file:
        json.dump({"sha256": _digest_of(body), "manifest": body}, file)
        sync(file)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Raises UserError where their folder cannot be read."""
    folder = run / "checkpoints"
    try:
        names = os.listdir(folder) if os.path.lexists(folder) else []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; mend it, and try again") from error
    return sorted(folder / name for name in names
                  if name.startswith("step_") and is_checkpoint(folder / name))


def is_checkpoint(folder: Path) -> bool:
    """Whether it is a complete one, wherever it is."""
    return os.path.lexists(folder / _MANIFEST)


def manifest(checkpoint: Path) -> Manifest:
    """What a checkpoint's manifest says. Raises UserError where it cannot be read."""
    try:
        tree = json.loads((checkpoint / _MANIFEST).read_text())
        if tree["sha256"] != _digest_of(tree["manifest"]):
            raise ValueError("is not what was written")
        return TypeAdapter(Manifest).validate_python(tree["manifest"])
    except FileNotFoundError:
        if not os.path.lexists(checkpoint):
            raise damaged(checkpoint, "") from None
        raise DamagedError(f"{checkpoint}: is no checkpoint, or was not completed (it has no {_MANIFEST})") from None
    except (IsADirectoryError, NotADirectoryError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(checkpoint, f"{_MANIFEST} ({type(error).__name__}: {one_line(error)})") from error
    except OSError as error:
        raise UserError(f"{checkpoint / _MANIFEST}: cannot be read: {error.strerror}; mend it, and try again"
                        ) from error


def config_of(checkpoint: Path, overrides: Overrides = ()) -> Config:
    """The config that a checkpoint was saved with, with changes."""
    return load_config(checkpoint / CONFIG, overrides)


def check(checkpoint: Path) -> None:
    """Compare every file's size and checksum with the manifest.

    Raises:
        DamagedError: they differ.
        UserError: a file cannot be read.
    """
    for name, (size, digest) in manifest(checkpoint).files.items():
        path = checkpoint / name
        try:
            if path.stat().st_size != size:
                raise damaged(checkpoint, f"{name} has {path.stat().st_size:,} bytes of {size:,}")
            if _digest(path) != digest:
                raise damaged(checkpoint, f"{name} is not what was written (its SHA-256 differs)")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise damaged(checkpoint, f"{name}: {error.strerror}") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; try again") from error


def damaged(checkpoint: Path, what: str) -> DamagedError:
    """The error that says so, or that it is gone."""
    if not os.path.lexists(checkpoint):
        return DamagedError(f"{checkpoint}: is not there; if a run trains in that folder, it has removed it: try again")
    return DamagedError(f"{checkpoint}: is damaged: {what}")


def newest_intact(run: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that is intact, and what is wrong with those after it.

    Raises:
        UserError: there is none.
    """
    problems: list[str] = []
    for checkpoint in reversed(checkpoints(run)):
        try:
            check(checkpoint)
        except DamagedError as error:
            problems.append(str(error))
            continue
        return checkpoint, problems
    if problems:
        raise UserError("\n".join([*problems, f"{run}: holds no intact checkpoint; train it anew, with --overwrite"]))
    if any(run.glob("checkpoints/[!.]*")):
        raise UserError(f"{run}: holds checkpoints of another version of blpipe; go on with that one, or train anew, "
                        "with --overwrite")
    raise UserError(f"{run}: holds no checkpoint yet; train it from the start, with --overwrite")


def best_of(run: Path) -> Path:
    """The checkpoint of the best accuracy, or where there is none of the least loss. Raises UserError where none is
    known.
    """
    best = _best(checkpoints(run))
    if best is None:
        raise UserError(f"{run}: holds no checkpoint at the end of an epoch that was evaluated; leave --best out")
    return best


def prune(run: Path, keep: int, keep_best: bool) -> None:
    """Delete all but the last `keep` checkpoints, and the best one, as `best_of` has it."""
    found = checkpoints(run)
    best = _best(found) if keep_best else None
    _delete(set(found[:-keep]) - {best})


def forget_after(run: Path, checkpoint: Path) -> None:
    """Delete what an interrupted run left half-written, and the checkpoints after `checkpoint`. Raises OSError."""
    for path in run.glob("checkpoints/.*.partial"):
        shutil.rmtree(path)
    _delete(path for path in run.glob("checkpoints/step_*") if path.name > checkpoint.name)


def _delete(checkpoints: Iterable[Path]) -> None:
    for path in list(checkpoints):
        gone = aside(path)  # so that what is left of one, should this be cut short, is no checkpoint
        path.rename(gone)
        shutil.rmtree(gone)


def _best(found: list[Path]) -> Path | None:
    measured = [(score, path) for path in found if (score := _score(path)) is not None]
    return max(measured)[1] if measured else None


def _score(checkpoint: Path) -> float | None:
    """The accuracy, or where there is none the loss, turned round; None for a checkpoint that has neither."""
    try:
        saved = manifest(checkpoint)
    except UserError:  # damaged since
        return None
    if saved.val_accuracy is None and saved.val_loss is not None and isfinite(saved.val_loss):
        return -saved.val_loss
    return saved.val_accuracy


def _digest_of(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
