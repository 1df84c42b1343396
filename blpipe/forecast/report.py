"""`blpipe plan`: the forecast of a config as a table, as JSON, as a trace and as a picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from blpipe import weights
from blpipe.config import Config
from blpipe.data import open_data
from blpipe.device import set_up
from blpipe.errors import ConfigError, UserError
from blpipe.forecast.costs import NOMINAL, profile
from blpipe.forecast.forecast import Forecaster, MethodForecast, StageForecast, methods
from blpipe.forecast.simulate import CONNECTIONS, Connection, Timeline
from blpipe.forecast.stages import settle
from blpipe.plan import Plan, make_network, make_plan, notices
from blpipe.text import blocks_text, human_bytes, human_count, human_seconds, percent, stages_text, table
from blpipe.trace import write_trace
from blpipe.transport.world import choose_device


@dataclass(frozen=True)
class Report:
    """Everything that `plan` found.

    Args:
        forecaster: which has the costs, and answers for other numbers of stages.
        methods: every method in the plan's number of stages, and backpropagation on one device.
        sweep: the same for every number of stages asked for.
        timeline: the simulation of the config's own method.
    """

    plan: Plan
    forecaster: Forecaster
    stages: list[StageForecast]
    methods: list[MethodForecast]
    sweep: list[MethodForecast]
    timeline: Timeline


def make_report(config: Config, sweep: Sequence[int] = (), latency: float | None = None,
                bandwidth: float | None = None) -> Report:
    """Look at every block, cut the model, and simulate; nothing is trained.

    On a CPU one thread is a device, as under torchrun, unless `runtime.threads` says otherwise.

    Args:
        sweep: numbers of stages to simulate beside the config's own.
        latency, bandwidth: of a message between stages, in seconds and bytes a second, where they are known.

    Raises:
        ConfigError: anything wrong with the config, or more stages than blocks.
    """
    device, _ = choose_device(config.runtime.device)
    torch.set_num_threads(1)
    set_up(config)
    connection = _connection(device, latency, bandwidth)
    data = open_data(config.data, config.seed)
    network = make_network(config, data.spec)
    weights.load(weights.given(config), config.model, network.model)
    blocks = len(network.block_names)
    if max(sweep, default=1) > blocks:
        raise ConfigError(f"--stages: {max(sweep)} stages need as many blocks, and the model has {blocks}; "
                          f"give numbers up to {blocks}, or a deeper model")
    plan = None if config.partition.unsettled else make_plan(config, data.spec, network)  # before parts are tried
    heads_at = [start - 1 for start in plan.starts[1:]] if plan and config.method.name != "bp" else []
    costs = profile(network, device, data if config.partition.costs == "measured" else None, heads_at)
    config = settle(config, network, costs)
    plan = plan or make_plan(config, data.spec, network)
    forecaster = Forecaster(costs, config, connection)
    one = forecaster.one_device()
    compared = forecaster.compare(len(plan.stages), plan.starts)
    alone = config.train.replicas == 1
    swept = [row for count in sweep for row in (
        [one] if count == 1 and alone else compared if count == len(plan.stages) else forecaster.compare(count))]
    return Report(plan, forecaster, forecaster.stages(plan), [*compared, one], swept,
                  forecaster.timeline(methods(config)[0], plan.starts, steps=4))


def _connection(device: torch.device, latency: float | None, bandwidth: float | None) -> Connection:
    connection = CONNECTIONS[device.type]
    for option, value in (("latency", latency), ("bandwidth", bandwidth)):
        if value is not None and not (value > 0 and isfinite(value)):
            raise ConfigError(f"--{option}: {value} must be a number above 0")
    return replace(connection, latency=latency or connection.latency, bandwidth=bandwidth or connection.bandwidth)


def save_trace(report: Report, path: Path) -> None:
    """Write the simulated timeline as a trace.

    Raises:
        UserError: `path` cannot be written.
    """
    try:
        write_trace(path, report.timeline.spans, report.plan.stage_names)
    except OSError as error:
        raise UserError(f"--trace: cannot write {path}: {error.strerror}; choose another file") from error


def as_json(report: Report) -> dict[str, Any]:
    """The report for programs; seconds, bytes and counts as plain numbers."""
    config = report.plan.config
    return {"name": config.name, "method": config.method.name, "device": str(report.forecaster.costs.device),
            "costs": "measured" if report.forecaster.costs.measured else "analytic",
            "batch_size": config.train.batch_size, "microbatches": config.train.microbatches,
            "replicas": config.train.replicas,
            "cuts": [stage.blocks[0] for stage in report.stages[1:]],
            "stages": [asdict(stage) for stage in report.stages],
            "methods": [asdict(method) for method in report.methods],
            "sweep": [asdict(method) for method in report.sweep], "wire": asdict(report.forecaster.connection)}


def as_text(report: Report) -> str:
    """The report for people."""
    config = report.plan.config
    train = config.train
    parts = [f"{config.name}: {config.method.name} in {stages_text(len(report.stages))}, a step of "
             f"{train.batch_size} samples"
             + (f" in {train.replicas} replicas" if train.replicas > 1 else "")
             + (f" {'of' if train.replicas > 1 else 'in'} {train.microbatches} microbatches"
                if train.microbatches > 1 else ""),
             *(f"note: {line}" for line in (*notices(report.plan), *_on_baselines(config))), "",
             _stage_table(report.stages), "",
             f"with a device for each stage{' of each replica' if train.replicas > 1 else ''}, {_basis(report)}:",
             _method_table(report.methods)]
    if report.sweep:
        parts += ["", "samples/s by number of stages:", _sweep_table(report.sweep)]
    return "\n".join(parts)


def _on_baselines(config: Config) -> list[str]:
    """Torch's schedules are made for more microbatches than stages: with fewer, their bubble is no measure of them."""
    stages, microbatches = config.partition.stage_count, config.train.microbatches
    if stages == 1 or microbatches >= 2 * stages:
        return []
    usual = 4 * stages if config.train.batch_size % (4 * stages) == 0 else 2 * stages
    several = "es" * (microbatches > 1)
    return [f"GPipe, 1F1B and zero-bubble have this config's {microbatches} microbatch{several} here, and are faster "
            f"with more; compare with train.microbatches={usual}"]


