"""A split: raw samples and their targets, fetched batch by batch, from memory or from a map-style Dataset."""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blpipe import launch
from blpipe.config import DataConfig
from blpipe.device import transfer
from blpipe.errors import ConfigError, UserError, one_line
from blpipe.seeds import derive_seed, fixed_randomness
from blpipe.specs import IGNORED
from blpipe.text import dtype_name

_GRACE_SECONDS = 30.0  # between SIGTERM and the end of a worker whose process has not let it go
_SIGNALS = {signal.SIGTERM, signal.SIGINT}
LEAVE_OUT = f"give {IGNORED} where a position is to be left out"

Request = tuple[tuple[int, *tuple[int | str, ...]], Tensor]
"""One batch to fetch: what the seed of all that is random in fetching it derives from, and indices, int64 [B]."""


@dataclass(frozen=True)
class TensorSplit:
    """Samples in memory, the host's or a device's.

    Args:
        x: [N, …], uint8 images, float32 or int64.
        y: [N, …], int64 labels or float32 values.
        places: int64 [N], which samples of the data these are; None for the first ones.
    """

    x: Tensor
    y: Tensor
    places: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The type of a raw sample."""
        return self.x.dtype

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The shape of one target."""
        return tuple(self.y.shape[1:])

    @property
    def target_dtype(self) -> torch.dtype:
        """The type of a target."""
        return self.y.dtype

    @property
    def labels(self) -> Tensor | None:
        """Every label [N, …]; None where targets are values."""
        return None if self.y.is_floating_point() else self.y

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.x.device

    def first(self, count: int) -> "TensorSplit":
        """The first `count` samples alone."""
        return replace(self, x=self.x[:count], y=self.y[:count])

    def part(self, index_N: Tensor) -> "TensorSplit":
        """The samples at these indices alone, copied, so that they take no more memory than they need."""
        return TensorSplit(self.x[index_N], self.y[index_N], _places_of_part(self.places, index_N))

    @property
    def nbytes(self) -> int:
        """Bytes of all samples and targets."""
        return self.x.nbytes + self.y.nbytes

    def to(self, device: torch.device) -> "TensorSplit":
        """The same samples on `device`."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def batches(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, Tensor]]:
        """Copies of the requested batches, where the data are, so that nobody's in-place operation reaches them."""
        for _, index_B in requests:
            index_B = transfer(index_B, self.x.device)
            yield self.x[index_B], self.y[index_B]


