"""`python -m benchmarks.soak`, from the repository root; see README.md."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch

from benchmarks.command import count, guarded, run_processes
from benchmarks.environment import environment
from benchmarks.soak.cases import CASES, STAGES, outcome, tree
from benchmarks.soak.report import as_markdown, grown
from blpipe.config_file import parse_config
from blpipe.runs import train_run

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """Disturb runs for so long, write what was found; returns the exit code, 1 where anything went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Train in four processes whose queues stall at random, and compare with undisturbed runs.")
    parser.add_argument("--minutes", type=count, default=60, metavar="N", help="rounds begin for so long; else 60")
    parser.add_argument("--stalls", type=int, default=1, choices=range(1, 41), metavar="N",
                        help="times as often as README.md says, from 1, as it is, to 40")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the stalls")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="FOLDER", help="of the results")
    arguments = parser.parse_args(argv)
    return guarded("soak", lambda: _main(arguments), "nothing is written")


def _main(arguments: argparse.Namespace) -> int:
    epochs = max(1, arguments.minutes // 2)  # of a run, so that some ten rounds fit in
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = {case: _undisturbed(case, epochs, Path(folder)) for case in CASES}
        disturbed = {"seed": arguments.seed, "stalls": arguments.stalls}
        job = {**disturbed, "minutes": arguments.minutes, "epochs": epochs, "runs": folder, "out": folder,
               "expected": {case: str(path) for case, path in undisturbed.items()}}
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        if run_processes(STAGES, "benchmarks.soak.worker", str(path)):
            print("soak: a process failed; what it said stands above", file=sys.stderr)
            return 1
        found = {"environment": environment(torch.device("cpu")), **disturbed,
                 "steps": {case: torch.load(path)["steps"] for case, path in undisturbed.items()},
                 "stages": [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(STAGES)]}
    table = as_markdown(found)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "cpu.md").write_text(table)
    print(table)
    too_much = grown(found)
    for line in too_much:
        print(f"soak: {line}", file=sys.stderr)
    return 1 if too_much else 0


def _undisturbed(case: str, epochs: int, folder: Path) -> Path:
    """Train a case in this process; returns the file of its outcome."""
    config = parse_config(tree(case, f"undisturbed{list(CASES).index(case)}", epochs, str(folder)))
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        train_run(config)
    found = outcome(Path(config.runtime.runs) / config.name)
    path = folder / f"{config.name}.pt"
    torch.save(found, path)
    return path


if __name__ == "__main__":
    sys.exit(main())
