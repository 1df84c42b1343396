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
from blpipe.data.source import Source, check_alike, check_labels, check_test_labels, keep_first
from blpipe.data.spec import DataSpec
from blpipe.data.splits import Request, fixed_randomness
from blpipe.data.target import from_target
from blpipe.errors import ConfigError
from blpipe.plugins import call, resolve
from blpipe.seeds import derive_seed, generator

__all__ = ["SETS", "Data", "DataSpec", "open_data"]

SETS: Mapping[str, Callable[..., Any]] = {
    "arrays": sets.arrays, "cifar10": sets.cifar10, "cifar100": sets.cifar100, "digits": sets.digits,
    "imagefolder": imagefolder, "stl10": sets.stl10, "svhn": sets.svhn, "synthetic": sets.synthetic,
}


class Data:
    """A data set, ready to train on; made by `open_data`."""

    def __init__(self, source: Source, config: DataConfig, key: str):
        train = source.train
        self._source, self._augment, self._key = source, config.augment, key
        self._mean = config.normalize.mean if config.normalize else source.mean
        self._std = config.normalize.std if config.normalize else source.std
        dtype = "int64" if train.dtype == torch.int64 else "float32"
        self.spec = DataSpec(train.shape, dtype, train.target_shape, source.classes, len(train),
                             len(source.test))

    def train_batches(self, seed: int, epoch: int, batch_size: int, drop_last: bool,
                      start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from `start_step` on, in random order and augmented.

        Yields:
            x float32 [B, …], normalised, or int64 [B, …] as it is; y int64 [B, …]. The last batch is smaller
            where the samples do not divide, unless `drop_last`.

        Raises:
            UserError: a sample cannot be read, or its label is not one of the classes.
        """
        order_N = torch.randperm(len(self._source.train), generator=generator(seed, "order", epoch))
        steps = len(order_N) // batch_size if drop_last else -(-len(order_N) // batch_size)

        def requests() -> Iterator[Request]:
            for step in range(start_step, steps):
                indices = order_N[step * batch_size:(step + 1) * batch_size].tolist()
                yield derive_seed(seed, "sample", epoch, step), indices

        for step, (x, y) in enumerate(self._source.train.batches(requests()), start_step):
            if self._augment.crop or self._augment.flip:
                x = prepare.augment(x, self._augment.crop, self._augment.flip,
                                    generator(seed, "augment", epoch, step))
            yield prepare.normalise(x, self._mean, self._std), y

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every test sample once, in order, as `train_batches` gives them but not augmented."""
        count = len(self._source.test)
        requests = ((derive_seed(0, "sample", start), list(range(start, min(start + batch_size, count))))
                    for start in range(0, count, batch_size))
        for x, y in self._source.test.batches(requests):
            yield prepare.normalise(x, self._mean, self._std), y

    def check_labels(self, classes: int) -> None:
        """Check the labels known up front against a model's number of classes.

        Raises:
            ConfigError: one lies outside 0…classes-1: the split, the index, the label and the remedy.
        """
        check_labels(self._source, classes, self._key)


def open_data(config: DataConfig, seed: int, key: str = "data") -> Data:
    """Open the data that `config` names.

    Args:
        config: the `data` section.
        seed: the run's seed; `synthetic` and what a target draws from torch's global stream follow from it.
        key: the section's key path, for messages.

    Raises:
        ConfigError: the data cannot be had, are malformed, or do not fit the rest of the section.
    """
    function = resolve(key, config, SETS)
    if config.name in SETS:
        source = call(key, function, config, seed, key, **config.args)
    else:
        with fixed_randomness(derive_seed(seed, "data")):
            returned = call(key, function, **config.args)
        where = f"{key}.target" if config.target is not None else f"{key}.name: {config.name!r}"
        source = from_target(returned, config, where)
    check_alike(source, key)
    problems = list(prepare.problems(config, source.train.shape, source.train.dtype, key))
    if problems:
        raise ConfigError(*problems)
    check_test_labels(source, key)
    return Data(keep_first(source, config, key), config, key)
