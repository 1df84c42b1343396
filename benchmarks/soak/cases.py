"""What is trained, what of it must be the same, and how the queues are disturbed."""

import json
from pathlib import Path
from typing import Any

import torch

from blpipe.saved import export_run

STAGES = 4
BASE: dict[str, Any] = {
    "model": {"name": "mlp", "args": {"hidden": [256] * 7, "dropout": 0.1}},
    "data": {"name": "synthetic", "args": {"shape": [1, 8, 8], "classes": 4, "samples": 1608}},
    "partition": {"stages": STAGES},
    "optimizer": {"name": "sgd", "lr": 0.02, "args": {"momentum": 0.9}},
    "train": {"batch_size": 32},  # 51 steps an epoch; the last batch holds 8
    "checkpoint": {"every_epochs": 0},
    # A queue that waits for so long is taken for a deadlock: every stall is shorter than half a second.
    "runtime": {"device": "cpu", "threads": 1, "progress": False, "timeout_seconds": 60.0},
}
CASES: dict[str, dict[str, Any]] = {
    "d = 0, M = 4": {"method": {"link": {"delay": 0}}, "train": {"microbatches": 4}},
    "d = 1": {"method": {"link": {"delay": 1}}},
    "d = 1, reach all": {"method": {"link": {"delay": 1, "length": "all", "reach": "all"}}},
    "a microbatch late, M = 4": {"method": {"link": {"delay": 1, "delay_unit": "microbatch"}},
                                 "train": {"microbatches": 4}},
}
# Probability, and shortest and longest seconds, of a stall before a message; else there is none. Where they are so many
# times as often that these make more than 1, the last is what is left.
STALLS = ((0.001, 0.1, 0.4), (0.01, 0.01, 0.06), (0.08, 0.001, 0.005))


def tree(case: str, name: str, epochs: int, runs: str) -> dict[str, Any]:
    """The config of one run of a case, in the folder `runs`."""
    changes = CASES[case]
    return {"name": name, **BASE, **changes, "train": {"epochs": epochs, **BASE["train"], **changes.get("train", {})},
            "runtime": BASE["runtime"] | {"runs": runs}}


def outcome(run: Path) -> dict[str, Any]:
    """What a finished run has learnt: the model's weights, and every stage's losses and accuracies by epoch."""
    export_run(run, run / "model.pt")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    learnt = ("epoch", "stage", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
    return {"weights": torch.load(run / "model.pt"), "metrics": [[row[key] for key in learnt] for row in rows],
            "steps": json.loads((run / "result.json").read_text())["steps"]}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two outcomes are equal, bit for bit."""
    left, right = one["weights"], other["weights"]
    return one["metrics"] == other["metrics"] and left.keys() == right.keys() \
        and all(torch.equal(left[name], right[name]) for name in left)