@dataclass(frozen=True)
class DatasetSplit:
    """Samples that a Dataset makes one by one, in `workers` processes (0: in this one).

    Every sample and target has the shape and type of the first, and labels lie in 0…classes-1; both are checked on
    every batch. `where` names the data in messages, for example "data.target: train". With `skip`, the next sample
    that can be read stands in for one that cannot; `skipped` collects a line about each of these, by index.
    `places`, int64 [N], are the indices of these samples in the Dataset; None for the first ones.
    """

    dataset: Dataset[Any]
    count: int
    classes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    target_shape: tuple[int, ...]
    target_dtype: torch.dtype
    labels: Tensor | None
    where: str
    workers: int
    skip: bool
    skipped: dict[int, str] = field(default_factory=dict)
    places: Tensor | None = None

    @classmethod
    def open(cls, dataset: Dataset[Any], classes: int, labels: Tensor | None, where: str,
             config: DataConfig) -> "DatasetSplit":
        """A split over all of `dataset`, whose first sample gives the shapes.

        Args:
            dataset: map-style, of (tensor, number or tensor).
            classes: how many there are; where targets are values, of no meaning.
            labels: every label int64 [N, …], where they are known up front.
            where: names the data in messages.
            config: its `workers` and `bad_samples`.

        Raises:
            ConfigError: it is empty, or its first sample is of no use.
        """
        count = length(dataset, where)
        if count == 0:
            raise ConfigError(f"{where} has no samples; give it at least one")
        try:
            with fixed_randomness(0):
                found = first_readable(dataset, range(count), where, config.bad_samples == "skip")
        except UserError as error:
            raise ConfigError(str(error)) from error
        return cls(dataset, count, classes, tuple(found.x.shape), found.x.dtype, tuple(found.y.shape), found.y.dtype,
                   labels, where, config.workers, config.bad_samples == "skip")

    def __len__(self) -> int:
        return self.count

    @property
    def device(self) -> torch.device:
        """Where batches are: on the host."""
        return torch.device("cpu")

    def first(self, count: int) -> "DatasetSplit":
        """The first `count` samples alone."""
        return replace(self, count=count, labels=None if self.labels is None else self.labels[:count])

    def part(self, index_N: Tensor) -> "DatasetSplit":
        """The samples at these indices alone; what is skipped there is told apart from what is skipped here."""
        return replace(self, count=len(index_N), labels=None if self.labels is None else self.labels[index_N],
                       skipped={}, places=_places_of_part(self.places, index_N))

    def place(self, index: int) -> int:
        """The index in the Dataset of the sample with this index."""
        return index if self.places is None else int(self.places[index])

    def batches(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, Tensor]]:
        """The requested batches, the same whatever the number of workers.

        Raises:
            UserError: a sample cannot be read and is not skipped, or does not fit; in a worker, too, one line.
        """
        # A loader without a generator of its own would draw from the global stream, which is a stage's.
        indices = ((derive_seed(*labels), index_B.tolist()) for labels, index_B in requests)
        loader = DataLoader(_Batches(self), batch_size=None, sampler=indices, num_workers=self.workers,
                            generator=torch.Generator(), worker_init_fn=_outlive_signals)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # would end a worker that has just begun
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                x, y, skipped = batch
                self.skipped.update(skipped | self.skipped)  # what was said of a sample before stays
                yield x, y
        finally:
            del batches  # ends the workers now; among what is collected later, it would wait for them in vain


