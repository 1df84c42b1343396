"""`python -m benchmarks.throughput [CONFIG]`, from the repository root; see README.md."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import device_for, guarded
from benchmarks.environment import folder_name
from benchmarks.throughput.measure import measure_case
from benchmarks.throughput.report import as_markdown
from benchmarks.throughput.settings import ThroughputConfig, load_settings
from blpipe.errors import ConfigError

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases asked for and write their table; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return guarded("throughput", lambda: _main(arguments), "the cases that were done are kept")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description="Train the same model with every method over the same processes, round after round, and write "
                    "their throughputs and ratios.")
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", default=HERE / "throughput.yaml",
                        help="a YAML file; else benchmarks/throughput/throughput.yaml")
    for name, what in (("stages", "K: so many processes, and GPUs"), ("rounds", "of all methods"),
                       ("steps", "of a method in a round, timed"), ("warmup", "steps before them")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what}; else what CONFIG says")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--only", action="append", metavar="CASE", help="measure this case alone; may be repeated")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="of the results; else results/<device>, beside CONFIG")
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    return parser


def _main(arguments: argparse.Namespace) -> int:
    changes = {name: value for name in ("stages", "rounds", "steps", "warmup")
               if (value := getattr(arguments, name)) is not None}
    settings = load_settings(arguments.config, changes)
    device = device_for(arguments.device, settings.stages)
    folder = arguments.out or arguments.config.parent / "results" / folder_name(device)
    path = folder / f"k{settings.stages}.json"
    cases = json.loads(path.read_text()) if path.exists() else {}
    for name in [] if arguments.table else _chosen(settings, arguments.only):
        found = measure_case(settings, name, device)
        if found is None:
            print(f"throughput: {name}: a process failed; what it said stands above", file=sys.stderr)
            return 1
        # In the order of the file, whenever they were measured.
        measured = cases | {name: found}
        cases = {each: measured[each] for each in (*settings.cases, *measured) if each in measured}
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cases, indent=1) + "\n")
    if not cases:
        raise ConfigError(f"--table: {path} holds no results; leave it out to measure some")
    table = as_markdown(cases)
    path.with_suffix(".md").write_text(table)
    print(table)
    return 0


def _chosen(settings: ThroughputConfig, only: list[str] | None) -> list[str]:
    for name in only or ():
        if name not in settings.cases:
            raise ConfigError(f"--only: no case is named {name!r}; there are {', '.join(settings.cases)}")
    return [name for name in settings.cases if not only or name in only]


if __name__ == "__main__":
    sys.exit(main())
