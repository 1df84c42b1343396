"""CIFAR-10 (JPEG copy) through `arrays` and `imagefolder`, in both engines."""

import importlib.util
import io

import numpy as np
import pytest
from conftest import REPOSITORY, assert_same_run, metrics_of, train_in_processes, train_locally
from PIL import Image

SHARED = REPOSITORY.parent / "shared" / "data"
TRAIN, TEST = 192, 64


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """The first images, as cifar.npz and as folders."""
    if not (SHARED / "cifar10-jpeg.npz").exists():
        pytest.skip(f"needs {SHARED}/cifar10-jpeg.npz")
    spec = importlib.util.spec_from_file_location("unpack_cifar10", SHARED / "unpack_cifar10.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    folder, arrays = tmp_path_factory.mktemp("cifar"), {}
    with np.load(unpack.PACKED) as packed:
        members = {name: packed[name] for name in packed.files}
    for split, count in (("train", TRAIN), ("test", TEST)):
        rows = [row for row, _ in zip(unpack.images(members, split), range(count), strict=False)]
        arrays[f"{split}_x"] = np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for _, jpeg, _ in rows])
        arrays[f"{split}_y"] = np.array([label for *_, label in rows], dtype=np.int64)
        for index, jpeg, label in rows:
            path = folder / split / str(members["classes"][label]) / f"{index:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg)
    np.savez(folder / "cifar.npz", **arrays)
    return folder


def config(name, data):
    return {
        "name": name, "model": {"name": "resnet_cifar", "args": {"depth": 8, "width": 0.5}},
        "data": {**data, "augment": {"crop": 4, "flip": True}}, "partition": {"stages": 2},
        "optimizer": {"name": "sgd", "lr": 0.05, "args": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}},
        "schedule": {"name": "one-cycle"}, "train": {"epochs": 3, "batch_size": 32}, "runtime": {"device": "cpu"},
    }


def test_both_engines_learn_the_same_from_arrays_and_from_folders(cifar, tmp_path):
    trees = [config("arrays", {"name": "arrays", "root": str(cifar / "cifar.npz")}),
             config("imagefolder", {"name": "imagefolder", "root": str(cifar), "workers": 1})]
    for tree, run in zip(trees, train_in_processes(trees, 2, tmp_path), strict=True):
        assert_same_run(run, train_locally(tree, tmp_path))
        losses = {(epoch, stage): loss for epoch, stage, _, loss, *_ in metrics_of(run)}
        assert all(losses[3, stage] < losses[2, stage] < losses[1, stage] for stage in (1, 2))
