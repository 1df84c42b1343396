"""Blocks, heads and losses that a stage cannot have, and what they may do while it runs."""

import pytest
import torch
from conftest import metrics_of, small_config, train_in_processes, train_locally
from test_transport import Sent
from torch import distributed, nn

from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.errors import ConfigError, StageError
from blpipe.parts import check_kept
from blpipe.plan import make_plan
from blpipe.specs import TensorSpec
from blpipe.transport.queues import SendQueue


class Listed(nn.Module):
    """Reaches its weight by a list."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(128))
        self.weights = [self.weight]

    def forward(self, x):
        return x.flatten(1) @ self.weights[0]


def listed_net():
    return [Listed(), nn.Linear(128, 6), nn.Linear(6, 4)]


HEAD = nn.Linear(6, 4)


def same_head(boundary):
    return HEAD


class Weighted(nn.Module):
    """Cross-entropy of logits that it scales by a parameter."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, logits, targets):
        return nn.functional.cross_entropy(logits * self.weight, targets)


WEIGHT, CLASS_WEIGHTS = nn.Parameter(torch.ones(())), torch.ones(4)


def same_loss():
    return Weighted(WEIGHT)


def same_class_weights():
    return nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)


def dropping_loss():
    return lambda logits, targets: nn.functional.cross_entropy(nn.functional.dropout(logits, 0.5), targets)


def planned(**changes):
    config = parse_config(small_config("parts", **changes))
    return make_plan(config, open_data(config.data, config.seed).spec)


def refused(message, **changes):
    with pytest.raises(ConfigError, match=message):
        planned(**changes)


def test_a_parameter_that_a_late_link_could_not_replace_is_refused():
    listed = {"model": {"target": "test_parts:listed_net"}, "partition": {"stages": 2}, "method__head": "linear"}
    refused(r"^model: 0 in the stage 0 keeps a parameter in 'weights' too, past which a late link cannot put ",
            **listed)
    planned(**listed, method__link={"delay": 0})
    planned(**listed | {"partition": {"cuts": ["2"]}})  # in the body, which no link trains
    planned(**listed, method="greedy")
    planned(model={"name": "mlp"}, partition={"stages": 2})


def hooked_net(register, block=0):
    net = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(128, 6)), nn.Linear(6, 6), nn.Linear(6, 4))
    getattr(next(net[block].parameters()), register)(lambda *_: None)
    return net


def hooked_head(boundary):
    head = nn.Linear(6, 4)
    head.weight.register_post_accumulate_grad_hook(lambda _: None)
    return head


def hooked(register, **args):
    return {"model": {"target": "test_parts:hooked_net", "args": {"register": register, **args}},
            "partition": {"stages": 2}, "method__head": "linear"}


def test_a_gradient_hook_where_a_late_link_trains_a_copy_is_refused():
    tree = hooked("register_hook")
    refused(r"^model: 0\.1\.weight in the stage 0 has a gradient hook, .*; take it out, or set method\.link\.delay=0$",
            **tree | {"partition": {"cuts": ["1"]}})
    planned(**tree | {"partition": {"cuts": ["2"]}})  # in the body, which no link trains
    planned(**tree, method__link={"delay": 0, "length": "all"})
    planned(**tree, method="greedy")
    planned(**hooked("register_hook", block=2))  # in the last stage, which no link trains


def test_a_hook_for_accumulated_gradients_is_refused_where_none_are():
    tree = hooked("register_post_accumulate_grad_hook")
    message = r"^model: 0\.1\.weight in the stage \S+ has a hook of register_post_accumulate_grad_hook, .*; take it out"
    refused(message, **tree)
    refused(message, **tree | {"method__name": "greedy"})
    planned(**tree | {"method__head": None, "method": "bp"})
    refused(r"^model: weight in the stage ", **hooked("register_hook", block=2),
            method={"name": "greedy", "head": {"target": "test_parts:hooked_head"}})


def test_an_embedding_that_bounds_its_norms_is_refused():
    with pytest.raises(ConfigError, match=r"^model: 1 in the stage stem writes to its weight in forward"):
        check_kept(["stem"], nn.Sequential(nn.Identity(), nn.Embedding(3, 3, max_norm=1.0)))


