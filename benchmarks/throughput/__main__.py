"""`python -m benchmarks.throughput [CONFIG]`, from the repository root; see README.md."""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import blpipe
from benchmarks.command import guarded, run_processes
from benchmarks.environment import device_name, environment
from benchmarks.throughput.report import as_markdown
from benchmarks.throughput.settings import ThroughputConfig, case_tree, find_cuts, load_settings
from benchmarks.throughput.torch_schedules import SCHEDULES
from blpipe.config import PartitionConfig
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.errors import ConfigError, UserError
from blpipe.plan import make_plan

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
    device = _device(arguments.device, settings.stages)
    folder = arguments.out or arguments.config.parent / "results" / _folder_name(device)
    path = folder / f"k{settings.stages}.json"
    cases = json.loads(path.read_text()) if path.exists() else {}
    for name in [] if arguments.table else _chosen(settings, arguments.only):
        found = _measure(settings, name, device)
        if found is None:
            print(f"throughput: {name}: a process failed; what it said stands above", file=sys.stderr)
            return 1
        cases[name] = found
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cases, indent=1) + "\n")
    # In the order of the file, whenever they were measured.
    ordered = {name: cases[name] for name in (*settings.cases, *cases) if name in cases}
    if not ordered:
        raise ConfigError(f"--table: {path} holds no results; leave it out to measure some")
    table = as_markdown(ordered)
    path.with_suffix(".md").write_text(table)
    print(table)
    return 0


def _chosen(settings: ThroughputConfig, only: list[str] | None) -> list[str]:
    for name in only or ():
        if name not in settings.cases:
            raise ConfigError(f"--only: no case is named {name!r}; there are {', '.join(settings.cases)}")
    return [name for name in settings.cases if not only or name in only]


def _device(wanted: str, stages: int) -> torch.device:
    """Where all processes compute: each on a GPU of its own, or on the CPU."""
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return torch.device("cpu")
    if gpus < stages:
        raise UserError(f"--device: {wanted}, but {stages} stages need a GPU each, and torch sees {gpus} here; give "
                        "--device cpu, or fewer --stages")
    return torch.device("cuda")


def _folder_name(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{device_name(device)} {os.cpu_count()} cores".lower()).strip("-")


def _measure(settings: ThroughputConfig, name: str, device: torch.device) -> dict[str, Any] | None:
    """A case's settings, environment and rounds; None where its processes failed, who say why."""
    tree = case_tree(settings, name, device.type)
    measured_on = environment(device) | {"load": os.getloadavg()[0], "blpipe": blpipe.__version__}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the stages will have
    cuts = find_cuts(parse_config(tree), device)
    torch.set_num_threads(threads)
    rounds = _launch({"case": name, "config": tree, "cuts": cuts._asdict(), **_lengths(settings)}, settings.stages)
    if rounds is None:
        return None
    return {"stages": settings.stages, "batch": parse_config(tree).train.batch_size, **_lengths(settings),
            "cuts": cuts._asdict(), "stage_blocks": _blocks(tree, cuts.stages),
            "virtual_blocks": _blocks(tree, cuts.virtual), "environment": measured_on,
            "like": {each: schedule.like for each, schedule in SCHEDULES.items() if schedule.like},
            "aims": [aim.model_dump() for aim in settings.cases[name].aims], "rounds": rounds}


def _lengths(settings: ThroughputConfig) -> dict[str, int]:
    return settings.model_dump(include={"microbatches", "rounds", "steps", "warmup"})


def _launch(job: dict[str, Any], stages: int) -> Any:
    """Run a job in `stages` processes under torchrun, one thread each; returns the rounds, None where that failed."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "job.json", Path(folder) / "rounds.json"
        path.write_text(json.dumps({**job, "out": str(out)}))
        failed = run_processes(stages, "benchmarks.throughput.worker", str(path))
        return None if failed else json.loads(out.read_text())


def _blocks(tree: dict[str, Any], cuts: list[str]) -> list[str]:
    """The first and the last block of every stage."""
    config = parse_config({**tree, "method": "bp", "partition": PartitionConfig(cuts=cuts).model_dump()})
    return make_plan(config, open_data(config.data, config.seed).spec).stage_names


if __name__ == "__main__":
    sys.exit(main())
