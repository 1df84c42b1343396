"""Transforms of single training images: torchvision's by name, and the user's own."""

import pytest
import torch
from data_under_test import RAW, SYNTHETIC, Listed, equal, opened, opened_target, refused, worker_warnings, write_folder
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from blpipe.data.prepare import augment, moves
from blpipe.errors import UserError
from blpipe.seeds import derive_seed, fixed_randomness, generator

CROP = {"name": "RandomResizedCrop", "args": {"size": [8, 6], "scale": [0.3, 1.0]}}
TRANSFORMS = [CROP, "TrivialAugmentWide"]
LIKE = {**SYNTHETIC, "normalize": RAW}


def marked():
    """A transform that writes to its image: the left column becomes white."""
    def mark(x):
        x[:, :, 0] = 255
        return x
    return mark


def noisy():
    """A transform that draws something when it is made: what it adds to every image."""
    noise = torch.randint(0, 9, (3, 8, 6), dtype=torch.uint8)
    return lambda x: x // 2 + noise


def height():
    """A transform that paints an image with its height."""
    return lambda x: torch.full_like(x, x.shape[1])


def nothing():
    """A transform that forgets to return."""
    return lambda x: None


def no_function():
    """Forgets to return the transform."""


@worker_warnings
@pytest.mark.parametrize("workers", [0, 2])
def test_each_training_image_is_transformed_by_the_stream_of_its_step(workers):
    plain, data = opened(**LIKE), opened(**LIKE, augment={"transforms": TRANSFORMS}, workers=workers)
    by_hand = v2.Compose([v2.RandomResizedCrop(**CROP["args"]), v2.TrivialAugmentWide()])
    assert data.spec == plain.spec
    assert equal(data.test_batches(7), plain.test_batches(7))
    batches = list(data.train_batches(5, 1, 16, False))
    for step, ((x, y), (u, v)) in enumerate(zip(plain.train_batches(5, 1, 16, False), batches, strict=True)):
        raw = (255 * x).round().byte()
        with fixed_randomness(derive_seed(5, "sample", 1, step)):
            wanted = torch.stack([by_hand(image) for image in raw])
        assert torch.equal(u, wanted.float() / 255)
        assert torch.equal(y, v)
        assert not torch.equal(x, u)
    assert equal(data.train_batches(5, 1, 16, False, start_step=2), batches[2:])


def test_crop_and_flip_come_after_them():
    step = generator(0, "augment", 0, 0)
    plain = opened(**LIKE)
    data = opened(**LIKE, augment={"transforms": [{"target": "test_transforms:marked"}], "crop": 2, "flip": True})
    x, _ = next(plain.train_batches(0, 0, 16, False))
    x[:, :, :, 0] = 1.0
    assert torch.equal(next(data.train_batches(0, 0, 16, False))[0], augment(x, moves(16, 2, True, step)))


def test_a_transform_that_writes_to_its_image_leaves_the_data_alone():
    data, plain = opened(**LIKE, augment={"transforms": [{"target": "test_transforms:marked"}]}), opened(**LIKE)
    list(data.train_batches(0, 0, 16, False))
    assert torch.equal(data._source.train.dataset.dataset.tensors[0], plain._source.train.x)


def test_what_a_target_draws_when_it_is_made_follows_from_the_seed():
    section = {**LIKE, "augment": {"transforms": [{"target": "test_transforms:noisy"}]}}
    state = torch.get_rng_state()
    batches = list(opened(3, **section).train_batches(3, 0, 16, False))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    assert equal(opened(3, **section).train_batches(3, 0, 16, False), batches)


def test_a_dataset_of_the_users_is_transformed_too(monkeypatch):
    x, y = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=generator(0)), torch.arange(6)
    pair = TensorDataset(x, y), TensorDataset(x, y)
    pair[0].targets = y
    data = opened_target(pair, monkeypatch, normalize=RAW, augment={"transforms": [
        {"target": "test_transforms:marked"}]})
    images, labels = next(data.train_batches(0, 0, 6, False))
    wanted = x[labels] / 255
    wanted[:, :, :, 0] = 1.0
    assert torch.equal(images, wanted)
    assert data.spec.train_samples == 6


