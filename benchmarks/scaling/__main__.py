"""`python -m benchmarks.scaling [CONFIG]`, from the repository root; see README.md."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.command import device_for, guarded, one_thread
from benchmarks.environment import environment, folder_name
from benchmarks.methods import JOINT, JOINT_TAIL, LARGER_HEADS, LAST_LOSS, late
from benchmarks.scaling.picture import draw
from benchmarks.scaling.report import as_markdown
from benchmarks.throughput.measure import measure_case
from benchmarks.throughput.report import samples_per_second
from benchmarks.throughput.settings import METHODS, ThroughputConfig, case_tree, load_settings
from blpipe.commands import whole_numbers
from blpipe.config import Config, MethodConfig
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.device import set_up
from blpipe.engines.common import train_epoch
from blpipe.errors import ConfigError
from blpipe.forecast.forecast import Forecaster, methods
from blpipe.forecast.report import make_report
from blpipe.plan import make_plan
from blpipe.trainer import open_local

HERE = Path(__file__).parent


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
    predicted = _predict(settings, name, device, counts)
    found = {"case": name, "batch": _config(settings, name, device).train.batch_size,
             "microbatches": settings.microbatches, "environment": environment(device),
             "measured": {"1": {"one device": _one_device(settings, name, device)}}, "predicted": predicted}
    folder = arguments.out or arguments.config.parent / "results"
    path = folder / f"{folder_name(device)}.json"
    _write(path, found)
    for count in [count for count in counts if _can_measure(settings, found["batch"], count, device)]:
        case = measure_case(settings.model_copy(update={"stages": count}), name, device)
        if case is None:
            print(f"scaling: K = {count}: a process failed; what it said stands above", file=sys.stderr)
            return 1
        measured = {method: samples_per_second(case, method) for method in METHODS if method in case["rounds"][0]}
        measured["1F1B"] = measured.pop("1F1B, own cuts")  # as every method has them in the prediction
        found["measured"][str(count)] = measured
        _write(path, found)
    print(path.with_suffix(".md").read_text())
    print(draw(found, path.with_suffix(".png")))
    return 0


def _can_measure(settings: ThroughputConfig, batch: int, count: int, device: torch.device) -> bool:
    """Whether there is a core or a GPU for each stage, and the batch divides among microbatches and processes."""
    most = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    return count <= most and batch % (count * settings.microbatches) == 0


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(found))


def _config(settings: ThroughputConfig, name: str, device: torch.device, microbatches: int = 1,
            **sections: Any) -> Config:
    tree = case_tree(settings, name, device.type)
    return parse_config({**tree, "train": {**tree["train"], "microbatches": microbatches}, **sections})


def _predict(settings: ThroughputConfig, name: str, device: torch.device, counts: list[int]) -> dict[str, Any]:
    """samples/s by K and method; those a batch late and one device with whole batches, all else with microbatches."""
    with one_thread():
        whole, parts, larger = (make_report(_config(settings, name, device, microbatches, **method), counts)
                                for microbatches, method in ((1, {}), (settings.microbatches, {}),
                                                             (1, {"method": LARGER_HEADS})))
    names = {"backlink d=0": "BackLink d=0", f"backlink d=1/{settings.microbatches}": "BackLink d=1/M",
             "GPipe": "GPipe", "1F1B": "1F1B", "zero-bubble": "zero-bubble"}
    found: dict[str, Any] = {"1": {"one device": whole.methods[-1].samples_per_second},
                             **{str(count): {} for count in counts}}
    for report, known in ((whole, {"backlink d=1": "BackLink d=1"}), (larger, {"backlink d=1": "larger heads d=1"}),
                          (parts, names)):
        for row in report.sweep:
            if row.method in known:
                found[str(row.stages)][known[row.method]] = row.samples_per_second
    for title, report, method in (("joint tail d=1", whole, JOINT_TAIL), ("joint d=1", whole, JOINT),
                                  ("last loss d=1/M", parts, late(LAST_LOSS, "1/M"))):
        forecaster = _by_the_same_costs(report.forecaster, method)
        own = methods(forecaster.config)[0].name
        for count in counts:
            found[str(count)][title], = (row.samples_per_second for row in forecaster.compare(count)
                                         if row.method == own)
    return found


def _by_the_same_costs(forecaster: Forecaster, method: dict[str, Any]) -> Forecaster:
    config = forecaster.config.model_copy(update={"method": MethodConfig.model_validate(method)})
    costs = replace(forecaster.costs, network=replace(forecaster.costs.network, config=config))
    return Forecaster(costs, config, forecaster.connection)


def _one_device(settings: ThroughputConfig, name: str, device: torch.device) -> float:
    """samples/s of end-to-end backpropagation of whole batches, reading them included; one thread on a CPU."""
    config = _config(settings, name, device, method="bp", partition={"stages": 1})
    set_up(config)
    data = open_data(config.data, config.seed)
    engine = open_local(make_plan(config, data.spec), data)
    seconds = []
    with one_thread():
        for epoch in range(settings.rounds + 1):
            started = perf_counter()
            train_epoch(engine, epoch)
            seconds.append(perf_counter() - started)
    return engine.plan.samples_per_epoch / median(seconds[1:])  # the first warms up


if __name__ == "__main__":
    sys.exit(main())
