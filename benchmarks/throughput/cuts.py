"""The balanced cuts of a case, each by the costs of the methods that have them."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.throughput.rows import BALANCES, ROWS
from benchmarks.throughput.settings import config_of
from blpipe.config import Config
from blpipe.data import open_data
from blpipe.errors import ConfigError
from blpipe.forecast.costs import FREE, Profile, profile
from blpipe.forecast.stages import settle
from blpipe.plan import make_network


class CaseCosts:
    """What the blocks and heads of one network cost, looked at once for each size of a microbatch and kind of head."""

    def __init__(self, device: torch.device):
        self.device = device
        self._known: dict[tuple[int, Hashable], Profile] = {}

    def of(self, config: Config) -> Profile:
        """The costs for a config of the network; where it leaves out heads, those of any other of the same size."""
        size, head = config.train.microbatch_size, config.method.stage_head(0)
        key = size, head.model_dump_json()
        if key not in self._known:
            alike = [costs for (other, _), costs in self._known.items() if other == size and head.left_out]
            self._known[key] = alike[0] if alike else self._look(config)
        return _under(self._known[key], config)

    def _look(self, config: Config) -> Profile:
        data = open_data(config.data, config.seed)
        return profile(make_network(config, data.spec), self.device,
                       data if config.partition.costs == "measured" else None)


def _under(costs: Profile, config: Config) -> Profile:
    """The same costs for another config of the network, whose heads are the same or left out."""
    *inner, last = costs.heads
    if config.method.stage_head(0).left_out:
        inner = [FREE for _ in inner]
    return replace(costs, network=replace(costs.network, config=config), heads=[*inner, last])


def find_cuts(tree: dict[str, Any], methods: Sequence[str], microbatches: int, device: torch.device
              ) -> dict[str, list[str]]:
    """The blocks that later stages begin with, for every kind of `BALANCES` that the methods have.

    Raises:
        ConfigError: a model that does not fit the data, or has too few blocks.
    """
    kinds, costs = {ROWS[method].cuts for method in methods}, CaseCosts(device)
    found = {}
    for kind, balance in BALANCES.items():
        if kind in kinds:
            stages = tree["partition"]["stages"] * balance.virtual // balance.replicas
            config = config_of(tree, balance, {**tree["partition"], "stages": stages}, microbatches)
            found[kind] = _cuts(config, costs.of(config), balance.virtual)
    return found


def _cuts(config: Config, costs: Profile, virtual: int) -> list[str]:
    stages, names = config.partition.stage_count, costs.network.block_names
    if stages > len(names):
        what = "schedules with two stages a process need" if virtual > 1 else "they need"
        raise ConfigError(f"stages: {stages // virtual}: {what} {stages} blocks, and {config.name} has {len(names)}; "
                          "use fewer stages")
    return list(settle(config, costs.network, costs).partition.cuts or ())
