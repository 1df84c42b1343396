"""What is fixed and checked before a run starts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blpipe.config import Config, LinkConfig, MethodConfig
from blpipe.config_file import parse_config
from blpipe.errors import ConfigError
from blpipe.forecast.costs import profile
from blpipe.links import Links, stage_links
from blpipe.models import build_model, mlp, resnet_cifar, vgg_cifar
from blpipe.plan import Plan, make_network, make_plan, notices
from blpipe.shapes import trace_shapes
from blpipe.specs import DataSpec, TensorSpec
from blpipe.steps import Step, evaluation_sizes, step_sizes

IMAGES = DataSpec((3, 8, 8), "float32", (), 4, 24, 10)
TOKENS = DataSpec((6,), "int64", (6,), 9, 24, 10)


# Models that the tests name as a target.

class Counter(nn.Module):
    """Changes a buffer in every forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x * torch.rand_like(x)


class WiderInEvaluation(nn.Module):
    """Gives twice as many features in evaluation."""

    def forward(self, x):
        return x if self.training else torch.cat([x, x], 1)


def own(what="net"):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    frozen = nn.BatchNorm1d(8).eval()
    return {
        "net": lambda: {"flat": flat, "counter": Counter(), "norm": nn.BatchNorm1d(8), "drop": nn.Dropout(0.5),
                        "out": nn.Linear(8, 4)},
        "tokens": lambda: {"embed": nn.Embedding(9, 5), "mix": nn.Linear(5, 7), "out": nn.Linear(7, 9)},
        "frozen": lambda: {"flat": flat, "frozen": nn.Sequential(frozen), "out": nn.Linear(8, 4)},
        "pair": lambda: {"flat": flat, "lstm": nn.LSTM(8, 4), "out": nn.Linear(4, 4)},
        "no batch": lambda: {"flat": nn.Flatten(0), "out": nn.Linear(192, 4)},
        "no features": lambda: {"flat": flat, "out": nn.Sequential(nn.Linear(8, 1), nn.Flatten(0))},
        "points": lambda: {"pool": nn.AdaptiveAvgPool2d(1), "out": nn.Sequential(nn.Flatten(), nn.Linear(3, 4))},
        "other shape": lambda: {"flat": flat, "wider": WiderInEvaluation(), "pool": nn.AdaptiveAvgPool1d(8),
                                "out": nn.Linear(8, 4)},
        "map": lambda: {"conv": nn.Conv2d(3, 4, 1), "out": nn.Conv2d(4, 4, 1)},
    }[what]()


def own_head(boundary, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(boundary.shape[0], classes))


def config(model="mlp", **changes) -> Config:
    tree = {"name": "run", "model": model, "partition": {"stages": 2}, "train": {"batch_size": 8}}
    return parse_config(tree | changes)


def plan(model="mlp", data=IMAGES, **changes) -> Plan:
    return make_plan(config(model, **changes), data)


def net(what="net") -> dict:
    return {"target": "test_plan:own", "args": {"what": what}}


def refused(match: str, model="mlp", data=IMAGES, **changes) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        plan(model, data, **changes)
    assert "\n" not in str(caught.value)


# Steps.

trains = st.builds(lambda micro, count, drop_last, evaluation: config(train={
    "batch_size": micro * count, "microbatches": count, "drop_last": drop_last, "eval_batch_size": evaluation}),
    st.integers(1, 6), st.integers(1, 6), st.booleans(), st.none() | st.integers(1, 20))


@settings(deadline=None, max_examples=150)
@given(config=trains, samples=st.integers(0, 150))
def test_the_steps_of_an_epoch_hold_every_sample_once(config, samples):
    train, steps = config.train, step_sizes(samples, config)
    micro = train.batch_size // train.microbatches
    assert all(0 < size <= micro for step in steps for size in step)
    assert all(step == (micro,) * train.microbatches for step in steps[:-1])
    assert all(set(step[:-1]) <= {micro} for step in steps)
    held = sum(map(sum, steps))
    assert held == (samples - samples % train.batch_size if train.drop_last else samples)


@settings(deadline=None, max_examples=100)
@given(config=trains, samples=st.integers(0, 150))
def test_an_evaluation_holds_every_sample_once(config, samples):
    sizes = evaluation_sizes(samples, config)
    most = config.train.eval_batch_size or config.train.batch_size
    assert sum(sizes) == samples
    assert all(size == most for size in sizes[:-1])
    assert all(0 < size <= most for size in sizes)


