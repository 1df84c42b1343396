"""What is compared: methods, numbers of stages, and ways to cut the network."""

from dataclasses import dataclass, field, replace
from itertools import product
from math import isqrt
from typing import Any, Literal

from benchmarks.methods import BACKLINK, JOINT, LAST_LOSS, late
from blpipe.config import Config
from blpipe.config_file import parse_config
from blpipe.models.resnet_cifar import resnet_cifar
from blpipe.specs import DataSpec

Part = Literal["local", "pipeline", "microbatches"]
Cut = Literal["even", "least", "limit"]

GOAL = 0.79  # what the paper saves of bp's memory
DEFAULT = {"name": "backlink", "link": {"length": 1, "delay": 1, "keep": "graph"}}  # of a pipeline


@dataclass(frozen=True)
class Case:
    """A method.

    Args:
        name: as tables show it.
        method: the config's section.
        checkpoint: the segments of activation checkpointing: "none"; of "one" block or of "two"; "√N" of them; the
            "stages" of the even cut.
        recompute: `train.recompute`.
    """

    name: str
    method: dict[str, Any] = field(hash=False)
    checkpoint: Literal["none", "one", "two", "√N", "stages"] = "none"
    recompute: bool = False

    def segments(self, blocks: int, stages: int) -> int | None:
        """How many segments so many blocks have, which go into so many stages; None without checkpointing."""
        return {"none": None, "one": blocks, "two": max(blocks // 2, 1), "√N": isqrt(blocks),
                "stages": stages}[self.checkpoint]


@dataclass(frozen=True)
class Size:
    """The network, the batch, the values of K, and how it is computed: `train.precision`, `train.channels_last`."""

    depth: int
    batch: int
    stages: tuple[int, ...]
    precision: str = "float32"
    channels_last: bool = False

    def config(self, case: Case, stages: int, microbatches: int = 1, **partition: Any) -> Config:
        """The config of a case in K stages.

        Raises:
            ConfigError: the options do not fit together.
        """
        return parse_config({
            "name": "memory",
            "model": {"name": "resnet_cifar", "args": {"depth": self.depth}},
            "data": {"name": "synthetic", "args": {"shape": [3, 32, 32], "classes": 10, "samples": self.batch}},
            "partition": partition if "cuts" in partition else {"stages": stages, **partition},
            "method": case.method,
            "optimizer": {"name": "sgd", "lr": 0.01, "args": {"momentum": 0.9}},
            # Of tensors without values nobody can say whether a loss is finite.
            "train": {"batch_size": self.batch, "microbatches": microbatches, "on_nonfinite": "ignore",
                      "precision": self.precision, "channels_last": self.channels_last, "recompute": case.recompute}})

    def key(self) -> dict[str, Any]:
        """What the rows of this size are known by."""
        return {"depth": self.depth, "batch": self.batch, "precision": self.precision,
                "channels_last": self.channels_last}

    def has(self, row: dict[str, Any]) -> bool:
        """Whether a row of the results is of this size."""
        return all(row[name] == value for name, value in self.key().items())

    def blocks(self) -> int:
        """How many blocks the network has.

        Raises:
            ValueError: there is no ResNet of that depth.
        """
        return len(resnet_cifar(self.depth))

    def data(self, steps: int) -> DataSpec:
        """As of a data set that holds so many batches."""
        return DataSpec((3, 32, 32), "float32", (), 10, steps * self.batch, self.batch)


@dataclass(frozen=True)
class Task:
    """One row to measure.

    Args:
        part: all stages in one process (local); each in its own, with whole batches (pipeline) or with K microbatches.
        cut: "even"; that whose largest stage needs "least"; the fastest within the goal's "limit".
    """

    part: Part
    case: Case
    stages: int
    cut: Cut = "even"

    @property
    def microbatches(self) -> int:
        """M."""
        return self.stages if self.part == "microbatches" else 1

    @property
    def parts(self) -> int:
        """How many stages the network is cut into: in one process bp has a single one."""
        return 1 if self.part == "local" and self.case.method["name"] == "bp" else self.stages

    def key(self, size: Size) -> dict[str, Any]:
        """What the row is known by."""
        return {"part": self.part, "method": self.case.name, "stages": self.stages, "cut": self.cut, **size.key()}


BP = Case("bp", {"name": "bp"})
GREEDY = Case("greedy", {"name": "greedy"})
CHECKPOINTED = [Case("bp, checkpoint every block", BP.method, "one"),
                Case("bp, checkpoint every two blocks", BP.method, "two"),
                Case("bp, checkpoint √N segments", BP.method, "√N"),
                Case("bp, checkpoint K segments", BP.method, "stages")]

WHOLE_BATCHES = [Case("joint, d = 0", late(JOINT, 0)), Case("joint, d = 1", late(JOINT, 1)),
                 Case("last loss, d = 1", late(LAST_LOSS, 1))]


def backlink(length: int | str, delay: int, keep: str = "graph") -> Case:
    """BackLink with such a link."""
    case = Case(f"BackLink, length {length}, d = {delay}",
                {"name": "backlink", "link": {"length": length, "delay": delay, "keep": "graph"}})
    return case if keep == "graph" else inputs_kept(case)


def inputs_kept(case: Case) -> Case:
    """The same with `link.keep: recompute`."""
    link = case.method["link"] | {"keep": "recompute"}
    return replace(case, name=f"{case.name}, recompute", method=case.method | {"link": link})


def recomputed(case: Case) -> Case:
    """The same with `train.recompute`."""
    return replace(case, name=f"{case.name}, blocks recomputed", recompute=True)


MICROBATCHES = [Case("BackLink, length 1, d = 1/M", late(BACKLINK, "1/M")), Case("joint, d = 1/M", late(JOINT, "1/M")),
                Case("last loss, d = 1/M", late(LAST_LOSS, "1/M"))]
INPUTS_KEPT = [inputs_kept(case) for case in MICROBATCHES]
RECOMPUTED = [recomputed(case) for case in (GREEDY, backlink(1, 0), backlink(1, 1), backlink("all", 1))]


def links(lengths: tuple[int | str, ...], delays: tuple[int, ...]) -> list[Case]:
    """BackLink with all of these links."""
    return [backlink(*link) for link in product(lengths, delays, ("graph", "recompute"))]


def tasks(part: Part, size: Size, linked: list[Case]) -> list[Task]:
    """The rows of a part. Links longer than 1, and cuts that are not even, at the largest K alone."""
    short, most = [GREEDY, *filter(_is_short, linked)], size.stages[-1:]
    longer = [case for case in linked if not _is_short(case)]
    if part == "microbatches":
        every = [BP, *CHECKPOINTED, *short, *MICROBATCHES, *INPUTS_KEPT, *RECOMPUTED,
                 *map(recomputed, (*MICROBATCHES, *INPUTS_KEPT))]
        return _rows(part, every, size.stages, "even")
    every = [*short, *WHOLE_BATCHES, *RECOMPUTED]
    rows = [*_rows(part, every, size.stages, "even"), *_rows(part, short, most, "least"),
            *_rows(part, longer, most, "even")]
    if part == "pipeline":
        return rows + _rows(part, [case for case in short if case.method == DEFAULT], most, "limit")
    # In one process bp does not depend on K, but for the segments that do.
    whole = [Task(part, case, 1) for case in (BP, *CHECKPOINTED[:-1])]
    return whole + _rows(part, CHECKPOINTED[-1:], size.stages, "even") + rows


def in_order(pending: list[Task], size: Size) -> list[Task]:
    """The most telling first: bp, then the largest K, then longer links."""
    def rank(task: Task) -> tuple[bool, int, bool]:
        length = task.case.method.get("link", {}).get("length", 1)
        return length != 1, -task.stages if task.stages > 1 else -size.stages[-1] - 1, task.part == "microbatches"
    return sorted(pending, key=rank)


def _is_short(case: Case) -> bool:
    return bool(case.method["link"]["length"] == 1)


def _rows(part: Part, cases: list[Case], stages: tuple[int, ...], cut: Cut) -> list[Task]:
    return [Task(part, case, count, cut) for count in stages for case in cases]
