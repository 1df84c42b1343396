"""`python -m benchmarks.scaling [CONFIG]`, from the repository root; see README.md."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.command import device_for, guarded, one_thread
from benchmarks.environment import environment, folder_name
from benchmarks.scaling.picture import draw
from benchmarks.scaling.report import PREDICTED, as_markdown
from benchmarks.throughput.cuts import CaseCosts
from benchmarks.throughput.measure import measure_case
from benchmarks.throughput.report import samples_per_second
from benchmarks.throughput.rows import METHODS, ROWS
from benchmarks.throughput.settings import ThroughputConfig, case_tree, config_of, load_settings
from blpipe.commands import whole_numbers
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.device import set_up
from blpipe.engines.common import train_epoch
from blpipe.errors import ConfigError
from blpipe.forecast.baselines import SCHEDULES
from blpipe.forecast.forecast import Forecaster, methods
from blpipe.forecast.simulate import CONNECTIONS
from blpipe.plan import make_plan
from blpipe.trainer import open_local

HERE = Path(__file__).parent
OWN_CUTS = {"1F1B": "1F1B, own cuts"}  # as every method has them in the prediction


def main(argv: Sequence[str] | None = None) -> int:
    """Predict, measure as far as the machine goes, write table and picture; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return guarded("scaling", lambda: _main(arguments), "what was done is kept")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Throughput over the number of stages: measured as far as there are cores or GPUs, and predicted.")
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", default=HERE / "resnet110.yaml",
                        help="a config of benchmarks.throughput with one case; else benchmarks/scaling/resnet110.yaml")
    parser.add_argument("--stages", default="2,4,8,16,32,56", metavar="K,K,…", help="all are predicted")
    parser.add_argument("--measure", metavar="K,K,…",
                        help="are measured; else those for which there are as many cores or GPUs")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results; else results/, beside CONFIG")
    return parser


def _main(arguments: argparse.Namespace) -> int:
    counts = [count for count in whole_numbers("--stages", arguments.stages) if count > 1]
    device = device_for(arguments.device, 1)
    settings = load_settings(arguments.config, {"stages": 2})
    if len(settings.cases) != 1:
        raise ConfigError(f"cases: {len(settings.cases)}; give one")
    name, = settings.cases
    tree = case_tree(settings, name, device.type)
    config = parse_config(tree)
    batch = config.train.batch_size
    measured_at = {count: load_settings(arguments.config, {"stages": count})
                   for count in _measured_counts(arguments.measure, counts, settings, batch, device)}
    for at_count in measured_at.values():  # refused before anything runs
        case_tree(at_count, name, device.type)
    counts = sorted({*counts, *measured_at})
    if not counts:
        raise ConfigError(f"--stages: {arguments.stages} leaves nothing to compare; give numbers from 2 on")
    set_up(config)
    predicted = _predict(settings, tree, device, counts)
    found = {"case": name, "batch": batch, "microbatches": settings.microbatches, "environment": environment(device),
             "measured": {"1": {"one device": _one_device(settings.rounds, tree)}}, "predicted": predicted}
    folder = arguments.out or arguments.config.parent / "results"
    path = folder / f"{folder_name(device)}.json"
    _write(path, found)
    for count, at_count in measured_at.items():
        case = measure_case(at_count, name, device)
        if case is None:
            print(f"scaling: K = {count}: a process failed; what it said stands above", file=sys.stderr)
            return 1
        measured = {method: samples_per_second(case, method) for method in METHODS if method in case["rounds"][0]}
        measured |= {method: measured.pop(row) for method, row in OWN_CUTS.items() if row in measured}
        found["measured"][str(count)] = measured
        _write(path, found)
    print(path.with_suffix(".md").read_text())
    print(draw(found, path.with_suffix(".png")))
    return 0


def _measured_counts(asked: str | None, counts: list[int], settings: ThroughputConfig, batch: int,
                     device: torch.device) -> list[int]:
    """Those asked for; else those for which there is a core or a GPU for each stage, and the batch suffices."""
    if asked is not None:
        return [count for count in whole_numbers("--measure", asked) if count > 1]
    most = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    return [count for count in counts if count <= min(most, settings.microbatches)
            and batch % (count * settings.microbatches) == 0]


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(found))


def _predict(settings: ThroughputConfig, tree: dict[str, Any], device: torch.device, counts: list[int]
             ) -> dict[str, Any]:
    """samples/s by K and method; those a batch late and one device with whole batches, all else with microbatches."""
    costs = CaseCosts(device)

    def forecaster(row: str) -> Forecaster:
        config = config_of(tree, ROWS[row], tree["partition"], settings.microbatches)
        with one_thread():
            return Forecaster(costs.of(config), config, CONNECTIONS[device.type])

    forecasters = {method: forecaster(row) for method in PREDICTED
                   if (row := OWN_CUTS.get(method, method)) in settings.measured}
    one = forecaster("one process")
    blocks = len(one.costs.blocks)
    if max(counts) > blocks:
        raise ConfigError(f"--stages: {max(counts)} stages need as many blocks, and the model has {blocks}; "
                          f"give numbers up to {blocks}, or a deeper model")
    found: dict[str, Any] = {"1": {"one device": one.one_device().samples_per_second},
                             **{str(count): {} for count in counts}}
    for method, of_method in forecasters.items():
        # A schedule by its own name; ours are the config's own.
        name = method if method in SCHEDULES else methods(of_method.config)[0].name
        for count in counts:
            forecast, = of_method.compare(count, among=[name])
            found[str(count)][method] = forecast.samples_per_second
    return found


def _one_device(rounds: int, tree: dict[str, Any]) -> float:
    """samples/s of end-to-end backpropagation of whole batches, reading them included; one thread on a CPU."""
    config = config_of(tree, ROWS["one process"], {"stages": 1}, microbatches=1)
    data = open_data(config.data, config.seed)
    engine = open_local(make_plan(config, data.spec), data)
    seconds = []
    with one_thread():
        for epoch in range(rounds + 1):
            started = perf_counter()
            train_epoch(engine, epoch)
            seconds.append(perf_counter() - started)
    return engine.plan.samples_per_epoch / median(seconds[1:])  # the first warms up


if __name__ == "__main__":
    sys.exit(main())
