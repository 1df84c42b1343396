"""The engines against plain PyTorch: a hand-written reference, a plain loop, plain backpropagation."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_run, metrics_of, small_config, state_of, train_in_processes, train_locally
from torch.func import functional_call

from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.engines.build import build_stage
from blpipe.plan import make_plan
from blpipe.seeds import derive_seed

NO_DROPOUT = {"target": "models_under_test:conv_net", "args": {"dropout": 0.0}}


def prepared(tree):
    config = parse_config(tree)
    data = open_data(config.data, config.seed)
    return config, data, make_plan(config, data.spec)


def batches(config, data):
    for epoch in range(config.train.epochs):
        yield from data.train_batches(config.seed, epoch, config.train.batch_size, config.train.drop_last)


def model_of(run):
    return {key.removeprefix("model/"): value for key, value in state_of(run).items() if key.startswith("model/")}


def heads_and_optimizers(plan):
    """A head for every stage, and an optimizer over blocks and head."""
    heads = [plan.build_head(k) for k in range(len(plan.stages) - 1)] + [torch.nn.Identity()]
    return heads, [torch.optim.SGD([*s.parameters(), *h.parameters()], lr=0.05, momentum=0.9)
                   for s, h in zip(plan.stages, heads, strict=True)]


def assert_close(trained, expected, rtol, atol):
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("length", [1, 2, "all"])
def test_exact_backlink_equals_a_hand_written_reference(length, tmp_path):
    tree = small_config("reference", model=NO_DROPOUT, method__link={"delay": 0, "length": length, "weight": 0.7})
    config, data, plan = prepared(tree)
    stages, last = plan.stages, len(plan.stages) - 1
    heads, optimizers = heads_and_optimizers(plan)
    for x, y in batches(config, data):
        inputs, tails, losses = [], [], []
        for k, (stage, head) in enumerate(zip(stages, heads, strict=True)):
            x = x.detach().requires_grad_(k > 0)
            inputs.append(x)
            body = len(stage) - min(len(stage) if length == "all" else length, len(stage))
            h = stage[:body](x)
            tails.append((list(stage[body:].parameters()), x := stage[body:](h)))
            losses.append(F.cross_entropy(head(x), y))
        errors = [torch.autograd.grad(losses[k + 1], inputs[k + 1], retain_graph=True)[0] for k in range(last)]
        for k in range(last + 1):
            losses[k].backward(retain_graph=True)
            if k < last:
                parameters, output = tails[k]
                for p, g in zip(parameters, torch.autograd.grad(output, parameters, 0.7 * errors[k]), strict=True):
                    p.grad += g
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_close(model_of(train_locally(tree, tmp_path)), plan.model.state_dict(), rtol=1e-5, atol=1e-6)


LINKS = [
    (0.0, 1, {"reach": 2, "delay": 0}),
    (0.4, 1, {"reach": 2, "delay": 1, "weight": [0.5, 0.0, 2.0]}),
    (0.0, 1, {"reach": "all", "delay": 1, "take": "farthest"}),
    (1.0, 2, {"reach": 3, "delay": 2, "take": "farthest", "keep": "recompute"}),
    (0.4, 1, {"reach": 1, "delay": 4, "schedule": {"name": "multistep", "milestones": [1], "gamma": 0.3}}),
    (0.0, 4, {"reach": 2, "delay": 1, "normalize": True}),
    (1.0, 4, {"reach": 1, "delay": 1, "delay_unit": "microbatch"}),
    (0.4, 2, {"reach": "all", "delay": 1, "delay_unit": "microbatch", "keep": "recompute"}),
    (0.0, 4, {"reach": 2, "delay": 3, "delay_unit": "microbatch", "take": "farthest"}),
    (0.4, 1, {"reach": 0}),
    (0.4, 2, {"joint": True, "delay": 0, "weight": [0.5, 0.0, 2.0]}),
    (1.0, 1, {"joint": True, "delay": 2, "keep": "recompute"}),
    (0.4, 2, {"joint": True, "length": 1, "delay": 0}),
    (0.4, 2, {"joint": True, "length": 1, "delay": 1, "weight": [0.5, 0.0, 2.0]}),
    (0.4, 4, {"length": 1, "delay": 3, "delay_unit": "microbatch"}),
    (0.4, 4, {"joint": True, "delay": 1, "delay_unit": "microbatch",
              "schedule": {"name": "multistep", "milestones": [1], "gamma": 0.3}}),
]


@pytest.mark.parametrize(("alpha", "microbatches", "link"), LINKS)
def test_every_link_equals_a_hand_written_reference(link, microbatches, alpha, tmp_path):
    """All losses backpropagated end to end through copies of the weights, and their parts added when they are due."""
    tree = small_config("reference", model=NO_DROPOUT, partition__stages=4, method__local_weight=alpha,
                        train__microbatches=microbatches, method__link={"length": "all", **link})
    config, data, plan = prepared(tree)
    given, last = config.method.link, len(plan.stages) - 1
    tails = [names_in_tail(stage, given.length) for stage in plan.stages]
    heads, optimizers = heads_and_optimizers(plan)
    for epoch in range(config.train.epochs):
        parts = [(t, len(y) / len(targets), out, y)
                 for t, (x, targets) in enumerate(data.train_batches(config.seed, epoch, 16, False))
                 for out, y in zip(x.split(16 // microbatches), targets.split(16 // microbatches), strict=True)]
        factor = 0.3 if epoch == 1 and given.schedule.name == "multistep" else 1.0
        late = given.delay * (1 if given.delay_unit == "microbatch" else microbatches)
        due = []  # (step, stage, weight, gradients by name)
        for n, (t, share, out, y) in enumerate(parts):
            copies = [{n: p.detach().clone().requires_grad_() for n, p in s.named_parameters()} for s in plan.stages]
            losses = []
            for stage, copy, head in zip(plan.stages, copies, heads, strict=True):
                out = functional_call(stage, copy, (out,))
                losses.append(share * F.cross_entropy(head(out), y))
            for k, head in enumerate(heads):
                own = gradients_of(losses[k], copies[k])
                joint = tails[k] if given.joint and k < last and given.stage_weight(k) else set()
                for step, names in ((t, own.keys() - joint), (step_at(parts, n + late), joint)):
                    due.append((step, k, alpha if k < last else 1.0, {name: own[name] for name in names}))
                farthest = min(last if given.reach == "all" else given.reach, last - k)
                for j in range(1 if given.take == "every" else max(1, farthest), farthest + 1):
                    gradients = gradients_of(losses[k + j], {name: copies[k][name] for name in tails[k]})
                    weight = given.stage_weight(k) * factor * (norm(own) / norm(gradients) if given.normalize else 1.0)
                    due.append((step_at(parts, n + j * late), k, weight, gradients))
                for p in head.parameters():
                    gradient, = torch.autograd.grad(losses[k], p, retain_graph=True)
                    p.grad = gradient if p.grad is None else p.grad + gradient
            if n + 1 < len(parts) and parts[n + 1][0] == t:
                continue
            for _, k, weight, gradients in (part for part in due if part[0] == t and part[2]):
                for name, g in gradients.items():
                    p = plan.stages[k].get_parameter(name)
                    p.grad = weight * g if p.grad is None else p.grad + weight * g
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_close(model_of(train_locally(tree, tmp_path)), plan.model.state_dict(), rtol=1e-4, atol=1e-5)


def names_in_tail(stage, length):
    """Of the parameters of a stage's last blocks."""
    blocks = [*stage._modules][0 if length == "all" else -length:]
    return {name for name, _ in stage.named_parameters() if name.split(".")[0] in blocks}