def test_steps_by_hand():
    def steps(**train):
        return step_sizes(21, config(train={"batch_size": 8, **train}))
    assert steps() == [(8,), (8,), (5,)]
    assert steps(microbatches=4) == [(2, 2, 2, 2)] * 2 + [(2, 2, 1)]
    assert steps(microbatches=2, drop_last=True) == [(4, 4)] * 2


def test_the_steps_of_later_epochs_are_numbered_on():
    made = plan(train={"batch_size": 10, "microbatches": 2})
    assert made.train_steps(0) == [Step(0, (5, 5)), Step(1, (5, 5)), Step(2, (4,))]
    assert [step.index for step in made.train_steps(2)] == [6, 7, 8]
    assert made.evaluation_sizes() == [10]


def test_a_batch_larger_than_the_data_is_refused():
    refused(r"^train\.batch_size: 25 is more than the 24 training samples; use at most 24$", train={"batch_size": 25})
    assert plan(train={"batch_size": 24}).train_steps(0) == [Step(0, (24,))]


# Shapes.

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("model", "data"), [
    (resnet_cifar(8, 0.25), IMAGES),
    (resnet_cifar(8, 0.25), DataSpec((3, 9, 7), "float32", (), 10, 5, 5)),
    (vgg_cifar(11, 1 / 64), DataSpec((3, 32, 32), "float32", (), 10, 5, 5)),
    (mlp([4, 5], in_shape=[3, 8, 8], dropout=0.5), IMAGES),
    (nn.Sequential(*own("tokens").values()), TOKENS)])
def test_traced_shapes_are_those_of_the_real_outputs(model, data, training):
    x = torch.randint(0, 9, (5, *data.shape)) if data.dtype == "int64" else torch.rand(5, *data.shape)
    specs = trace_shapes(model, data, 5, training)
    model.train(training)
    assert list(specs) == [name for name, _ in model.named_children()]
    for spec, block in zip(specs.values(), model, strict=True):
        x = block(x)
        assert spec == (tuple(x.shape), x.dtype)


@pytest.mark.parametrize("what", ["net", "frozen"])
def test_tracing_leaves_no_trace(what):
    model = nn.Sequential()
    for name, block in own(what).items():
        model.add_module(name, block)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    model.train()
    trace_shapes(model, IMAGES, 4, training=True)
    assert all(module.training for module in model.modules())
    model.eval()
    trace_shapes(model, IMAGES, 1, training=False)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_making_a_plan_leaves_the_model_as_it_was_built():
    random_state = torch.get_rng_state()
    made = plan(net())
    built = build_model(made.config.model, IMAGES, made.config.seed)
    assert all(torch.equal(a, b) for a, b in zip(made.model.state_dict().values(), built.state_dict().values(),
                                                 strict=True))
    assert [m.training for m in made.model.modules()] == [m.training for m in built.modules()]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_making_a_plan_keeps_a_part_that_the_model_froze_in_its_mode():
    assert not plan(net("frozen"), partition={"stages": 1}).model.frozen[0].training


def test_a_plan_has_the_output_of_every_stage_for_every_size():
    made = plan({"name": "resnet_cifar", "args": {"depth": 8, "width": 0.25}}, partition={"stages": 3},
                train={"batch_size": 10, "microbatches": 2, "eval_batch_size": 7})
    assert set(made.outputs) == {5, 4, 7, 3}
    for size, specs in made.outputs.items():
        assert [spec.shape for spec in specs] == [(size, 4, 8, 8), (size, 8, 4, 4), (size, 4)]
        assert {spec.dtype for spec in specs} == {torch.float32}
        assert made.input(size) == ((size, 3, 8, 8), torch.float32)
        assert made.targets(size) == ((size,), torch.int64)
    assert [made.block_names(k) for k in range(3)] == [["stem"], ["layer1_0", "layer2_0"], ["layer3_0", "classifier"]]
    assert [b.shape for b in made.boundaries] == [(4, 8, 8), (8, 4, 4), (4,)]
    assert made.boundaries[0].later == ((4, 8, 8), (8, 4, 4), (16, 2, 2), (4,))
    assert made.boundaries[-1].later == ()
    assert made.classes == 4


