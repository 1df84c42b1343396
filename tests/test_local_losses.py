"""Losses that read the stage's output, against their formulas; how a loss is built and called."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blpipe.boundary import Boundary
from blpipe.config import LossConfig
from blpipe.errors import ConfigError
from blpipe.losses import build_loss

LATER = ((8, 2, 2), (5,))
SHAPES = [(6, 3, 4), (6, 1, 1), (3, 2, 2), (1, 2, 2), (5, 6), (6,), (1,)]


def build(name=None, boundary=None, seed=0, block="layer1", key="method.loss", **config):
    boundary = boundary or Boundary((6, 3, 4), 5, LATER)
    return build_loss(LossConfig.model_validate(({"name": name} if name else {}) | config), boundary, seed, block, key)


def batch(shape=(6, 3, 4), size=7, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, classes, generator=generator), torch.randint(classes, (size,), generator=generator),
            torch.randn(size, *shape, generator=generator))


# Losses that the tests name as a target.

def of_logits(power=1):
    return lambda logits, targets: (logits.sum(-1) - targets).abs().pow(power).mean()


def of_x(boundary, factor=1.0):
    return lambda logits, targets, x: factor * x.square().mean() + boundary.classes


def named_last(factor, boundary):
    return of_x(boundary, factor)


class Distance(nn.Module):
    """A loss with a parameter and a buffer of its own."""

    def __init__(self, boundary):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(boundary.shape))
        self.register_buffer("calls", torch.zeros(()))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, logits, targets, x):
        return self.relu(self.scale * x).mean() + F.cross_entropy(logits, targets)


class Weighted(nn.Module):
    """A loss of logits and targets with a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(5))

    def forward(self, logits, targets):
        return F.cross_entropy(logits, targets, self.weight)


def text(boundary):
    return "text"


# Similarity matching.

def centred_cosines(rows):
    """Cosine similarities of rows, each less its mean, in a double loop; 0 for a row without a direction."""
    rows = [np.asarray(row, np.float64) - np.mean(row) for row in rows]
    lengths = [math.sqrt((row ** 2).sum()) for row in rows]
    return np.array([[a @ b / (p * q) if p > 1e-6 and q > 1e-6 else 0.0 for b, q in zip(rows, lengths, strict=True)]
                     for a, p in zip(rows, lengths, strict=True)])


def reduced(loss, x):
    """What `pred_sim` compares of each sample: by hand, from the layers' weights."""
    if x.dim() == 4:
        z = F.conv2d(x, loss.projection.conv.weight, padding=1).detach().numpy()
        flat = z.reshape(*z.shape[:2], -1)
        return flat.std(2, ddof=1) if flat.shape[1] > 3 and flat.shape[2] > 1 else flat.reshape(len(z), -1)
    pooled = x.mean(1) if x.dim() == 3 else x
    return (pooled @ loss.projection.fc.weight.T).detach().numpy()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_pred_sim_is_its_formula(shape, beta):
    logits, targets, x = batch(shape)
    loss = build("pred_sim", Boundary(shape, 5, LATER), args={"beta": beta})
    have, want = centred_cosines(reduced(loss, x)), centred_cosines(np.eye(5)[targets])
    expected = (1 - beta) * float(F.cross_entropy(logits, targets)) + beta * ((have - want) ** 2).mean()
    assert loss(logits, targets, x).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_pred_sim_has_by_default_99_parts_of_similarity():
    given = batch()
    assert torch.equal(build("pred_sim")(*given), build("pred_sim", args={"beta": 0.99})(*given))
    assert torch.equal(build("pred_sim", args={"beta": 0})(*given), F.cross_entropy(*given[:2]))


def test_pred_sim_is_nothing_where_the_outputs_are_as_alike_as_the_targets():
    logits, targets, _ = batch()
    loss = build("pred_sim", Boundary((5,), 5, LATER), args={"beta": 1.0})
    with torch.no_grad():
        loss.projection.fc.weight.copy_(3 * torch.eye(5))
    assert loss(logits, targets, F.one_hot(targets, 5).float() + 2).item() == pytest.approx(0, abs=1e-9)
    assert loss(logits, targets, F.one_hot((targets + targets.flip(0)) % 5, 5).float()).item() > 0.1


# Supervised contrast.

def contrast(z, targets, temperature):
    """L_out by its formula, sample by sample, over the batch."""
    z, total = np.asarray(z, np.float64), 0.0
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positive = [p for p in others if targets[p] == targets[i]]
        for p in positive:
            share = math.exp(z[i] @ z[p] / temperature) / sum(math.exp(z[i] @ z[a] / temperature) for a in others)
            total -= math.log(share) / len(positive)
    return total / len(z)