def test_a_buffer_whose_elements_share_memory_is_refused():
    block = nn.Identity()
    block.register_buffer("passing", torch.ones(1).expand(4), persistent=False)
    block.register_buffer("single", torch.ones(1).expand(1, 1))
    block.register_buffer("scale", torch.ones(4))
    check_kept(["stem"], block)
    block.scale = torch.ones(3, 1).expand(3, 4)
    with pytest.raises(ConfigError, match=r"^model: scale in the stage stem is expanded, .*; add \.contiguous\(\)$"):
        check_kept(["stem"], block)


@pytest.mark.parametrize(("key", "target"), [("head", "same_head"), ("loss", "same_loss")])
def test_stages_that_would_share_a_head_or_a_loss_are_refused(key, target):
    refused(rf"^method\.{key}: stage [23] has the parameters of an earlier stage's; have the target make a new ",
            model={"name": "mlp", "args": {"hidden": [6, 6, 6]}}, **{f"method__{key}": {
                "target": f"test_parts:{target}"}})


def test_stages_may_share_what_is_not_trained():
    planned(model={"name": "mlp"}, method__loss={"target": "test_parts:same_class_weights"})


class Bfloat16(nn.Module):
    """What it gives is another type than without values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(128, 6)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x.flatten(1))


class Float32(nn.Linear):
    """Takes any type."""

    def forward(self, x):
        return super().forward(x.float())


def autocasting_net():
    return [Bfloat16(), Float32(6, 4)]


def test_a_stage_whose_output_is_not_as_planned_ends_a_run_in_processes(tmp_path):
    tree = small_config("unplanned", model={"target": "test_parts:autocasting_net"}, partition__stages=2,
                        method__head={"target": "test_parts:float_head"}, train__epochs=1)
    train_locally(tree, tmp_path)
    with pytest.raises(AssertionError, match=r"stage 1 .*: ValueError: it gives bfloat16 \[16, 6\], and did not when "):
        train_in_processes([tree], 2, tmp_path)


def float_head(boundary):
    return Float32(6, 4)


def test_a_message_that_is_not_as_planned_is_not_sent(monkeypatch):
    arrived = []
    monkeypatch.setattr(distributed, "isend", lambda buffer, peer, group: Sent(buffer, arrived))
    queue = SendQueue(None, 1, "sending", torch.device("cpu"), torch.device("cpu"),
                      layouts={(TensorSpec((4, 2), torch.float32),)})
    queue.put(torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"^it gives bfloat16 \[4, 2\], and did not when its shapes were traced"):
        queue.put(torch.ones(4, 2, dtype=torch.bfloat16))
    queue.drain()
    assert len(arrived) == 1


class AddsInPlace(nn.Module):
    """Writes to its input."""

    def forward(self, x):
        return x.add_(1.0)


def writing_net():
    return [nn.Sequential(AddsInPlace(), nn.Flatten(), nn.Linear(128, 6)), nn.Linear(6, 4)]


def test_a_tail_that_writes_to_its_input_is_not_run_again_on_it(tmp_path):
    tree = small_config("writing", model={"target": "test_parts:writing_net"}, partition__stages=2, train__epochs=1,
                        method__head="linear")
    train_locally(tree, tmp_path)
    tree["method"]["link"] = {"keep": "recompute"}
    with pytest.raises(StageError, match=r"ValueError: a block writes to its input, which method\.link\."):
        train_locally(tree | {"name": "again"}, tmp_path)


def test_the_loss_of_bp_draws_from_the_runs_seed(tmp_path):
    tree = small_config("dropping", method={"name": "bp", "loss": {"target": "test_parts:dropping_loss"}},
                        train__epochs=1)
    first = metrics_of(train_locally(tree, tmp_path / "first"))
    torch.rand(7)
    assert metrics_of(train_locally(tree, tmp_path / "second")) == first


def test_fused_sgd_has_momentum_of_tails_that_begin_late(tmp_path):
    tree = small_config("joint", method__link={"joint": True, "delay": 2}, train__epochs=1, optimizer={
        "name": "sgd", "lr": 0.05, "args": {"momentum": 0.9}})
    plain = metrics_of(train_locally(tree, tmp_path / "plain"))
    tree["optimizer"]["args"] = {"momentum": 0.9, "fused": True}
    fused = metrics_of(train_locally(tree, tmp_path / "fused"))
    assert [row[3] for row in fused] == pytest.approx([row[3] for row in plain], rel=1e-5)
