"""Files of results with a line of JSON for each row, which an interruption may have cut short."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows; a line that was cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row, in one write, so that those of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.exists() else ""
    cut_short = bool(before) and not before.endswith("\n")
    with path.open("a") as file:
        file.write("\n" * cut_short + json.dumps(row) + "\n")