@pytest.mark.parametrize(("temperature", "weight"), [(0.1, 1.0), (0.5, 2.5), (7.0, 0.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_supcon_is_its_formula(shape, temperature, weight):
    logits, targets, x = batch(shape, size=9)
    loss = build("supcon", Boundary(shape, 5, LATER), args={"temperature": temperature, "weight": weight})
    pooled = x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x
    layers = loss.projection
    z = F.linear(F.linear(pooled, layers.fc1.weight, layers.fc1.bias).relu(), layers.fc2.weight, layers.fc2.bias)
    assert z.shape == (9, 128)
    expected = weight * contrast(z.detach(), targets.tolist(), temperature) + float(F.cross_entropy(logits, targets))
    assert loss(logits, targets, x).item() == pytest.approx(expected, rel=1e-4)


def test_supcon_has_by_default_temperature_one_tenth_and_weight_one():
    given = batch()
    assert torch.equal(build("supcon")(*given), build("supcon", args={"temperature": 0.1, "weight": 1.0})(*given))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_supcon_without_positives_is_the_cross_entropy(size):
    logits, _, x = batch(size=size)
    targets, x = torch.arange(size), x.requires_grad_()
    loss = build("supcon")
    value = loss(logits, targets, x)
    assert torch.equal(value, F.cross_entropy(logits, targets))
    value.backward()
    assert all(not tensor.grad.any() for tensor in (x, *loss.parameters()))


@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(["supcon", "pred_sim"]), order=st.permutations(range(6)),
       targets=st.lists(st.integers(0, 3), min_size=6, max_size=6), names=st.permutations(range(4)))
def test_neither_the_order_of_samples_nor_the_names_of_classes_matter(name, order, targets, names):
    logits, _, x = batch(size=6, classes=4)
    loss, targets = build(name, Boundary((6, 3, 4), 4, LATER)), torch.tensor(targets)
    value = loss(logits, targets, x)
    assert value.isfinite()
    torch.testing.assert_close(loss(logits[order], targets[order], x[order]), value)
    renamed = loss(logits.detach()[:, torch.tensor(names).argsort()], torch.tensor(names)[targets], x)
    torch.testing.assert_close(renamed, value)


# What both have in common.

@pytest.mark.parametrize("name", ["pred_sim", "supcon"])
@pytest.mark.parametrize("shape", [(6, 3, 4), (5, 6), (6,)])
def test_gradients_reach_the_output_and_the_losses_own_parameters(name, shape):
    logits, targets, x = batch(shape)
    loss = build(name, Boundary(shape, 5, LATER))
    loss(logits, targets, x.requires_grad_()).backward()
    assert all(tensor.grad.isfinite().all() and tensor.grad.any() for tensor in (x, *loss.parameters()))


@pytest.mark.parametrize("name", ["pred_sim", "supcon"])
def test_gradients_are_those_of_finite_differences(name):
    logits, targets, x = batch((4, 2, 3), size=5, classes=3)
    loss = build(name, Boundary((4, 2, 3), 3, LATER)).double()
    assert torch.autograd.gradcheck(lambda x, logits: loss(logits, targets, x),
                                    (x.double().requires_grad_(), logits.double().requires_grad_()))


@pytest.mark.parametrize("name", ["pred_sim", "supcon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_output_of_zeros_gives_finite_gradients(name, shape):
    logits, targets, _ = batch()
    loss, x = build(name, Boundary(shape, 5, LATER)), torch.zeros(7, *shape, requires_grad=True)
    value = loss(logits, targets, x)
    value.backward()
    assert value.isfinite()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *loss.parameters()))


@pytest.mark.parametrize("name", ["pred_sim", "supcon"])
def test_a_map_with_its_channels_last_gives_the_same(name):
    logits, targets, x = batch()
    first = build(name, Boundary((6, 3, 4), 5, LATER))
    last = build(name, Boundary((3, 4, 6), 5, LATER, channels_last=True))
    assert torch.equal(first(logits, targets, x), last(logits, targets, x.permute(0, 2, 3, 1)))


@pytest.mark.parametrize("name", ["pred_sim", "supcon"])
def test_at_the_models_own_output_both_are_the_cross_entropy(name):
    logits, targets, _ = batch()
    loss = build(name, Boundary((5,), 5))
    assert torch.equal(loss(logits, targets, logits), F.cross_entropy(logits, targets))
    assert not list(loss.parameters())


@pytest.mark.parametrize(("name", "args", "message"), [
    ("pred_sim", {"beta": 1.1},
     r"^method\.loss: ValueError: beta 1\.1 must be from 0 to 1 \(with args \{'beta': 1\.1\}\)$"),
    ("pred_sim", {"beta": -0.1}, r"^method\.loss: ValueError: beta -0\.1 must be from 0 to 1 "),
    ("pred_sim", {"beta": math.nan}, r"^method\.loss: ValueError: beta nan must be from 0 to 1 "),
    ("supcon", {"temperature": 0}, r"^method\.loss: ValueError: temperature 0 must be above 0 "),
    ("supcon", {"temperature": math.nan}, r"^method\.loss: ValueError: temperature nan must be above 0 "),
    ("supcon", {"weight": -1}, r"^method\.loss: ValueError: weight -1 must be at least 0 "),
    ("pred_sim", {"alpha": 1}, r"^method\.loss\.args: .*'alpha'; it takes beta$"),
    ("supcon", {"beta": 1}, r"^method\.loss\.args: .*'beta'; it takes temperature, weight$"),
    ("pred_simm", {}, r"^method\.loss\.name: unknown 'pred_simm' \(did you mean 'pred_sim'\?\); "
                      r"one of bce, cross_entropy, mse, pred_sim, supcon, or method\.loss\.target for your own$"),
])
def test_arguments_that_do_not_fit_are_refused(name, args, message):
    with pytest.raises(ConfigError, match=message):
        build(name, args=args)


@pytest.mark.parametrize("name", ["pred_sim", "supcon"])
def test_targets_for_every_token_and_odd_boundaries_are_refused(name):
    for later in (LATER, ()):
        with pytest.raises(ConfigError, match=rf"^method\.loss: ValueError: {name} needs one label a sample, and "
                                              r"targets of shape \[5\] are more; use cross_entropy$"):
            build(name, Boundary((5, 6), 5, later, target_shape=(5,)))
    with pytest.raises(ConfigError, match="no map, tokens or features; give a target of your own$"):
        build(name, Boundary((1, 2, 3, 4), 5, LATER))


# How a loss is built and called.

def test_a_loss_is_told_of_the_boundary_and_of_x_where_it_asks():
    given = batch()
    square = float(given[2].square().mean())
    for target, args in (("of_x", {"factor": 3.0}), ("named_last", {"factor": 3.0})):
        loss = build(target=f"test_local_losses:{target}", args=args)
        assert loss(*given).item() == pytest.approx(3 * square + 5)
    plain = build(target="test_local_losses:of_logits", args={"power": 2})
    assert torch.equal(plain(*given), of_logits(2)(*given[:2]))


def test_the_tensors_of_a_loss_are_found():
    own = build(target="test_local_losses:Distance")
    assert own.state_dict().keys() == {"scale", "calls"}
    assert own.scale.shape == (6, 3, 4)
    assert not own.relu.inplace
    assert [buffer.shape for buffer in build(target="test_local_losses:Weighted").buffers()] == [(5,)]


@pytest.mark.parametrize(("config", "message"), [
    ({"target": "test_local_losses:text"},
     r"^method\.loss\.2: it returned a str; return a function of \(logits, targets, x\)$"),
    ({"name": "supcom"}, r"^method\.loss\.2\.name: unknown 'supcom' \(did you mean 'supcon'\?\); .* or "
                         r"method\.loss\.2\.target for your own$"),
    ({"name": "supcon", "args": {"a": 1}}, r"^method\.loss\.2\.args: .*'a'; it takes temperature, weight$"),
    ({"name": "supcon", "args": {"weight": -1}}, r"^method\.loss\.2: ValueError: weight -1 "),
    ({"target": "test_local_losses:named_last"}, r"^method\.loss\.2\.args: .*'factor'; it takes factor$"),
])
def test_a_loss_of_a_list_that_cannot_be_built_is_refused_with_its_place(config, message):
    with pytest.raises(ConfigError, match=message):
        build(key="method.loss.2", **config)


@pytest.mark.parametrize("config", [{"name": "pred_sim"}, {"name": "supcon"}, {"target": "test_local_losses:Distance"}])
def test_a_loss_is_a_function_of_the_seed_and_of_the_block_it_follows(config):
    def parameter(seed=0, block="layer1"):
        return next(build(seed=seed, block=block, **config).parameters())
    first, before = parameter(), torch.get_rng_state()
    assert torch.equal(parameter(), first)
    assert not torch.equal(parameter(block="layer2"), first)
    assert not torch.equal(parameter(seed=1), first)
    assert torch.equal(torch.get_rng_state(), before)
