"""The sweep's config, and the runs that it comes to."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from blpipe.config import Config
from blpipe.config_file import parse_as, parse_config, read_yaml, set_key
from blpipe.config_types import NotNegative, Section, Some
from blpipe.errors import ConfigError

SHORT = {"partition.stages": "K", "method.link.length": "length", "method.link.delay": "d", "method.link.weight": "λ",
         "method.link.reach": "reach", "method.link.take": "take", "method.local_weight": "α",
         "method.head": "head", "method.loss": "loss"}
_NOT_IDENTITY = {"name", "runtime", "checkpoint"}  # what changes nothing of what a run learns

T = TypeVar("T")


class GroupConfig(Section):
    """Rows under one name: the product of the values of each key, and of the seeds.

    sweep: a value, or a list of values, for each dotted key; a value that is a list is a list in the list.
    """

    name: str
    sweep: dict[str, Any] = {}
    seeds: Some[NotNegative] | None = None


class SweepConfig(Section):
    """A whole sweep.

    base: an ordinary config without what the rows vary. groups: in the order of their value.
    cost_reference: the group whose seconds per epoch, at the same K, are 1; else the first BackLink row's are.
    """

    base: dict[str, Any]
    seeds: Some[NotNegative] = (0,)
    groups: Some[GroupConfig]
    cost_reference: str | None = None


@dataclass(frozen=True)
class Run:
    """One training run. `id` stands for all of its config that can change what it learns."""

    id: str
    seed: int
    config: Config


@dataclass(frozen=True)
class Combination:
    """A row of the table: one combination of a group's values, with a run for each seed."""

    group: str
    settings: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def config(self) -> Config:
        """The config of its first seed."""
        return self.runs[0].config

    @property
    def label(self) -> str:
        """The group and its settings on one line."""
        return ", ".join([self.group, *(f"{short(key)} {plain(value)}" for key, value in self.settings.items()
                                        if key != "method.name")])


def load_sweep(path: Path) -> tuple[SweepConfig, list[Combination]]:
    """Read a sweep's file, and check the config of every run.

    Raises:
        ConfigError: with every problem found, each on its own line.
    """
    sweep = parse_as(SweepConfig, read_yaml(path))
    problems = [f"base.{key}: leave it out; {why}" for key, why in
                (("name", "runs are named by their id"), ("seed", "seeds lists the seeds")) if key in sweep.base]
    names = [group.name for group in sweep.groups]
    if sweep.cost_reference is not None and sweep.cost_reference not in names:
        problems.append(f"cost_reference: no group is named {sweep.cost_reference!r}; there are {', '.join(names)}")
    combinations = []
    for number, group in enumerate(sweep.groups):
        try:
            combinations += list(_expand(group, sweep))
        except ConfigError as error:
            problems += [f"groups.{number} ({group.name}): {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(*problems)
    return sweep, combinations


def _expand(group: GroupConfig, sweep: SweepConfig) -> Iterator[Combination]:
    choices = {key: value if isinstance(value, list) else [value] for key, value in group.sweep.items()}
    problems = [f"sweep.{key}: {what}" for key, values in choices.items() for what in _unfit(key, values)]
    found = []
    for values in product(*choices.values()):
        settings = dict(zip(choices, values, strict=True))
        try:
            found.append(Combination(group.name, settings, tuple(_run(sweep.base, settings, seed)
                                                                 for seed in group.seeds or sweep.seeds)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    yield from found


def _unfit(key: str, values: list[Any]) -> Iterator[str]:
    if not values:
        yield "an empty list; give at least one value"
    if not all(key.split(".")):
        yield "must be a key such as method.link.delay"
    if key in ("seed", "name"):
        yield "leave it out; seeds lists the seeds" if key == "seed" else "leave it out; runs are named by their id"


def _run(base: dict[str, Any], settings: dict[str, Any], seed: int) -> Run:
    tree = {**deepcopy(base), "name": "run", "seed": seed}
    for key, value in settings.items():
        set_key(tree, key, deepcopy(value))
    config = parse_config(tree)
    name = identity(config)
    return Run(name, seed, config.model_copy(update={"name": name}))


def identity(config: Config) -> str:
    """The hash of all that can change what a run learns.

    Only what differs from the defaults counts, so that a key which a later version adds changes no identity.
    """
    tree = config.model_dump(exclude=_NOT_IDENTITY, exclude_defaults=True)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def in_order(combinations: Iterable[Combination]) -> list[tuple[Combination, Run]]:
    """Each run once, the most valuable first: the first seed of all rows in the order of the file, then the second."""
    rows = list(combinations)
    found: dict[str, tuple[Combination, Run]] = {}
    for position in range(max((len(row.runs) for row in rows), default=0)):
        for row in rows:
            if position < len(row.runs):
                found.setdefault(row.runs[position].id, (row, row.runs[position]))
    return list(found.values())


def short(key: str) -> str:
    """A key's name in tables."""
    return SHORT.get(key, key.rpartition(".")[2])


def plain(value: Any) -> str:
    """A setting's value in tables: of a part its name, and what else it is given."""
    if isinstance(value, dict):
        name = value.get("name") or value.get("target")
        given = {**value, **value.get("args", {})}
        rest = [f"{key}={plain(one)}" for key, one in given.items()
                if key not in ("name", "target", "args") and one is not None]
        return " ".join([*([str(name)] if name else []), *rest])
    if isinstance(value, list | tuple):
        return "/".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
