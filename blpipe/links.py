"""Which errors come back to each stage, and how far they run through it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blpipe.config import MethodConfig
from blpipe.config_types import WirePrecision


@dataclass(frozen=True)
class Links:
    """What goes back through one stage.

    Args:
        hops_in: the errors that come back for each microbatch, in order; hop j is that of the loss j stages on.
        hops_out: those that the stage before wants; hop 1 is of this stage's own loss.
        tail: how many of the last blocks the errors run through; 0 where none comes, all where one is passed on.
        weight: λ.
        local_weight: α.
        joint: whether the tail takes its local gradient together with the error.
        late: whether errors come after the step that follows their forward.
        take: whether each of them trains the stage, or the last to come alone.
        keep: the tail's graph until its errors are there, or its input alone.
        normalize: whether a link gradient is scaled to the norm of the local one.
        wire: the precision of errors under way.
    """

    hops_in: tuple[int, ...] = ()
    hops_out: tuple[int, ...] = ()
    tail: int = 0
    weight: float = 1.0
    local_weight: float = 1.0
    joint: bool = False
    late: bool = True
    take: Literal["every", "farthest"] = "every"
    keep: Literal["graph", "recompute"] = "graph"
    normalize: bool = False
    wire: WirePrecision = "full"

    @property
    def passes_on(self) -> bool:
        """Whether errors that come back go on to the stage before."""
        return any(hop + 1 in self.hops_out for hop in self.hops_in)

    @property
    def need_all_blocks(self) -> bool:
        """Whether errors must run through all blocks of the stage: they go on, or nothing else trains it."""
        return self.passes_on or self.local_weight == 0.0


def hops(method: MethodConfig, stages: int) -> list[tuple[int, ...]]:
    """The errors that come back to each stage for a microbatch, in order; hop j is that of the loss j stages on."""
    link, found = method.link, [set[int]()]
    if not method.linked:
        return [()] * stages
    for k in range(stages - 1):
        after = stages - 1 - k
        farthest = after if link.reach == "all" else min(link.reach, after)
        own = range(1 if link.take == "every" else farthest, farthest + 1) if link.stage_weight(k) else ()
        # Even a stage of weight 0 passes on what the one before it wants.
        found.append({*own, *(hop - 1 for hop in found[-1] if hop > 1)})
    return [*(tuple(sorted(each)) for each in found[1:]), ()]


def stage_links(method: MethodConfig, sizes: Sequence[int]) -> list[Links]:
    """What goes back through each of the stages with these numbers of blocks."""
    link, links, before = method.link, [], tuple[int, ...]()
    for k, (size, hops_in) in enumerate(zip(sizes, hops(method, len(sizes)), strict=True)):
        last = k == len(sizes) - 1
        length = size if link.length == "all" else min(link.length, size)
        alpha = 1.0 if last or method.name == "bp" else method.local_weight
        links.append(Links(hops_in, before, length if hops_in else 0, 0.0 if last else link.stage_weight(k), alpha,
                           link.joint and bool(hops_in and alpha), link.delay > 0, link.take, link.keep, link.normalize,
                           link.wire))
        before = hops_in
    return links


def fitting(method: MethodConfig, stages: int | None = None) -> MethodConfig:
    """The method for so many stages, or for any number: a list of link weights for others becomes its largest."""
    weight = method.link.weight
    if not isinstance(weight, tuple) or len(weight) + 1 == stages:
        return method
    return method.model_copy(update={"link": method.link.model_copy(update={"weight": max(weight, key=abs)})})
