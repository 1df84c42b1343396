"""Data that tests open, and targets that their configs name as `data.target`."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from blpipe.config import DataConfig
from blpipe.data import Data, open_data
from blpipe.errors import ConfigError
from blpipe.seeds import generator

SYNTHETIC = {"name": "synthetic", "args": {"shape": [3, 8, 6], "classes": 4, "samples": 50}}
AUGMENT = {"crop": 2, "flip": True}
RAW = {"mean": [0.0] * 3, "std": [1.0] * 3}
X, Y = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=generator(0)), torch.arange(6) % 3
worker_warnings = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning",
    "ignore:This DataLoader will create:UserWarning")


def opened(seed: int = 0, **section) -> Data:
    return open_data(DataConfig.model_validate(section), seed)


def refused(match: str, **section) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        opened(**section)
    assert all("\n" not in problem for problem in caught.value.problems)


def equal(left, right) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(left, right, strict=True))


# A target of each test's own: the function that `data.target` imports returns what the test put here.
returned = None


def own_data(**args):
    return returned(**args) if callable(returned) else returned


def opened_target(value, monkeypatch, **section) -> Data:
    monkeypatch.setattr("data_under_test.returned", value)
    return opened(target="data_under_test:own_data", **section)


def refused_target(match: str, value, monkeypatch, **section) -> None:
    monkeypatch.setattr("data_under_test.returned", value)
    refused(match, target="data_under_test:own_data", **section)


class Listed(Dataset):
    """A map-style Dataset over a list of samples."""

    def __init__(self, samples, **attributes):
        self.samples = samples
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if isinstance(self.samples[index], Exception):
            raise self.samples[index]
        return self.samples[index]


class Noisy(Listed):
    """One whose samples are drawn from the global streams of torch, Python and numpy."""

    def __getitem__(self, index):
        return torch.cat([torch.rand(2), torch.tensor([random.random(), np.random.rand()])]), self.samples[index]


def images(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Images uint8 [count, 3, size, size]."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def arrays(**changes) -> dict:
    """The fields of a sound file, changed."""
    fields = {"train_x": images(6, 4).transpose(0, 2, 3, 1), "train_y": np.arange(6) % 3,
              "test_x": images(3, 4, seed=1).transpose(0, 2, 3, 1), "test_y": np.arange(3)}
    return {name: value for name, value in (fields | changes).items() if value is not None}


def write_folder(root: Path, test_name: str = "test") -> dict:
    """A folder of PNG files, 3 classes × 4 and × 2; returns its images as the fields of `arrays`."""
    fields = {}
    for split, folder, count in (("train", "train", 12), ("test", test_name, 6)):
        x_NHWC = images(count, 5, seed=count).transpose(0, 2, 3, 1)
        y = np.sort(np.arange(count) % 3)
        for i, (image, label) in enumerate(zip(x_NHWC, y, strict=True)):
            path = root / folder / "abc"[label] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        fields |= {f"{split}_x": x_NHWC, f"{split}_y": y}
    return fields
