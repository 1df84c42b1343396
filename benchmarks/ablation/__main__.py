"""`python -m benchmarks.ablation CONFIG`, from the repository root; see README.md."""

import argparse
import json
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.command import guarded
from benchmarks.environment import environment, folder_name
from benchmarks.markdown import table
from blpipe.config import Config
from blpipe.config_file import parse_as, parse_config, read_yaml, set_key
from blpipe.config_types import Positive, Section
from blpipe.data import open_data
from blpipe.device import set_up
from blpipe.engines.common import Engine, train_epoch
from blpipe.errors import ConfigError
from blpipe.plan import make_plan
from blpipe.text import human_bytes
from blpipe.trainer import open_local
from blpipe.transport.world import choose_device

DASH = "–"


class AblationConfig(Section):
    """What is measured.

    base: an ordinary config without name, with `synthetic` data. rows: the keys that each row changes in it; the
    first row is what the others are compared with. A round trains `steps` batches of every row.
    """

    base: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    rounds: Positive = 5
    steps: Positive = 20


@dataclass
class Row:
    """One row: its engine, and what each round found."""

    config: Config
    device: torch.device
    engine: Engine
    held_bytes: int  # between its turns: weights, and what else it keeps
    seconds: list[float] = field(default_factory=list)  # of a step
    peak_bytes: int = 0

    def measure(self, epoch: int) -> None:
        """Train an epoch; the first one is thrown away."""
        set_up(self.config)
        cuda = self.device.type == "cuda"
        before = _allocated(self.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        train_epoch(self.engine, epoch)
        reports = self.engine.reports()
        assert reports is not None
        if epoch:
            samples, batch = self.config.data.args["samples"], self.config.train.batch_size
            self.seconds.append(reports[0].train_seconds * batch / samples)
            # Less what the other rows hold at the same time, which is not known on a CPU.
            others = before - self.held_bytes
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - others if cuda else 0)
        self.held_bytes += _allocated(self.device) - before


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all rows and write their table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation",
                                     description="What each optimisation gives in the local engine, one a row.")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="such as benchmarks/ablation/gpu.yaml")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="of the results; else results/<device>, beside CONFIG")
    arguments = parser.parse_args(argv)
    return guarded("ablation", lambda: _main(arguments), "the rounds that were done are kept")


def _main(arguments: argparse.Namespace) -> int:
    settings = parse_as(AblationConfig, read_yaml(arguments.config))
    rows = {name: _open(settings, name) for name in settings.rows}
    device = next(iter(rows.values())).device
    folder = arguments.out or arguments.config.parent / "results" / folder_name(device)
    path = folder / f"{arguments.config.stem}.json"
    names = list(rows)
    for number in range(settings.rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            rows[name].measure(number)
        print(f"round {number} of {settings.rounds}" if number else "warm-up", flush=True)
        if number:
            _write(path, settings, rows)
    print(path.with_suffix(".md").read_text())
    return 0


def _write(path: Path, settings: AblationConfig, rows: dict[str, Row]) -> None:
    """The rounds so far, and their table."""
    found = {"environment": environment(next(iter(rows.values())).device), "rows": {
        name: {"changes": settings.rows[name], "seconds": row.seconds, "peak_bytes": row.peak_bytes}
        for name, row in rows.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(found))


def as_markdown(found: dict[str, Any]) -> str:
    """The table: medians over rounds; ratios are formed within a round."""
    rows = found["rows"]
    first = next(iter(rows.values()))["seconds"]
    lines = [["", "changes", "ms a step", "× as fast", "in single rounds", "peak memory"]]
    for name, row in rows.items():
        changes = ", ".join(f"`{key}: {value}`" for key, value in row["changes"].items())
        ratios = [base / own for base, own in zip(first, row["seconds"], strict=True)]
        lines.append([name, changes or DASH, f"{1000 * median(row['seconds']):.1f}", f"{median(ratios):.2f}",
                      f"{min(ratios):.2f} … {max(ratios):.2f}",
                      human_bytes(row["peak_bytes"]) if row["peak_bytes"] else DASH])
    environment = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    return f"{table(lines, texts=2)}\n\n{environment}.\n"


def _open(settings: AblationConfig, name: str) -> Row:
    tree = {**deepcopy(settings.base), "name": "ablation"}
    if "batch_size" not in tree.get("train", {}):
        raise ConfigError("base.train.batch_size: missing; give one")
    set_key(tree, "data.args.samples", settings.steps * tree["train"]["batch_size"])
    for key, value in settings.rows[name].items():
        set_key(tree, key, value)
    config = parse_config(tree)
    device, _ = choose_device(config.runtime.device)
    set_up(config)
    before = _allocated(device)
    data = open_data(config.data, config.seed)
    engine = open_local(make_plan(config, data.spec), data)
    return Row(config, device, engine, _allocated(device) - before)


def _allocated(device: torch.device) -> int:
    """Bytes of a GPU that torch has given out; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


if __name__ == "__main__":
    sys.exit(main())
