"""Training samples held out for validation: which ones, how they are prepared, and what is evaluated on them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, small_config
from data_under_test import RAW, SYNTHETIC, Listed, equal, opened, opened_target, refused, worker_warnings, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from models_under_test import conv_net
from test_cli import evaluated, run, shown
from torch.nn.functional import cross_entropy

from blpipe.config_file import load_config
from blpipe.data import open_data
from blpipe.errors import ConfigError
from blpipe.metrics import read_rows
from blpipe.seeds import generator

CROP = {"name": "RandomResizedCrop", "args": {"size": [8, 6], "scale": [0.3, 1.0]}}


def white():
    """A transform that makes an image white."""
    return lambda x: torch.full_like(x, 255)


def numbered(count, as_dataset):
    """Samples that are their own index, of two classes, for training and for testing."""
    x, y = torch.arange(count)[:, None], torch.arange(count) % 2
    pair = Listed(list(zip(x, y, strict=True)), targets=y) if as_dataset else (x, y)
    return pair, pair


def indices(batches):
    return [index for x, _ in batches for index in x[:, 0].tolist()]


def held_of(count, held):
    """The samples of so many that are held out, in order."""
    return torch.randperm(count, generator=generator(0, "validation"))[:held].sort().values.tolist()


def rest_of(count, held):
    return sorted({*range(count)} - {*held_of(count, held)})


# ---- which ones


@given(held=st.integers(1, 20), rest=st.integers(1, 20), cut_off=st.integers(0, 5), batch_size=st.integers(1, 50),
       seed=st.integers(0, 9), as_dataset=st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_parts_are_disjoint_and_together_the_training_samples(held, rest, cut_off, batch_size, seed, as_dataset):
    count = held + rest
    with pytest.MonkeyPatch.context() as patch:
        data = opened_target(numbered(count + cut_off, as_dataset), patch, seed=seed, train_samples=count,
                             validation_samples=held)
    assert (data.spec.train_samples, data.spec.test_samples, data.spec.classes) == (rest, held, 2)
    tested = indices(data.test_batches(batch_size))
    assert tested == held_of(count, held)  # whatever the seed
    for epoch in range(2):
        trained = indices(data.train_batches(seed, epoch, batch_size, False))
        assert sorted(trained) == rest_of(count, held)


def test_the_choice_neither_reads_nor_moves_the_global_stream(monkeypatch):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = opened_target(numbered(20, False), monkeypatch, validation_samples=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert equal(one.test_batches(5), opened_target(numbered(20, False), monkeypatch,
                                                    validation_samples=5).test_batches(5))


def test_some_must_be_left_to_train_on():
    assert opened(**SYNTHETIC, validation_samples=49).spec.train_samples == 1
    refused(r"^data\.validation_samples: 50 of 50 training samples would leave none to train on; hold out at most 49$",
            **SYNTHETIC, validation_samples=50)
    refused(r"^data\.validation_samples: 9 of 9 training samples would leave none .* at most 8$", **SYNTHETIC,
            train_samples=9, validation_samples=9)


@pytest.mark.parametrize("place", ["host", "device"])
def test_the_memory_is_that_of_the_training_samples_wherever_they_are(place):
    whole = opened(**SYNTHETIC)
    data = opened(**SYNTHETIC, validation_samples=8, place=place)
    there = data.to(torch.device("cpu"))
    assert data._source.nbytes == whole._source.train.nbytes
    assert [part.x.untyped_storage().nbytes() for part in (data._source.train, data._source.test)] == [
        42 * 3 * 8 * 6, 8 * 3 * 8 * 6]
    assert equal(there.train_batches(0, 0, 16, False), data.train_batches(0, 0, 16, False))
    assert equal(there.test_batches(3), data.test_batches(3))


# ---- how they are prepared


def rows(data, places):
    """These of the test samples, in one batch."""
    x, y = next(data.test_batches(data.spec.test_samples))
    return [(x[places], y[places])]


@worker_warnings
@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_a_folder_are_fitted_as_those_for_testing_are(tmp_path, workers):
    write_folder(tmp_path)  # 12 images of 5 × 5
    shutil.rmtree(tmp_path / "test")
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    section = {"name": "imagefolder", "root": str(tmp_path), "args": {"size": [8, 6]}, "workers": workers}
    plain, data = opened(**section), opened(**section, validation_samples=5, augment={"transforms": [CROP]})
    assert equal(data.test_batches(5), rows(plain, held_of(12, 5)))
    (x, y), (u, v) = (next(each.train_batches(0, 0, 12, False)) for each in (data, opened(
        **section, validation_samples=5)))
    assert torch.equal(y, v)
    assert not any(map(torch.equal, x, u))  # transformed, each of them


@pytest.mark.parametrize("as_dataset", [False, True])
def test_transforms_and_augmentation_are_for_the_others_alone(monkeypatch, as_dataset):
    x, y = torch.randint(0, 200, (12, 3, 8, 6), dtype=torch.uint8, generator=generator(0)), torch.arange(12)
    pair = Listed(list(zip(x, y, strict=True)), targets=y) if as_dataset else (x, y)
    augment = {"transforms": [{"target": "test_validation:white"}], "crop": 2, "flip": True}
    data = opened_target((pair, pair), monkeypatch, validation_samples=5, augment=augment, normalize=RAW)
    assert equal(data.test_batches(5), rows(opened_target((pair, pair), monkeypatch, normalize=RAW), held_of(12, 5)))
    (images, labels), = data.train_batches(0, 0, 12, False)
    assert sorted(labels.tolist()) == rest_of(12, 5)
    assert images.eq(1).all()


@pytest.mark.parametrize(("bad", "part"), [(held_of(12, 5)[1], held_of(12, 5)), (held_of(12, 5)[-1], held_of(12, 5)),
                                           (rest_of(12, 5)[2], rest_of(12, 5)), (rest_of(12, 5)[-1], rest_of(12, 5))])
def test_the_next_of_its_own_part_stands_in_for_a_bad_sample(monkeypatch, bad, part):
    pair = numbered(12, True)
    pair[0].samples[bad] = KeyError("no such file")
    data = opened_target(pair, monkeypatch, validation_samples=5, bad_samples="skip")
    other = part[(part.index(bad) + 1) % len(part)]
    found = [sorted(indices(batches)) for batches in (data.train_batches(0, 0, 5, False), data.test_batches(2))]
    assert found == [sorted(other if index == bad else index for index in each)
                     for each in (rest_of(12, 5), held_of(12, 5))]
    assert data.notes() == [f"data.target: train sample {bad}: cannot be read: KeyError: 'no such file'; sample "
                            f"{other} stands in for it"]


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize("index", [held_of(12, 5)[3], rest_of(12, 5)[3]])
def test_a_label_that_the_model_does_not_know_is_named_by_its_index_in_the_data(monkeypatch, as_dataset, index):
    x, y = torch.zeros(12, 2), torch.arange(12) % 2
    y[index] = 4
    pair = Listed(list(zip(x, y, strict=True)), targets=y) if as_dataset else (x, y)
    data = opened_target((pair, pair), monkeypatch, validation_samples=5)
    data.check_fits_model(5)
    with pytest.raises(ConfigError, match=rf"^data: train label 4 at index {index} lies outside 0\.\.3, of which the "
                                          r"model gives logits; have it give 5, or mend the data$"):
        data.check_fits_model(4)


# ---- what is evaluated


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """A working directory with a run that held 20 of its 88 training images out; returns what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(REPOSITORY / "tests")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small_config("small", data__validation_samples=20)))
    assert run("train", "small.yaml") == 0
    return capsys.readouterr().out


