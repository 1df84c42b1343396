"""What every data set comes as: its two splits, its classes, its usual normalisation."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blpipe.config import DataConfig
from blpipe.data.splits import LEAVE_OUT, Split, TensorSplit, outside
from blpipe.errors import ConfigError
from blpipe.seeds import generator
from blpipe.text import dtype_name


@dataclass(frozen=True)
class Source:
    """A data set before preparation.

    Args:
        train: the training samples.
        test: the test samples, or those held out for validation in their place.
        classes: see `DataSpec`.
        mean: the default normalisation of values in 0…1, per channel or one for all; None for none.
        std: likewise.
        untransformed: the training samples without the transforms of `augment`; None where nobody needs them.
        tested: the name of the split that `test` is of, "test" or, where its samples are held out, "train".
    """

    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...] | None = (0.5,)
    std: tuple[float, ...] | None = (0.5,)
    untransformed: Split | None = None
    tested: str = "test"

    def on(self, device: torch.device) -> "Source":
        """The same data set, what of it is in memory on `device`."""
        train, test = (split.to(device) if isinstance(split, TensorSplit) else split for _, split in self.splits())
        return replace(self, train=train, test=test)

    @property
    def nbytes(self) -> int | None:
        """Bytes of all samples and targets; None where some are not in memory."""
        if isinstance(self.train, TensorSplit) and isinstance(self.test, TensorSplit):
            return self.train.nbytes + self.test.nbytes
        return None

    @property
    def labelled(self) -> bool:
        """Whether targets are labels of classes, and no values."""
        return not self.train.target_dtype.is_floating_point

    def splits(self) -> list[tuple[str, Split]]:
        """Both splits with their names."""
        return [("train", self.train), (self.tested, self.test)]


def notes_on_layout(source: Source) -> list[str]:
    """A note where images seem to have their channels last: they would train as if their rows were the channels."""
    shape = source.train.shape
    if source.train.dtype != torch.uint8 or len(shape) != 3 or shape[2] not in (1, 3) or shape[0] in (1, 3):
        return []
    return [f"data: uint8 samples of {list(shape)} are taken as images of {shape[0]} channels; if these are last, give "
            "[N, C, H, W], such as by moveaxis(x, -1, 1)"]


def class_count(labels: Tensor, key: str) -> int:
    """1 + the largest label. Raises ConfigError where a training label is negative, but for `IGNORED` positions."""
    negative = outside(labels, 1 + int(labels.max()), labels.dim() > 1 and int(labels.max()) >= 0)
    if bool(negative.any()):
        raise ConfigError(f"{key}: {_found(labels, negative, 'train')} is negative; mend the data")
    return 1 + int(labels.max())


def check_fits_model(source: Source, classes: int) -> None:
    """Raises ConfigError where a label lies outside 0…classes-1, or may, where none is known up front."""
    for name, split in source.splits():
        if split.labels is None:
            if source.labelled and source.classes > classes:
                raise ConfigError(f"data: the data have {source.classes} classes, and the model gives {classes} "
                                  f"logits; have it give {source.classes}")
            continue
        wrong = outside(split.labels, classes, split.labels.dim() > 1)
        if bool(wrong.any()):
            needed = 1 + max(int(other.labels.max()) for _, other in source.splits() if other.labels is not None)
            leave_out = f", {LEAVE_OUT}" if split.labels.dim() > 1 else ""
            raise ConfigError(f"data: {_found(split.labels, wrong, name, split.places)} lies outside 0..{classes - 1}, "
                              f"of which the model gives logits; have it give {needed}{leave_out}, or mend the data")


def check_known_labels(source: Source) -> None:
    """Raises ConfigError where a label known up front is none of the classes that training knows."""
    for name, split in source.splits():
        if split.labels is None:
            continue
        wrong = outside(split.labels, source.classes, split.labels.dim() > 1)
        if bool(wrong.any()):
            raise ConfigError(f"data: {_found(split.labels, wrong, name)} is none of the {source.classes} "
                              f"classes, 0..{source.classes - 1}; mend the data")


def check_alike(source: Source) -> None:
    """Raises ConfigError where train and test differ in shape or type, or either is empty."""
    for name, split in source.splits():
        if len(split) == 0 or 0 in split.shape + split.target_shape:
            raise ConfigError(f"data: {name} is empty: {len(split)} samples of {list(split.shape)}; "
                              "give at least one")
    kinds = [(split.dtype, list(split.shape), split.target_dtype, list(split.target_shape))
             for _, split in source.splits()]
    if kinds[0] != kinds[1]:
        train, test = (f"{dtype_name(dtype)} {shape} with target {dtype_name(target_dtype)} {target}"
                       for dtype, shape, target_dtype, target in kinds)
        raise ConfigError(f"data: train samples are {train}, but test samples are {test}; make them alike")


def keep_first(source: Source, config: DataConfig) -> Source:
    """The source cut to `train_samples` and `test_samples`. Raises ConfigError where there are fewer."""
    kept: dict[str, Any] = {}
    for name, split in source.splits():
        count = getattr(config, f"{name}_samples")
        if count is None:
            continue
        if count > len(split):
            raise ConfigError(f"data.{name}_samples: {count} is more than there are; at most {len(split)}")
        kept[name] = split.first(count)
    return replace(source, **kept)


def hold_out(source: Source, config: DataConfig) -> Source:
    """The source with `validation_samples` of its training samples, untransformed, in place of the test samples.

    They are drawn at random, the same ones for every seed of a run: runs are to choose by the same samples.

    Raises:
        ConfigError: none would be left to train on.
    """
    held, count = config.validation_samples, len(source.train)
    if held is None:
        return source
    if held >= count:
        raise ConfigError(f"data.validation_samples: {held} of {count} training samples would leave none to train on; "
                          f"hold out at most {count - 1}")
    order_N = torch.randperm(count, generator=generator(0, "validation"))
    held_N, rest_N = order_N[:held].sort().values, order_N[held:].sort().values
    prepared_as_test = source.train if source.untransformed is None else source.untransformed
    return replace(source, train=source.train.part(rest_N), test=prepared_as_test.part(held_N), untransformed=None,
                   tested="train")


def _found(labels: Tensor, wrong: Tensor, name: str, places: Tensor | None = None) -> str:
    """The first wrong label and its index: in the labels, or of the sample that `places` says it is of."""
    place = wrong.nonzero()[0].tolist()
    sample = place[0] if places is None else int(places[place[0]])
    index = sample if len(place) == 1 else [sample, *place[1:]]
    return f"{name} label {int(labels[tuple(place)])} at index {index}"
