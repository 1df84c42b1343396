import contextlib
import io
import json
import pickle
import random
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from blpipe.config import DataConfig
from blpipe.data import SETS, Data, DataSpec, open_data
from blpipe.data.prepare import augment, moves
from blpipe.errors import ConfigError, UserError
from blpipe.seeds import derive_seed, generator

SYNTHETIC = {"name": "synthetic", "args": {"shape": [3, 8, 6], "classes": 4, "samples": 50}}
AUGMENT = {"crop": 2, "flip": True}
RAW = {"mean": [0.0] * 3, "std": [1.0] * 3}
X, Y = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=generator(0)), torch.arange(6) % 3
TEST_DIGITS = 359


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
    monkeypatch.setattr("test_data.returned", value)
    return opened(target="test_data:own_data", **section)


def refused_target(match: str, value, monkeypatch, **section) -> None:
    monkeypatch.setattr("test_data.returned", value)
    refused(match, target="test_data:own_data", **section)


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


# ---- batches: order, resumption, completeness


def test_batches_are_a_pure_function_of_seed_and_epoch():
    data, again = opened(**SYNTHETIC, augment=AUGMENT), opened(**SYNTHETIC, augment=AUGMENT)
    torch.manual_seed(1)
    first = list(data.train_batches(3, 1, 16, False))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    list(data.train_batches(3, 0, 16, False))
    assert equal(first, again.train_batches(3, 1, 16, False))
    assert torch.equal(before, torch.get_rng_state())
    assert not equal(first, data.train_batches(3, 2, 16, False))
    assert not equal(first, data.train_batches(4, 1, 16, False))


