"""What is to be measured: the config, and for each case the model, its batches and its cuts."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from benchmarks.throughput.rows import COMPARED, METHODS, REPLICAS, Balance, Row
from blpipe.config import Config
from blpipe.config_file import parse_as, parse_config, read_yaml
from blpipe.config_types import Positive, Section
from blpipe.errors import ConfigError
from blpipe.plugins import did_you_mean

DRAINING = 2  # steps after a window, in which pipelines drain: they do so once an epoch, which has hundreds of steps
OWN_SPEED = "own speed"  # of the slowest stage, without neighbours


class AimConfig(Section):
    """A ratio to reach: the samples/s of `method` over those of the method `over`, or over its own speed."""

    method: str
    over: str
    at_least: Annotated[float, Field(gt=0.0)]


class CaseConfig(Section):
    """A model, and what is to be reached with it. `data` and `batch_size` stand over those of `base`."""

    model: Any
    data: Any = None
    batch_size: Positive | None = None
    aims: tuple[AimConfig, ...] = Field(default=(), strict=False)


class ThroughputConfig(Section):
    """The whole measurement.

    base: an ordinary config without name, model, method and cuts; `samples` of its data follows from
    the steps. head: of the methods that have no heads of their own. methods: these alone, and 1F1B and DDP, which they
    are compared with. microbatches: of BackLink d=0 and of torch's schedules. A window is `warmup` steps that are not
    timed, then `steps` that are, then two in which the pipelines drain. own_speed: whether each process is also
    measured without neighbours.
    """

    base: dict[str, Any]
    head: Any = None
    methods: tuple[str, ...] = Field(default=METHODS, strict=False)
    stages: Positive = 2
    microbatches: Positive = 8
    rounds: Positive = 5
    steps: Positive = 8
    warmup: Positive = 3
    own_speed: bool = True
    cases: dict[str, CaseConfig]

    @property
    def measured(self) -> list[str]:
        """The methods that are measured, in order; replicas only with an even number of stages."""
        return [method for method in METHODS if method in (*self.methods, *COMPARED)
                and (method != REPLICAS or self.stages % 2 == 0)]


def load_settings(path: Path, changes: dict[str, Any]) -> ThroughputConfig:
    """Read the config at `path`, put `changes` over its keys, and check it.

    Raises:
        ConfigError: with the problems found, each on its own line with its key.
    """
    settings = parse_as(ThroughputConfig, read_yaml(path) | changes)
    problems = [f"methods: unknown {method!r}{did_you_mean(method, dict.fromkeys(METHODS))}; some of "
                f"{', '.join(METHODS)}" for method in settings.methods if method not in METHODS]
    problems += [f"base.{key}: leave it out; {why}" for key, why in
                (("name", "cases have names"), ("model", "cases have models"), ("method", "all of them are measured"))
                if key in settings.base]
    for name, case in settings.cases.items():
        aims = [(f"cases.{name}.aims.{i}", aim) for i, aim in enumerate(case.aims)]
        for key, value, known in [(f"{key}.method", aim.method, settings.measured) for key, aim in aims] \
                + [(f"{key}.over", aim.over, [*settings.measured, *[OWN_SPEED] * settings.own_speed])
                   for key, aim in aims]:
            if value not in known:
                problems.append(f"{key}: unknown {value!r}{did_you_mean(value, dict.fromkeys(known))}; "
                                f"one of {', '.join(known)}")
    if settings.stages < 2:
        problems.append("stages: 1 leaves nothing to compare; use 2 or more")
    if settings.microbatches < settings.stages:
        problems.append(f"microbatches: {settings.microbatches} are fewer than the {settings.stages} stages, and "
                        "torch's 1F1B wants as many; use more, or fewer stages")
    if problems:
        raise ConfigError(*problems)
    return settings


def case_tree(settings: ThroughputConfig, name: str, device: str) -> dict[str, Any]:
    """The config of a case as `parse_config` takes it, cuts still to be found.

    Raises:
        ConfigError: a batch that does not divide among the microbatches and the processes, or a wrong key.
    """
    case, base = settings.cases[name], settings.base
    train = base.get("train", {}) | ({"batch_size": case.batch_size} if case.batch_size else {})
    data = case.data or base.get("data", {})
    tree = {**base, "name": re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-."), "model": case.model,
            "partition": {**base.get("partition", {}), "stages": settings.stages, "strategy": "balanced"},
            "train": train, "runtime": {**base.get("runtime", {}), "device": device, "progress": False}}
    batch, parts = parse_config(tree).train.batch_size, settings.stages * settings.microbatches
    if batch % parts:
        raise ConfigError(f"cases.{name}: a batch of {batch} does not divide among {settings.microbatches} "
                          f"microbatches and {settings.stages} processes; use a multiple of {parts}")
    samples = (settings.warmup + settings.steps + DRAINING) * batch
    if settings.head is not None:
        tree["method"] = {"head": settings.head}
    tree["data"] = {**data, "args": {**data.get("args", {}), "samples": samples}}
    return tree


def config_of(tree: dict[str, Any], what: Row | Balance, partition: dict[str, Any], microbatches: int) -> Config:
    """The config of a case for one method, or for the costs of one: its batches are whole, or cut into microbatches."""
    return parse_config({
        **tree, "method": {**tree.get("method", {}), **what.method}, "partition": partition,
        "train": {**tree["train"], "microbatches": 1 if what.whole else microbatches, "replicas": what.replicas}})
