"""`python -m benchmarks.models`, from the repository root; see README.md."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import jsonl
from benchmarks.command import guarded
from benchmarks.environment import environment
from benchmarks.jsonl import Row
from benchmarks.models.cases import Case, all_cases
from benchmarks.models.measure import measured
from benchmarks.models.report import as_markdown, counts_and_exceptions
from blpipe.errors import UserError
from blpipe.plugins import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Try the models that have no row yet, and write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description="Cut models of timm and Transformers into blocks, compare them, and train each for a step. "
                    "Rows that are there are kept.")
    parser.add_argument("--only", action="append", metavar="NAME", help="a model or a library; may be repeated")
    parser.add_argument("--table", action="store_true", help="only write the tables anew")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER",
                        help="of the results")
    arguments = parser.parse_args(argv)
    return guarded("models", lambda: _main(arguments), "the same command goes on")


def _main(arguments: argparse.Namespace) -> int:
    path = arguments.out / "results.jsonl"
    if not arguments.table:
        run(chosen(all_cases(), arguments.only or []), path)
    rows = rows_of(path)
    if not rows:
        raise UserError(f"{path}: has no rows; leave out --table")
    path.with_name("table.md").write_text(as_markdown(rows))
    print(counts_and_exceptions(rows))
    return 0


def chosen(cases: Sequence[Case], only: Sequence[str]) -> list[Case]:
    """The cases that are named, by model or by library; all if none is. Raises UserError at an unknown name."""
    known = dict.fromkeys(name for case in cases for name in (case.library, case.model))
    for name in only:
        if name not in known:
            raise UserError(f"--only: unknown {name!r}{did_you_mean(name, known)}; give a model of "
                            "benchmarks/models/cases.py, or one of its libraries")
    return [case for case in cases if not only or case.library in only or case.model in only]


def run(cases: Sequence[Case], path: Path) -> None:
    """Append a row for each case that has none in the file. Raises UserError where a library is missing."""
    done = {_key(row) for row in rows_of(path)}
    pending = [case for case in cases if _key(case.name) not in done]
    libraries = dict.fromkeys(case.library for case in pending)
    for library in libraries:
        if find_spec(library) is None:
            raise UserError(f"{library}: is not installed; run `pip install {library}`, or give the models of another "
                            "library with --only")
    of_all = environment(torch.device("cpu"))
    versions = {library: version(library) for library in libraries}
    for row in measured(pending):
        jsonl.append(path, row | of_all | {"version": versions[row["library"]]})
        print(f"{row['model']}: {row.get('why') or '{blocks} blocks'.format(**row)}", flush=True)


def rows_of(path: Path) -> list[Row]:
    """The rows of a file; of two of the same model, the later one."""
    return list({_key(row): row for row in jsonl.read(path)}.values())


def _key(row: Row) -> tuple[str, str]:
    return row["library"], row["model"]


if __name__ == "__main__":
    sys.exit(main())