def test_a_plan_for_tokens_has_a_target_at_every_position():
    made = plan(net("tokens"), TOKENS, method={"name": "bp"})
    assert [spec.shape for spec in made.outputs[8]] == [(8, 6, 5), (8, 6, 9)]
    assert (made.input(8), made.targets(8)) == (((8, 6), torch.int64), ((8, 6), torch.int64))
    assert made.classes == 9


@pytest.mark.parametrize(("model", "data", "message"), [
    ({"name": "vgg_cifar", "args": {"width": 0.02}}, IMAGES,
     r"^model: block conv4_1 cannot take an input of shape \[8, 10, 1, 1\] \(samples of \[3, 8, 8\]\): .*; "
     "change model.args or the samples' size$"),
    ({"name": "mlp", "args": {"in_shape": [1, 8, 8]}}, IMAGES,
     r"^model: block layer1 cannot take an input of shape \[8, 3, 8, 8\] \(samples of \[3, 8, 8\]\): "),
    (net("pair"), IMAGES, r"^model: block lstm made tuple of \[8, 8\]; it must return one tensor \[8, …\] for a bat"),
    (net("no batch"), IMAGES, r"^model: block flat made \[1536\] of \[8, 3, 8, 8\]; it must return one "
                              r"tensor \[8, …\] for a batch of 8$"),
    (net("no features"), IMAGES, r"^model: block out made \[8\] of \[8, 8\]; have it return \[8, classes\]$"),
    (net("no features"), replace(IMAGES, classes=1, target_dtype="float32"),
     r"^model: block out made \[8\] of \[8, 8\]; have it return \[8, 1\], as without a squeeze; targets of \[N\] "
     r"and of \[N, 1\] go with that$"),
    (net("other shape"), IMAGES, r"^model: block wider gives \[8, 8\] of float32 in training and \[8, 16\] of float32 "
                                 "in evaluation; have it give the same in both$"),
    (net("map"), IMAGES, r"^model: its last block out gives \[8, 4, 8, 8\]; for targets of \[8\] it must give "
                         r"\[8, classes\]$"),
    (net("net"), DataSpec((3, 8, 8), "float32", (5,), 4, 24, 10),
     r"^model: its last block out gives \[8, 4\]; for targets of \[8, 5\] it must give \[8, 5, classes\]; or "
     r"give one label a sample: y\.squeeze\(1\), or y\.argmax\(1\) of one-hot rows$"),
])
def test_a_model_that_does_not_fit_the_data_is_refused_with_block_and_shape(model, data, message):
    refused(message, model, data)


@pytest.mark.parametrize("method", ["bp", "greedy", "backlink"])
def test_a_last_microbatch_of_one_sample_and_batchnorm_are_refused(method):
    data = DataSpec((3, 8, 8), "float32", (), 4, 25, 10)
    train = {"batch_size": 8, "microbatches": 2}
    refused(r"^train\.batch_size: BatchNorm in block layer1 cannot train on a microbatch of 1 sample; "
            "set train.drop_last=true, fewer train.microbatches, or another batch size$", data=data, train=train,
            method={"name": method})
    assert len(plan(data=data, train=train | {"drop_last": True}).train_steps(0)) == 3


def test_a_last_microbatch_of_one_sample_is_fine_without_batchnorm_and_in_an_evaluation():
    bare = {"name": "mlp", "args": {"batch_norm": False}}
    data = DataSpec((3, 8, 8), "float32", (), 4, 25, 10)
    assert plan(bare, data, method={"head": "linear"}).outputs.keys() == {8, 1, 2}
    assert plan(data=DataSpec((3, 8, 8), "float32", (), 4, 24, 9)).outputs.keys() == {8, 1}


def test_a_head_that_cannot_train_on_one_sample_is_refused():
    data = DataSpec((3, 8, 8), "float32", (), 4, 25, 10)
    refused(r"^train\.batch_size: BatchNorm in method\.head \(after block pool\) cannot train on a microbatch",
            net("points"), data)
    assert plan(net("points"), data, method={"head": "linear"}).outputs.keys() == {8, 1, 2}


# Heads.

def test_heads_are_checked_against_the_logits():
    target = {"target": "test_plan:own_head"}
    assert plan(method={"head": target | {"args": {"classes": 4}}}).classes == 4
    refused(r"^method\.head: after block layer2 it gives \[8, 3\] of \[8, 128\]; it must give \[8, 4\], the logits; "
            r"give a method\.head\.target that does$",
            method={"head": target | {"args": {"classes": 3}}})