@given(start=st.integers(0, 9), batch_size=st.integers(1, 60), drop_last=st.booleans())
@settings(deadline=None, max_examples=25)
def test_start_step_gives_the_same_later_batches(start, batch_size, drop_last):
    data = opened(**SYNTHETIC, augment=AUGMENT)
    whole = list(data.train_batches(0, 2, batch_size, drop_last))
    assert equal(whole[start:], data.train_batches(0, 2, batch_size, drop_last, start_step=start))
    assert sum(len(y) for _, y in whole) == (50 // batch_size * batch_size if drop_last else 50)


def test_start_step_fetches_no_earlier_sample(monkeypatch):
    fetched = []

    class Recorded(Listed):
        def __getitem__(self, index):
            fetched.append(index)
            return super().__getitem__(index)

    samples = [(torch.zeros(1), 0) for _ in range(10)]
    data = opened_target((Recorded(samples, classes=["a"]), Recorded(samples)), monkeypatch)
    fetched.clear()
    list(data.train_batches(0, 0, 4, False, start_step=2))
    assert fetched == torch.randperm(10, generator=generator(0, "order", 0))[8:].tolist()


def test_an_epoch_has_every_training_sample_once_in_a_new_order(monkeypatch):
    x = torch.arange(20)[:, None]
    data = opened_target(((x, x[:, 0] % 2), (x, x[:, 0] % 2)), monkeypatch)
    orders = [torch.cat([x for x, _ in data.train_batches(0, epoch, 7, False)])[:, 0] for epoch in range(2)]
    assert all(sorted(order.tolist()) == list(range(20)) for order in orders)
    assert orders[0].tolist() != orders[1].tolist()
    assert orders[0].tolist() == torch.randperm(20, generator=generator(0, "order", 0)).tolist()


@given(count=st.integers(2, 40), batch_size=st.integers(1, 50), dataset=st.booleans())
@settings(deadline=None, max_examples=40)
def test_test_batches_have_every_sample_once_in_order(count, batch_size, dataset):
    x, y = torch.arange(count)[:, None], torch.arange(count) % 2
    pair = Listed(list(zip(x, y, strict=True)), targets=y) if dataset else (x, y)
    with pytest.MonkeyPatch.context() as patch:
        data = opened_target((pair, pair), patch)
        batches = list(data.test_batches(batch_size))
    assert torch.cat([x for x, _ in batches]).tolist() == x.tolist()
    assert torch.cat([y for _, y in batches]).tolist() == y.tolist()
    assert [len(y) for _, y in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_changing_a_batch_in_place_leaves_the_data_alone(monkeypatch):
    pair = (torch.ones(6, 2), torch.zeros(6, dtype=torch.int64))
    data = opened_target((pair, pair), monkeypatch)
    for x, _ in (*data.train_batches(0, 0, 6, False), *data.test_batches(6)):
        x.zero_()
    assert all(x.eq(1).all() for x, _ in (*data.train_batches(0, 0, 6, False), *data.test_batches(6)))


# ---- preparation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@given(batch=st.integers(1, 5), channels=st.integers(1, 3), height=st.integers(1, 7), width=st.integers(1, 7),
       crop=st.integers(0, 6), flip=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=80)
def test_augment_is_pad_crop_and_flip_of_each_image(dtype, batch, channels, height, width, crop, flip, seed):
    crop = min(crop, height - 1, width - 1)
    x = torch.randint(0, 256, (batch, channels, height, width), generator=generator(seed)).to(dtype)
    random = generator(seed, "reference")
    offset = torch.randint(-crop, crop + 1, (2, batch), generator=random) if crop else torch.zeros(2, batch)
    flipped = torch.rand(batch, generator=random) < 0.5 if flip else torch.zeros(batch)
    wanted = []
    for i in range(batch):
        padded = torch.nn.functional.pad(x[i].float(), (crop,) * 4, mode="reflect")
        top, left = crop + int(offset[0, i]), crop + int(offset[1, i])
        image = padded[:, top:top + height, left:left + width]
        wanted.append(image.flip(-1) if flipped[i] else image)
    moved = augment(x, moves(batch, crop, flip, generator(seed, "reference")))
    assert torch.equal(moved, torch.stack(wanted).to(dtype))


def test_augmentation_draws_each_offset_and_flip_alike():
    x = torch.arange(25).view(1, 1, 5, 5).expand(4000, 1, 5, 5)
    centres = Counter(augment(x, moves(len(x), 1, False, generator(0)))[:, 0, 2, 2].tolist())
    assert set(centres) == {6, 7, 8, 11, 12, 13, 16, 17, 18}
    assert min(centres.values()) > 350
    flipped = augment(x, moves(len(x), 0, True, generator(0)))[:, 0, 0, 0] == 4
    assert 1850 < int(flipped.sum()) < 2150


def test_only_training_batches_are_augmented_by_the_streams_of_their_step():
    plain, augmented = opened(**SYNTHETIC), opened(**SYNTHETIC, augment=AUGMENT)
    assert equal(plain.test_batches(7), augmented.test_batches(7))
    pairs = zip(plain.train_batches(5, 1, 16, False), augmented.train_batches(5, 1, 16, False), strict=True)
    for step, ((x, y), (u, v)) in enumerate(pairs):
        assert torch.equal(augment(x, moves(len(x), 2, True, generator(5, "augment", 1, step))), u)
        assert torch.equal(y, v)
        assert not torch.equal(x, u)


def test_normalisation_values(tmp_path):
    x = np.array([0, 51, 255], dtype=np.uint8).reshape(1, 1, 1, 3).repeat(4, 0)
    y = np.zeros(4, dtype=np.int64)
    np.savez(tmp_path / "a.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    section = {"name": "arrays", "root": str(tmp_path / "a.npz")}
    given = opened(**section, normalize={"mean": [0.1, 0.2, 0.3], "std": [0.5, 1.0, 2.0]})
    wanted = torch.tensor([(0 - 0.1) / 0.5, (0.2 - 0.2) / 1.0, (1 - 0.3) / 2.0])
    for data, values in ((given, wanted), (opened(**section), torch.tensor([-1, 0.2 * 2 - 1, 1]))):
        for batches in (data.train_batches(0, 0, 4, False), data.test_batches(4)):
            x_BCHW, y_B = next(batches)
            assert x_BCHW.dtype == torch.float32
            assert y_B.dtype == torch.int64
            torch.testing.assert_close(x_BCHW, values.view(1, 3, 1, 1).expand(4, 3, 1, 1))


@pytest.mark.parametrize(("section", "match"), [
    ({"augment": {"crop": 6}}, r"data\.augment\.crop: 6 is not smaller than the images, 8×6; at most 5"),
    ({"normalize": {"mean": [0.5], "std": [1.0]}}, r"data\.normalize\.mean: \[0\.5\] has 1 values.* 3 chann"),
    ({"normalize": {"mean": [0.5] * 3, "std": [1.0] * 2}}, r"data\.normalize\.std: .* has 2 values"),
    ({"train_samples": 51}, r"data\.train_samples: 51 is more than there are; at most 50"),
    ({"test_samples": 11}, r"data\.test_samples: 11 is more than there are; at most 10"),
])
def test_what_does_not_fit_the_images_is_refused(section, match):
    refused(match, **SYNTHETIC, **section)


def test_all_misfits_are_told_at_once():
    with pytest.raises(ConfigError, match=r"augment\.crop") as caught:
        opened(**SYNTHETIC, augment={"crop": 9}, normalize={"mean": [0.0], "std": [1.0]})
    assert len(caught.value.problems) == 3


def test_the_first_samples_are_kept_and_the_classes_stay():
    whole, part = opened(**SYNTHETIC), opened(**SYNTHETIC, train_samples=5, test_samples=3)
    assert (part.spec.train_samples, part.spec.test_samples, part.spec.classes) == (5, 3, 4)
    assert equal([next(whole.test_batches(3))], part.test_batches(10))
    assert sum(len(y) for _, y in part.train_batches(0, 0, 2, False)) == 5


# ---- spec, names, labels


def test_spec_survives_json():
    spec = opened(**SYNTHETIC).spec
    assert spec == DataSpec((3, 8, 6), "float32", (), 4, 50, 10)
    assert DataSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_wrong_names_and_arguments_are_refused():
    refused(r"data\.name: unknown 'cifar11' \(did you mean 'cifar1", name="cifar11")
    refused(r"data\.args: .*'sahpe'", name="synthetic", args=SYNTHETIC["args"] | {"sahpe": 1})
    refused(r"data\.args: .*'samples'; it takes shape, classes, samples$", name="synthetic",
            args={"shape": [1, 2, 2], "classes": 2})
    refused(r"data\.args: .*'size'; it takes no arguments", name="digits", args={"size": 3})
    assert sorted(SETS) == ["arrays", "cifar10", "cifar100", "digits", "imagefolder", "stl10", "svhn",
                            "synthetic"]


def test_the_key_of_the_section_is_in_the_message():
    with pytest.raises(ConfigError, match=r"^other\.root: is required"):
        open_data(DataConfig.model_validate({"name": "arrays"}), 0, key="other")


def test_labels_are_checked_against_the_model():
    data = opened(**SYNTHETIC)
    data.check_labels(4)
    data.check_labels(9)
    with pytest.raises(ConfigError, match=r"^data: train label 3 at index \d+ lies outside 0\.\.2; set "
                                          r"model\.args\.classes ≥ 4 or mend the data$"):
        data.check_labels(3)


def test_the_first_wrong_label_of_testing_is_found_too(monkeypatch):
    data = opened_target(((X[[0, 1, 2]], Y[[0, 1, 2]]), (X, Y)), monkeypatch, train_samples=2)
    with pytest.raises(ConfigError, match=r"^data: test label 2 at index 2 lies outside 0\.\.1; set "
                                          r"model\.args\.classes ≥ 3 or mend the data$"):
        data.check_labels(2)


def test_a_label_only_testing_has_is_found_by_the_check(monkeypatch):
    x, y = torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])
    refused_target(r"^data: test label 5 at index 2 is none of the 2 classes, 0\.\.1; mend the data$",
                   ((x, y), (x, torch.tensor([0, 1, 5, 0]))), monkeypatch)