def plainly(batches):
    """Loss and accuracy of the plain model, as they are shown."""
    model = conv_net()
    model.load_state_dict(torch.load("model.pt", weights_only=True))
    (x, y), = batches
    with torch.no_grad():
        logits = model.eval()(x)
    return f"{cross_entropy(logits, y):.4f}", f"{100 * (logits.argmax(1) == y).float().mean():.1f}"


def test_training_evaluates_those_held_out_and_eval_the_test_samples(trained, capsys):
    assert "; 68 training and 20 validation samples of [2, 8, 8]" in trained
    assert trained.count("  validation accuracy by stage ") == 2
    last = read_rows(Path("runs/small"))[-3:]
    assert json.loads(Path("runs/small/result.json").read_text())["val_accuracy"] == last[-1]["val_accuracy"]
    assert run("export", "runs/small", "--out", "model.pt") == 0
    config = load_config("runs/small/config.yaml")
    held_out = plainly(open_data(config.data, 0).test_batches(20))
    tested = plainly(open_data(config.data.model_copy(update={"validation_samples": None}), 0).test_batches(88))
    assert shown(last)[-1] == held_out != tested
    assert evaluated(capsys, "runs/small")[-1] == tested
    assert evaluated(capsys, "runs/small", "data.validation_samples=20") == shown(last)


def test_a_run_goes_on_with_the_same_ones_held_out(trained, capsys):
    assert run("train", "--resume", "runs/small", "data.validation_samples=10") == 2
    assert capsys.readouterr().err.startswith("blpipe: data.validation_samples: 10, but 20 in runs/small/checkpoints/")
    assert run("train", "--resume", "runs/small", "train.epochs=3") == 0
