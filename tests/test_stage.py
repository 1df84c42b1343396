"""One stage by itself: delayed links, snapshots, statistics."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blpipe.device import use_compiler
from blpipe.gradients import edge_of, gradients_of
from blpipe.links import Links
from blpipe.losses import cross_entropy
from blpipe.seeds import RandomStream
from blpipe.stage import Stage
from blpipe.update import Update

CPU = torch.device("cpu")
KEPT = [("graph", False), ("recompute", False), ("graph", True), ("recompute", True)]
"""`link.keep`, and whether blocks run again in their backward."""


class Checkpointed(nn.Module):
    """A block that runs itself again in its backward."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def make_stage(keep="graph", delay=1, tail=2, optimizer="sgd", dropout=0.0, recompute=False, compile=False,
               skip_nonfinite=False, kind="", clip_norm=None, ema=None, **links):
    torch.manual_seed(0)
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(dropout))
                             for _ in range(3)])
    if kind == "tied tensors":
        blocks[2][0].weight, blocks[2][1].running_mean = blocks[1][0].weight, blocks[1][1].running_mean
    if kind == "tied layers":
        blocks[2] = blocks[1]
    if kind == "checkpointed":
        blocks = nn.Sequential(*map(Checkpointed, blocks))
    head = nn.Linear(5, 3)
    parameters = [*blocks.parameters(), *head.parameters()]
    made = {"sgd": lambda: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(parameters, lr=0.1),
            "fused": lambda: torch.optim.AdamW(parameters, lr=0.1, fused=True)}[optimizer]()
    update = Update([blocks, head], made, clip_norm=clip_norm, skip_nonfinite=skip_nonfinite, ema=ema)
    return Stage(blocks, head, cross_entropy(), update, Links((1,), (1,), tail, late=delay > 0, keep=keep, **links),
                 RandomStream(1, CPU), recompute=recompute, compile=compile)


def microbatch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)


@pytest.mark.parametrize("kind", ["", "tied tensors", "tied layers", "checkpointed"])
@pytest.mark.parametrize(("keep", "recompute"), KEPT)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fused"])
def test_a_delayed_link_gradient_is_that_at_the_weights_of_its_own_forward(keep, recompute, optimizer, kind):
    stage = make_stage(keep, delay=1, optimizer=optimizer, kind=kind, recompute=recompute)
    before = copy.deepcopy(stage.blocks)
    x, targets = microbatch(0)
    stage.forward(x)
    stage.local_backward(targets, 1.0)
    stage.step(0, 1.0)  # changes the live weights in place
    error = torch.randn(8, 5)
    stage.link_backward(error)
    h = before[0](x)
    tail = before[1:]
    expected = torch.autograd.grad(tail(h), list(tail.parameters()), error)
    live = list(stage.blocks[1:].parameters())
    assert set(live) <= {parameter for group in stage.update.optimizer.param_groups for parameter in group["params"]}
    assert not torch.equal(live[0], next(tail.parameters()))
    for parameter, gradient in zip(live, expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in stage.blocks[0].parameters())


