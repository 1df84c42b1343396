"""Data sets by name: torchvision's, arrays in a file, folders of images."""

import contextlib
import io
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from data_under_test import AUGMENT, RAW, arrays, equal, images, opened, refused, worker_warnings, write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from blpipe.data import Data
from blpipe.errors import ConfigError, UserError
from blpipe.seeds import generator
from blpipe.specs import DataSpec

# ---- the sets by name


def test_digits():
    data = opened(name="digits")
    assert data.spec == DataSpec((1, 8, 8), "float32", (), 10, data.spec.train_samples, 359)
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


def test_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    data = opened(name="arrays", root=str(tmp_path / "a.npz"), normalize=RAW)
    assert data.spec == DataSpec((3, 4, 4), "float32", (), 3, 6, 3)
    check_opened(data, images(6, 4), [0, 1, 2, 0, 1, 2], images(3, 4, seed=1), [0, 1, 2])


NOTHING = np.zeros((0, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(("changes", "match"), [
    ({"test_y": None}, r"has no test_y; it must have test_y, int64 \[N\]"),
    ({"train_x": np.zeros((6, 4, 4, 3))}, r"train_x is float64, but must be uint8 \[N, H, W, C\]; "
                                                r"convert it by \(255 \* x\)\.round\(\)\.astype\('uint8'\), if its "
                                                "values are from 0 to 1$"),
    ({"train_y": np.zeros(6, np.int32)}, r"train_y is int32, but must be int64 \[N\]; convert it by "),
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
        data.check_fits_model(2)


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
