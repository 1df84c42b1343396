"""The data sets by name, except image folders: functions of the config, the seed and `args`."""

import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blpipe.config import DataConfig
from blpipe.data.source import Source, class_count
from blpipe.data.splits import TensorSplit
from blpipe.errors import ConfigError, one_line
from blpipe.seeds import generator

ARRAYS = {"train_x": ("uint8", "[N, H, W, C]"), "train_y": ("int64", "[N]"),
          "test_x": ("uint8", "[N, H, W, C]"), "test_y": ("int64", "[N]")}

_INFLATED = 1032  # the most that deflate makes of a byte
_HEADER = 1000  # the most characters of a plain array's header, which has some 70


def digits(config: DataConfig, seed: int) -> Source:
    """scikit-learn's 1,797 handwritten digits [1, 8, 8]; every fifth of each class is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x_N1HW = torch.from_numpy(np.round(bunch.images * 255 / 16).astype(np.uint8)).unsqueeze(1)
    y_N = torch.from_numpy(bunch.target.astype(np.int64))
    rank_N = torch.zeros_like(y_N)  # of a sample: how many of its class come before it
    for label in range(10):
        rank_N[y_N == label] = torch.arange(int((y_N == label).sum()))
    test_N = rank_N % 5 == 2
    return Source(TensorSplit(x_N1HW[~test_N], y_N[~test_N]), TensorSplit(x_N1HW[test_N], y_N[test_N]),
                  classes=10, mean=(0.3053,), std=(0.3760,))


def cifar10(config: DataConfig, seed: int) -> Source:
    """CIFAR-10 [3, 32, 32] as torchvision reads it."""
    return Source(*_torchvision("CIFAR10", "train", (True, False), config), classes=10,
                  mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def cifar100(config: DataConfig, seed: int) -> Source:
    """CIFAR-100 [3, 32, 32], the 100 fine labels, as torchvision reads it."""
    return Source(*_torchvision("CIFAR100", "train", (True, False), config), classes=100,
                  mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))


def svhn(config: DataConfig, seed: int) -> Source:
    """SVHN's cropped digits [3, 32, 32], without the extra ones, as torchvision reads it."""
    return Source(*_torchvision("SVHN", "split", ("train", "test"), config), classes=10,
                  mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970))


def stl10(config: DataConfig, seed: int) -> Source:
    """STL-10's labelled images [3, 96, 96] as torchvision reads it."""
    return Source(*_torchvision("STL10", "split", ("train", "test"), config), classes=10,
                  mean=(0.4467, 0.4398, 0.4066), std=(0.2603, 0.2566, 0.2713))


def arrays(config: DataConfig, seed: int) -> Source:
    """The .npz file at `root`: train_x, test_x uint8 [N, H, W, C] and train_y, test_y int64 [N].

    Values are normalised with mean and standard deviation 0.5, that is to -1…1.

    Raises:
        ConfigError: the file is missing or not such a file; pickles in it are never read.
    """
    if config.root is None:
        raise ConfigError(f"data.root: is required for arrays: the .npz file with {', '.join(ARRAYS)}")
    found = _read_npz(Path(config.root))
    train_x, train_y, test_x, test_y = (torch.from_numpy(found[name]) for name in ARRAYS)
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if len(x) != len(y):
            raise ConfigError(f"data.root: {name}_x has {len(x)} samples, but {name}_y has {len(y)} labels; "
                              "give one label for each")
        if x.numel() == 0:
            raise ConfigError(f"data.root: {name}_x is empty, {list(x.shape)}; give at least one image")
    classes = class_count(train_y, "data.root")
    unseen = sorted(set(test_y.tolist()) - set(train_y.tolist()))
    if unseen:
        raise ConfigError(f"data.root: test_y has the label {unseen[0]}, which train_y has not; "
                          "mend the data")
    return Source(TensorSplit(_channels_first(train_x), train_y),
                  TensorSplit(_channels_first(test_x), test_y), classes)