def test_heads_that_cannot_take_their_boundary_are_refused():
    refused(r"^method\.head \(after block stem\) cannot take an input of shape \[8, 16, 8, 8\]",
            {"name": "resnet_cifar", "args": {"depth": 8}},
            method={"head": {"target": "test_plan:own_head", "args": {"classes": 4}}}, partition={"cuts": ["layer1_0"]})
    refused(r"^method\.head\.name: unknown 'cnv' \(did you mean 'conv'\?\)", method={"head": "cnv"})


@pytest.mark.parametrize("changes", [{"method": {"name": "bp", "head": "cnv"}},
                                     {"method": {"head": "cnv"}, "partition": {"stages": 1}}])
def test_heads_are_not_checked_where_none_is_used(changes):
    assert plan(**changes).classes == 4


def own_loss(what):
    return {"vector": lambda logits, targets: logits.sum(-1), "number": lambda logits, targets: 1.0,
            "fails": lambda logits, targets: logits @ targets}[what]


@pytest.mark.parametrize(("changes", "message"), [
    ({"method": {"loss": "hinge"}}, r"^method\.loss\.name: unknown 'hinge'"),
    ({"method": {"loss": {"target": "test_plan:own_loss", "args": {"what": "vector"}}}},
     r"^method\.loss: the function must return a scalar tensor, the mean over the batch$"),
    ({"method": {"loss": {"target": "test_plan:own_loss", "args": {"what": "number"}}}},
     r"^method\.loss: the function must return a scalar tensor, the mean over the batch$"),
    ({"method": {"loss": {"target": "test_plan:own_loss", "args": {"what": "fails"}}}},
     r"^method\.loss: RuntimeError for logits \[2, 4\] and targets int64 \[2\]: "),
    ({"optimizer": {"name": "sdg"}}, r"^optimizer\.name: unknown 'sdg' \(did you mean 'sgd'\?\)"),
    ({"optimizer": {"args": {"betas": [1]}}}, r"^optimizer\.args: got an unexpected keyword argument 'betas'"),
])
def test_the_loss_and_the_optimizer_are_checked(changes, message):
    refused(message, **changes)


# Tails.

@pytest.mark.parametrize(("length", "blocks", "tail"), [(1, 3, 1), (3, 3, 3), (9, 3, 3), ("all", 3, 3), (0, 3, 0)])
def test_a_tail_is_the_links_length_clipped_to_the_stage(length, blocks, tail):
    assert stage_links(MethodConfig(link=LinkConfig(length=length)), [blocks, 1])[0].tail == tail
    assert stage_links(MethodConfig(link=LinkConfig(length=length, weight=0.0)), [blocks, 1])[0].tail == 0


SIX = {"name": "mlp", "args": {"hidden": [4] * 5}}


@pytest.mark.parametrize(("method", "tails"), [
    ({}, [1, 1, 0]),
    ({"link": {"length": 2}}, [1, 2, 0]),
    ({"link": {"length": "all"}}, [1, 2, 0]),
    ({"link": {"length": 0}}, [0, 0, 0]),
    ({"link": {"weight": 0}}, [0, 0, 0]),
    ({"link": {"weight": -0.5}}, [1, 1, 0]),
    ({"name": "greedy"}, [0, 0, 0]),
    ({"name": "bp"}, [0, 0, 0]),
])
def test_every_stage_but_the_last_has_a_tail_where_there_is_a_link(method, tails):
    links = plan(SIX, method=method, partition={"cuts": ["layer2", "layer4"]}).links
    assert [each.tail for each in links] == tails
    assert [each.hops_in for each in links] == [(1,) if tail else () for tail in tails]


def test_a_single_stage_has_no_link():
    assert plan(partition={"stages": 1}).links == [Links(weight=0.0)]


@pytest.mark.parametrize(("reach", "weight", "hops_in"), [
    (1, 1.0, [1, 1, 1, 0]), (2, 1.0, [2, 2, 1, 0]), ("all", 1.0, [3, 2, 1, 0]), (9, 1.0, [3, 2, 1, 0]),
    (0, 1.0, [0, 0, 0, 0]), (1, [0.0, 1.0, 1.0], [0, 1, 1, 0]), (2, [1.0, 0.0, 0.0], [2, 1, 0, 0]),
    (3, [1.0, 0.0, 0.0], [3, 2, 1, 0]),
])
def test_a_stage_gets_the_errors_in_reach_and_those_that_it_passes_on(reach, weight, hops_in):
    made = plan(SIX, method={"link": {"reach": reach, "weight": weight, "length": "all"}}, partition={"stages": 4})
    expected = [tuple(range(1, count + 1)) for count in hops_in]
    assert [links.hops_in for links in made.links] == expected
    assert [links.hops_out for links in made.links] == [(), *expected[:-1]]
    weights = weight if isinstance(weight, list) else [weight] * 3
    assert [links.weight for links in made.links] == [*weights, 0.0]


