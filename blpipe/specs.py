"""Shapes, types and sizes: what must be known of tensors and data before there are any."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

Shape = tuple[int, ...]

IGNORED = -100  # the target of a position that is not learned, as of torch's cross-entropy


class TensorSpec(NamedTuple):
    """Shape and dtype of one tensor, batch included."""

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class DataSpec:
    """Shapes, types and sizes of the prepared data; small and JSON-able.

    Args:
        shape: of one prepared sample, for example (3, 32, 32).
        dtype: of a prepared batch, "float32" or "int64".
        target_shape: of one target, () for a class label.
        classes: how many classes there are; of values, how many a target has in its last dimension.
        train_samples: how many training samples, but for those held out.
        test_samples: how many samples are evaluated: test samples, or those held out.
        target_dtype: "int64" for labels, "float32" for values.
    """

    shape: tuple[int, ...]
    dtype: str
    target_shape: tuple[int, ...]
    classes: int
    train_samples: int
    test_samples: int
    target_dtype: str = "int64"

    @property
    def labelled(self) -> bool:
        """Whether targets are labels of classes, and no values."""
        return self.target_dtype == "int64"

    def targets(self, size: int) -> TensorSpec:
        """The targets of so many samples."""
        return TensorSpec((size, *self.target_shape), getattr(torch, self.target_dtype))

    def batch(self, size: int) -> TensorSpec:
        """So many samples together."""
        return TensorSpec((size, *self.shape), getattr(torch, self.dtype))

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `json` can write."""
        return asdict(self) | {"shape": list(self.shape), "target_shape": list(self.target_shape)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "DataSpec":
        """The spec that `to_json` made `fields` from."""
        shapes = {name: tuple(fields[name]) for name in ("shape", "target_shape")}
        return cls(**{**fields, **shapes})


class Share(NamedTuple):
    """What one of the pipeline's replicas takes of every batch."""

    replica: int = 0
    replicas: int = 1

    def of(self, samples: int) -> slice:
        """Of so many samples: as many as every other replica, or one more in the first ones."""
        each, more = divmod(samples, self.replicas)
        start = self.replica * each + min(self.replica, more)
        return slice(start, start + each + (self.replica < more))

    @property
    def labels(self) -> tuple[int, ...]:
        """What its random numbers are seeded with besides, so that replicas draw others than the first."""
        return (self.replica,) if self.replica else ()


EVERYTHING = Share()