# ---- the sets by name


def test_digits():
    data = opened(name="digits")
    assert data.spec == DataSpec((1, 8, 8), "float32", (), 10, data.spec.train_samples, TEST_DIGITS)
    assert data.spec.train_samples + data.spec.test_samples == 1797
    labels = [torch.cat([y for _, y in batches]).bincount() for batches in
              (data.train_batches(0, 0, 500, False), data.test_batches(500))]
    share = labels[1] / (labels[0] + labels[1])
    assert share.min() > 0.19
    assert share.max() < 0.21
    x = torch.cat([x for x, _ in data.train_batches(0, 0, 500, False)])
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    assert x.max() == pytest.approx((1 - 0.3053) / 0.3760)
    assert equal(data.test_batches(500), opened(seed=9).test_batches(500))


def test_digits_hold_every_image_of_the_original_once():
    from sklearn.datasets import load_digits

    data = opened(name="digits", normalize={"mean": [0.0], "std": [1.0]})
    batches = [*data.train_batches(0, 0, 999, False), *data.test_batches(999)]
    found = sorted((*(x * 16).round().int().flatten().tolist(), int(y))
                   for xs, ys in batches for x, y in zip(xs, ys, strict=True))
    bunch = load_digits()
    wanted = np.column_stack([bunch.data, bunch.target]).astype(int)
    assert found == sorted(map(tuple, wanted.tolist()))


def test_synthetic_is_a_pure_function_of_the_seed_and_can_be_learned():
    section = {"name": "synthetic", "args": {"shape": [1, 6, 6], "classes": 5, "samples": 300}}
    data = opened(seed=1, **section)
    assert equal(data.test_batches(9), opened(seed=1, **section).test_batches(9))
    assert not equal(data.test_batches(9), opened(seed=2, **section).test_batches(9))
    assert (data.spec.train_samples, data.spec.test_samples) == (300, 60)
    x, y = next(data.train_batches(0, 0, 300, False))
    centre = torch.stack([x[y == label].mean(0).flatten() for label in range(5)])
    test_x, test_y = next(data.test_batches(60))
    guess = torch.cdist(test_x.flatten(1), centre).argmin(1)
    assert (guess == test_y).float().mean() > 0.9
    assert test_y.bincount().tolist() == [12] * 5


def test_synthetic_tests_every_class_even_of_few_samples():
    data = opened(name="synthetic", args={"shape": [1, 1, 1], "classes": 7, "samples": 3})
    assert (data.spec.test_samples, data.spec.classes) == (7, 7)


@pytest.mark.parametrize(("args", "match"), [
    ({"shape": [3, 8]}, r"data\.args\.shape: must be \[C, H, W\], three numbers ≥ 1, got \[3, 8\]"),
    ({"shape": 8}, r"data\.args\.shape: .* got 8"),
    ({"shape": [3, 0, 8]}, r"data\.args\.shape"),
    ({"classes": 0}, r"data\.args\.classes: must be a number ≥ 1, got 0"),
    ({"samples": "many"}, r"data\.args\.samples: must be a number ≥ 1, got 'many'"),
    ({"samples": True}, r"data\.args\.samples"),
])
def test_synthetic_refuses_what_makes_no_sense(args, match):
    refused(match, name="synthetic", args={"shape": [1, 2, 2], "classes": 2, "samples": 2} | args)