@pytest.mark.parametrize(("reach", "weight", "hops_in"), [
    (1, 1.0, [(1,), (1,), (1,), ()]), (2, 1.0, [(2,), (1, 2), (1,), ()]), ("all", 1.0, [(3,), (2,), (1,), ()]),
    ("all", [1.0, 0.0, 1.0], [(3,), (2,), (1,), ()]), (2, [1.0, 0.0, 0.0], [(2,), (1,), (), ()]),
    (2, [0.0, 1.0, 0.0], [(), (2,), (1,), ()]),
])
def test_of_the_farthest_losses_no_other_errors_are_sent(reach, weight, hops_in):
    made = plan(SIX, method={"link": {"reach": reach, "weight": weight, "length": "all", "take": "farthest"}},
                partition={"stages": 4})
    assert [links.hops_in for links in made.links] == hops_in
    assert [links.hops_out for links in made.links] == [(), *hops_in[:-1]]


@pytest.mark.parametrize(("method", "joint"), [
    ({}, [True, True, False]), ({"local_weight": 0.0}, [False] * 3), ({"name": "greedy"}, [False] * 3),
    ({"link": {"weight": [1.0, 0.0]}}, [True, False, False]),
])
def test_where_nothing_comes_back_nothing_is_joined(method, joint):
    link = {"joint": True, "length": "all", **method.get("link", {})}
    made = plan(SIX, method={**method, "link": link}, partition={"stages": 3})
    assert [links.joint for links in made.links] == joint


def test_the_last_stage_always_learns_from_its_own_loss_in_full():
    made = plan(SIX, method={"local_weight": 0.25}, partition={"stages": 3})
    assert [links.local_weight for links in made.links] == [0.25, 0.25, 1.0]


@pytest.mark.parametrize(("method", "message"), [
    ({"link": {"reach": 2}}, r"^method\.link\.reach: 2: stage 2 passes errors on through all of its 2 blocks, and "
                             r"method\.link\.length is 1; set method\.link\.length=all$"),
    ({"local_weight": 0.0}, r"^method\.local_weight: 0, and no link through all blocks of stage 2 \(layer2 … layer3\): "
                            r"they would not learn; set method\.link\.length=all, or a local weight above 0$"),
    ({"local_weight": 0.0, "link": {"length": "all", "weight": [1.0, 0.0]}},
     r"^method\.local_weight: 0, and no link .*of stage 2 .*; give it a method\.link\.weight, or"),
])
def test_links_that_cannot_be_are_refused(method, message):
    with pytest.raises(ConfigError, match=message):
        plan(SIX, method=method, partition={"cuts": ["layer2", "layer4"]})


def test_what_travels_in_bf16_takes_half_of_the_bytes():
    full, errors, activations = (plan(SIX, partition={"stages": 3}, **changes) for changes in (
        {}, {"method": {"link": {"wire": "bf16"}}}, {"train": {"batch_size": 8, "wire": "bf16"}}))
    size = full.step_sizes[0][0]
    half = TensorSpec(full.outputs[size][0].shape, torch.bfloat16)
    assert full.error(size, 0) == full.activation(size, 0) == full.outputs[size][0]
    assert (errors.error(size, 0), errors.activation(size, 0)) == (half, full.outputs[size][0])
    assert (activations.error(size, 0), activations.activation(size, 0)) == (full.outputs[size][0], half)


def narrow_net(frozen):
    blocks = nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)).bfloat16()
    return blocks.requires_grad_(not frozen)


@pytest.mark.parametrize(("frozen", "message"), [
    (False, r"^model: 0\.weight is bfloat16, in which small steps are lost; have the model in float32, and set "),
    (True, r"^method\.head: after block 0 it takes float32, and the block gives bfloat16; have the model in float32")])
