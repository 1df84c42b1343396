"""Numbers, tables and lines for people."""

import sys
from collections.abc import Iterable, Sequence

from tqdm import tqdm


def say(line: str) -> None:
    """Print a line of a run, above its progress bars. A log that has no room, as on a full disk, ends no run.

    Raises:
        BrokenPipeError: who read the lines has gone.
    """
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        pass  # it is written with a later line, if then there is room


def say_notes(notes: Iterable[str]) -> None:
    """Print each of them on a line of its own, as a note."""
    for line in notes:
        say(f"note: {line}")


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Rows of cells as aligned columns; those in `left` are set flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                     for row in rows)


def percent(share: float | None) -> str:
    """A share 0…1 in per cent; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def human_bytes(count: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point: 1.23 GiB."""
    return _scaled(count, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"])


def human_count(count: float) -> str:
    """A number with three digits and a prefix: 1.23 G."""
    return _scaled(count, 1000, ["", "k", "M", "G", "T", "P", "E"])


def _scaled(count: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while count >= 999.5 and power < len(units) - 1:
        count, power = count / base, power + 1
    return f"{count:.3g} {units[power]}".rstrip()


def human_seconds(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"


def stages_text(count: int) -> str:
    """So many stages: `1 stage`, `4 stages`."""
    return f"{count} stage{'s' * (count != 1)}"


def dtype_name(dtype: object) -> str:
    """torch's name of a dtype, without torch's: float32."""
    return str(dtype).removeprefix("torch.")


def blocks_text(names: Sequence[str]) -> str:
    """The first and the last of a stage's blocks."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
