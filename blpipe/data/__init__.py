"""The data: named sets or the user's own, prepared and handed out in batches.

Batches are pure functions of (seed, epoch, step): nothing here draws from a global random stream.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from blpipe.config import DataConfig
from blpipe.data import prepare, sets
from blpipe.data.folder import imagefolder
from blpipe.data.mixing import Mixing
from blpipe.data.source import (
    Source,
    check_alike,
    check_fits_model,
    check_known_labels,
    hold_out,
    keep_first,
    notes_on_layout,
)
from blpipe.data.splits import DatasetSplit, Request
from blpipe.data.target import from_target
from blpipe.data.transforms import with_transforms
from blpipe.device import free_memory, transfer
from blpipe.errors import ConfigError, UserError
from blpipe.plugins import call, resolve
from blpipe.seeds import derive_seed, fixed_randomness, generator
from blpipe.specs import EVERYTHING, DataSpec, Share
from blpipe.text import dtype_name, human_bytes

__all__ = ["SETS", "Data", "Mixing", "open_data"]

SETS: Mapping[str, Callable[..., Any]] = {
    "arrays": sets.arrays, "cifar10": sets.cifar10, "cifar100": sets.cifar100, "digits": sets.digits,
    "imagefolder": imagefolder, "stl10": sets.stl10, "svhn": sets.svhn, "synthetic": sets.synthetic,
}


class Data:
    """A data set, ready to train on; made by `open_data`.

    Args:
        source: the samples as they are.
        config: how they are prepared.
        device: where they are prepared.
    """

    def __init__(self, source: Source, config: DataConfig, device: torch.device):
        train = source.train
        self._source, self._config, self.device = source, config, device
        self._augment = config.augment
        self._told: set[str] = set()
        usual = config.normalize or source
        self._mean, self._std = (prepare.constants(values, device) for values in (usual.mean, usual.std))
        dtype = "int64" if train.dtype == torch.int64 else "float32"
        self.spec = DataSpec(train.shape, dtype, train.target_shape, source.classes, len(train), len(source.test),
                             dtype_name(train.target_dtype))

    def to(self, device: torch.device) -> "Data":
        """The same data, prepared on `device`, and also held there if `data.place` says so.

        The batches are the same wherever they are prepared. `auto` holds data sets in memory on a GPU where they take
        less than half of what it has free.

        Raises:
            UserError: `data.place` is `device`, and the GPU has too little memory.
        """
        needed = self._source.nbytes
        if needed is None or self._config.place == "host":
            return Data(self._source, self._config, device)
        free = free_memory(device) if device.type == "cuda" else None
        if self._config.place == "auto" and (free is None or 2 * needed >= free):
            return Data(self._source, self._config, device)
        if free is not None and needed > free:
            raise UserError(f"data.place: device, but the samples take {human_bytes(needed)}, and {device} has "
                            f"{human_bytes(free)} free; leave it out")
        return Data(self._source.on(device), self._config, device)

    @property
    def is_held_there(self) -> bool:
        """Whether the samples are held where they are prepared."""
        return self._source.train.device == self.device

    def train_batches(self, seed: int, epoch: int, batch_size: int, drop_last: bool,
                      start_step: int = 0, share: Share = EVERYTHING) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from `start_step` on, in random order and augmented; of each, this share.

        Which samples a batch has, and how it is cropped and flipped, does not depend on the replicas that share it;
        what transforms draw, and a Dataset for itself, does. Targets of pixels are cropped and flipped with the images.

        Yields:
            x float32 [B, …], normalised, or int64 [B, …] as it is; y [B, …], int64 labels or float32 values; on
            `device`. The last batch is smaller where the samples do not divide, unless `drop_last`.

        Raises:
            UserError: a sample cannot be read and is not skipped, or its label is not one of the classes.
        """
        order_N = torch.randperm(len(self._source.train), generator=generator(seed, "order", epoch))
        steps = len(order_N) // batch_size if drop_last else -(-len(order_N) // batch_size)

        batches = order_N.split(batch_size)

        def requests() -> Iterator[Request]:
            for step in range(start_step, steps):
                labels: tuple[int | str, ...] = ("sample", epoch, step, *share.labels)
                yield (seed, *labels), batches[step][share.of(len(batches[step]))]

        for step, (x, y) in enumerate(self._source.train.batches(requests()), start_step):
            count = len(batches[step])
            moves = self._moves(count, seed, "augment", epoch, step)
            ours = None if moves is None else moves[:, share.of(count)]
            yield self._train_batch(x, y, ours)

    def zeros(self, count: int) -> tuple[Tensor, Tensor]:
        """A batch of so many zeros, prepared as those of `train_batches`."""
        train = self._source.train
        x = torch.zeros(count, *train.shape, dtype=train.dtype)
        y = torch.zeros(count, *train.target_shape, dtype=train.target_dtype)
        return self._train_batch(x, y, self._moves(count, 0))

    def _train_batch(self, x: Tensor, y: Tensor, moves_3B: Tensor | None) -> tuple[Tensor, Tensor]:
        y = transfer(y, self.device)
        if moves_3B is not None and prepare.of_pixels(self.spec.target_shape, self.spec.shape):
            y = prepare.augment(y, moves_3B)
        return self._prepared(x, moves_3B), y

    def _moves(self, count: int, seed: int, *labels: int | str) -> Tensor | None:
        """What augmentation does with so many images, int64 [3, B]; None where it neither crops nor flips."""
        crop, flip = self._augment.crop, self._augment.flip
        return prepare.moves(count, crop, flip, generator(seed, *labels)) if crop or flip else None

    def _prepared(self, x: Tensor, moves_3B: Tensor | None = None) -> Tensor:
        """Samples as they are, transferred, augmented and normalised; a transfer before takes the fewest bytes."""
        x = transfer(x, self.device)
        if moves_3B is not None:
            x = prepare.augment(x, moves_3B)
        return prepare.normalise(x, self._mean, self._std)

    def test_batches(self, batch_size: int, share: Share = EVERYTHING) -> Iterator[tuple[Tensor, Tensor]]:
        """Every test sample once, in order, as `train_batches` gives them but not augmented.

        With `data.validation_samples` they are those held out of the training samples. Each of several replicas has
        every n-th whole batch.
        """
        count = len(self._source.test)
        requests = (((0, "sample", start), torch.arange(start, min(start + batch_size, count)))
                    for start in range(0, count, batch_size)[share.replica::share.replicas])
        for x, y in self._source.test.batches(requests):
            yield self._prepared(x), transfer(y, self.device)

    def notes(self) -> list[str]:
        """What the user is to know: a line for each sample that was skipped, new ones since the last call."""
        lines = [line for split in (self._source.train, self._source.test) if isinstance(split, DatasetSplit)
                 for line in split.skipped.values()]
        new = [line for line in lines if line not in self._told]
        self._told.update(new)
        return new

    def notes_on_layout(self) -> list[str]:
        """What of the samples' layout may be a mistake."""
        return notes_on_layout(self._source)

    def check_fits_model(self, classes: int) -> None:
        """Check the labels known up front against a model's number of classes.

        Raises:
            ConfigError: one lies outside 0…classes-1: the split, the index, the label and the remedy.
        """
        check_fits_model(self._source, classes)


def open_data(config: DataConfig, seed: int) -> Data:
    """Open the data that `config` names.

    Args:
        config: the `data` section.
        seed: the run's seed; `synthetic` and what a target draws from torch's global stream follow from it.

    Raises:
        ConfigError: the data cannot be had, are malformed, or do not fit the rest of the section.
    """
    function = resolve("data", config, SETS)
    if config.name in SETS:
        source = call("data", function, config, seed, **config.args)
    else:
        with fixed_randomness(derive_seed(seed, "data")):
            returned = call("data", function, **config.args)
        where = "data.target" if config.target is not None else f"data.name: {config.name!r}"
        source = from_target(returned, config, where)
    check_alike(source)
    problems = list(prepare.problems(config, source.train))
    if problems:
        raise ConfigError(*problems)
    if config.name != "imagefolder":  # which transforms an image before it fits it to its size
        source = with_transforms(source, config, seed)
    check_known_labels(source)
    if config.place == "device" and source.nbytes is None:
        why = "data.augment.transforms run" if config.augment.transforms else "these are read"
        raise ConfigError(f"data.place: device is for data in memory, and {why} sample by sample, on the host; "
                          "leave it out")
    source = hold_out(keep_first(source, config), config)
    return Data(source, config, source.train.device)
