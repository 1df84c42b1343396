"""What the rest of the system must know about the data without reading any."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataSpec:
    """Shapes, types and sizes of the prepared data; small and JSON-able.

    Args:
        shape: of one prepared sample, for example (3, 32, 32).
        dtype: of a prepared batch, "float32" or "int64".
        target_shape: of one target, () for a class label; targets are int64.
        classes: how many classes there are.
        train_samples: how many training samples.
        test_samples: how many test samples.
    """

    shape: tuple[int, ...]
    dtype: str
    target_shape: tuple[int, ...]
    classes: int
    train_samples: int
    test_samples: int

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `json` can write."""
        return asdict(self) | {"shape": list(self.shape), "target_shape": list(self.target_shape)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "DataSpec":
        """The spec that `to_json` made `fields` from."""
        shapes = {name: tuple(fields[name]) for name in ("shape", "target_shape")}
        return cls(**{**fields, **shapes})
