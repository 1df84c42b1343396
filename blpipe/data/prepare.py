"""From raw batches to what a network reads: augmentation and normalisation, a whole batch at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from blpipe.config import DataConfig
from blpipe.data.splits import Split
from blpipe.device import transfer
from blpipe.text import dtype_name


def problems(config: DataConfig, train: Split) -> Iterator[str]:
    """What of `augment` and `normalize` does not fit these raw samples, one line each."""
    shape, dtype = train.shape, train.dtype
    images = len(shape) == 3 and dtype != torch.int64
    sample = f"{dtype_name(dtype)} {list(shape)}"
    wanted = {"augment.crop": config.augment.crop, "augment.flip": config.augment.flip,
              "augment.mixup": config.augment.mixup, "augment.cutmix": config.augment.cutmix,
              "augment.transforms": config.augment.transforms, "normalize": config.normalize}
    if not images:
        for name, value in wanted.items():
            if value:
                yield f"data.{name}: needs images [C, H, W], the samples are {sample}; leave it out"
        return
    if config.augment.crop >= min(shape[1:]):
        yield (f"data.augment.crop: {config.augment.crop} is not smaller than the images, "
               f"{shape[1]}×{shape[2]}; at most {min(shape[1:]) - 1}")
    if len(train.target_shape) > 1 and not of_pixels(train.target_shape, shape):
        for name in ("crop", "flip"):
            if value := getattr(config.augment, name):
                yield (f"data.augment.{name}: {value} moves pixels, and the targets {list(train.target_shape)} are not "
                       f"those of pixels, {list(shape[1:])} or [C, {shape[1]}, {shape[2]}], to move with them; leave "
                       "it out")
    if train.target_shape or train.target_dtype.is_floating_point:
        for name in ("mixup", "cutmix"):
            if value := getattr(config.augment, name):
                yield (f"data.augment.{name}: {value:g} needs one label an image, and the targets are "
                       f"{dtype_name(train.target_dtype)} {list(train.target_shape)}; leave it out")
    if config.normalize is None:
        return
    for name, values in (("mean", config.normalize.mean), ("std", config.normalize.std)):
        if len(values) != shape[0]:
            yield (f"data.normalize.{name}: {list(values)} has {len(values)} values, but the images have "
                   f"{shape[0]} channels; give one value for each")


def moves(count: int, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """What `augment` does with each of so many images, int64 [3, B]: rows and columns to move by, and whether to flip.

    Args:
        crop: by how many pixels to pad; 0 for none.
        flip: whether to flip left-right at all, with p = 0.5.
        generator: of the CPU; draws, in this order, the offsets [2, B] and the flips [B].
    """
    moves_3B = torch.zeros(3, count, dtype=torch.int64)
    if crop:
        moves_3B[:2] = torch.randint(-crop, crop + 1, (2, count), generator=generator)
    if flip:
        moves_3B[2] = torch.rand(count, generator=generator) < 0.5
    return moves_3B


def of_pixels(target_shape: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether targets are of the pixels of images [C, H, W]: they are [H, W] or [C', H, W], and move with them."""
    return len(target_shape) in (2, 3) and target_shape[-2:] == shape[1:]


def augment(x_BCHW: Tensor, moves_3B: Tensor) -> Tensor:
    """Each image reflect-padded, and cropped back at a place of its own, or flipped too.

    Args:
        x_BCHW: images [B, C, H, W] of any type, on any device, where the images returned are too; or targets of
            their pixels, [B, H, W] too.
        moves_3B: see `moves`; by fewer pixels than H and W.
    """
    B, H, W = len(x_BCHW), *x_BCHW.shape[-2:]
    device = x_BCHW.device
    moves_3B1 = transfer(moves_3B, device)[:, :, None]
    rows_BH = _reflect(torch.arange(H, device=device) + moves_3B1[0], H)
    columns_BW = _reflect(torch.arange(W, device=device) + moves_3B1[1], W)
    columns_BW = torch.where(moves_3B1[2] == 1, columns_BW.flip(1), columns_BW)
    # Padding, cropping and flipping only move pixels, so one gather does them all.
    pixels = (rows_BH[:, :, None] * W + columns_BW[:, None, :]).view(B, 1, H * W)
    given_BCN = x_BCHW.reshape(B, -1, H * W)
    return given_BCN.gather(2, pixels.expand(given_BCN.shape)).view(x_BCHW.shape)


def constants(values: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
    """`mean` or `std` as `normalise` takes it, on `device`: one value per channel, or one for all; None for None."""
    if values is None:
        return None
    if len(values) == 1:
        return torch.tensor(values[0], device=device)
    return torch.tensor(values, device=device).view(-1, 1, 1)


def normalise(x: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """Float32 from uint8 [B, …] scaled to 0…1 or from float32 as it is, then (x - mean) / std.

    `mean` and `std` are float32 [C, 1, 1] for [B, C, H, W], or [] for all values; None leaves that step out. Integers
    other than uint8 are tokens, and stay as they are.
    """
    if x.dtype == torch.int64:
        return x
    if x.dtype == torch.uint8:
        # By a tensor: a GPU divides by a number by multiplying, which rounds otherwise than a CPU's division.
        x = x.to(torch.float32).div_(torch.full((), 255.0, device=x.device))
    if mean is None or std is None:
        return x
    return x.sub(mean).div_(std)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices off either end mirrored at the first and the last element, which are not repeated."""
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)
