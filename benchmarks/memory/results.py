"""results.jsonl: a line for each row that was measured; of two of the same, the later one counts."""

from pathlib import Path
from typing import Any

from benchmarks import jsonl
from benchmarks.jsonl import Row

KEY = ("part", "method", "stages", "cut", "depth", "batch", "precision", "channels_last")


class Results:
    """The rows of a file, which new ones are appended to.

    Args:
        environment: what every new row is marked with.
    """

    def __init__(self, path: Path, environment: Row):
        self._path, self._environment = path, environment
        self._rows: dict[tuple[Any, ...], Row] = {}
        for row in jsonl.read(path):
            self._keep(row)

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return list(self._rows.values())

    def __contains__(self, key: Row) -> bool:
        return _key(key) in self._rows

    def add(self, row: Row) -> None:
        """Append a row."""
        row = row | self._environment
        jsonl.append(self._path, row)
        self._keep(row)

    def _keep(self, row: Row) -> None:
        self._rows[_key(row)] = row


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)
