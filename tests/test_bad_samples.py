"""Samples that cannot be read: refused or skipped by `data.bad_samples`, the same for any number of workers."""

from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_same_run, small_config, train_in_processes, train_locally
from PIL import Image
from torch.utils.data import Dataset

from blpipe import cli
from blpipe.config import DataConfig
from blpipe.data import Data, open_data
from blpipe.errors import ConfigError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning",
                                        "ignore:This DataLoader will create:UserWarning")
CLASSES, TRAIN, TEST = "abc", 16, 8  # images a class


@pytest.fixture
def root(tmp_path) -> Path:
    """An image folder of 3 × 16 JPEG and 3 × 8 PNG files."""
    values = np.random.default_rng(0)
    for split, count, suffix in (("train", TRAIN, "jpg"), ("test", TEST, "png")):
        for name in CLASSES:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(values.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                    tmp_path / "images" / split / name / f"{i:02d}.{suffix}")
    return tmp_path / "images"


def image(root: Path, split: str, index: int) -> Path:
    """The file of a sample, by its index."""
    return sorted((root / split).glob("*/*"))[index]


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-path.stat().st_size // 3])
    return path


def stand_in(root: Path, split: str, index: int, other: int) -> None:
    """Put another sample, its image and its class, in the place of one."""
    path, good = image(root, split, index), image(root, split, other)
    assert path.parent == good.parent
    path.write_bytes(good.read_bytes())


def opened(root: Path, **section) -> Data:
    return open_data(DataConfig.model_validate({"name": "imagefolder", "root": str(root)} | section), 0)


def epoch(data: Data) -> list[torch.Tensor]:
    return [part for batch in (*data.train_batches(1, 0, 5, False), *data.test_batches(7)) for part in batch]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def folder_config(name: str, root: Path, **data) -> dict:
    tree = small_config(name, model={"name": "resnet_cifar", "args": {"depth": 8, "width": 0.25}}, train__epochs=2)
    return tree | {"data": {"name": "imagefolder", "root": str(root), **data}}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_readable_sample_stands_in_and_each_is_told_once(root, workers):
    skipped = (("train", 3, 5), ("train", 4, 5), ("train", 20, 21), ("test", 9, 10))
    bad = [truncate(image(root, split, index)) for split, index, _ in skipped]
    data = opened(root, workers=workers, bad_samples="skip")
    assert data.notes() == []
    found = epoch(data)
    said = data.notes()
    assert len(said) == 4
    for (split, index, other), path in zip(skipped, bad, strict=True):
        line, = (line for line in said if str(path) in line)
        assert line.startswith(f"data.root: {split} sample {index}: {path}: cannot be read as an image: ")
        assert line.endswith(f"; sample {other} stands in for it")
    assert equal(epoch(data), found)
    assert data.notes() == []
    truncate(image(root, "test", 0))
    epoch(data)
    assert [line.partition(": /")[0] for line in data.notes()] == ["data.root: test sample 0"]
    for split, index, other in (*skipped, ("test", 0, 1)):
        stand_in(root, split, index, other)
    mended = opened(root)
    assert equal(epoch(mended)[:20], found[:20])
    assert mended.notes() == []


def test_notes_and_batches_are_the_same_for_any_number_of_workers(root):
    for index in (0, 7, 8, 30, 47):
        truncate(image(root, "train", index))
    opens = [opened(root, workers=workers, bad_samples="skip") for workers in (0, 1, 3)]
    batches = [epoch(data) for data in opens]
    notes = [data.notes() for data in opens]
    assert equal(batches[0], batches[1])
    assert equal(batches[0], batches[2])
    assert notes[0] == notes[1] == notes[2]
    assert len(notes[0]) == 5


def test_after_the_last_sample_comes_the_first_of_those_that_are_kept(root):
    truncate(image(root, "train", 9))
    data = opened(root, bad_samples="skip", train_samples=10)
    list(data.train_batches(0, 0, 5, False))
    line, = data.notes()
    assert line.endswith("; sample 0 stands in for it")


def test_shapes_come_from_the_first_image_that_can_be_read(root):
    for i in range(2):
        truncate(image(root, "train", i))
    assert opened(root, bad_samples="skip").spec.shape == (3, 8, 8)
    with pytest.raises(ConfigError, match=r"^data\.root: train sample 0: .*; mend or remove it, or set data\.bad_"):
        opened(root)


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_an_image_of_more_than_eight_bits_is_refused_rather_than_clipped(root, mode):
    path = image(root, "train", 0).with_suffix(".tif")
    image(root, "train", 0).unlink()
    Image.new(mode, (8, 8), 1000).save(path)
    with pytest.raises(ConfigError, match=rf"mode {mode} is more than 8 bits a channel; convert it to 8; mend "):
        opened(root)
    assert opened(root, bad_samples="skip").spec.shape == (3, 8, 8)


