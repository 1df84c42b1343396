"""`python -m benchmarks.overhead`, from the repository root; see README.md."""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks import markdown
from benchmarks.command import run_processes
from benchmarks.environment import environment

ROWS = {
    "step": "a step of the pipeline, d = 1",
    "messages": "the two messages of a step, sent there and back with nothing between",
    "plain": "the larger stage's computing in a plain loop: no engine, no neighbour",
}


def main() -> int:
    """Measure in two processes, write the table; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rounds.json"
        if run_processes(2, "benchmarks.overhead.worker", str(out)):
            return 1
        rounds = json.loads(out.read_text())
    measured_on = environment(torch.device("cpu"))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "cpu.json").write_text(json.dumps({"environment": measured_on, "rounds": rounds}, indent=1) + "\n")
    table = as_markdown(rounds) + "\n" + ", ".join(f"{key} {value}" for key, value in measured_on.items()) + ".\n"
    (results / "cpu.md").write_text(table)
    print(table)
    return 0


def as_markdown(rounds: list[dict[str, float]]) -> str:
    """The table, in milliseconds; what is left is worked out within a round."""
    engine = [row["step"] - row["messages"] - row["plain"] for row in rounds]
    beyond = [row["step"] - row["messages"] for row in rounds]
    rows = [*((what, [row[key] for row in rounds]) for key, what in ROWS.items()),
            ("a step beyond its messages' own time", beyond), ("of which the engine's own", engine)]
    return markdown.table([["", "ms"], *([what, f"{1000 * median(found):.2f}"] for what, found in rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
