"""Files that are there whole or not at all."""

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then put it there. Raises OSError, with the file before still there."""
    put(path, lambda partial: partial.write_text(text))


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
