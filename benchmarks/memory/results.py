"""results.jsonl: a line for each row that was measured; of two of the same, the later one counts."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]

KEY = ("part", "method", "stages", "cut", "depth", "batch", "precision", "channels_last")


class Results:
    """The rows of a file, which new ones are appended to.

    Args:
        environment: what every new row is marked with.
    """

    def __init__(self, path: Path, environment: Row):
        self._path, self._environment = path, environment
        self._rows: dict[tuple[Any, ...], Row] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(json.JSONDecodeError):  # a line that an interruption cut short
                self._keep(json.loads(line))

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return list(self._rows.values())

    def __contains__(self, key: Row) -> bool:
        return _key(key) in self._rows

    def add(self, row: Row) -> None:
        """Append a row."""
        row = row | self._environment
        self._path.parent.mkdir(parents=True, exist_ok=True)
        before = self._path.read_text() if self._path.exists() else ""
        with self._path.open("a") as file:
            file.write("\n" * (bool(before) and not before.endswith("\n")) + json.dumps(row) + "\n")
        self._keep(row)

    def _keep(self, row: Row) -> None:
        self._rows[_key(row)] = row


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)