def test_what_is_no_sample_is_said_as_without_transforms(monkeypatch):
    pair = Listed([(torch.zeros(3, 4, 4), 0), "text"], classes="ab"), Listed([(torch.zeros(3, 4, 4), 0)])
    data = opened_target(pair, monkeypatch, augment={"transforms": ["RandomHorizontalFlip"]})
    with pytest.raises(UserError, match=r"^data\.target: train sample 1 is str; expected \(tensor or array, "):
        list(data.train_batches(0, 0, 2, False))


def test_an_image_file_is_transformed_before_it_is_fitted_to_its_size(tmp_path):
    write_folder(tmp_path)  # of 5 × 5
    for path in (tmp_path / "train").glob("*/*.png"):
        Image.new("RGB", (20, 40)).save(path)
    section = {"name": "imagefolder", "root": str(tmp_path), "args": {"size": [6, 3]}, "normalize": RAW}
    data = opened(**section, augment={"transforms": [{"target": "test_transforms:height"}]})
    for x, _ in data.train_batches(0, 0, 4, False):
        torch.testing.assert_close(x, torch.full((4, 3, 6, 3), 40 / 255))
    assert equal(data.test_batches(4), opened(**section).test_batches(4))


@pytest.mark.parametrize(("transforms", "match"), [
    (["RandomResizedCorp"], r"^data\.augment\.transforms\.0\.name: unknown 'RandomResizedCorp' \(did you mean "
                            r"'RandomResizedCrop'\?\); one of .*AugMix, .*, or data\.augment\.transforms\.0\.target"),
    ([CROP, "RandomResizedCrop"], r"^data\.augment\.transforms\.1\.args: missing a required argument: 'size'; it "),
    ([{"name": "RandomResizedCrop", "args": {"size": 8, "scale": 2}}], r"^data\.augment\.transforms\.0: TypeError: "),
    ([{"name": "RandomResizedCrop", "args": {"size": 4}}], r"^data\.augment\.transforms: of uint8 \[3, 8, 6\] they "
                                                           r"make uint8 \[3, 4, 4\], and must keep its type and shape"),
    ([{"name": "RandomCrop", "args": {"size": 9}}], r"^data\.augment\.transforms\.0: ValueError: .*[^.], of uint8 "
                                                    r"\[3, 8, 6\] \(data: train sample 0\); change or remove it$"),
    ([{"target": "test_transforms:nothing"}], r"^data\.augment\.transforms: of uint8 \[3, 8, 6\] they make NoneType, "),
    ([{"target": "test_transforms:no_function"}], r"^data\.augment\.transforms\.0: returned NoneType; expected a "
                                                  r"function of an image$"),
])
def test_what_does_not_fit_is_said_in_one_line(transforms, match):
    refused(match, **SYNTHETIC, augment={"transforms": transforms})


def test_they_are_for_images_and_made_on_the_host(monkeypatch):
    refused(r"^data\.place: device is for data in memory, and data\.augment\.transforms run sample by sample",
            **SYNTHETIC, augment={"transforms": TRANSFORMS}, place="device")
    tokens = torch.zeros(4, 7, dtype=torch.int64), torch.arange(4)
    monkeypatch.setattr("data_under_test.returned", (tokens, tokens))
    refused(r"^data\.augment\.transforms: needs images \[C, H, W\], the samples are int64 \[7\]; leave it out",
            target="data_under_test:own_data", augment={"transforms": TRANSFORMS})


@pytest.mark.parametrize(("transform", "match"), [
    ({"name": "RandomCrop", "args": {"size": 9}}, r"\.0: ValueError: .*"),
    ("Grayscale", r": of uint8 \[3, 5, 5\] they make uint8 \[1, 5, 5\], and must keep its type and channels"),
])
def test_a_transform_that_fails_is_not_an_image_that_cannot_be_read(tmp_path, transform, match):
    write_folder(tmp_path)
    refused(rf"^data\.augment\.transforms{match} \(data\.root: train sample 0\); change or remove it$",
            name="imagefolder", root=str(tmp_path), bad_samples="skip", augment={"transforms": [transform]})