def test_where_nothing_can_be_read_that_is_an_error(root):
    for path in (root / "test").glob("*/*"):
        truncate(path)
    with pytest.raises(ConfigError, match=r"^data\.root: test sample 0: .*; none of the 24 samples can be read; mend") \
            as caught:
        opened(root, bad_samples="skip")
    assert "\n" not in str(caught.value)
    for path in (root / "train").glob("*/*"):
        truncate(path)
    with pytest.raises(ConfigError, match=r"^data\.root: train sample 0: .*; none of the 48 samples can be read; mend"):
        opened(root, bad_samples="skip")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_becomes_unreadable_later_is_an_error_too(root, workers):
    data = opened(root, bad_samples="skip", workers=workers)
    for path in (root / "train").glob("*/*"):
        path.unlink()
    with pytest.raises(UserError, match=r"^data\.root: train sample \d+: .*; none of the 48 samples can be read; mend"
                       ) as held:
        list(data.train_batches(0, 0, 4, False))
    assert held.tb is not None and not active_children()  # the workers have ended, whatever becomes of the error


class Flawed(Dataset):
    """Samples of a user's own, some of them flawed; each draws from torch's global stream."""

    classes = ("a", "b")

    def __init__(self, flaws: dict):
        self.flaws = flaws

    def __len__(self):
        return 12

    def __getitem__(self, index):
        x = torch.rand(2) + index
        flaw = self.flaws.get(index)
        if isinstance(flaw, Exception):
            raise flaw
        return flaw or (x, index % 2)


flaws: dict = {}


def flawed():
    return Flawed(flaws), Flawed({})


def opened_flawed(found: dict, monkeypatch, **section) -> Data:
    monkeypatch.setattr("test_bad_samples.flaws", found)
    return open_data(DataConfig.model_validate({"target": "test_bad_samples:flawed"} | section), 0)


def test_any_sample_that_a_dataset_does_not_give_is_skipped(monkeypatch):
    found = {0: KeyError("no\nkey"), 5: UserError("of mine"), 11: EOFError()}
    plain, parallel = (opened_flawed(found, monkeypatch, bad_samples="skip", workers=n) for n in (0, 2))
    batches = [list(data.train_batches(0, 0, 4, False)) for data in (plain, parallel)]
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(*batches, strict=True))
    assert sorted(torch.cat([x for x, _ in batches[0]])[:, 0].long().tolist()) == [1, 1, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10]
    assert sorted(plain.notes()) == sorted(parallel.notes()) == [
        r"data.target: train sample 0: cannot be read: KeyError: 'no\nkey'; sample 1 stands in for it",
        "data.target: train sample 11: cannot be read: EOFError: ; sample 1 stands in for it",
        "data.target: train sample 5: of mine; sample 6 stands in for it"]


@pytest.mark.parametrize(("flaw", "match"), [
    ((torch.rand(2), 2), r"sample 5 has the label 2, outside 0\.\.1"),
    ((torch.rand(3), 1), r"sample 5 is float32 \[3\] with target int64 \[\], but the first is float32 \[2\]"),
    ("text", r"sample 5 is str; expected \(tensor or array, number or tensor\)"),
])
def test_what_can_be_read_but_does_not_fit_is_never_skipped(monkeypatch, flaw, match):
    for found in ({5: flaw}, {5: flaw, 4: OSError("gone")}):  # nor as a stand-in
        data = opened_flawed(found, monkeypatch, bad_samples="skip")
        with pytest.raises(UserError, match=rf"^data\.target: train {match}"):
            list(data.train_batches(0, 0, 4, False))


def test_data_in_memory_take_the_key_as_they_take_workers():
    assert open_data(DataConfig(name="digits", bad_samples="skip", workers=1), 0).notes() == []


# Through the command line.

def run(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


def test_a_run_says_each_skipped_file_once_and_is_the_same_for_any_number_of_workers(root, tmp_path, monkeypatch,
                                                                                     capsys):
    monkeypatch.chdir(tmp_path)
    bad = {truncate(image(root, "train", 5)), truncate(image(root, "test", 2))}
    Path("run.yaml").write_text(yaml.safe_dump(folder_config("run", root, bad_samples="skip")))
    for workers in (0, 2):
        assert run("train", "run.yaml", f"data.workers={workers}", f"runtime.runs=runs{workers}") == 0
        said = capsys.readouterr()
        assert said.err == ""
        lines = said.out.splitlines()
        notes = [line for line in lines if line.startswith("note: data")]
        assert len(notes) == 2
        assert all(sum(str(path) in note for note in notes) == 1 for path in bad)
        first = next(i for i, line in enumerate(lines) if line.startswith("epoch 1/2"))
        assert lines[first + 1:first + 3] == notes
        assert run("eval", f"runs{workers}/run") == 0
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")] == notes[1:]
    assert_same_run(tmp_path / "runs0/run", tmp_path / "runs2/run")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_refuses_ends_with_one_line_that_names_the_file(root, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.chdir(tmp_path)
    bad = truncate(image(root, "train", 5))
    Path("run.yaml").write_text(yaml.safe_dump(folder_config("run", root, workers=workers)))
    assert run("train", "run.yaml") == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"blpipe: data.root: train sample 5: {bad}: cannot be read as an image: OSError: ")
    assert line.endswith("; mend or remove it, or set data.bad_samples=skip")


def test_both_engines_skip_alike(root, tmp_path):
    for split, index in (("train", 5), ("train", 40), ("test", 2)):
        truncate(image(root, split, index))
    tree = folder_config("run", root, bad_samples="skip") | {"partition": {"stages": 2}}
    there, = train_in_processes([tree], 2, tmp_path)
    assert_same_run(train_locally(tree, tmp_path), there)
