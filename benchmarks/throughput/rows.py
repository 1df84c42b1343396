"""The rows of the table: what each method trains, over which cuts, and by what costs these are found."""

from typing import Any, NamedTuple

from benchmarks.methods import BACKLINK, BACKPROP, GREEDY, HEADLESS, JOINT, JOINT_TAIL, LARGER_HEADS, LAST_LOSS, late


class Row(NamedTuple):
    """One method.

    Args:
        method: a config's section `method`.
        cuts: which of `BALANCES` they are.
        whole: whether batches stay whole; else there are M microbatches.
        replicas: of a pipeline of so many times fewer stages.
    """

    method: dict[str, Any]
    cuts: str = "stages"
    whole: bool = False
    replicas: int = 1


class Balance(NamedTuple):
    """Balanced cuts, by the costs of a method.

    Args:
        whole: of whole batches; else of microbatches.
        virtual: stages a process.
        replicas: of a pipeline of so many times fewer stages, each with its share of a batch.
    """

    method: dict[str, Any]
    whole: bool = True
    virtual: int = 1
    replicas: int = 1


REPLICAS = "2 replicas d=1"
ROWS = {
    "BackLink d=1": Row(late(BACKLINK, 1), whole=True),
    "BackLink d=1/M": Row(late(BACKLINK, "1/M")),
    "BackLink d=0": Row(late(BACKLINK, 0)),
    "larger heads d=1": Row(late(LARGER_HEADS, 1), "larger_heads", whole=True),
    "joint tail d=1": Row(late(JOINT_TAIL, 1), "joint_tail", whole=True),
    "joint tail d=0": Row(late(JOINT_TAIL, 0), "joint_tail"),
    "joint d=1": Row(late(JOINT, 1), "joint", whole=True),
    "joint d=1/M": Row(late(JOINT, "1/M"), "joint"),
    "joint d=0": Row(late(JOINT, 0), "joint"),
    "last loss d=1": Row(late(LAST_LOSS, 1), whole=True),
    "last loss d=1/M": Row(late(LAST_LOSS, "1/M")),
    "no heads d=1": Row(late(HEADLESS, 1), "no_heads", whole=True),
    "no heads d=1/M": Row(late(HEADLESS, "1/M"), "no_heads"),
    "greedy": Row(GREEDY, whole=True),
    "GPipe": Row(BACKPROP),
    "1F1B": Row(BACKPROP),
    "1F1B, own cuts": Row(BACKPROP, "backprop"),
    "interleaved 1F1B": Row(BACKPROP, "virtual"),
    "zero-bubble": Row(BACKPROP, "virtual"),
    "DDP": Row(BACKPROP, whole=True),
    REPLICAS: Row(late(BACKLINK, 1), "replicas", whole=True, replicas=2),
    "one process": Row(BACKPROP, whole=True),
}
METHODS = tuple(ROWS)
COMPARED = ("1F1B", "DDP")  # over which the speeds of all are told
BALANCES = {
    "stages": Balance(BACKLINK),
    "larger_heads": Balance(LARGER_HEADS),
    "joint_tail": Balance(JOINT_TAIL),
    "joint": Balance(JOINT),
    "no_heads": Balance(HEADLESS),
    "backprop": Balance(BACKPROP, whole=False),
    "virtual": Balance(BACKPROP, whole=False, virtual=2),  # for schedules with two stages a process
    "replicas": Balance(BACKLINK, replicas=2),
}
