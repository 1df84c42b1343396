"""Data of the user's own: `data.target`."""

import numpy as np
import pytest
import torch
from conftest import train_locally
from data_under_test import Listed, Noisy, X, Y, equal, opened_target, refused, refused_target, worker_warnings
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, random_split

from blpipe.data.prepare import augment, moves
from blpipe.errors import ConfigError, UserError
from blpipe.seeds import derive_seed, generator
from blpipe.specs import DataSpec


def as_dataset(x, y, **attributes) -> Listed:
    return Listed([(a, int(b)) for a, b in zip(x, y, strict=True)], **attributes)


@pytest.mark.parametrize("kind", ["tensors", "arrays", "lists", "dataset", "labels as tensors", "arrays one by one",
                                  "mixed"])
def test_a_target_in_every_shape_gives_the_same(monkeypatch, kind):
    readonly = X.numpy().copy()
    readonly.flags.writeable = False
    value = {"tensors": ((X, Y), (X, Y)), "arrays": ((readonly, Y.numpy()), (X.numpy()[:], Y.numpy())),
             "lists": [[X, Y.int()], [X, Y]], "dataset": (as_dataset(X, Y, targets=Y), as_dataset(X, Y)),
             "labels as tensors": (Listed([*zip(X, Y, strict=True)], classes=list("abc")), as_dataset(X, Y)),
             "arrays one by one": (as_dataset(readonly, Y, targets=Y), as_dataset(X.numpy()[::-1][::-1], Y)),
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


@pytest.mark.parametrize("channels", [(), (2,)])
def test_targets_of_pixels_move_with_the_images(channels, monkeypatch):
    rows = torch.arange(16).view(1, 4, 4) + torch.arange(6).view(6, 1, 1)
    y = (rows[:, None] * torch.arange(1, 3).view(2, 1, 1)).float() if channels else rows
    x = torch.cat([rows[:, None], X[:, 1:]], 1).to(torch.uint8)
    data = opened_target(((x, y), (x, y)), monkeypatch, augment={"crop": 1, "flip": True}, normalize={
        "mean": [0.0] * 3, "std": [1.0] * 3})
    (moved, of_pixels), = data.train_batches(2, 3, 6, False)
    first = (moved[:, 0] * 255).round()
    assert of_pixels.dtype == y.dtype and of_pixels.shape == y.shape
    assert torch.equal(of_pixels.float(), torch.stack([first, 2 * first], 1) if channels else first)
    assert not torch.equal(first.sort(0).values, rows.float())  # they did move


def test_targets_that_cannot_move_with_the_images_are_refused(monkeypatch):
    pair = X, torch.zeros(6, 4, 4, 3)
    assert opened_target((pair, pair), monkeypatch).spec.target_shape == (4, 4, 3)
    for key, value in (("crop", 1), ("flip", True)):
        refused_target(rf"^data\.augment\.{key}: {value} moves pixels, and the targets \[4, 4, 3\] are not those of "
                       r"pixels, \[4, 4\] or \[C, 4, 4\], to move with them; leave it out$", (pair, pair), monkeypatch,
                       augment={key: value})


def test_images_that_seem_to_have_their_channels_last_are_noted(monkeypatch, tmp_path, capsys):
    def notes(shape, dtype=torch.uint8):
        pair = torch.zeros(6, *shape, dtype=dtype), Y
        return opened_target((pair, pair), monkeypatch).notes_on_layout()

    assert notes((8, 9, 3)) == ["data: uint8 samples of [8, 9, 3] are taken as images of 8 channels; if these are "
                                "last, give [N, C, H, W], such as by moveaxis(x, -1, 1)"]
    assert len(notes((8, 9, 1))) == 1
    assert notes((8, 9, 3), torch.float32) == notes((3, 8, 3)) == notes((1, 8, 1)) == notes((8, 9, 9)) == []
    pair = torch.zeros(6, 4, 4, 3, dtype=torch.uint8), Y
    monkeypatch.setattr("data_under_test.returned", (pair, pair))
    train_locally({"name": "last", "model": "mlp", "data": {"target": "data_under_test:own_data"}, "method": "bp",
                   "partition": {"stages": 1}, "train": {"epochs": 1, "batch_size": 6}, "runtime": {}}, tmp_path)
    assert "note: data: uint8 samples of [4, 4, 3]" in capsys.readouterr().out


def test_a_part_of_a_dataset_has_the_classes_and_the_targets_of_the_whole(monkeypatch):
    named, listed = as_dataset(X, Y, classes=list("abcd")), as_dataset(X, Y, targets=Y + 2)
    data = opened_target(random_split(named, [4, 2]), monkeypatch)
    assert data.spec == DataSpec((3, 4, 4), "float32", (), 4, 4, 2)
    assert opened_target((Subset(Subset(named, [0, 1]), [1]), named), monkeypatch).spec.classes == 4
    part = Subset(listed, [1, 3, -2])
    assert opened_target((part, part), monkeypatch).spec.classes == 1 + int((Y + 2)[[1, 3, -2]].max())
    refused_target(r"^data\.target: test: the indices of its Subset are none of its Dataset: index 6 is out of bounds",
                   (listed, Subset(listed, [6])), monkeypatch)


class Halved(Subset):
    """A part with targets of its own."""

    classes = ("low", "high")

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, y // 2

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_a_part_that_changes_its_targets_is_not_taken_for_the_whole(monkeypatch):
    part = Halved(as_dataset(X, Y, targets=Y + 2), [0, 1])
    assert opened_target((part, part), monkeypatch).spec.classes == 2


def test_a_target_gets_its_arguments(monkeypatch):
    def make(count):
        return (X[:count], Y[:count]), (X, Y)

    assert opened_target(make, monkeypatch, args={"count": 5}).spec.train_samples == 5
    refused_target(r"^data: TypeError: .*'cuont'", make, monkeypatch, args={"cuont": 5})
    refused(r"^data\.args: .*'x'; it takes no arguments", target="test_data_targets:write_nothing", args={"x": 1})
    refused(r"^data\.target: cannot import 'test_data_targets:absent'", target="test_data_targets:absent")


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
        data.check_fits_model(4)
    for name, section in (("augment.flip", {"augment": {"flip": True}}),
                          ("augment.crop", {"augment": {"crop": 1}}),
                          ("normalize", {"normalize": {"mean": [0.0], "std": [1.0]}})):
        refused_target(rf"^data\.{name}: needs images \[C, H, W\], the samples are int64 \[4\]; leave it ou",
                       value, monkeypatch, **section)
    images_of_tokens = torch.zeros(6, 1, 4, 4, dtype=torch.int64), Y
    refused_target(r"augment\.flip: needs images .* int64", (images_of_tokens,) * 2, monkeypatch,
                   augment={"flip": True})


class Sentences(Dataset):
    """Of four tokens and as many targets, the last of them left out."""

    classes = range(5)

    def __init__(self, left_out=-100):
        self.left_out = left_out

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        tokens = torch.arange(index, index + 4) % 5
        return tokens, torch.cat([tokens[1:], torch.tensor([self.left_out])])


def test_positions_may_be_left_out_of_targets_and_samples_may_not(monkeypatch):
    x, y = (torch.stack(part) for part in zip(*Sentences(), strict=True))
    for value in ((Sentences(), Sentences()), ((x, y), (x, y))):
        data = opened_target(value, monkeypatch)
        assert data.spec.classes == 5
        data.check_fits_model(5)
        (_, found), = data.test_batches(6)
        assert torch.equal(found, y)
    wrong = y.clone()
    wrong[2, 1] = -99
    refused_target(r"train label -99 at index \[2, 1\] is negative", ((x, wrong), (x, wrong)), monkeypatch)
    with pytest.raises(UserError, match=r"has the label -1 at \[\d\], outside 0\.\.4; give -100 where a position "
                                        r"is to be left out, mend the data or its number of classes$"):
        list(opened_target((Sentences(-1), Sentences(-1)), monkeypatch).test_batches(6))
    none = torch.full_like(y, -100)
    refused_target(r"train label -100 at index \[0, 0\] is negative", ((x, none), (x, none)), monkeypatch)
    flat = torch.tensor([0, 1, 2, 3, 4, -100])
    refused_target("train label -100 at index 5 is negative", ((x, flat), (x, flat)), monkeypatch)


class Odd(Listed):
    """Some of what blpipe asks of a Dataset goes wrong."""

    def __init__(self, **answers):
        super().__init__([(X[0], 0)])
        self.answers = {"length": 1, **answers}

    def __len__(self):
        return self._answer("length")

    @property
    def targets(self):
        return self._answer("targets")

    @property
    def classes(self):
        return self._answer("classes")

    def _answer(self, name):
        answer = self.answers.get(name)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Unsized(Listed):
    __len__ = None


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(("value", "match"), [
    (None, r"returned NoneType; expected \(train, test\), each a pair"),
    ((X, Y), r"train is uint8 \[6, 3, 4, 4\]; expected"),
    (((X, Y), (X, Y), (X, Y)), r"returned \(\(uint8 \[6, 3, 4, 4\], int64 \[6\]\), .*; expected"),
    (((X, Y), None), r"test is NoneType; expected"),
    (((X.bool(), Y), (X, Y)), r"train is \(bool \[6, 3, 4, 4\], int64 \[6\]\); expected"),
    (((X, Y.bool()), (X, Y)), r"train is \(uint8 .*, bool \[6\]\); expected .* y of integers"),
    ((([1, 2], Y), (X, Y)), r"train is \(list, int64 \[6\]\); expected"),
    (((np.array(["a"] * 6), Y), (X, Y)), r"train is \(<U1 \[6\], int64 \[6\]\); expected"),
    (((torch.tensor(1), torch.tensor(1)), (X, Y)), r"train is \(int64 \[\], int64 \[\]\); expected"),
    (((X[:4], Y), (X, Y)), r"train has 4 samples, but 6 targets"),
    (((X[:0], Y[:0]), (X, Y)), r"train is empty"),
    (((X, Y), (X[:0], Y[:0])), r"test is empty"),
    (((X, Y - 1), (X, Y)), r"train label -1 at index 0 is negative"),
    ((Stream(), (X, Y)), r"train is a Stream, which has no length or no order; expected"),
    ((Unsized([]), (X, Y)), r"train is a Unsized, which has no length or no order; expected"),
    ((Odd(length=2.0), (X, Y)), r"train: its length cannot be read: TypeError: 'float' .*; have __len__ give a whole"),
    (((X, Y), Odd(length=KeyError("no file"))), r"test: its length cannot be read: KeyError: .*; have __len__ give"),
    ((Odd(targets=OSError("a\nb")), (X, Y)), r"train: the attribute targets cannot be read: OSError: a b; mend it or"),
    ((Odd(classes=OSError("a\nb")), (X, Y)), r"train: the attribute classes cannot be read: OSError: a b; mend it or"),
    ((Odd(classes=torch.tensor(3)), (X, Y)), r"train: the attribute classes: its length cannot be read: TypeError: "),
    ((Listed([(np.array(["a"]), 0)], classes=["a"]), (X, Y)), r"train sample 0 is \(<U1 \[1\], int\); expected"),
    ((Listed([], classes=["a"]), (X, Y)), r"train is empty"),
    ((as_dataset(X, Y), (X, Y)), r"the train Dataset says neither .* attribute classes .* or targets"),
    ((as_dataset(X, Y, targets=[0]), (X, Y)), r"train: the attribute targets is list, not a number for ea"),
    ((as_dataset(X, Y, targets=["a"] * 6), (X, Y)), r"train: the attribute targets is list"),
    ((Listed([(X[0],)], classes=["a"]), (X, Y)), r"train sample 0 is \(uint8 \[3, 4, 4\]\); expected \(tens"),
    ((Listed([(Image.new("L", (2, 2)), 0)], classes=["a"]), (X, Y)), r"train sample 0 is \(Image, int\); ex"),
    ((Listed([(X[0], "a")], classes=["a"]), (X, Y)), r"train sample 0 is \(uint8 .*, str\); expected"),
    ((Listed([KeyError("x\ny")], classes=["a"]), (X, Y)), r"train sample 0: cannot be read: KeyError: "),
])
def test_anything_else_from_a_target_is_refused(monkeypatch, value, match):
    refused_target(rf"^data\.target: {match}", value, monkeypatch)


def test_train_and_test_must_be_alike(monkeypatch):
    refused_target(r"train samples are uint8 .* test samples are float32", ((X, Y), (X.float(), Y)),
                   monkeypatch)
    refused_target(r"train samples are .* with target int64 \[\], but .* with target int64 \[1\]",
                   ((X, Y), (X, Y[:, None])), monkeypatch)


@worker_warnings
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("sample", "match"), [
    ((X[0], 3), r"sample 4 has the label 3, outside 0\.\.2; mend the data"),
    ((X[0], -1), r"sample 4 has the label -1, outside 0\.\.2"),
    ((X[0, :2], 1), r"sample 4 is uint8 \[2, 4, 4\] with target int64 \[\], but the first is uint8 \[3, 4"),
    ((X[0].float(), 1), r"sample 4 is float32 \[3, 4, 4\] with target int64 \[\], but the first is uint8"),
    ("text", r"sample 4 is str; expected \(tensor or array, number or tensor\)"),
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
    data.check_fits_model(3)
    with pytest.raises(ConfigError, match=r"have 3 classes, and the model gives 2 logits; have it give 3"):
        data.check_fits_model(2)
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


@worker_warnings
@pytest.mark.parametrize("workers", [0, 1])
def test_samples_with_a_gradient_are_taken_without(workers, monkeypatch):
    samples = [((torch.ones(3, 4, 4).requires_grad_() * number), number % 2) for number in range(4)]
    data = opened_target((Listed(samples, classes="ab"), Listed(samples)), monkeypatch, workers=workers)
    x, _ = next(data.train_batches(0, 0, 4, False))
    assert not x.requires_grad