def images(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Images uint8 [count, 3, size, size]."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def check_opened(data: Data, train: np.ndarray, train_y: list, test: np.ndarray, test_y: list) -> None:
    """`data`, opened without normalisation, holds exactly these images uint8 [N, C, H, W] and labels."""
    x, y = next(data.test_batches(100))
    assert torch.equal((x * 255).round().to(torch.uint8), torch.from_numpy(test))
    assert y.tolist() == test_y
    order = torch.randperm(len(train), generator=generator(0, "order", 0))
    x, y = next(data.train_batches(0, 0, 100, False))
    assert torch.equal((x * 255).round().to(torch.uint8), torch.from_numpy(train)[order])
    assert y.tolist() == torch.tensor(train_y)[order].tolist()


@pytest.fixture
def no_checksums(monkeypatch):
    """torchvision's own readers, taking the files of a test for the published ones."""
    for module in ("cifar", "svhn", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity",
                            lambda path, md5=None: Path(path).is_file())


@pytest.mark.usefixtures("no_checksums")
@pytest.mark.parametrize(("name", "folder", "files", "key", "meta", "classes"), [
    ("cifar10", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], "labels",
     ("batches.meta", "label_names"), 10),
    ("cifar100", "cifar-100-python", ["train", "test"], "fine_labels", ("meta", "fine_label_names"), 100),
])
def test_cifar_as_torchvision_reads_it(tmp_path, name, folder, files, key, meta, classes):
    (tmp_path / folder).mkdir()
    x, y = images(2 * len(files)), [(7 * i) % classes for i in range(2 * len(files))]
    for i, file in enumerate(files):
        entry = {"data": x[2 * i:2 * i + 2].reshape(2, -1), key: y[2 * i:2 * i + 2]}
        (tmp_path / folder / file).write_bytes(pickle.dumps(entry))
    (tmp_path / folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [str(i) for i in range(classes)]}))
    data = opened(name=name, root=str(tmp_path), normalize=RAW)
    assert data.spec == DataSpec((3, 32, 32), "float32", (), classes, 2 * len(files) - 2, 2)
    check_opened(data, x[:-2], y[:-2], x[-2:], y[-2:])


@pytest.mark.usefixtures("no_checksums")
def test_svhn_as_torchvision_reads_it(tmp_path):
    x = {"train": images(4), "test": images(3, seed=1)}
    for split, values in x.items():
        labels = np.array([[10], [1], [9], [2]][:len(values)], dtype=np.uint8)
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": values.transpose(2, 3, 1, 0), "y": labels})
    data = opened(name="svhn", root=str(tmp_path), normalize=RAW)
    assert data.spec == DataSpec((3, 32, 32), "float32", (), 10, 4, 3)
    check_opened(data, x["train"], [0, 1, 9, 2], x["test"], [0, 1, 9])


@pytest.mark.usefixtures("no_checksums")
def test_stl10_as_torchvision_reads_it(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    x = {"train": images(3, 96), "test": images(2, 96, seed=1), "unlabeled": images(1, 96)}
    for split, values in x.items():
        values.transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")
        np.array([10, 1, 5][:len(values)], dtype=np.uint8).tofile(folder / f"{split}_y.bin")
    data = opened(name="stl10", root=str(tmp_path), normalize=RAW)
    assert data.spec == DataSpec((3, 96, 96), "float32", (), 10, 3, 2)
    check_opened(data, x["train"], [9, 0, 4], x["test"], [9, 0])


@pytest.mark.usefixtures("no_checksums")
def test_published_normalisation_is_the_default(tmp_path):
    for split in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat",
                         {"X": np.full((32, 32, 3, 2), 255, np.uint8), "y": np.ones((2, 1), np.uint8)})
    x, _ = next(opened(name="svhn", root=str(tmp_path)).test_batches(2))
    wanted = torch.tensor([(1 - 0.4377) / 0.1980, (1 - 0.4438) / 0.2010, (1 - 0.4728) / 0.1970])
    torch.testing.assert_close(x[0, :, 0, 0], wanted)


