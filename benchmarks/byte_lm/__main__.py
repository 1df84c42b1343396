"""`python -m benchmarks.byte_lm`, from the repository root; see README.md."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.command import count, guarded
from benchmarks.environment import environment
from blpipe.errors import UserError

HERE = Path(__file__).parent
CONFIG = "benchmarks/byte_lm/byte_lm_k4.yaml"
METHODS = {
    "BackLink, d = 0": ["method.link.delay=0"],
    "BackLink, d = 1": [],
    "greedy": ["method.name=greedy"],
    "the last loss, a microbatch late": [
        "method.local_weight=0", "train.microbatches=4",
        "method.link={length: all, reach: all, take: farthest, delay: 1, delay_unit: microbatch}"],
    "bp": ["method.name=bp"],
}

Losses = list[float | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, write results.json, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.byte_lm",
        description="Train the byte-level language model with every method and seed, each run in one process with one "
                    "thread, and print its bits per byte. A run that is there already is kept.")
    parser.add_argument("--seeds", type=count, default=2, metavar="N")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER", help="of results.json")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys to set over the config's")
    arguments = parser.parse_args(argv)
    return guarded("byte_lm", lambda: _main(arguments), "the same command goes on")


def _main(arguments: argparse.Namespace) -> int:
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = {method: [pool.submit(train, method, seed, arguments.overrides) for seed in range(arguments.seeds)]
                for method in METHODS}
        found = {"environment": environment(torch.device("cpu")),
                 "runs": {method: [run.result() for run in each] for method, each in runs.items()}}
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["runs"]))
    return 0


def train(method: str, seed: int, overrides: Sequence[str]) -> dict[str, Losses]:
    """Train one run where it is not there yet; returns the bits per byte of its last epoch, stage by stage.

    Raises:
        UserError: the run failed.
    """
    name = f"byte_lm_{list(METHODS).index(method)}_seed{seed}"
    if not Path("runs", name, "result.json").exists():
        done = subprocess.run([sys.executable, "-m", "blpipe", "train", CONFIG, f"name={name}", f"seed={seed}",
                               *METHODS[method], *overrides, "--overwrite"], stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise UserError(done.stderr.strip())
    rows = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    return {key: [row[key] for row in last] for key in ("val_loss", "train_loss")}


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """By method: bits per byte of the held-out text, each stage's mean over the seeds, and the last stage's by seed;
    and the last stage's in the last epoch of training.
    """
    lines = [
        "| | stage 1 | stage 2 | stage 3 | stage 4 | stage 4 by seed | training text |",
        "|---|---|---|---|---|---|---|"]
    for method, seeds in runs.items():
        by_stage = zip(*(seed["val_loss"] for seed in seeds), strict=True)
        stages = ["–" if losses[0] is None else f"{mean(losses):.3f}" for losses in by_stage]
        last = ", ".join(f"{seed['val_loss'][-1]:.3f}" for seed in seeds)
        training = mean(seed["train_loss"][-1] for seed in seeds)
        lines.append(f"| {method} | {' | '.join(stages)} | {last} | {training:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
