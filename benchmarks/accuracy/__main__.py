"""`python -m benchmarks.accuracy CONFIG`, from the repository root; see README.md."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy import execute, plots, report
from benchmarks.accuracy.sweep import Combination, Run, SweepConfig, in_order, load_sweep
from benchmarks.command import count, guarded
from blpipe.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is pending; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return guarded("accuracy", lambda: _main(arguments), "the same command goes on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description="Run every pending row of a sweep, the most valuable first, and write its table and plots. "
                    "What is done is kept, and what was interrupted goes on.")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file: benchmarks/accuracy/cpu.yaml")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results; else one beside CONFIG")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", default=Path("runs/accuracy"), help="of the run folders")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="so many runs at a time")
    parser.add_argument("--threads", type=count, metavar="N", help="of each process; on a CPU 1, or what CONFIG says")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop then; what is running goes on the next time")
    parser.add_argument("--engine", choices=["local", "pipeline"], default="local",
                        help="pipeline: a process a stage, in rows of their own")
    parser.add_argument("--only", action="append", metavar="GROUP", help="run this group alone; may be repeated")
    parser.add_argument("--table", action="store_true", help="only write the table and the plots anew")
    parser.add_argument("--list", action="store_true", help="only say which rows are done and which are pending")
    return parser


def _main(arguments: argparse.Namespace) -> int:
    sweep, combinations = load_sweep(arguments.config)
    out = arguments.out or arguments.config.parent / "results" / arguments.config.stem
    options = execute.Options(out / "results.jsonl", arguments.runs, arguments.engine, arguments.jobs,
                              arguments.threads, arguments.minutes)
    rows = in_order(_chosen(combinations, arguments.only))
    if arguments.list:
        _list(rows, options)
        return 0
    pending = [] if arguments.table else _pending(rows, options)
    failed: list[str] = []
    if pending and (options.minutes is None or options.minutes > 0):
        device = execute.check_machine(run for _, run in pending)
        failed = execute.execute(pending, options, device, lambda line: print(line, flush=True))
    _write(sweep, combinations, out)
    _say_progress(rows, options)
    return 1 if failed else 0


def _write(sweep: SweepConfig, combinations: list[Combination], out: Path) -> None:
    """Write and print the table, and draw the plots; of all rows, whatever ran now."""
    results = execute.read_results(out / "results.jsonl")
    table = report.as_markdown(sweep, combinations, results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table)
    print(table)
    for line in plots.draw(report.make_lines(sweep, combinations, results), out):
        print(line)


def _chosen(combinations: list[Combination], only: list[str] | None) -> list[Combination]:
    names = list(dict.fromkeys(row.group for row in combinations))
    for name in only or ():
        if name not in names:
            raise ConfigError(f"--only: no group is named {name!r}; there are {', '.join(names)}")
    return [row for row in combinations if not only or row.group in only]


def _pending(rows: list[tuple[Combination, Run]], options: execute.Options) -> list[tuple[Combination, Run]]:
    done = execute.read_results(options.results)
    return [(row, run) for row, run in rows if (options.engine, run.id) not in done]


def _list(rows: list[tuple[Combination, Run]], options: execute.Options) -> None:
    done = execute.read_results(options.results)
    for row, run in rows:
        found = done.get((options.engine, run.id))
        state = f"{found['val_accuracy']:.2%}" if found else "pending"
        print(f"{run.id}  {state:>7}  {row.label}, seed {run.seed}")


def _say_progress(rows: list[tuple[Combination, Run]], options: execute.Options) -> None:
    pending = _pending(rows, options)
    following = f", next: {pending[0][0].label}, seed {pending[0][1].seed}" if pending else ""
    print(f"{len(rows) - len(pending)} of {len(rows)} rows done{following}")


if __name__ == "__main__":
    sys.exit(main())
