"""`python -m benchmarks.prediction`, from the repository root; see README.md."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from benchmarks.environment import environment

CASES: dict[str, dict[str, Any]] = {
    "ResNet-20, width 2, balanced": {
        "model": {"name": "resnet_cifar", "args": {"depth": 20, "width": 2.0}},
        "partition": {"stages": 2, "strategy": "balanced"}},
    "ResNet-20, width 2, late cut": {
        "model": {"name": "resnet_cifar", "args": {"depth": 20, "width": 2.0}},
        "partition": {"cuts": ["layer3_0"]}},
    "VGG-11, early cut": {
        "model": {"name": "vgg_cifar", "args": {"depth": 11}},
        "partition": {"cuts": ["conv2_0"]}},
    "ViT, 6 blocks, even": {
        "model": {"target": "vit:blocks"},
        "partition": {"stages": 2}},
}
SMALL, LARGE = 4, 32  # batch sizes: peaks of memory are compared by their difference
STEPS = 8            # of an epoch


def main() -> None:
    """Predict and measure every case in turn, as often as asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description="Predictions of `blpipe plan` "
                                     "against real runs of two processes, side by side.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [compare(name, case, arguments.rounds) for name, case in CASES.items()]
    measured_on = environment(torch.device("cpu"))
    if arguments.out:
        arguments.out.write_text(json.dumps({"environment": measured_on, "rows": rows}, indent=2) + "\n")
    print(as_markdown(rows))
    print(", ".join(f"{key} {value}" for key, value in measured_on.items()))


def compare(name: str, case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One row: medians over all rounds of predicted and measured step seconds, and both peaks of memory."""
    with tempfile.TemporaryDirectory() as folder:
        predicted, measured, own, cuts = [], [], [], None
        for _ in range(rounds):
            forecast = plan(case, LARGE, Path(folder))
            # The first forecast settles the cuts; every later one and every run uses them.
            cuts = cuts or {"cuts": forecast["cuts"]}
            case = case | {"partition": cuts}
            predicted.append(forecast["methods"][0]["seconds_per_step"])
            own.append([stage["seconds"] for stage in forecast["stages"]])
            measured.append(train(case, LARGE, Path(folder))["seconds_per_step"])
        small_forecast = plan(case, SMALL, Path(folder))
        large, small = (train(case, batch, Path(folder), lean=True)["peaks"] for batch in (LARGE, SMALL))
        more = [[large - little for large, little in zip(*pair, strict=True)] for pair in (
            (peaks(forecast["stages"]), peaks(small_forecast["stages"])), (large, small))]
    return {"name": name, "cuts": cuts["cuts"], "stage_seconds": [median(stage) for stage in zip(*own, strict=True)],
            "predicted_seconds": median(predicted), "measured_seconds": median(measured),
            "all_predicted": predicted, "all_measured": measured,
            "predicted_more_bytes": more[0], "measured_more_bytes": more[1]}


def peaks(stages: list[dict[str, Any]]) -> list[int]:
    """The peak memory of every stage."""
    return [stage["peak_memory_bytes"] for stage in stages]


def plan(case: dict[str, Any], batch: int, folder: Path) -> dict[str, Any]:
    """The forecast of `blpipe plan`, as JSON."""
    return json.loads(call([sys.executable, "-m", "blpipe", "plan", config(case, batch, folder), "--json"], folder))


def train(case: dict[str, Any], batch: int, folder: Path, lean: bool = False) -> dict[str, Any]:
    """A real run under torchrun: step seconds of the epochs after the first, and each process's peak memory.

    Args:
        lean: whether what is freed is given back at once, so that a process's size is that of its tensors.
    """
    keys, environ = (["runtime.keep_memory=false"], {"MALLOC_MMAP_THRESHOLD_": "65536"}) if lean else ([], {})
    call(["torchrun", "--standalone", "--nproc-per-node=2", "-m", "blpipe", "train", config(case, batch, folder),
          "--overwrite", *keys], folder, environ)
    run = folder / "runs" / "case"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["train_seconds"] / STEPS for row in rows if row["epoch"] > 1 and row["stage"] == 2]
    stages = json.loads((run / "result.json").read_text())["stages"]
    return {"seconds_per_step": median(seconds), "peaks": peaks(stages)}


def config(case: dict[str, Any], batch: int, folder: Path) -> str:
    """The path of a config file with the case."""
    path = folder / "case.yaml"
    path.write_text(yaml.safe_dump({
        "name": "case", **case,
        "data": {"name": "synthetic", "args": {"shape": [3, 32, 32], "classes": 10, "samples": STEPS * batch}},
        "optimizer": {"name": "sgd", "lr": 0.01, "args": {"momentum": 0.9}},
        "train": {"epochs": 3, "batch_size": batch}, "runtime": {"device": "cpu", "progress": False}}))
    return str(path)


def call(command: list[str], folder: Path, environ: dict[str, str] | None = None) -> str:
    """Run a command in `folder`, one thread a process, with changes to its environment; returns what it printed."""
    here = str(Path(__file__).parent)
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": here} | (environ or {})
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The tables of README.md."""
    steps = ["| model and cut | stages' own steps, ms | predicted step, ms | measured, ms | predicted / measured |",
             "|---|---|---|---|---|"]
    memory = [f"| model and cut | predicted, batch {LARGE} over {SMALL}, MiB | measured, MiB | predicted / measured |",
              "|---|---|---|---|"]
    for row in rows:
        predicted, measured = row["predicted_seconds"], row["measured_seconds"]
        steps.append(f"| {row['name']} | {' / '.join(f'{1000 * s:.0f}' for s in row['stage_seconds'])} "
                     f"| {1000 * predicted:.0f} | {1000 * measured:.0f} | {predicted / measured:.2f} |")
        pairs = list(zip(row["predicted_more_bytes"], row["measured_more_bytes"], strict=True))
        memory.append(f"| {row['name']} | {' / '.join(f'{one / 2**20:.0f}' for one, _ in pairs)} "
                      f"| {' / '.join(f'{other / 2**20:.0f}' for _, other in pairs)} "
                      f"| {' / '.join(f'{one / other:.2f}' for one, other in pairs)} |")
    return "\n".join([*steps, "", *memory])


if __name__ == "__main__":
    main()