def gradients_of(loss, parameters):
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values(), retain_graph=True), strict=True))


def step_at(parts, n):
    """The step of the n-th microbatch of an epoch; of its last one, for those that would come after it."""
    return parts[min(n, len(parts) - 1)][0]


def norm(gradients):
    return sum(float(g.square().sum()) for g in gradients.values()) ** 0.5


def test_links_that_reach_all_of_the_way_are_backpropagation(tmp_path):
    method = {"link": {"reach": "all", "take": "farthest", "delay": 0, "length": "all"}, "local_weight": 0.0}
    linked = train_locally(small_config("linked", model=NO_DROPOUT, method=method), tmp_path)
    plain = train_locally(small_config("bp", model=NO_DROPOUT, method__name="bp"), tmp_path)
    assert_close(model_of(linked), model_of(plain), rtol=1e-4, atol=1e-5)


LAST_LOSS = {"local_weight": 0.0, "link": {"reach": "all", "take": "farthest", "length": "all", "delay": 1}}


@pytest.mark.parametrize("changes", [{}, {"train__on_nonfinite": "skip", "train__replicas": 2}])
def test_heads_that_teach_nothing_can_be_left_out(changes, tmp_path):
    """The model learns the same without them, and their stages have no accuracy."""
    heads, none = (train_locally(small_config(head, method={**LAST_LOSS, "head": head}, **changes), tmp_path)
                   for head in ("linear", "none"))
    assert_close(model_of(none), model_of(heads), rtol=0, atol=0)
    of_stages = json.loads((none / "result.json").read_text())["stage_val_accuracy"]
    assert of_stages[:-1] == [None] * (len(of_stages) - 1)
    assert of_stages[-1] == json.loads((heads / "result.json").read_text())["val_accuracy"]


