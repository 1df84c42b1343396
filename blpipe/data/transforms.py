"""Random transforms of single training images: torchvision's by name, or the user's own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from blpipe.config import DataConfig
from blpipe.data.source import Source
from blpipe.data.splits import DatasetSplit, TensorSplit, TransformError, describe, sample_tensor
from blpipe.errors import ConfigError, one_line
from blpipe.plugins import call, resolve
from blpipe.seeds import derive_seed, fixed_randomness

Transform = Callable[[Tensor], Tensor]


def open_transforms(config: DataConfig, seed: int, keep_size: bool) -> Transform | None:
    """What `augment.transforms` make of a training image [C, H, W], one after the other; None where there are none.

    A name is that of a class of torchvision.transforms.v2, a target a function that returns the transform. The image
    that it is given stays as it is, and what comes out has its type and channels. It raises TransformError.

    Args:
        seed: of the run, from which all follows that a target draws.
        keep_size: whether H and W must stay too.

    Raises:
        ConfigError: an unknown name, args that do not fit, or a target that returns no function.
    """
    if not config.augment.transforms:
        return None
    from torchvision.transforms import v2

    built_in = {name: value for name, value in vars(v2).items()
                if isinstance(value, type) and issubclass(value, v2.Transform) and value is not v2.Transform}
    steps = []
    with fixed_randomness(derive_seed(seed, "transforms")):
        for number, part in enumerate(config.augment.transforms):
            where = f"data.augment.transforms.{number}"
            step = call(where, resolve(where, part, built_in), **part.args)
            if not callable(step):
                raise ConfigError(f"{where}: returned {describe(step)}; expected a function of an image")
            steps.append((where, step))

    def transform(x_CHW: Tensor) -> Tensor:
        out = x_CHW.clone()  # a transform may write to it
        for where, step in steps:
            try:
                out = step(out)
            except Exception as error:
                reason = f"{type(error).__name__}: {one_line(error).rstrip('.')}"
                raise TransformError(f"{where}: {reason}, of {describe(x_CHW)}") from error
        kept = 3 if keep_size else 1
        if not isinstance(out, Tensor) or out.ndim != 3 \
                or (out.dtype, out.shape[:kept]) != (x_CHW.dtype, x_CHW.shape[:kept]):
            raise TransformError(f"data.augment.transforms: of {describe(x_CHW)} they make {describe(out)}, and must "
                                 f"keep its type and {'shape' if keep_size else 'channels'}")
        return out

    return transform


class Transformed(Dataset[Any]):
    """A map-style Dataset's samples, each image transformed; what is no sample passes, for its reader to refuse."""

    def __init__(self, dataset: Dataset[Any], transform: Transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # map-style, so it has a length

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        x = sample_tensor(sample)
        return sample if x is None else (self.transform(x), sample[1])


def with_transforms(source: Source, config: DataConfig, seed: int) -> Source:
    """The source with its training samples transformed one by one, when they are fetched, and as they were beside.

    Raises:
        ConfigError: as `open_transforms` does, or transforms that fail on the first sample.
    """
    transform, train = open_transforms(config, seed, keep_size=True), source.train
    if transform is None:
        return source
    dataset, where = (TensorDataset(train.x, train.y), "data: train") if isinstance(train, TensorSplit) \
        else (train.dataset, train.where)
    split = DatasetSplit.open(Transformed(dataset, transform), source.classes, train.labels, where, config)
    return replace(source, train=split, untransformed=train)
