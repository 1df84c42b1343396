"""Files that are there whole or not at all."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then put it there. Raises OSError, with the file before still there."""
    def write(partial: Path) -> None:
        with partial.open("w") as file:
            file.write(text)
            sync(file)

    put(path, write)


def sync(file: IO[str]) -> None:
    """Have the disk keep what was written to a file, whatever becomes of the machine. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside this one's place, then put it there.

    Raises:
        OSError: of `write`, with the file before still there; or there is something else, such as a folder or a device.
    """
    if not path.name or (path.exists() and not path.is_file()):
        raise OSError(errno.EINVAL, "no place for a file")
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
