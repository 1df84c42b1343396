"""The folders of checkpoints: complete or not, intact or not, and which are kept.

A checkpoint `checkpoints/step_<steps done>/` holds what DCP writes, the run's `config.yaml` and, written last,
`checkpoint.json` with the size and the SHA-256 of every other file. It is written aside, and renamed when complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blpipe.config import Config
from blpipe.config_file import load_config
from blpipe.errors import UserError, one_line

CONFIG, _MANIFEST = "config.yaml", "checkpoint.json"

FileSeal = tuple[int, str]
"""Bytes and SHA-256 of a file."""


@dataclass(frozen=True)
class Manifest:
    """What `checkpoint.json` says.

    Args:
        steps_done: optimizer steps of the run that it has behind it.
        val_accuracy: of the model, where it stands at the end of an epoch that was evaluated.
        stages: the names of the blocks of every stage.
        metadata: the versions of the plain model's modules.
        files: the seals of all other files, by name.
    """

    steps_done: int
    val_accuracy: float | None
    stages: list[list[str]]
    metadata: dict[str, Any]
    files: dict[str, FileSeal]


def folder_of(run: Path, steps_done: int) -> Path:
    """Where the checkpoint after so many steps is."""
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
    with (partial / _MANIFEST).open("w") as file:
        json.dump(asdict(manifest), file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(checkpoint, ignore_errors=True)
    partial.rename(checkpoint)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in run.glob(f"checkpoints/step_*/{_MANIFEST}"))


def manifest(checkpoint: Path) -> Manifest:
    """What a checkpoint's manifest says. Raises UserError where it cannot be read."""
    try:
        return Manifest(**json.loads((checkpoint / _MANIFEST).read_text()))
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: is no checkpoint, or was not completed (it has no {_MANIFEST})") from None
    except (OSError, ValueError, TypeError) as error:
        raise damaged(checkpoint, f"{_MANIFEST}: {one_line(error)}") from error


def config_of(checkpoint: Path) -> Config:
    """The config that a checkpoint was saved with."""
    return load_config(checkpoint / CONFIG)


def check(checkpoint: Path) -> None:
    """Compare every file's size and checksum with the manifest. Raises UserError."""
    for name, (size, digest) in manifest(checkpoint).files.items():
        path = checkpoint / name
        try:
            if path.stat().st_size != size:
                raise damaged(checkpoint, f"{name} has {path.stat().st_size:,} bytes of {size:,}")
            if _digest(path) != digest:
                raise damaged(checkpoint, f"{name} is not what was written (its SHA-256 differs)")
        except OSError as error:
            raise damaged(checkpoint, f"{name}: {error.strerror}") from error


def damaged(checkpoint: Path, what: str) -> UserError:
    """The error that says so."""
    return UserError(f"{checkpoint}: is damaged: {what}")


def newest_intact(run: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that is intact, and what is wrong with those after it.

    Raises:
        UserError: there is none.
    """
    problems: list[str] = []
    for checkpoint in reversed(checkpoints(run)):
        try:
            check(checkpoint)
        except UserError as error:
            problems.append(str(error))
            continue
        return checkpoint, problems
    if problems:
        raise UserError("\n".join([*problems, f"{run}: holds no intact checkpoint; train it anew, with --overwrite"]))
    raise UserError(f"{run}: holds no checkpoint yet; train it from the start, with --overwrite")


def prune(run: Path, keep: int, keep_best: bool) -> None:
    """Delete all but the last `keep` checkpoints, and the one of the best accuracy."""
    found = checkpoints(run)
    measured = [(accuracy, path) for path in found if (accuracy := manifest(path).val_accuracy) is not None]
    best = {max(measured)[1]} if measured and keep_best else set()
    _delete(set(found[:-keep]) - best)


def forget_after(run: Path, checkpoint: Path | None) -> None:
    """Delete what an interrupted run left half-written, and the checkpoints after `checkpoint` (None: all)."""
    later = [path for path in run.glob("checkpoints/step_*") if checkpoint is None or path.name > checkpoint.name]
    _delete([*run.glob("checkpoints/.*.partial"), *later])


def _delete(folders: Iterable[Path]) -> None:
    for path in folders:
        shutil.rmtree(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