@pytest.mark.parametrize("key", ["method__link", "train"])
def test_what_travels_in_bf16_changes_no_more_than_its_rounding(key, tmp_path):
    size = {"epochs": 1, "batch_size": 16} if key == "train" else {}
    full, half = (model_of(train_locally(small_config("run", model=NO_DROPOUT, train__epochs=1,
                                                      **{key: {**size, "wire": wire}}), tmp_path / wire))
                  for wire in ("full", "bf16"))
    assert not torch.equal(full["0.0.weight"], half["0.0.weight"])
    for name, tensor in full.items():
        torch.testing.assert_close(half[name], tensor, rtol=2e-2, atol=2e-3)


def test_one_stage_equals_a_plain_loop(tmp_path):
    tree = small_config("one", partition__stages=1, schedule={"name": "multistep", "milestones": [1]},
                        optimizer__lr_factors={"0.*": 0.5})
    config, data, plan = prepared(tree)
    model, steps = plan.model, len(plan.train_steps(0))
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[1:].parameters()}],
                                lr=0.05, momentum=0.9)
    torch.manual_seed(derive_seed(config.seed, "stage", 0))
    for step, (x, y) in enumerate(batches(config, data)):
        for group, lr in zip(optimizer.param_groups, (0.025, 0.05), strict=True):
            group["lr"] = lr if step < steps else lr * 0.1
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model_of(train_locally(tree, tmp_path))
    assert all(torch.equal(trained[name], tensor) for name, tensor in model.state_dict().items())


def test_backprop_equals_a_plain_loop_in_both_engines(tmp_path):
    tree = small_config("bp", method__name="bp", model=NO_DROPOUT, train__microbatches=4)
    config, data, plan = prepared(tree)
    optimizer = torch.optim.SGD(plan.model.parameters(), lr=0.05, momentum=0.9)
    for x, y in batches(config, data):
        for part, target in zip(x.split(4), y.split(4), strict=True):
            (F.cross_entropy(plan.model(part), target) * (len(part) / len(x))).backward()
        optimizer.step()
        optimizer.zero_grad()
    fast = small_config("fast", method__name="bp", model=NO_DROPOUT, train__precision="bf16",
                        train__channels_last=True)
    local, fast_local = [train_locally(each, tmp_path) for each in (tree, fast)]
    pipeline, fast_pipeline = train_in_processes([tree, fast], 3, tmp_path)
    for run in (local, pipeline):
        assert_close(model_of(run), plan.model.state_dict(), rtol=1e-5, atol=1e-6)
    assert [row[-1] for row in metrics_of(local)] == pytest.approx([row[-1] for row in metrics_of(pipeline)])
    assert_close(model_of(fast_pipeline), model_of(fast_local), rtol=1e-2, atol=1e-3)


def test_a_link_of_weight_zero_is_greedy(tmp_path):
    run = train_locally(small_config("zero", method__link__weight=0.0), tmp_path / "zero")
    greedy = train_locally(small_config("zero", method__name="greedy"), tmp_path / "greedy")
    assert_same_run(run, greedy)


def test_the_link_changes_what_is_learned_and_so_does_its_delay(tmp_path):
    states = [model_of(train_locally(small_config("run", method=method), tmp_path / str(i)))
              for i, method in enumerate(({"name": "greedy"}, {"link": {"delay": 0}}, {"link": {"delay": 1}}))]
    for i, one in enumerate(states):
        for other in states[i + 1:]:
            assert not torch.equal(one["0.0.weight"], other["0.0.weight"])


def test_recomputing_the_tail_changes_nothing_but_memory(tmp_path):
    for delay in (0, 1, 2):
        kept, recomputed = (
            train_locally(small_config("run", method__link={"keep": keep, "delay": delay, "length": 2},
                                       train__microbatches=2), tmp_path / f"{keep}{delay}")
            for keep in ("graph", "recompute"))
        assert_same_run(kept, recomputed)


@pytest.mark.parametrize("delay", [0, 1])
def test_microbatches_change_nothing_but_rounding(delay, tmp_path):
    model = {"name": "mlp", "args": {"hidden": [16, 16, 16], "batch_norm": False}}
    whole, parts = (
        train_locally(small_config("run", model=model, method__link={"delay": delay, "length": 2},
                                   train__microbatches=microbatches), tmp_path / str(microbatches))
        for microbatches in (1, 4))
    assert_close(model_of(parts), model_of(whole), rtol=1e-4, atol=1e-6)


def test_every_stage_draws_from_a_stream_of_its_own():
    _, _, plan = prepared(small_config("run"))
    states = [build_stage(plan, index, torch.device("cpu")).stream.state[0] for index in range(3)]
    again = build_stage(plan, 1, torch.device("cpu")).stream.state[0]
    assert torch.equal(states[1], again)
    assert not any(torch.equal(states[a], states[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
