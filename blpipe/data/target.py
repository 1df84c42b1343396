"""The user's own data: what the function at `data.target`, or a registered one, returned, as a Source."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from blpipe.config import DataConfig
from blpipe.data.source import Source, class_count
from blpipe.data.splits import DatasetSplit, Split, TensorSplit, as_tensor, describe, length, usable, usable_target
from blpipe.errors import ConfigError, one_line

EXPECTED = ("expected (train, test), each a pair (x, y) of tensors or arrays [N, …], y of integers (labels) or floats "
            "(values), or a map-style torch Dataset of (tensor or array, number or tensor)")


def from_target(returned: Any, config: DataConfig, where: str) -> Source:
    """Both splits. uint8 is taken as images and normalised to -1…1; floats and integers stay as they are.

    Args:
        returned: by the function.
        config: the `data` section.
        where: the key path that names the function, for messages.

    Raises:
        ConfigError: `returned` is anything else than documented, with what it is and what is expected.
    """
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise ConfigError(f"{where}: returned {describe(returned)}; {EXPECTED}")
    train_where, test_where = f"{where}: train", f"{where}: test"
    train = _split(returned[0], 0, config, train_where)
    classes = _classes(returned[0], train, where)
    if isinstance(train, DatasetSplit):
        train = replace(train, classes=classes)
    test = _split(returned[1], classes, config, test_where)
    pairs = isinstance(train, TensorSplit) and isinstance(test, TensorSplit)
    if pairs and train.labels is not None and test.labels is not None:
        classes = max(classes, 1 + int(test.labels.max()))  # the model may know one that training does not show
    normalisation = (0.5,) if train.dtype == torch.uint8 else None
    return Source(train, test, classes, normalisation, normalisation)


def _pair(pair: Any, where: str) -> TensorSplit:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ConfigError(f"{where} is {describe(pair)}; {EXPECTED}")
    x, y = (as_tensor(part) for part in pair)
    x = None if x is None else usable(x.cpu())
    y = None if y is None else usable_target(y.cpu())
    if x is None or y is None or x.ndim == 0 or y.ndim == 0:
        raise ConfigError(f"{where} is {describe(tuple(pair))}; {EXPECTED}")
    if len(x) != len(y):
        raise ConfigError(f"{where} has {len(x)} samples, but {len(y)} targets; give one for each")
    if x.numel() == 0 or y.numel() == 0:
        raise ConfigError(f"{where} is empty, {describe(tuple(pair))}; give at least one sample")
    return TensorSplit(x, y)


def _split(given: Any, classes: int, config: DataConfig, where: str) -> Split:
    if not isinstance(given, Dataset):
        return _pair(given, where)
    return DatasetSplit.open(given, classes, _labels(given, where), where, config)


def _classes(given: Any, train: Split, where: str) -> int:
    """As many as a Dataset for training says there are, or 1 + the largest label; of values, see `DataSpec`."""
    if train.target_dtype.is_floating_point:
        return train.target_shape[-1] if train.target_shape else 1
    names = _class_names(given, f"{where}: train") if isinstance(given, Dataset) else None
    classes = length(names, f"{where}: train: the attribute classes") if hasattr(names, "__len__") else 0
    if classes > 0:
        return classes
    if train.labels is None:
        raise ConfigError(f"{where}: the train Dataset says neither how many classes there are nor what "
                          "its targets are; give it the attribute classes (their names) or targets (a label "
                          "for each sample)")
    return class_count(train.labels, where)


def _class_names(dataset: Dataset[Any], where: str) -> Any:
    names = _attribute(dataset, "classes", where)
    return _class_names(dataset.dataset, where) if names is None and type(dataset) is Subset else names


def _labels(dataset: Dataset[Any], where: str) -> Tensor | None:
    """Every label, int64 [N, …], of a Dataset that knows them up front."""
    if isinstance(dataset, IterableDataset) or getattr(dataset, "__len__", None) is None:
        raise ConfigError(f"{where} is a {type(dataset).__name__}, which has no length or no order; "
                          f"{EXPECTED}")
    count = length(dataset, where)
    if count == 0:
        raise ConfigError(f"{where} is empty; give at least one sample")
    targets = _attribute(dataset, "targets", where)
    if targets is None:
        counted = type(dataset) is Subset and hasattr(dataset.dataset, "__len__")  # others may change what they take
        return _labels_of_part(dataset, where) if counted else None
    labels = usable_target(targets)
    if labels is None or labels.ndim == 0 or len(labels) != count:
        raise ConfigError(f"{where}: the attribute targets is {describe(targets)}, not a number for each "
                          f"of the {count} samples; mend it or leave it out")
    return None if labels.is_floating_point() else labels


def _labels_of_part(part: Any, where: str) -> Tensor | None:
    labels = _labels(part.dataset, where)
    try:
        return None if labels is None else labels[torch.as_tensor(part.indices)]
    except Exception as error:  # whatever the indices are
        raise ConfigError(f"{where}: the indices of its Subset are none of its Dataset: {one_line(error)}; mend "
                          "them") from error


def _attribute(dataset: Dataset[Any], name: str, where: str) -> Any:
    """An attribute that a Dataset may have, else None; it may be a property, of the user's own."""
    try:
        return getattr(dataset, name, None)
    except Exception as error:
        raise ConfigError(f"{where}: the attribute {name} cannot be read: {type(error).__name__}: {one_line(error)}; "
                          "mend it or leave it out") from error
