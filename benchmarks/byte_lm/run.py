"""Train the byte-level language model with every method and seed, and print a table of bits per byte.

    python benchmarks/byte_lm/run.py [--seeds 2] [--jobs 2] [key.sub=value ...]

Run it from the repository root. Every run is one process with one thread; a run that is there already is kept.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

CONFIG = "benchmarks/byte_lm/byte_lm_k4.yaml"
METHODS = {
    "backlink, d = 0": ["method.name=backlink", "method.link.delay=0"],
    "backlink, d = 1": ["method.name=backlink", "method.link.delay=1"],
    "greedy": ["method.name=greedy"],
    "bp": ["method.name=bp"],
}


def train(method: str, seed: int, overrides: list[str]) -> list[dict]:
    """Train one run where it is not there yet; returns the rows of its last epoch, one a stage."""
    name = f"byte_lm_{method.replace(', d = ', '_d')}_seed{seed}"
    if not Path("runs", name, "result.json").exists():
        subprocess.run([sys.executable, "-m", "blpipe", "train", CONFIG, f"name={name}", f"seed={seed}",
                        *METHODS[method], *overrides, "--overwrite"], check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["epoch"] == rows[-1]["epoch"]]


def table_row(method: str, runs: list[list[dict]]) -> str:
    """One method's bits per byte on the held-out text: each stage's mean over the seeds, and
    the last stage's by seed; and the last stage's in the last epoch of training."""
    stages = ["–" if run[0] is None else f"{mean(run):.3f}"
              for run in zip(*[[row["val_loss"] for row in run] for run in runs], strict=True)]
    seeds = ", ".join(f"{run[-1]['val_loss']:.3f}" for run in runs)
    training = mean(run[-1]["train_loss"] for run in runs)
    return f"| {method} | {' | '.join(stages)} | {seeds} | {training:.3f} |"


def main() -> None:
    """Train what is missing, `--jobs` at a time, and print the table as markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = {method: [pool.submit(train, method, seed, arguments.overrides) for seed in range(arguments.seeds)]
                for method in METHODS}
    print("| method | stage 1 | stage 2 | stage 3 | stage 4 | stage 4 by seed | training text |")
    print("|---|---|---|---|---|---|---|")
    for method, futures in runs.items():
        print(table_row(method, [future.result() for future in futures]))


if __name__ == "__main__":
    main()