def _outlive_signals(worker: int) -> None:
    """SIGTERM and Ctrl-C come to all processes of a run, which still needs its batches to end between two steps."""
    launch.outlive_sigterm(_GRACE_SECONDS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class _Batches(Dataset[Any]):
    """A DatasetSplit by request, in place of by index; an error is returned, to cross processes as it is."""

    def __init__(self, split: DatasetSplit):
        self.split = split

    def __getitem__(self, request: tuple[int, list[int]]) -> tuple[Tensor, Tensor, dict[int, str]] | UserError:
        seed, indices = request
        with fixed_randomness(seed):
            try:
                samples = [self._checked(index) for index in indices]
            except UserError as error:
                return error
        skipped = {index: line for sample in samples for index, line in sample.skipped.items()}
        return torch.stack([sample.x for sample in samples]), torch.stack([sample.y for sample in samples]), skipped

    def _checked(self, index: int) -> "Sample":
        split = self.split
        places = map(split.place, chain(range(index, split.count), range(index)))
        sample = first_readable(split.dataset, places, split.where, split.skip)
        index, x, y = sample.place, sample.x, sample.y
        first = split.shape, split.dtype, split.target_shape, split.target_dtype
        if (tuple(x.shape), x.dtype, tuple(y.shape), y.dtype) != first:
            raise UserError(f"{split.where} sample {index} is {describe(x)} with target {describe(y)}, but "
                            f"the first is {dtype_name(split.dtype)} {list(split.shape)} with target "
                            f"{dtype_name(split.target_dtype)} {list(split.target_shape)}; make them all alike")
        wrong = torch.zeros(()) if y.is_floating_point() else outside(y, split.classes, y.dim() > 0)
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            at, leave_out = (f" at {place}", f"{LEAVE_OUT}, ") if place else ("", "")
            raise UserError(f"{split.where} sample {index} has the label {int(y[tuple(place)])}{at}, outside "
                            f"0..{split.classes - 1}; {leave_out}mend the data or its number of classes")
        return sample


def _places_of_part(places: Tensor | None, index_N: Tensor) -> Tensor:
    return index_N if places is None else places[index_N]


def outside(labels: Tensor, classes: int, ignorable: bool) -> Tensor:
    """Which labels are none of 0…classes-1, nor `IGNORED` where they may be."""
    found = (labels < 0) | (labels >= classes)
    return found & (labels != IGNORED) if ignorable else found


class Sample(NamedTuple):
    """A sample that could be read, its index, and a line about each one that it stands in for, by index."""

    place: int
    x: Tensor
    y: Tensor
    skipped: dict[int, str]


Split = TensorSplit | DatasetSplit


def usable(x: Tensor) -> Tensor | None:
    """`x` as the system works with it: uint8 as it is, floats as float32, integers as int64, else None."""
    x = x.detach()  # one with a gradient could not pass between processes
    if x.dtype == torch.uint8:
        return x
    if x.is_floating_point():
        return x.to(torch.float32)
    return x.to(torch.int64) if _is_integer(x) else None


def usable_target(y: Any) -> Tensor | None:
    """`y`, a tensor, array or number, as int64 labels or float32 values; None where it holds neither."""
    try:
        y = torch.as_tensor(y).detach()
    except Exception:  # whatever it is, it is no tensor
        return None
    if y.is_floating_point():
        return y.to(torch.float32)
    return y.to(torch.int64) if _is_integer(y) else None


def as_tensor(value: Any) -> Tensor | None:
    """A tensor as it is, an array as a tensor of its memory where it can be; None of anything else."""
    if not isinstance(value, np.ndarray):
        return value if isinstance(value, Tensor) else None
    try:
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except (TypeError, ValueError):  # objects, texts, another byte order
        return None


def sample_tensor(sample: Any) -> Tensor | None:
    """The usable tensor of a sample, a pair of that (or an array) and its target; None of anything else."""
    x = as_tensor(sample[0]) if isinstance(sample, tuple | list) and len(sample) == 2 else None
    return None if x is None else usable(x)


def length(value: Any, where: str) -> int:
    """len(value), of what messages call `where`. Raises ConfigError where that raises."""
    try:
        return len(value)
    except Exception as error:
        raise ConfigError(f"{where}: its length cannot be read: {type(error).__name__}: {one_line(error)}; have "
                          "__len__ give a whole number") from error


def describe(value: Any) -> str:
    """What a value is, in messages: "uint8 [3, 32, 32]", or its type's name."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(describe(v) for v in value[:4])}{', …' if len(value) > 4 else ''})"
    return type(value).__name__


def first_readable(dataset: Dataset[Any], places: Iterable[int], where: str, skip: bool) -> Sample:
    """The first sample of those at `places`; with `skip`, the first that can be read.

    Raises:
        UserError: it cannot be read, with `skip` none of them can, or it is no (tensor, number or tensor).
    """
    reasons: dict[int, str] = {}
    for index in places:
        try:
            x, y = _sample(dataset, index, where)
        except _UnreadableError as error:
            if not skip:
                raise UserError(f"{error}; mend or remove it, or set data.bad_samples=skip") from error
            reasons[index] = str(error)
        else:
            lines = {bad: f"{reason}; sample {index} stands in for it" for bad, reason in reasons.items()}
            return Sample(index, x, y, lines)
    raise UserError(f"{next(iter(reasons.values()))}; none of the {len(reasons)} samples can be read; mend the data")


class TransformError(UserError):
    """A transform of `data.augment` that does not take an image; the image itself can be read."""


class _UnreadableError(UserError):
    """A sample that its Dataset did not give."""


def _sample(dataset: Dataset[Any], index: int, where: str) -> tuple[Tensor, Tensor]:
    try:
        pair = dataset[index]
    except TransformError as error:
        raise UserError(f"{error} ({where} sample {index}); change or remove it") from error
    except UserError as error:
        raise _UnreadableError(f"{where} sample {index}: {one_line(error)}") from error
    except Exception as error:
        raise _UnreadableError(f"{where} sample {index}: cannot be read: {type(error).__name__}: "
                               f"{one_line(error)}") from error
    x = sample_tensor(pair)
    y = None if x is None else usable_target(pair[1])
    if x is not None and y is not None:
        return x, y
    raise UserError(f"{where} sample {index} is {describe(pair)}; expected (tensor or array, number or tensor)")


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.is_quantized or x.dtype == torch.bool)
