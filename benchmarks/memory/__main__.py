"""`python -m benchmarks.memory`, from the repository root; see README.md."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import count, guarded
from benchmarks.environment import environment, folder_name
from benchmarks.memory import cases, plots, report, timing
from benchmarks.memory.measure import measure
from benchmarks.memory.results import Results
from blpipe.device import keep_freed_memory, use_precision
from blpipe.errors import ConfigError
from blpipe.text import human_bytes
from blpipe.transport.world import choose_device

PARTS = ("local", "pipeline", "microbatches", "time")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has no row yet, and write the table and the plot; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return guarded("memory", lambda: _main(arguments), "the same command goes on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description="Peak memory of bp, bp under activation checkpointing, greedy and BackLink, and what they take of "
                    "time. Rows of memory that are there are kept; times are always taken anew.")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART",
                        help=f"one of {', '.join(PARTS)}; may be repeated")
    parser.add_argument("--table", action="store_true", help="only write the table and the plot anew")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results; else results/<device>")
    parser.add_argument("--depth", type=int, default=110, help="of the ResNet")
    parser.add_argument("--batch", type=count, default=1024)
    parser.add_argument("--precision", choices=["float32", "tf32", "bf16"], default="float32")
    parser.add_argument("--channels-last", action="store_true", help="the layout of weights and maps")
    parser.add_argument("--stages", type=_counts, default=(2, 4, 8, 16), metavar="K,…")
    parser.add_argument("--lengths", type=_lengths, default=(1, 2, "all"), metavar="L,…", help="of the link")
    parser.add_argument("--delays", type=_delays, default=(0, 1, 2), metavar="D,…", help="of the link")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="rows of memory at a time, on a CPU")
    parser.add_argument("--time-batch", type=count, metavar="B", help="32 on a CPU, --batch on a GPU")
    parser.add_argument("--rounds", type=count, default=5, help="in which all methods take turns")
    parser.add_argument("--steps", type=count, default=2, help="of each method in a round")
    parser.add_argument("--threads", type=count, default=1, help="of a CPU, for the times")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({count(part) for part in text.split(",")}))


def _delays(text: str) -> tuple[int, ...]:
    return tuple(0 if part == "0" else count(part) for part in text.split(","))


def _lengths(text: str) -> tuple[int | str, ...]:
    found: tuple[int | str, ...] = tuple("all" if part == "all" else count(part) for part in text.split(","))
    if 1 not in found:
        raise argparse.ArgumentTypeError(f"{text!r} must hold 1, the length that all parts have")
    return found


def _main(arguments: argparse.Namespace) -> int:
    device, _ = choose_device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    # What is counted without values is the same on every CPU.
    name = folder_name(device) if device.type == "cuda" else "cpu"
    folder = arguments.out or Path(__file__).parent / "results" / name
    size = cases.Size(arguments.depth, arguments.batch, arguments.stages, arguments.precision, arguments.channels_last)
    use_precision(size.precision)
    keep_freed_memory()
    linked = cases.links(arguments.lengths, arguments.delays)
    _check(size, linked)
    results = Results(folder / "results.jsonl", environment(device))
    parts = [] if arguments.table else arguments.only or PARTS
    pending = [task for part in PARTS[:3] if part in parts for task in cases.tasks(part, size, linked)
               if task.key(size) not in results]
    for row in _measured(cases.in_order(pending, size), size, device, arguments.jobs):
        results.add(row)
        print(f"{row['part']}: {row['method']}, K = {row['stages']}, {row['cut']}: "
              f"{human_bytes(row['peak_bytes']) if row['peak_bytes'] else row['why']}", flush=True)
    if "time" in parts:
        cpu = device.type == "cpu"
        timed = replace(size, batch=arguments.time_batch or (32 if cpu else size.batch))
        effort = timing.Effort(arguments.rounds, arguments.steps, arguments.threads if cpu else None)
        for row in timing.measure(timing.tasks(size, linked), size, timed, effort, device):
            results.add(row)
    table = report.as_markdown(results.rows, size)
    (folder / "table.md").write_text(table)
    print(table)
    print(plots.draw(results.rows, size, folder))
    return 0


def _check(size: cases.Size, linked: list[cases.Case]) -> None:
    """Refuse what no row could be measured with, before any is."""
    try:
        size.blocks()
    except ValueError as error:
        raise ConfigError(f"--depth: {error}") from error
    if size.stages[-1] > size.blocks():
        raise ConfigError(f"--stages: {size.stages[-1]} is more than the {size.blocks()} blocks; use fewer, or a "
                          "larger --depth")
    unfit = [stages for stages in size.stages if size.batch % stages]
    if unfit:
        raise ConfigError(f"--batch: {size.batch} cannot be cut into {unfit[0]} microbatches; use a multiple of each K")


def _measured(pending: list[cases.Task], size: cases.Size, device: torch.device, jobs: int) -> Iterator[dict[str, Any]]:
    """The rows, as they are done."""
    if device.type == "cuda" or jobs == 1:
        yield from (measure(task, size, device) for task in pending)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures: list[Future[dict[str, Any]]] = [pool.submit(measure, task, size, device) for task in pending]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)  # what has not begun, where this is interrupted


if __name__ == "__main__":
    sys.exit(main())
