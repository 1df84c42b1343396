"""Data: batches, how they are prepared, and what is said of those that do not fit."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from data_under_test import AUGMENT, SYNTHETIC, Listed, X, Y, equal, opened, opened_target, refused, refused_target
from hypothesis import given, settings
from hypothesis import strategies as st

from blpipe.data import SETS
from blpipe.data.prepare import augment, moves
from blpipe.errors import ConfigError
from blpipe.seeds import generator
from blpipe.specs import DataSpec

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


def test_labels_are_checked_against_the_model():
    data = opened(**SYNTHETIC)
    data.check_fits_model(4)
    data.check_fits_model(9)
    with pytest.raises(ConfigError, match=r"^data: train label 3 at index \d+ lies outside 0\.\.2, of which "
                                          r"the model gives logits; have it give 4, or mend the data$"):
        data.check_fits_model(3)


def test_the_first_wrong_label_of_testing_is_found_too(monkeypatch):
    data = opened_target(((X[[0, 1, 2]], Y[[0, 1, 2]]), (X, Y)), monkeypatch, train_samples=2)
    with pytest.raises(ConfigError, match=r"^data: test label 2 at index 2 lies outside 0\.\.1, of which the "
                                          r"model gives logits; have it give 3, or mend the data$"):
        data.check_fits_model(2)


def test_a_label_that_only_testing_has_is_one_of_the_classes_of_pairs(monkeypatch):
    x, y = torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])
    data = opened_target(((x, y), (x, torch.tensor([0, 1, 5, 0]))), monkeypatch)
    assert data.spec.classes == 6
    data.check_fits_model(6)
    with pytest.raises(ConfigError, match=r"^data: test label 5 at index 2 lies outside 0\.\.4, of which the model "):
        data.check_fits_model(5)
    refused_target(r"^data: test label -1 at index 0 is none of the 2 classes, 0\.\.1; mend the data$",
                   ((x, y), (x, y - 1)), monkeypatch)
    refused_target(r"^data: train samples are .* with target int64 \[\], but test samples are .* float32",
                   ((x, y), (x, y / 0)), monkeypatch)