def synthetic(config: DataConfig, seed: int, shape: list[int], classes: int,
              samples: int) -> Source:
    """Random images that a network can learn: a smooth pattern for each class, plus as much noise.

    Args:
        config: unused.
        seed: all of the data follow from it and from the arguments.
        shape: [C, H, W] of an image.
        classes: how many classes; every one of them is in both splits where `samples` ≥ `classes`.
        samples: how many training images; there are max(classes, samples // 5) more for testing.
    """
    if not (isinstance(shape, list | tuple) and len(shape) == 3 and all(_is_positive(n) for n in shape)):
        raise ConfigError(f"data.args.shape: must be [C, H, W], three numbers ≥ 1, got {shape!r}")
    for name, value in (("classes", classes), ("samples", samples)):
        if not _is_positive(value):
            raise ConfigError(f"data.args.{name}: must be a number ≥ 1, got {value!r}")
    C, H, W = shape
    random = generator(seed, "synthetic")
    coarse = torch.rand(classes, C, min(H, 4), min(W, 4), generator=random) * 127
    pattern = torch.nn.functional.interpolate(coarse, (H, W), mode="bilinear").to(torch.uint8)

    def split(count: int) -> TensorSplit:
        y_N = (torch.arange(count) % classes)[torch.randperm(count, generator=random)]
        noise = torch.randint(0, 128, (count, C, H, W), dtype=torch.uint8, generator=random)
        return TensorSplit(pattern[y_N] + noise, y_N)

    return Source(split(samples), split(max(classes, samples // 5)), classes)


def _torchvision(name: str, argument: str, values: tuple[Any, Any],
                 config: DataConfig) -> tuple[TensorSplit, TensorSplit]:
    """Both splits of `torchvision.datasets.<name>`, which `argument` chooses by `values`."""
    import torchvision

    root = config.root or "data"
    make: Callable[..., Any] = getattr(torchvision.datasets, name)
    each = f"[torchvision.datasets.SVHN({root!r}, split=s, download=True) for s in ('train', 'test')]"
    command = each if name == "SVHN" else f"torchvision.datasets.{name}({root!r}, download=True)"
    command = f'python -c "import torchvision; {command}"'
    try:
        train, test = (make(root, download=config.download, **{argument: value}) for value in values)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        if config.download:
            raise ConfigError(f"data.download: {name} could not be downloaded to {root!r}: {reason}; where there is a "
                              f"network, run {command}, and set data.root to that folder") from error
        raise ConfigError(f"data.root: {name} is not in {root!r}, or not whole ({reason}); get it with "
                          f"{command} or data.download=true") from error
    return _in_memory(train), _in_memory(test)


def _in_memory(dataset: Any) -> TensorSplit:
    x = torch.from_numpy(np.ascontiguousarray(dataset.data))
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    # Of torchvision's four sets, CIFAR's two alone have their channels last.
    return TensorSplit(_channels_first(x) if x.shape[-1] == 3 else x,
                       torch.from_numpy(np.array(labels, dtype=np.int64)))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return {name: _read_array(archive, name, path) for name in ARRAYS}
    except FileNotFoundError:
        raise ConfigError(f"data.root: {str(path)!r} does not exist; make it with numpy.savez, with "
                          f"{', '.join(ARRAYS)}") from None
    except ConfigError:
        raise
    except Exception as error:  # whatever bytes do to the parsers of zip and npy, they are no such file
        raise ConfigError(f"data.root: {str(path)!r} is not a readable .npz file: {type(error).__name__}: "
                          f"{one_line(error)}; make it with numpy.savez, without pickled objects") from error


def _read_array(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """An array of an .npz file; its header is checked first, so that only what can be right is given memory."""
    wanted, (dtype, axes) = " ".join(ARRAYS[name]), ARRAYS[name]
    if f"{name}.npy" not in archive.namelist():
        raise ConfigError(f"data.root: {str(path)!r} has no {name}; it must have {name}, {wanted}")
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, found = read_header(member, max_header_size=_HEADER)
    if found != np.dtype(dtype):
        scaled = found.kind == "f" and dtype == "uint8"
        how = "by (255 * x).round()" if scaled else "by "
        raise ConfigError(f"data.root: {name} is {found}, but must be {wanted}; convert it {how}.astype('{dtype}')"
                          f"{', if its values are from 0 to 1' * scaled}")
    if len(shape) != axes.count(",") + 1:
        raise ConfigError(f"data.root: {name} has the shape {list(shape)}, but must be {wanted}")
    most = min(archive.getinfo(f"{name}.npy").file_size, _INFLATED * path.stat().st_size)
    if not 0 <= prod(shape) * found.itemsize <= most or min(shape) < 0:
        raise ConfigError(f"data.root: {name} in {str(path)!r} has the shape {list(shape)}, and fewer values; make the "
                          "file again")
    with archive.open(f"{name}.npy") as member:
        values = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # the end is also where zipfile compares checksums
            raise ValueError(f"{name} goes on after its {list(shape)} values")
    return values


def _channels_first(x_NHWC: Tensor) -> Tensor:
    return x_NHWC.permute(0, 3, 1, 2).contiguous()


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