def _basis(report: Report) -> str:
    costs, connection = report.forecaster.costs, report.forecaster.connection
    flops, traffic = NOMINAL[costs.device.type]
    how = f"by costs measured on this {costs.device.type}" if costs.measured else \
        f"by estimates at {human_count(flops)}FLOP/s and {human_count(traffic)}B/s"
    return (f"{how}, messages at {human_count(connection.bandwidth)}B/s after {human_seconds(connection.latency)}")


def _stage_table(stages: Sequence[StageForecast]) -> str:
    rows = [("stage", "blocks", "parameters", "FLOP", "step time", "sends on", "sends back", "peak memory")]
    for number, stage in enumerate(stages, start=1):
        rows.append((str(number), blocks_text(stage.blocks), f"{stage.params:,}", human_count(stage.flops),
                     human_seconds(stage.seconds), human_bytes(stage.sent_forward_bytes),
                     human_bytes(stage.sent_back_bytes), human_bytes(stage.peak_memory_bytes)))
    return table(rows, left=[1])


def _method_table(rows: Sequence[MethodForecast]) -> str:
    header = ("method", "step time", "samples/s", "efficiency", "× one device")
    return table([header, *((row.method, human_seconds(row.seconds_per_step), f"{row.samples_per_second:,.0f}",
                             percent(row.efficiency) if row.stages > 1 else "–", f"{row.speedup:.2f}")
                            for row in rows)], left=[0])


def _sweep_table(rows: Sequence[MethodForecast]) -> str:
    names = list(dict.fromkeys(row.method for row in rows if row.stages > 1)) or [rows[0].method]
    found = {(row.stages, row.method): row.samples_per_second for row in rows}
    one = {count: found.get((count, "one device")) for count, _ in found}
    cells = [("stages", *names)]
    for count in sorted({count for count, _ in found}):
        values = [found.get((count, name), one[count]) for name in names]
        cells.append((str(count), *(f"{value:,.0f}" if value else "–" for value in values)))
    return table(cells)
