"""Image folders: root/{train,test}/<class>/*, decoded when they are needed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from blpipe.config import DataConfig
from blpipe.data.source import Source
from blpipe.data.splits import DatasetSplit, first_readable
from blpipe.data.transforms import Transform, open_transforms
from blpipe.errors import ConfigError, UserError, one_line


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images by their paths, decoded to RGB uint8 [3, H, W], with their labels.

    An image is transformed, if there is a transform. One whose size then is not `size` (H, W) is resized until it
    covers that, and cropped in the centre; None takes each as it is.
    """

    def __init__(self, paths: list[str], labels: list[int], size: tuple[int, int] | None,
                 transform: Transform | None = None):
        self.paths, self.labels, self.size, self.transform = paths, labels, size, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image and its label. Raises UserError, with the file's name, where it cannot be decoded."""
        from torchvision.transforms.v2 import functional

        try:
            image = _rgb(self.paths[index])
            x_CHW = functional.pil_to_tensor(fit(image, self.size) if self.transform is None else image)
        except Exception as error:
            raise UserError(f"{self.paths[index]}: cannot be read as an image: {type(error).__name__}: "
                            f"{one_line(error)}") from error
        return (x_CHW if self.transform is None else fit(self.transform(x_CHW), self.size)), self.labels[index]


def _rgb(path: str) -> Any:
    """PIL's image of a file. Raises ValueError where it has more than eight bits, which PIL would clip to white."""
    from PIL import Image

    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode} is more than 8 bits a channel; convert it to 8")
        return image.convert("RGB")


def fit(image: Any, size: tuple[int, int] | None) -> Any:
    """An image, PIL's or a tensor [C, H, W]; one of another size is resized until it covers `size`, and cropped."""
    from torchvision.transforms.v2 import functional

    height, width = functional.get_size(image)
    if size is None or size == (height, width):
        return image
    scale = max(size[0] / height, size[1] / width)
    covering = [max(wanted, round(length * scale)) for wanted, length in zip(size, (height, width), strict=True)]
    return functional.center_crop(functional.resize(image, covering), list(size))


def imagefolder(config: DataConfig, seed: int, size: int | list[int] | None = None) -> Source:
    """root/train/<class>/* and root/test/<class>/* (or val), decoded by `workers` processes.

    Default normalisation: ImageNet's.

    Args:
        config: its `root`, `workers`, `bad_samples` and the transforms of `augment`.
        seed: of the run, for what transforms draw when they are made.
        size: a number or [H, W]; without it, the size of the first training image, of those that can be read.

    Raises:
        ConfigError: a folder is missing or empty, a class is only in the test folder, or a transform does not fit.
    """
    if config.root is None:
        raise ConfigError("data.root: is required for imagefolder: the folder with train/CLASS/* and "
                          "test/CLASS/*")
    root = Path(config.root)
    test_name = "test" if (root / "test").is_dir() or not (root / "val").is_dir() else "val"
    train_paths, train_names = _scan(root / "train")
    test_paths, test_names = _scan(root / test_name)
    classes = sorted(set(train_names))
    unseen = sorted(set(test_names) - set(classes))
    if unseen:
        raise ConfigError(f"data.root: the class {unseen[0]!r} is in {str(root / test_name)!r}, but not in "
                          f"{str(root / 'train')!r}; give it training images or remove it")
    label = {name: index for index, name in enumerate(classes)}
    both = {"train": (train_paths, train_names), "test": (test_paths, test_names)}
    height_width = _size(size) or _first_size(train_paths, "data.root: train", config)

    def split(name: str, transform: Transform | None = None) -> DatasetSplit:
        paths, names = both[name]
        labels = [label[n] for n in names]
        files = ImageFiles(paths, labels, height_width, transform)
        return DatasetSplit.open(files, len(classes), torch.tensor(labels), f"data.root: {name}", config)

    transform = open_transforms(config, seed, keep_size=False)
    untransformed = split("train") if transform and config.validation_samples else None
    return Source(split("train", transform), split("test"), len(classes), mean=(0.485, 0.456, 0.406),
                  std=(0.229, 0.224, 0.225), untransformed=untransformed)


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """The image files in the class folders of `folder`, in order, and the name of each one's class."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(folder)
    except OSError as error:
        raise ConfigError(f"data.root: {str(folder)!r} is not a folder of class folders of images: "
                          f"{one_line(error)}; imagefolder reads ROOT/train/CLASS/* and ROOT/test/CLASS/* "
                          "(or val)") from error
    return [path for path, _ in found.samples], [found.classes[label] for label in found.targets]


def _size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = size if isinstance(size, list | tuple) else [size, size]
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in pair):
        raise ConfigError(f"data.args.size: must be a number ≥ 1 or [H, W], got {size!r}")
    return pair[0], pair[1]


def _first_size(paths: list[str], where: str, config: DataConfig) -> tuple[int, int]:
    files = ImageFiles(paths, [0] * len(paths), None)
    try:
        x_CHW = first_readable(files, range(len(paths)), where, config.bad_samples == "skip").x
    except UserError as error:
        raise ConfigError(str(error)) from error
    return x_CHW.shape[1], x_CHW.shape[2]
