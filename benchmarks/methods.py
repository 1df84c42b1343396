"""Methods that several benchmarks compare, each a config's section `method`."""

from typing import Any

BACKPROP: dict[str, Any] = {"name": "bp"}
GREEDY: dict[str, Any] = {"name": "greedy"}
BACKLINK: dict[str, Any] = {"name": "backlink", "link": {}}
LARGER_HEADS: dict[str, Any] = {"name": "backlink", "head": "blocks", "link": {"length": "all"}}
JOINT: dict[str, Any] = {"name": "backlink", "link": {"length": "all", "joint": True}}
JOINT_TAIL: dict[str, Any] = {"name": "backlink", "link": {"joint": True}}
LAST_LOSS: dict[str, Any] = {"name": "backlink", "local_weight": 0.0,
                             "link": {"length": "all", "reach": "all", "take": "farthest"}}
HEADLESS: dict[str, Any] = LAST_LOSS | {"head": "none"}


def late(method: dict[str, Any], delay: int | str) -> dict[str, Any]:
    """The method with errors so many batches late, or a microbatch: "1/M"."""
    keys = {"delay": 1, "delay_unit": "microbatch"} if delay == "1/M" else {"delay": delay}
    return method | {"link": method["link"] | keys}