@pytest.mark.parametrize(("name", "command"), [
    ("cifar10", r"torchvision\.datasets\.CIFAR10\('{root}', download=True\)"),
    ("cifar100", r"torchvision\.datasets\.CIFAR100\('{root}', download=True\)"),
    ("svhn", r"\[torchvision\.datasets\.SVHN\('{root}', split=s, download=True\) for s in "
             r"\('train', 'test'\)\]"),
    ("stl10", r"torchvision\.datasets\.STL10\('{root}', download=True\)"),
])
def test_missing_files_come_with_the_command_that_gets_them(tmp_path, monkeypatch, name, command):
    wanted = (r"data\.root: .*is not in '{root}'.*"
              rf'python -c "import torchvision; {command}" or data\.download=true$')
    refused(wanted.format(root=tmp_path), name=name, root=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    refused(wanted.format(root="data"), name=name)


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_a_failed_download_is_one_line(tmp_path, monkeypatch, name):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    refused(rf"data\.download: .* could not be downloaded to '{tmp_path}': URLError: .*no route to host.*; "
            r"where there is a network, run python -c .*data\.root", name=name, root=str(tmp_path),
            download=True)


# ---- arrays


def arrays(**changes) -> dict:
    """The fields of a sound file, changed."""
    fields = {"train_x": images(6, 4).transpose(0, 2, 3, 1), "train_y": np.arange(6) % 3,
              "test_x": images(3, 4, seed=1).transpose(0, 2, 3, 1), "test_y": np.arange(3)}
    return {name: value for name, value in (fields | changes).items() if value is not None}


def test_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    data = opened(name="arrays", root=str(tmp_path / "a.npz"), normalize=RAW)
    assert data.spec == DataSpec((3, 4, 4), "float32", (), 3, 6, 3)
    check_opened(data, images(6, 4), [0, 1, 2, 0, 1, 2], images(3, 4, seed=1), [0, 1, 2])


NOTHING = np.zeros((0, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(("changes", "match"), [
    ({"test_y": None}, r"has no test_y; it must have test_y, int64 \[N\]"),
    ({"train_x": np.zeros((6, 4, 4, 3))}, r"train_x is float64, but must be uint8 \[N, H, W, C\]; conv"),
    ({"train_y": np.zeros(6, np.int32)}, r"train_y is int32, but must be int64 \[N\]; convert it with "),
    ({"train_x": np.zeros((6, 4, 4), np.uint8)}, r"train_x has the shape \[6, 4, 4\], but must be uint8"),
    ({"test_y": np.zeros((3, 1), np.int64)}, r"test_y has the shape \[3, 1\]"),
    ({"train_y": np.zeros(5, np.int64)}, r"train_x has 6 samples, but train_y has 5 labels"),
    ({"test_x": NOTHING, "test_y": np.zeros(0, np.int64)}, r"test_x is empty, \[0, 4, 4, 3\]"),
    ({"train_x": NOTHING, "train_y": np.zeros(0, np.int64)}, r"train_x is empty"),
    ({"train_x": np.zeros((6, 0, 4, 3), np.uint8)}, r"train_x is empty, \[6, 0, 4, 3\]"),
    ({"test_x": np.zeros((3, 5, 4, 3), np.uint8)},
     r"train samples are uint8 \[3, 4, 4\].*test samples are uint8 \[3, 5, 4\].*make them alike"),
    ({"train_y": np.array([0, 1, -2, 0, 1, 2])}, r"train label -2 at index 2 is negative; mend the data"),
    ({"test_y": np.array([0, -1, 2])}, r"test_y has the label -1, which train_y has not; mend the data"),
    ({"train_y": np.array([0, 2] * 3)}, r"test_y has the label 1, which train_y has not; mend the data"),
    ({"train_y": np.array([0, None] * 3)}, r"train_y is object, but must be int64 \[N\]; convert"),
])
def test_malformed_arrays_are_refused(tmp_path, changes, match):
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    refused(rf"^data(\.root)?: .*{match}", name="arrays", root=str(tmp_path / "a.npz"))


def test_what_is_no_npz_file_is_refused(tmp_path):
    section = {"name": "arrays", "root": str(tmp_path / "a.npz")}
    refused(r"^data\.root: is required for arrays", name="arrays")
    refused(r"^data\.root: '.*a\.npz' does not exist; make it with numpy\.savez", **section)
    refused(r"^data\.root: .* not a readable .npz file: IsADirectory", name="arrays", root=str(tmp_path))
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.zeros(3))
    refused(r"^data\.root: .* not a readable .npz file: BadZipFile: ", **section)
    (tmp_path / "a.npz").write_bytes(pickle.dumps({"train_x": 1}))
    refused(r"^data\.root: .* not a readable .npz file: BadZipFile: ", **section)


def test_a_member_that_is_no_array_is_refused(tmp_path):
    import zipfile

    np.savez(tmp_path / "a.npz", **arrays(train_y=None))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("train_y", b"0, 1, 2")
    refused(r"a\.npz' has no train_y; it must have train_y, int64 \[N\]", name="arrays",
            root=str(tmp_path / "a.npz"))


@given(start=st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00"]),
       rest=st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_as_arrays(tmp_path, start, rest):
    (tmp_path / "a.npz").write_bytes(start + rest)
    refused(r"^data\.root: ", name="arrays", root=str(tmp_path / "a.npz"))


@given(position=st.floats(0, 1), value=st.binary(min_size=1, max_size=4), keep=st.floats(0, 1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_arrays_are_refused_or_harmless(tmp_path, position, value, keep):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays())
    whole = buffer.getvalue()
    at = int(position * len(whole))
    broken = whole[:at] + value + whole[at + len(value):]
    (tmp_path / "a.npz").write_bytes(broken)
    with contextlib.suppress(ConfigError):  # anything else that it raises fails the test
        opened(name="arrays", root=str(tmp_path / "a.npz"))
    (tmp_path / "a.npz").write_bytes(whole[:int(keep * (len(whole) - 1))])
    refused(r"^data\.root: ", name="arrays", root=str(tmp_path / "a.npz"))


# ---- image folders

worker_warnings = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning",
    "ignore:This DataLoader will create:UserWarning")


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


@worker_warnings
@pytest.mark.parametrize("test_name", ["test", "val"])
def test_imagefolder_equals_arrays_of_its_images_with_and_without_workers(tmp_path, test_name):
    np.savez(tmp_path / "a.npz", **write_folder(tmp_path, test_name))
    common = {"augment": AUGMENT, "normalize": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    wanted = opened(name="arrays", root=str(tmp_path / "a.npz"), **common)
    state = torch.get_rng_state()
    for workers in (0, 2):
        data = opened(name="imagefolder", root=str(tmp_path), workers=workers, **common)
        assert data.spec == wanted.spec
        assert equal(data.test_batches(4), wanted.test_batches(4))
        assert equal(data.train_batches(3, 1, 5, False), wanted.train_batches(3, 1, 5, False))
        assert equal(data.train_batches(3, 1, 5, True, 1), wanted.train_batches(3, 1, 5, True, 1))
    assert torch.equal(state, torch.get_rng_state())


def test_imagefolder_normalises_as_imagenet_and_keeps_the_first(tmp_path):
    fields = write_folder(tmp_path)
    data = opened(name="imagefolder", root=str(tmp_path), test_samples=2)
    (x, y), = data.test_batches(10)
    wanted = torch.from_numpy(fields["test_x"][:2].transpose(0, 3, 1, 2)) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x, (wanted - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert y.tolist() == [0, 0]
    with pytest.raises(ConfigError, match=r"train label 2 at index 8 lies outside 0\.\.1"):
        data.check_labels(2)


@pytest.mark.parametrize(("size", "shape"), [(None, (5, 5)), (4, (4, 4)), ([6, 3], (6, 3))])
def test_imagefolder_resizes_and_crops_only_what_has_another_size(tmp_path, size, shape):
    fields = write_folder(tmp_path)
    ramp = np.tile(np.linspace(0, 255, 20, dtype=np.uint8)[None, :, None], (10, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "test" / "a" / "00.png")
    args = {} if size is None else {"size": size}
    data = opened(name="imagefolder", root=str(tmp_path), args=args, normalize=RAW)
    assert data.spec.shape == (3, *shape)
    x, _ = next(data.test_batches(2))
    row = x[0, 0, shape[0] // 2]
    assert row.diff().min() > 0  # the ramp still rises from left to right
    assert float(row[0] + row[-1]) == pytest.approx(1, abs=0.15)  # its centre is in the centre
    assert float(row[-1] - row[0]) < 0.8  # its ends are cropped away
    if size is None:
        wanted = torch.from_numpy(fields["test_x"][1].transpose(2, 0, 1))
        assert torch.equal((x[1] * 255).round().byte(), wanted)


def test_imagefolder_reads_grey_and_palette_images_as_rgb(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(np.full((5, 5), 102, np.uint8)).save(tmp_path / "test" / "a" / "00.png")
    x, _ = next(opened(name="imagefolder", root=str(tmp_path), normalize=RAW).test_batches(1))
    torch.testing.assert_close(x, torch.full((1, 3, 5, 5), 0.4))


@worker_warnings
@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named(tmp_path, workers):
    write_folder(tmp_path)
    bad = tmp_path / "train" / "c" / "11.png"
    bad.write_bytes(bad.read_bytes()[:50])
    data = opened(name="imagefolder", root=str(tmp_path), workers=workers)
    with pytest.raises(UserError, match=rf"^data\.root: train sample 11: {bad}: cannot be read as an image: "
                                        r".*; mend or remove it, or set data\.bad_samples=skip$"):
        list(data.train_batches(0, 0, 4, False))
    bad.rename(tmp_path / "train" / "a" / "00.png")
    refused(r"^data\.root: .*00\.png: cannot be read as an image", name="imagefolder", root=str(tmp_path))


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    section = {"name": "imagefolder", "root": str(tmp_path)}
    refused(r"^data\.root: is required for imagefolder", name="imagefolder")
    refused(r"^data\.root: '.*train' is not a folder of class folders.*ROOT/train/CLASS", **section)
    (tmp_path / "train").mkdir()
    refused(r"^data\.root: '.*train' is not a folder of class folders", **section)
    write_folder(tmp_path)
    refused(r"^data\.args\.size: must be a number ≥ 1 or \[H, W\], got 0", **section, args={"size": 0})
    refused(r"^data\.args\.size: .* got \[1, 2, 3\]", **section, args={"size": [1, 2, 3]})
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "new")
    refused(r"^data\.root: the class 'new' is in '.*test', but not in '.*train'", **section)


def test_a_class_that_testing_lacks_keeps_the_labels_of_training(tmp_path):
    write_folder(tmp_path)
    for file in (tmp_path / "test" / "a").iterdir():
        file.unlink()
    (tmp_path / "test" / "a").rmdir()
    data = opened(name="imagefolder", root=str(tmp_path))
    assert torch.cat([y for _, y in data.test_batches(9)]).tolist() == [1, 1, 2, 2]


# ---- the user's own


def as_dataset(x, y, **attributes) -> Listed:
    return Listed([(a, int(b)) for a, b in zip(x, y, strict=True)], **attributes)


@pytest.mark.parametrize("kind", ["tensors", "arrays", "lists", "dataset", "labels as tensors", "mixed"])
def test_a_target_in_every_shape_gives_the_same(monkeypatch, kind):
    readonly = X.numpy().copy()
    readonly.flags.writeable = False
    value = {"tensors": ((X, Y), (X, Y)), "arrays": ((readonly, Y.numpy()), (X.numpy()[:], Y.numpy())),
             "lists": [[X, Y.int()], [X, Y]], "dataset": (as_dataset(X, Y, targets=Y), as_dataset(X, Y)),
             "labels as tensors": (Listed([*zip(X, Y, strict=True)], classes=list("abc")), as_dataset(X, Y)),
             "mixed": ((X, Y), as_dataset(X, Y))}[kind]
    data = opened_target(value, monkeypatch, augment={"crop": 1, "flip": True})
    assert data.spec == DataSpec((3, 4, 4), "float32", (), 3, 6, 6)
    (x, y), = data.test_batches(6)
    torch.testing.assert_close(x, X / 127.5 - 1)  # uint8 is normalised to -1…1 where nothing else is said
    assert torch.equal(y, Y)
    (x, y), = data.train_batches(2, 3, 6, False)
    order = torch.randperm(6, generator=generator(2, "order", 3))
    moved = augment(X[order], moves(len(order), 1, True, generator(2, "augment", 3, 0)))
    torch.testing.assert_close(x, moved / 127.5 - 1)
    assert torch.equal(y, Y[order])


def test_a_target_gets_its_arguments(monkeypatch):
    def make(count):
        return (X[:count], Y[:count]), (X, Y)

    assert opened_target(make, monkeypatch, args={"count": 5}).spec.train_samples == 5
    refused_target(r"^data: TypeError: .*'cuont'", make, monkeypatch, args={"cuont": 5})
    refused(r"^data\.args: .*'x'; it takes no arguments", target="test_data:write_nothing", args={"x": 1})
    refused(r"^data\.target: cannot import 'test_data:absent'", target="test_data:absent")


def write_nothing():
    return None


def test_randomness_inside_a_target_follows_the_seed(monkeypatch):
    def make():
        return (torch.rand(4, 2), Y[:4]), (torch.rand(4, 2), Y[:4])

    state = torch.get_rng_state()
    first, again, other = (opened_target(make, monkeypatch, seed=seed) for seed in (1, 1, 2))
    assert equal(first.test_batches(4), again.test_batches(4))
    assert not equal(first.test_batches(4), other.test_batches(4))
    assert torch.equal(state, torch.get_rng_state())


def test_floats_are_normalised_only_when_asked(monkeypatch):
    pair = (torch.rand(6, 1, 2, 2, dtype=torch.float64, generator=generator(1)), Y)
    (x, _), = opened_target((pair, pair), monkeypatch).test_batches(6)
    assert torch.equal(x, pair[0].float())
    data = opened_target((pair, pair), monkeypatch, normalize={"mean": [0.5], "std": [0.25]})
    (x, _), = data.test_batches(6)
    torch.testing.assert_close(x, (pair[0].float() - 0.5) / 0.25)


def test_integers_are_tokens_and_stay_untouched(monkeypatch):
    tokens = torch.arange(24).view(6, 4)
    value = ((tokens.int(), tokens % 5), (tokens.int(), tokens % 5))
    data = opened_target(value, monkeypatch)
    assert data.spec == DataSpec((4,), "int64", (4,), 5, 6, 6)
    (x, y), = data.test_batches(6)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x, tokens)
    assert torch.equal(y, tokens % 5)
    with pytest.raises(ConfigError, match=r"train label 4 at index \[1, 0\] lies outside 0\.\.3"):
        data.check_labels(4)
    for name, section in (("augment.flip", {"augment": {"flip": True}}),
                          ("augment.crop", {"augment": {"crop": 1}}),
                          ("normalize", {"normalize": {"mean": [0.0], "std": [1.0]}})):
        refused_target(rf"^data\.{name}: needs images \[C, H, W\], the samples are int64 \[4\]; leave it ou",
                       value, monkeypatch, **section)
    images_of_tokens = torch.zeros(6, 1, 4, 4, dtype=torch.int64), Y
    refused_target(r"augment\.flip: needs images .* int64", (images_of_tokens,) * 2, monkeypatch,
                   augment={"flip": True})


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(("value", "match"), [
    (None, r"returned NoneType; expected \(train, test\), each a pair"),
    ((X, Y), r"train is uint8 \[6, 3, 4, 4\]; expected"),
    (((X, Y), (X, Y), (X, Y)), r"returned \(\(uint8 \[6, 3, 4, 4\], int64 \[6\]\), .*; expected"),
    (((X, Y), None), r"test is NoneType; expected"),
    (((X.bool(), Y), (X, Y)), r"train is \(bool \[6, 3, 4, 4\], int64 \[6\]\); expected"),
    (((X, Y.float()), (X, Y)), r"train is \(uint8 .*, float32 \[6\]\); expected .* y of integers"),
    ((([1, 2], Y), (X, Y)), r"train is \(list, int64 \[6\]\); expected"),
    (((np.array(["a"] * 6), Y), (X, Y)), r"train is \(<U1 \[6\], int64 \[6\]\); expected"),
    (((torch.tensor(1), torch.tensor(1)), (X, Y)), r"train is \(int64 \[\], int64 \[\]\); expected"),
    (((X[:4], Y), (X, Y)), r"train has 4 samples, but 6 targets"),
    (((X[:0], Y[:0]), (X, Y)), r"train is empty"),
    (((X, Y), (X[:0], Y[:0])), r"test is empty"),
    (((X, Y - 1), (X, Y)), r"train label -1 at index 0 is negative"),
    ((Stream(), (X, Y)), r"train is a Stream, which has no length or no order; expected"),
    ((Listed([], classes=["a"]), (X, Y)), r"train is empty"),
    ((as_dataset(X, Y), (X, Y)), r"the train Dataset says neither .* attribute classes .* or targets"),
    ((as_dataset(X, Y, targets=[0]), (X, Y)), r"train: the attribute targets is list, not an integer for ea"),
    ((as_dataset(X, Y, targets=["a"] * 6), (X, Y)), r"train: the attribute targets is list"),
    ((Listed([(X[0],)], classes=["a"]), (X, Y)), r"train sample 0 is \(uint8 \[3, 4, 4\]\); expected \(tens"),
    ((Listed([(Image.new("L", (2, 2)), 0)], classes=["a"]), (X, Y)), r"train sample 0 is \(Image, int\); ex"),
    ((Listed([(X[0], 0.5)], classes=["a"]), (X, Y)), r"train sample 0 is \(uint8 .*, float\); expected"),
    ((Listed([KeyError("x\ny")], classes=["a"]), (X, Y)), r"train sample 0: cannot be read: KeyError: "),
])
def test_anything_else_from_a_target_is_refused(monkeypatch, value, match):
    refused_target(rf"^data\.target: {match}", value, monkeypatch)


def test_train_and_test_must_be_alike(monkeypatch):
    refused_target(r"train samples are uint8 .* test samples are float32", ((X, Y), (X.float(), Y)),
                   monkeypatch)
    refused_target(r"train samples are .* with target \[\], but .* with target \[1\]",
                   ((X, Y), (X, Y[:, None])), monkeypatch)


@worker_warnings
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("sample", "match"), [
    ((X[0], 3), r"sample 4 has the label 3, outside 0\.\.2; mend the data"),
    ((X[0], -1), r"sample 4 has the label -1, outside 0\.\.2"),
    ((X[0, :2], 1), r"sample 4 is uint8 \[2, 4, 4\] with target int64 \[\], but the first is uint8 \[3, 4"),
    ((X[0].float(), 1), r"sample 4 is float32 \[3, 4, 4\] with target int64 \[\], but the first is uint8"),
    ("text", r"sample 4 is str; expected \(tensor, int or int64 tensor\)"),
    (RuntimeError("out\nof luck"), r"sample 4: cannot be read: RuntimeError: out of luck; mend or remove it, or set "),
])
def test_a_bad_sample_is_named_when_it_is_fetched(monkeypatch, workers, sample, match):
    samples = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
    bad = Listed(samples[:4] + [sample] + samples[5:], classes=["a", "b", "c"])
    data = opened_target((bad, (X, Y)), monkeypatch, workers=workers)
    with pytest.raises(UserError, match=rf"^data\.target: train {match}") as caught:
        list(data.train_batches(0, 0, 2, False))
    assert "\n" not in str(caught.value)


def test_datasets_with_unknown_labels_are_checked_by_their_classes(monkeypatch):
    dataset = as_dataset(X, Y, classes=["a", "b", "c"])
    data = opened_target((dataset, dataset), monkeypatch)
    data.check_labels(3)
    with pytest.raises(ConfigError, match=r"have 3 classes, the model 2; set model\.args\.classes ≥ 3"):
        data.check_labels(2)
    refused_target(r"train label 2 at index 2 is none of the 2 classes",
                   (as_dataset(X, Y, classes=["a", "b"], targets=Y), dataset), monkeypatch)


@worker_warnings
def test_randomness_inside_a_dataset_follows_seed_epoch_and_step(monkeypatch):
    dataset = Noisy([0] * 6, classes=["a"])
    torch.manual_seed(7)
    state = torch.get_rng_state()
    plain = opened_target((dataset, dataset), monkeypatch)
    whole = list(plain.train_batches(0, 1, 2, False))
    x = whole[1][0]
    torch.manual_seed(derive_seed(0, "sample", 1, 1))
    assert torch.equal(x[:, :2], torch.stack([torch.rand(2), torch.rand(2)]))
    torch.set_rng_state(state)
    parallel = opened_target((dataset, dataset), monkeypatch, workers=2)
    assert equal(whole, parallel.train_batches(0, 1, 2, False))
    assert equal(whole[1:], plain.train_batches(0, 1, 2, False, 1))
    assert equal(plain.test_batches(4), parallel.test_batches(4))
    assert not equal(whole, plain.train_batches(0, 2, 2, False))
    assert torch.equal(torch.get_rng_state(), state)
