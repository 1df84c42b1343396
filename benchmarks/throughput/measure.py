"""Measuring one case: its cuts are found, and its methods run in processes under torchrun."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

import blpipe
from benchmarks.command import one_thread, run_processes
from benchmarks.environment import environment
from benchmarks.throughput.cuts import find_cuts
from benchmarks.throughput.rows import ROWS
from benchmarks.throughput.settings import ThroughputConfig, case_tree, config_of
from benchmarks.throughput.torch_schedules import SCHEDULES
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.device import set_up
from blpipe.plan import make_plan


def measure_case(settings: ThroughputConfig, name: str, device: torch.device) -> dict[str, Any] | None:
    """A case's settings, environment and rounds; None where its processes failed, who say why."""
    tree = case_tree(settings, name, device.type)
    config = parse_config(tree)
    set_up(config)
    measured_on = environment(device) | {"load": os.getloadavg()[0], "blpipe": blpipe.__version__}
    with one_thread():
        cuts = find_cuts(tree, settings.measured, settings.microbatches, device)
    rounds = _launch({"case": name, "config": tree, "cuts": cuts, "methods": settings.measured,
                      "own_speed": settings.own_speed, **_lengths(settings)}, settings.stages)
    if rounds is None:
        return None
    return {"stages": settings.stages, "batch": config.train.batch_size, **_lengths(settings),
            "cuts": cuts,
            "blocks": {kind: _blocks(tree, each) for kind, each in cuts.items()},
            "environment": measured_on,
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
    config = config_of(tree, ROWS["one process"], {"cuts": cuts}, microbatches=1)
    return make_plan(config, open_data(config.data, config.seed).spec).stage_names