@pytest.mark.parametrize("keep", ["graph", "recompute"])
@pytest.mark.parametrize(("tail", "factor"), [(3, 1.0), (3, 0.0), (1, 1.0)])
def test_a_joint_backward_gives_the_sum_of_both_gradients_and_sends_the_local_error_at_once(keep, tail, factor):
    twice, once = (make_stage(keep, tail=tail, local_weight=0.3, joint=joint) for joint in (False, True))
    (x, targets), error, sent = microbatch(0), torch.randn(8, 5), []
    for stage in (twice, once):
        stage.forward(x)
        sent.append(stage.local_backward(targets, 1.0))
        assert (stage is once) == all(p.grad is None for p in stage.tail.blocks.parameters())
        assert all(p.grad is not None for p in stage.body.parameters())
        assert stage.link_backward(error, factor=factor) is None
    torch.testing.assert_close(*sent)
    for a, b in zip(twice.blocks.parameters(), once.blocks.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_an_error_that_weighs_nothing_spoils_no_joint_gradient():
    stage = make_stage(tail=3, joint=True)
    x, targets = microbatch(0)
    stage.forward(x)
    stage.local_backward(targets, 1.0)
    stage.link_backward(torch.full((8, 5), torch.inf), factor=0.0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stage.blocks.parameters())


def test_the_error_sent_upstream_is_that_of_the_local_loss_alone():
    stage, alone = make_stage(tail=3), make_stage(tail=3)
    reference = copy.deepcopy(nn.Sequential(*stage.blocks, stage.head))
    x, targets = microbatch(0)
    leaf = x.clone().requires_grad_()
    cross_entropy()(reference(leaf), targets).backward()
    for linked, running in ((True, stage), (False, alone)):
        running.forward(x)
        error = running.local_backward(targets, 1.0)
        if linked:
            running.link_backward(torch.ones(8, 5))
        torch.testing.assert_close(error, leaf.grad)


@pytest.mark.parametrize(("keep", "recompute"), KEPT)
@pytest.mark.parametrize("delay", [0, 1])
def test_batchnorm_counts_every_sample_once(keep, recompute, delay):
    stage = make_stage(keep, delay, recompute=recompute)
    plain = copy.deepcopy(stage.blocks)
    for seed in range(3):
        x, targets = microbatch(seed)
        plain.load_state_dict({**stage.blocks.state_dict(),
                               **{n: b for n, b in plain.state_dict().items() if "running" in n or "num_" in n}})
        plain(x)
        stage.forward(x)
        stage.local_backward(targets, 1.0)
        stage.link_backward(torch.randn(8, 5))
        stage.step(0, 1.0)
    for (name, buffer), expected in zip(stage.blocks.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    assert int(stage.blocks[2][1].num_batches_tracked) == 3


def test_dropout_is_drawn_again_the_same_when_the_tail_is_recomputed():
    gradients = []
    for keep, recompute in KEPT:
        stage = make_stage(keep, dropout=0.5, recompute=recompute)
        for seed in range(2):
            x, targets = microbatch(seed)
            stage.forward(x)
            stage.local_backward(targets, 1.0)
        stage.link_backward(torch.ones(8, 5))
        gradients.append([p.grad.clone() for p in stage.blocks.parameters()])
    assert all(torch.equal(a, b) for others in gradients[1:] for a, b in zip(gradients[0], others, strict=True))


def test_the_snapshot_is_made_once_a_step():
    stage = make_stage()
    runs = []
    for seed in range(2):
        x, targets = microbatch(seed)
        stage.forward(x)
        stage.local_backward(targets, 0.5)
        runs.append(stage.tail._awaiting[1][-1].parameters)
    assert runs[0] is runs[1]
    stage.step(0, 1.0)
    stage.forward(x)
    stage.local_backward(targets, 1.0)
    assert stage.tail._awaiting[1][-1].parameters is not runs[0]


def test_frozen_parameters_stay_and_the_rest_learns():
    stage = make_stage()
    for parameter in stage.blocks[1].parameters():
        parameter.requires_grad_(False)
    frozen = make_frozen_copy(stage)
    x, targets = microbatch(0)
    frozen.forward(x)
    assert frozen.local_backward(targets, 1.0) is not None
    frozen.link_backward(torch.ones(8, 5))
    assert all(p.grad is None for p in frozen.blocks[1].parameters())
    assert all(p.grad is not None for p in frozen.blocks[2].parameters())


def make_frozen_copy(stage):
    parameters = [p for p in (*stage.blocks.parameters(), *stage.head.parameters()) if p.requires_grad]
    return Stage(stage.blocks, stage.head, stage.loss, Update(stage.parts, torch.optim.SGD(parameters, lr=0.1)),
                 stage.links, stage.stream)


def test_a_recomputed_tail_has_the_buffers_of_its_own_forward():
    """Spectral normalisation reads a buffer that every training forward moves on."""
    gradients = []
    for keep, recompute in KEPT:
        torch.manual_seed(0)
        blocks = nn.Sequential(nn.Linear(5, 5), *(torch.nn.utils.spectral_norm(nn.Linear(5, 5)) for _ in range(2)))
        stage = Stage(blocks, nn.Linear(5, 3), cross_entropy(), Update([blocks], None),
                      Links((1,), (1,), 2, keep=keep), RandomStream(1, CPU), recompute=recompute)
        for seed in range(2):
            x, targets = microbatch(seed)
            stage.forward(x)
            stage.local_backward(targets, 1.0)
        stage.link_backward(torch.ones(8, 5))
        gradients.append([p.grad for p in blocks.parameters()])
    assert all(torch.equal(a, b) for others in gradients[1:] for a, b in zip(gradients[0], others, strict=True))


def test_a_stage_that_ignores_its_input_sends_a_zero_error():
    stage = make_stage()
    stage.blocks[0][0].register_forward_hook(lambda module, inputs, output: output.detach())
    x, targets = microbatch(0)
    stage.forward(x)
    assert torch.equal(stage.local_backward(targets, 1.0), torch.zeros(8, 5))


class Transposed(nn.Module):
    """Its parameters' gradients come in another layout than theirs, and two of them as one tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.one, self.other = (nn.Parameter(torch.zeros(5)) for _ in range(2))

    def forward(self, x):
        return torch.tanh(x[:, :, None] * self.weight.T).sum(1) + (self.one + self.other)


@pytest.mark.parametrize("tail", [0, 1])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_optimizers_see_every_gradient_in_its_parameters_layout(optimizer, tail):
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        blocks, head = nn.Sequential(Transposed()), nn.Linear(5, 3)
        kwargs = {"momentum": 0.9, "nesterov": True} if optimizer is torch.optim.SGD else {}
        made = optimizer([*blocks.parameters(), *head.parameters()], lr=0.1, fused=fused, **kwargs)
        stage = Stage(blocks, head, cross_entropy(), Update([blocks, head], made),
                      Links((1,) * tail, (1,), tail, late=False), RandomStream(1, CPU))
        for seed in range(3):
            x, targets = microbatch(seed)
            stage.forward(x)
            stage.local_backward(targets, 1.0)
            if tail:
                stage.link_backward(torch.ones(8, 5))
            assert blocks[0].one.grad is not blocks[0].other.grad
            stage.step(0, 1.0)
        weights.append(blocks[0].weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_a_tail_that_is_recomputed_for_every_hop_is_the_same_each_time():
    """Spectral normalisation writes to the buffers that it reads."""
    gradients = []
    for keep, recompute in KEPT:
        torch.manual_seed(0)
        blocks = nn.Sequential(*(torch.nn.utils.spectral_norm(nn.Linear(5, 5)) for _ in range(2)))
        stage = Stage(blocks, nn.Linear(5, 3), cross_entropy(), Update([blocks], None),
                      Links((1, 2), (1, 2), 2, keep=keep), RandomStream(1, CPU), recompute=recompute)
        x, targets = microbatch(0)
        stage.forward(x)
        stage.local_backward(targets, 1.0)
        passed = stage.link_backward(torch.ones(8, 5), hop=1)
        stage.link_backward(torch.ones(8, 5), hop=2)
        gradients.append([passed, *(p.grad for p in blocks.parameters())])
    assert all(torch.equal(a, b) for others in gradients[1:] for a, b in zip(gradients[0], others, strict=True))


def test_the_norm_of_all_gradients_together_is_clipped():
    def first_step(clip_norm):
        stage = make_stage(delay=0, clip_norm=clip_norm)
        before = [p.detach().clone() for p in stage.update.optimizer.param_groups[0]["params"]]
        x, targets = microbatch(0)
        stage.forward(x)
        stage.local_backward(targets, 1.0)
        stage.link_backward(torch.ones(8, 5))
        stage.step(0, 1.0)
        pairs = zip(before, stage.update.optimizer.param_groups[0]["params"], strict=True)
        return torch.cat([((old - new) / 0.5).detach().flatten() for old, new in pairs])  # the first: lr · gradient

    free, clipped = first_step(None), first_step(0.1)
    assert free.norm() > 0.1
    torch.testing.assert_close(clipped, free * 0.1 / free.norm(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first_step(1000.0), free)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler's own
def test_a_compiled_stage_computes_the_same_to_rounding():
    """With a link that comes after the step, through the graph that the local backward has been through."""
    use_compiler()
    stages = [make_stage(delay=1, tail=1, compile=compile) for compile in (False, True)]
    for seed in range(3):
        x, targets = microbatch(seed)
        error = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
        for stage in stages:
            stage.forward(x)
            stage.local_backward(targets, 1.0)
            if seed:
                stage.link_backward(error)
            stage.step(0, 1.0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # body, tail, head
    for plain, compiled in zip(*(stage.blocks.parameters() for stage in stages), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_an_error_and_a_gradient_that_autograd_gives_as_one_tensor_are_two():
    """Of a sum: an optimizer may write to the gradient while the error is under way."""
    x, parameter = torch.randn(1, 3, requires_grad=True), nn.Parameter(torch.zeros(1, 3))
    (gradient,), error = gradients_of(edge_of((x + parameter).sum()), [parameter], x, None)
    assert torch.equal(gradient, error)
    assert gradient.data_ptr() != error.data_ptr()
