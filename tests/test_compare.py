"""Blocks that would not compute what their model does are refused."""

from threading import Lock

import numpy as np
import pytest
import torch
from test_models import build, refused
from torch import nn

import blpipe
from blpipe.models.build import model_notes, plain_names
from blpipe.seeds import derive_seed, fixed_randomness


class Traced(nn.Module):
    """Three layers, and a number between two of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(size, 8) for size in (128, 8, 8))
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("mean", torch.ones(1))
        self.calls = 0

    def forward(self, x):
        return self.last(self.second(self.between(self.first(x.flatten(1)))).relu())

    def between(self, x):
        return x


class CountsItsCalls(Traced):
    def between(self, x):
        self.calls += 1
        return x * self.calls


class AsksWhatItIsGiven(Traced):
    def between(self, x):
        return x * 2 if torch.is_tensor(x) else x


class UpdatesAChainOfABuffer(Traced):
    def between(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean())
        return x


class KeepsItsNormFrozen(Traced):
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def between(self, x):
        return self.norm(x)


class FrozenSequence(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(128, 8), nn.BatchNorm1d(8))

    def train(self, mode=True):
        super().train(mode)
        self[2].eval()
        return self


class AnnealsItsScale(Traced):
    scale = 1.0

    def between(self, x):
        if self.training:
            self.scale = 0.9 * self.scale
        return x * self.scale


class KeepsItsSize(Traced):
    """And a table that it makes once."""

    size, table = 0, None

    def between(self, x):
        self.size = x.shape[1]
        if self.table is None:
            self.table = torch.ones_like(x.mT @ x).tril() / self.size
        return x @ self.table


class ClampsItsWeight(Traced):
    def between(self, x):
        self.last.weight.data.clamp_(min=0)
        return x


class ReplacesItsWeightsData(Traced):
    def between(self, x):
        self.last.weight.data = self.last.weight.data.clamp(min=0)
        return x


class HoldsAHookedModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.scaled, self.last = nn.Linear(8, 8), Scaled(), nn.Linear(8, 2)
        self.scaled.register_full_backward_hook(lambda module, given, of_output: (-3 * of_output[0],))

    def forward(self, x):
        return self.last(self.scaled(self.first(x)))


class Scaled(nn.Module):
    def forward(self, x):
        return 2 * x


class HasAHook(Traced):
    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda module, given, output: 2 * output)


class SwitchesGradientsOff(Traced):
    def between(self, x):
        with torch.no_grad():
            return self.norm(x)


class SwitchesAutocastOn(Traced):
    def between(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x.mT @ x


class DrawsFromNumPy(Traced):
    def between(self, x):
        return x * float(np.random.rand())


class WritesToAView(Traced):
    def between(self, x):
        x = x.clone()
        x.tensor_split(2, 1)[0].mul_(3.0)
        return x


class Spectral(Traced):
    """Which changes its buffers in training, as it may."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.second)


class IsFrozenAndHoldsALock(KeepsItsNormFrozen):
    """And so cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = Lock()


@pytest.mark.parametrize("model", [AsksWhatItIsGiven, KeepsItsNormFrozen, FrozenSequence, IsFrozenAndHoldsALock])
def test_blocks_that_compute_something_else_than_their_model_are_refused(model):
    refused(r"^model: in (training|evaluation) its blocks compute something else than it does\. Tracing sees neither ",
            target=f"test_compare:{model.__name__}")


class Centers(Traced):
    """By a running mean, which every forward replaces."""

    def __init__(self):
        super().__init__()
        self.centered = nn.Sequential(nn.Linear(8, 8), Center())

    def between(self, x):
        return self.centered(x)


class Center(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.center = 0.9 * self.center + 0.1 * x.detach().mean(0)
        return x - self.center


@pytest.mark.parametrize(("model", "reason"), [
    (CountsItsCalls, "its forward counts in the attribute calls"),
    (AnnealsItsScale, "its forward counts in the attribute scale"),
    (UpdatesAChainOfABuffer, "writes to a parameter or buffer by another name"),
    (ClampsItsWeight, "writes to a parameter or buffer by another name"),
    (ReplacesItsWeightsData, r"sets \.data of a tensor"),
    (SwitchesGradientsOff, "switches gradients or autocast on or off"),
    (SwitchesAutocastOn, "switches gradients or autocast on or off"),
    (DrawsFromNumPy, "draws random numbers that do not depend on the input"),
    (WritesToAView, "overwrites a tensor of which a view is used later")])
def test_what_tracing_would_lose_is_refused_with_its_place(model, reason):
    refused(rf"^model: cannot be traced.*{reason}", target=f"test_compare:{model.__name__}")


def test_hooks_of_the_model_itself_are_refused_and_those_of_its_modules_run():
    refused("^model: it has hooks, which its blocks would not run", target="test_compare:HasAHook")
    model = HoldsAHookedModule()
    blocks, x = blpipe.blocks_of(model), torch.randn(3, 8, requires_grad=True)
    with_blocks, plain = (torch.autograd.grad(each(x).sum(), x)[0] for each in (blocks, model))
    assert torch.equal(with_blocks, plain)
    model.scaled._backward_hooks.clear()
    assert not torch.equal(torch.autograd.grad(model(x).sum(), x)[0], plain)


class HasAnAuxiliaryBranch(Traced):
    """Which draws random numbers and changes buffers, in training."""

    def forward(self, x):
        x = self.first(x.flatten(1))
        auxiliary = self.norm(nn.functional.dropout(x, 0.5, self.training))
        x = self.last(nn.functional.dropout(x, 0.5, self.training))
        return (x, auxiliary) if self.training else x


class DropsAndAttends(Traced):
    def between(self, x):
        x = nn.functional.dropout(x, 0.5, self.training).view(-1, 1, 2, 4)
        return nn.functional.scaled_dot_product_attention(x, x, x).flatten(1)


class HoldsALock(Traced):
    def __init__(self):
        super().__init__()
        self.lock = Lock()

    def between(self, x):
        return self.norm(x)


class TakesLargerBatches(Traced):
    """Than those that it is compared on."""

    def between(self, x):
        torch._assert(x.shape[0] > 2, "too small")
        return x


@pytest.mark.parametrize("model", [Traced, Spectral, HasAnAuxiliaryBranch, DropsAndAttends, HoldsALock, Centers,
                                   KeepsItsSize])
def test_comparing_leaves_a_model_as_it_was_built(model):
    blocks = build(target=f"test_compare:{model.__name__}")
    with fixed_randomness(derive_seed(0, "model")):
        plain = model()
    assert blocks.training
    state = {plain_names(blocks)[name]: tensor for name, tensor in blocks.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


def test_a_model_that_could_not_be_compared_is_told_of():
    assert model_notes(build(target="test_compare:Traced")) == []
    assert model_notes(build(target="test_compare:TakesLargerBatches")) == [
        "model: its blocks are not compared with it in evaluation: AssertionError: too small"]