def test_a_model_in_bfloat16_is_refused_before_it_meets_a_head_in_float32(frozen, message):
    tree = {"name": "narrow", "model": {"target": "test_plan:narrow_net", "args": {"frozen": frozen}},
            "partition": {"stages": 2}, "method": {"head": "linear"}, "train": {"batch_size": 8}}
    with pytest.raises(ConfigError, match=message):
        make_plan(parse_config(tree), DataSpec((4,), "int64", (4,), 3, 16, 16))


class Double(nn.Linear):
    """In float64."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, dtype=torch.float64)

    def forward(self, x):
        return super().forward(x.flatten(1).double())


def double_net():
    return [Double(192, 6), Double(6, 4)]


def double_head(boundary):
    return Double(boundary.features, boundary.classes)


class Projected(nn.Module):
    """A loss with weights of its own, which take nothing else than their type."""

    def __init__(self, boundary, dtype):
        super().__init__()
        self.projection = nn.Linear(boundary.features, 1, dtype=getattr(torch, dtype))

    def forward(self, logits, targets, x):
        return self.projection(x).mean() + nn.functional.cross_entropy(logits, targets)


def projected(boundary, dtype):
    return Projected(boundary, dtype)


def test_a_loss_is_tried_in_the_type_that_the_stage_gives():
    def doubled(loss, **changes):
        return dict(model={"target": "test_plan:double_net"},
                    method={"head": {"target": "test_plan:double_head"}, "loss": loss}, **changes)

    own = {"target": "test_plan:projected", "args": {"dtype": "float64"}}
    assert plan(**doubled(own)).classes == 4
    message = "^method\\.loss: its weights are {}, and the stage gives {}; have the model and the loss in float32$"
    refused(message.format("float32", "float64"), **doubled("pred_sim"))
    refused(message.format("float64", "float32"), method={"loss": own})
    balanced = config(**doubled(own, partition={"stages": 2, "strategy": "balanced", "costs": "analytic"}))
    assert profile(make_network(balanced, IMAGES), torch.device("cpu")).heads[0] is not None


def test_what_a_user_may_have_overlooked_is_noted():
    config = parse_config({"name": "odd", "model": {"name": "mlp", "args": {"classes": 9}}, "partition": {"stages": 2},
                           "schedule": {"name": "multistep", "warmup_epochs": 3},
                           "train": {"epochs": 2, "batch_size": 8}})
    assert notices(make_plan(config, DataSpec((4,), "float32", (), 3, 16, 16))) == [
        "model: it gives 9 logits, and the data have 3 classes",
        "schedule: multistep without milestones changes nothing",
        "schedule.warmup_epochs: 3 are not over after train.epochs, 2"]


def test_activations_of_bp_cannot_travel_in_bf16():
    with pytest.raises(ConfigError, match=r"^train\.wire: bf16, but .* bp .*; leave train\.wire out$"):
        plan(SIX, partition={"stages": 3}, method={"name": "bp"},
             train={"batch_size": 8, "wire": "bf16"})


def test_a_link_longer_than_a_stage_is_noticed():
    three = {"cuts": ["layer2", "layer4"]}
    said = notices(plan(SIX, method={"link": {"length": 2}}, partition=three))
    assert said == ["method.link.length: 2 is more than some stages have; stages 1 use all of their blocks"]
    both, = notices(plan(SIX, method={"link": {"length": 3}}, partition=three))
    assert "stages 1, 2 use all" in both


@pytest.mark.parametrize(("delay", "unit", "count"), [
    (3, "batch", "3 steps"), (500, "batch", "3 steps"), (6, "microbatch", "6 microbatches")])
def test_a_delay_that_no_epoch_is_long_enough_for_is_noticed(delay, unit, count):
    def said(delay):
        return notices(plan(SIX, method={"link": {"delay": delay, "delay_unit": unit}},
                            train={"batch_size": 8, "microbatches": 2}))

    assert said(delay) == [f"method.link.delay: {delay}, and an epoch has {count}: all errors wait for its end; give "
                           f"less than {count[0]}"]
    assert said(int(count[0]) - 1) == []
    assert notices(plan(SIX, method={"link": {"delay": 9}}, train={"batch_size": 24})) == []


@pytest.mark.parametrize("method", [{}, {"link": {"length": "all"}}, {"name": "greedy", "link": {"length": 9}},
                                    {"name": "greedy", "link": {"delay": 9}}, {"name": "bp", "link": {"length": 9}}])
def test_nothing_is_noticed_otherwise(method):
    assert notices(plan(SIX, method=method, partition={"cuts": ["layer2", "layer4"]})) == []
