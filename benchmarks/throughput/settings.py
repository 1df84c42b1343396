"""What is to be measured: the config, and for each case the model, its batches and its cuts."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from benchmarks.methods import HEADLESS, JOINT, JOINT_TAIL, LARGER_HEADS
from blpipe.config import Config, MethodConfig, PartitionConfig
from blpipe.config_file import parse_as, parse_config, read_yaml
from blpipe.config_types import Positive, Section
from blpipe.data import open_data
from blpipe.errors import ConfigError
from blpipe.forecast.costs import Profile, profile
from blpipe.forecast.stages import settle
from blpipe.plan import make_network
from blpipe.plugins import did_you_mean

REPLICAS = "2 replicas d=1"
METHODS = ("BackLink d=1", "BackLink d=1/M", "BackLink d=0", "larger heads d=1", "joint tail d=1",
           "joint tail d=0", "joint d=1", "joint d=1/M", "joint d=0", "last loss d=1", "last loss d=1/M",
           "no heads d=1", "no heads d=1/M", "greedy", "GPipe", "1F1B", "1F1B, own cuts", "interleaved 1F1B",
           "zero-bubble", "DDP", REPLICAS, "one process")
COMPARED = ("1F1B", "DDP")  # over which the speeds of all are told
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
    the steps. methods: these alone, and 1F1B and DDP, which they are compared with. microbatches: of BackLink d=0 and
    of torch's schedules. A window is `warmup` steps that are not timed, then `steps` that are, then two in which the
    pipelines drain.
    """

    base: dict[str, Any]
    methods: tuple[str, ...] = Field(default=METHODS, strict=False)
    stages: Positive = 2
    microbatches: Positive = 8
    rounds: Positive = 5
    steps: Positive = 8
    warmup: Positive = 3
    cases: dict[str, CaseConfig]

    @property
    def measured(self) -> list[str]:
        """The methods that are measured, in order; replicas only with an even number of stages."""
        return [method for method in METHODS if method in (*self.methods, *COMPARED)
                and (method != REPLICAS or self.stages % 2 == 0)]


class Cuts(NamedTuple):
    """The blocks that later stages begin with.

    Args:
        stages: of K stages, by the costs of BackLink.
        larger_heads: of K stages, by those of BackLink with heads `blocks` and links through all of a stage.
        joint_tail: of K stages, by those of BackLink with a joint backward through the last block.
        joint: of K stages, by those of BackLink with a joint backward through all blocks.
        no_heads: of K stages, by those of the last loss alone.
        backprop: of K stages, by those of backpropagation with microbatches.
        virtual: of 2K stages, by the same, for schedules with two a process.
        replicas: of K/2 stages, by the costs of BackLink with half of every batch; None where K is odd.
    """

    stages: list[str]
    larger_heads: list[str]
    joint_tail: list[str]
    joint: list[str]
    no_heads: list[str]
    backprop: list[str]
    virtual: list[str]
    replicas: list[str] | None


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
                + [(f"{key}.over", aim.over, [*settings.measured, OWN_SPEED]) for key, aim in aims]:
            if value not in known:
                problems.append(f"{key}: unknown {value!r}{did_you_mean(value, dict.fromkeys(known))}; "
                                f"one of {', '.join(known)}")
    if settings.stages < 2:
        problems.append("stages: 1 leaves nothing to compare; use 2 or more")
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
    tree["data"] = {**data, "args": {**data.get("args", {}), "samples": samples}}
    return tree


def find_cuts(config: Config, microbatches: int, device: torch.device) -> Cuts:
    """The balanced cuts: for BackLink from the costs of whole batches, for backpropagation of microbatches.

    Raises:
        ConfigError: a model that does not fit the data, or has too few blocks.
    """
    stages = config.partition.stage_count
    larger, joint_tail, joint, no_heads = (config.model_copy(update={"method": MethodConfig.model_validate(method)})
                                           for method in (LARGER_HEADS, JOINT_TAIL, JOINT, HEADLESS))
    train = config.train.model_copy(update={"microbatches": microbatches})
    backprop = config.model_copy(update={"method": MethodConfig(name="bp"), "train": train})
    virtual = backprop.model_copy(update={"partition": PartitionConfig(stages=2 * stages, strategy="balanced")})
    whole, parts = _costs(config, device), _costs(backprop, device)
    names = whole.network.block_names
    if 2 * stages > len(names):
        raise ConfigError(f"stages: {stages}: schedules with two stages a process need {2 * stages} blocks, and "
                          f"{config.name} has {len(names)}; use fewer stages")

    def cuts(each: Config, costs: Profile) -> list[str]:
        network = replace(costs.network, config=each)
        return list(settle(each, network, replace(costs, network=network)).partition.cuts or ())

    half = None if stages % 2 else _half_of(config)
    return Cuts(cuts(config, whole), cuts(larger, _costs(larger, device)), cuts(joint_tail, whole), cuts(joint, whole),
                cuts(no_heads, _costs(no_heads, device)), cuts(backprop, parts), cuts(virtual, parts),
                None if half is None else cuts(half, _costs(half, device)))


def _half_of(config: Config) -> Config:
    """One of two replicas of half as many stages."""
    partition = PartitionConfig(stages=config.partition.stage_count // 2, strategy="balanced",
                                costs=config.partition.costs)
    return config.model_copy(update={"partition": partition, "train": config.train.model_copy(update={"replicas": 2})})


def _costs(config: Config, device: torch.device) -> Profile:
    data = open_data(config.data, config.seed)
    return profile(make_network(config, data.spec), device, data if config.partition.costs == "measured" else None)
