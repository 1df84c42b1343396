"""Training images mixed with each other, as torchvision mixes them; every stage knows the shares of their labels."""

import pytest
import torch
import torch.nn.functional as F
from conftest import metrics_of, small_config, train_locally
from data_under_test import refused_target
from test_reference import assert_close, batches, model_of, prepared
from torchvision.transforms import v2

from blpipe.config import AugmentConfig
from blpipe.config_file import parse_config
from blpipe.data import Mixing
from blpipe.errors import ConfigError
from blpipe.losses import cross_entropy
from blpipe.seeds import derive_seed, generator, seeded
from blpipe.tally import Tally, main_targets, mixed_loss

IMAGE = (3, 8, 8)
BOTH = {"mixup": 0.4, "cutmix": 1.0}


def mixing(seed=0, **alphas):
    return Mixing(AugmentConfig(**alphas), seed, IMAGE)


def by_torchvision(way, alpha, step, x, y, classes, seed=0):
    """Images and labels as probabilities."""
    with seeded(derive_seed(seed, "mix", step)):
        torch.randint(1, ())  # which of the ways that are on
        return way(alpha=alpha, num_classes=classes)(x, y)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("key", "way"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_images_and_their_loss_are_those_of_torchvision(key, way, smoothing):
    x, logits = (torch.randn(shape, generator=generator(1)) for shape in ((6, *IMAGE), (6, 5)))
    y, loss = torch.tensor([0, 1, 2, 3, 4, 0]), cross_entropy(smoothing)
    for step in range(5):
        mix = mixing(**{key: 0.7}).of_step(step)
        mixed_x, soft_y = by_torchvision(way, 0.7, step, x, y, 5)
        assert torch.equal(mix.of(x), mixed_x)
        torch.testing.assert_close(mixed_loss(loss, logits, y, x, mix.ratio),
                                   F.cross_entropy(logits, soft_y, label_smoothing=smoothing))
        assert torch.equal(main_targets(y, mix.ratio), soft_y.argmax(1))
        tally = Tally()
        tally.add(torch.zeros(()), soft_y, main_targets(y, mix.ratio))
        assert tally.accuracy == 1.0


def test_a_step_has_one_of_the_ways_and_the_same_one_each_time():
    drawn = [mixing(**BOTH).of_step(step) for step in range(200)]
    cut = ["box" in mix.drawn for mix in drawn]
    assert 70 < sum(cut) < 130
    assert all(0.0 <= mix.ratio <= 1.0 for mix in drawn)
    again = mixing(**BOTH)
    assert [again.of_step(step).drawn for step in reversed(range(200))] == [mix.drawn for mix in reversed(drawn)]
    other = mixing(1, **BOTH)
    assert [other.of_step(step).ratio for step in range(200)] != [mix.ratio for mix in drawn]


def test_drawing_leaves_the_random_stream_alone():
    state = torch.get_rng_state()
    mixing(**BOTH).of_step(3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("method", "stages"), [("backlink", 1), ("bp", 2)])
@pytest.mark.parametrize(("key", "way"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_a_run_is_a_plain_loop_over_images_that_torchvision_has_mixed(key, way, method, stages, tmp_path):
    tree = small_config("mixed", model={"name": "mlp", "args": {"hidden": [12]}}, partition__stages=stages,
                        method=method, data__augment={key: 0.7})
    config, data, plan = prepared(tree)
    optimizer = torch.optim.SGD(plan.model.parameters(), lr=0.05, momentum=0.9)
    total = 0.0
    for step, (x, y) in enumerate(batches(config, data)):
        mixed_x, soft_y = by_torchvision(way, 0.7, step, x, y, 4)
        loss = F.cross_entropy(plan.model(mixed_x), soft_y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += len(y) * loss.item() * (step >= 6)
    run = train_locally(tree, tmp_path)
    assert_close(model_of(run), plan.model.state_dict(), rtol=1e-4, atol=1e-5)
    assert metrics_of(run)[-1][3] == pytest.approx(total / 88, rel=1e-4)


def test_tokens_and_images_of_many_labels_are_refused(monkeypatch):
    tokens, labels = torch.zeros(8, 5, dtype=torch.int64), torch.arange(8) % 4
    refused_target(r"^data\.augment\.cutmix: needs images \[C, H, W\], the samples are int64 \[5\]; leave it out$",
                   ((tokens, labels), (tokens, labels)), monkeypatch, augment={"cutmix": 1.0})
    images, maps = torch.zeros(8, *IMAGE), torch.zeros(8, 8, 8, dtype=torch.int64)
    refused_target(r"^data\.augment\.mixup: 0\.4 needs one label an image, and the targets are int64 \[8, 8\]; leave "
                   r"it out\ndata\.augment\.cutmix: 1 needs one label an image, ",
                   ((images, maps), (images, maps)), monkeypatch, augment=BOTH)


def test_a_negative_share_is_refused():
    with pytest.raises(ConfigError, match=r"^data\.augment\.mixup: must be 0, for none, or from 0\.001 to 1000"):
        parse_config(small_config("refused", data__augment={"mixup": -0.1}))
