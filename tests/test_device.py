"""Precision, layout and where the data are: what changes, and what must not."""

import os
import weakref
from contextlib import suppress
from copy import deepcopy

import pytest
import torch
from conftest import metrics_of, small_config, state_of, train_locally
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blpipe import trainer
from blpipe.config import DataConfig
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.device import (
    _may_be_channels_last,
    set_up,
    settings_put_back,
    spare_cudnn_norms,
    transfer,
    use_channels_last,
    use_precision,
)
from blpipe.engines.local import LocalEngine
from blpipe.errors import ConfigError, UserError
from blpipe.forecast import costs
from blpipe.forecast.memory import Rehearsal
from blpipe.plan import make_network, make_plan
from blpipe.precision import Precision
from blpipe.runs import train_run
from blpipe.saved import export_run
from blpipe.transport.memory import MemoryQueue
from blpipe.transport.messages import layout_of, message_bytes, views

CPU, META = torch.device("cpu"), torch.device("meta")
IMAGES = {"name": "synthetic", "args": {"shape": [3, 8, 6], "classes": 4, "samples": 50},
          "augment": {"crop": 2, "flip": True}, "normalize": {"mean": [0.1, 0.2, 0.3], "std": [0.7, 0.8, 0.9]}}
FAST = {"train__precision": "bf16", "train__channels_last": True}


def opened(**section):
    return open_data(DataConfig.model_validate({**IMAGES, **section}), 0)


def batches(data):
    return [*data.train_batches(1, 2, 16, False), *data.test_batches(8)]


# ---- data on the device


def test_batches_are_the_same_wherever_they_are_prepared():
    host, placed = opened(place="host").to(CPU), opened(place="device").to(CPU)
    for (x, y), (u, v) in zip(batches(host), batches(placed), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_gpu_prepares_batches_without_the_hosts_tensors(monkeypatch, place):
    """On tensors without values of a GPU that need not be there: an operation on mixed devices raises."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    gpu = torch.device("cuda", 0)
    data = opened(place=place)
    host = batches(data)
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = data.to(gpu)
        prepared, (zeros, targets) = batches(there), there.zeros(3)
    assert there.is_held_there is (place == "device")
    assert (zeros.device, zeros.shape, zeros.dtype) == (gpu, (3, *data.spec.shape), torch.float32)
    assert (targets.device, targets.shape, targets.dtype) == (gpu, (3,), torch.int64)
    for (x, y), (u, v) in zip(prepared, host, strict=True):
        assert x.device == y.device == gpu
        assert (x.shape, x.dtype, y.shape, y.dtype) == (u.shape, u.dtype, v.shape, v.dtype)


def test_auto_leaves_data_on_the_host_without_a_gpu_or_room_on_it(monkeypatch):
    data, asked = opened(), opened(place="device")
    assert data.to(CPU).is_held_there and not data.to(META).is_held_there
    assert asked.to(META)._source.train.x.device == META
    memory = {"mem_get_info": (1000, 1000), "memory_reserved": 500, "memory_allocated": 500}
    for name in memory:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: memory[name])
    with FakeTensorMode(allow_non_fake_inputs=True):  # the GPU need not be there
        assert not data.to(torch.device("cuda", 0)).is_held_there
        with pytest.raises(UserError, match=r"place: device, .* samples take 8\.91 KiB, and cuda:0 has 0\.977 KiB"):
            asked.to(torch.device("cuda", 0))
        memory["memory_reserved"] = 20_000  # what was freed, and torch keeps
        assert all(each.to(torch.device("cuda", 0)).is_held_there for each in (data, asked))


def test_data_read_sample_by_sample_have_no_place_on_a_device(tmp_path):
    from PIL import Image
    for folder in ("train/a", "test/a"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "0.png")
    section = {"name": "imagefolder", "root": str(tmp_path)}
    assert not open_data(DataConfig.model_validate(section), 0).to(META).is_held_there
    with pytest.raises(ConfigError, match=r"data\.place: device is for data in memory"):
        open_data(DataConfig.model_validate({**section, "place": "device"}), 0)


def test_a_transfer_to_where_a_tensor_is_copies_nothing():
    x = torch.zeros(3)
    assert transfer(x, CPU) is x


# ---- several runs


def test_a_run_on_a_gpu_begins_without_what_another_one_has_left(monkeypatch):
    class Recorded:
        """Holds itself, as recordings do."""

    left, done = Recorded(), []
    left.runner, seen = left, weakref.ref(left)
    for name in ("set_device", "init", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: done.append((name, seen() is None)))
    del left
    trainer._use(torch.device("cuda", 0))
    assert done[-2:] == [("empty_cache", True), ("reset_peak_memory_stats", True)]


# ---- precision


def test_float32_means_float32_and_tf32_allows_it_everywhere():
    try:
        use_precision("tf32")
        assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
        for name in ("bf16", "float32"):
            use_precision(name)
            assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    finally:
        use_precision("float32")


@pytest.mark.parametrize("newer", [[], ["cuda.matmul"], ["cudnn.conv"], ["mkldnn.matmul", "cudnn.rnn"]])
def test_a_run_puts_back_how_precise_float32_was_in_torchs_older_and_newer_settings(newer):
    settings = {"cuda.matmul": torch.backends.cuda.matmul, "mkldnn.matmul": torch.backends.mkldnn.matmul,
                "cudnn.conv": torch.backends.cudnn.conv, "cudnn.rnn": torch.backends.cudnn.rnn}

    older = {"precision": torch.get_float32_matmul_precision, "convolutions": lambda: torch.backends.cudnn.allow_tf32,
             "products": lambda: torch.backends.cuda.matmul.allow_tf32}

    def seen():
        found = {name: each.fp32_precision for name, each in settings.items()}
        for name, get in older.items():
            with suppress(RuntimeError):  # torch does not tell what the newer ones contradict
                found[name] = get()
        return found

    use_precision("float32")
    fresh = {name: each.fp32_precision for name, each in settings.items()}
    try:
        for name in newer:
            settings[name].fp32_precision = "tf32"
        before = seen()
        assert len(before) == 7 or newer
        for precision in ("float32", "tf32"):
            with settings_put_back():
                use_precision(precision)
            assert before.items() <= seen().items()
    finally:
        for name, each in settings.items():
            each.fp32_precision = fresh[name]
        use_precision("float32")


def test_bf16_computes_in_bfloat16_and_gives_float32():
    seen = []
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    x = torch.randn(2, 4)
    assert Precision("bf16").run(layer, x).dtype == torch.float32
    assert Precision().run(layer, x).dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("method", ["backlink", "bp"])
def test_bf16_trains_otherwise_than_float32_and_nearly_as_well(method, tmp_path):
    full = train_locally(small_config("full", method=method), tmp_path)
    less = train_locally(small_config("less", method=method, train__precision="bf16"), tmp_path)
    assert metrics_of(less) != metrics_of(full)
    losses = [[row[5] for row in metrics_of(run) if row[5] is not None] for run in (full, less)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_bf16_refuses_a_model_that_is_not_in_float32():
    tree = small_config("double", model={"target": "test_device:doubles"}, partition__stages=2, method="bp",
                        train__precision="bf16")
    config = parse_config(tree)
    with pytest.raises(ConfigError, match=r"train\.precision: bf16 is for .* float32, and block a gives float64"):
        make_plan(config, open_data(config.data, 0).spec)


class _Double(nn.Module):
    def forward(self, x):
        return x.double()


class _Single(nn.Module):
    def forward(self, x):
        return x.float()


def doubles():
    return {"a": _Double(), "b": nn.Sequential(_Single(), nn.Flatten(), nn.Linear(128, 4))}


# ---- layout


def test_channels_last_is_for_tensors_of_four_dimensions_alone():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv3d(2, 4, 3), nn.Linear(3, 4))
    values = [p.clone() for p in model.parameters()]
    parameters = list(model.parameters())
    use_channels_last(model)
    assert all(p is q and torch.equal(p, value)
               for p, q, value in zip(model.parameters(), parameters, values, strict=True))
    assert [p.is_contiguous() for p in model.parameters()] == [False] + [True] * 5
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_message_has_the_strides_that_a_transfer_gives():
    queue = MemoryQueue()
    queue.put(torch.randn(2, 3, 1, 1).to(memory_format=torch.channels_last), torch.randn(2, 3, 4, 4).mT)
    assert [tensor.stride() for tensor in queue.get()] == [(3, 1, 1, 1), (48, 16, 4, 1)]


@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_have_one_layout_in_every_queue(channels_last):
    """And where a model is laid out channels last, nothing is copied for it."""
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    others = [torch.randn(2, 3, 1, 1), torch.randn(2, 3, 4, 4), torch.randn(2, 5), torch.randn(3, 4).mT]
    queue = MemoryQueue(channels_last)
    queue.put(x, *others)
    got = queue.get()
    layout = layout_of((x, *others))
    through = views(torch.zeros(message_bytes(layout), dtype=torch.uint8), layout, channels_last)
    for view, tensor in zip(through, (x, *others), strict=True):
        view.copy_(tensor)
    assert [t.stride() for t in got] == [t.stride() for t in through]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(got, through, (x, *others), strict=True))
    assert (got[0].data_ptr() == x.data_ptr()) == channels_last


def test_checkpoints_resume_and_exports_are_plain(tmp_path):
    tree = small_config("whole", train__epochs=3, checkpoint__every_epochs=1, **FAST)
    whole = train_locally(tree, tmp_path)
    tree["name"] = "parts"
    parts = train_locally({**tree, "train": {**tree["train"], "epochs": 2}}, tmp_path)
    config = parse_config({**tree, "runtime": {**tree["runtime"], "runs": str(parts.parent)}})
    train_run(config, resume_from=parts)
    left, right = state_of(whole), state_of(parts)
    assert all(torch.equal(left[key], right[key]) for key in left)
    export_run(whole, tmp_path / "model.pt")
    exported = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(tensor.is_contiguous() for tensor in exported.values())
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32, torch.int64}


# ---- forecasts


def three():
    return {"a": nn.Conv2d(2, 8, 3), "b": nn.Conv2d(8, 8, 3),
            "c": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))}


def test_forecasts_compute_as_the_run_will(monkeypatch):
    monkeypatch.setattr(costs, "_MEASURE_SECONDS", 0.0)
    plain, fast = (parse_config(small_config("forecast", model={"target": "test_device:three"}, **changes))
                   for changes in ({}, FAST))
    data = open_data(plain.data, 0)
    networks = [make_network(config, data.spec) for config in (plain, fast)]
    saved = [sum(block.saved_bytes for block in costs.profile(network, CPU).blocks) for network in networks]
    assert saved[1] != saved[0]
    peaks = [Rehearsal(network, CPU).peak_bytes(1, 2) for network in networks]
    assert peaks[1] != peaks[0]
    assert all(block.forward > 0 for block in costs.profile(networks[1], CPU, data).blocks)


@pytest.mark.parametrize("method", ["backlink", "greedy", "bp"])
def test_what_the_config_says_is_compiled_and_nothing_else(method, tmp_path, monkeypatch):
    compiled = []

    def compile_(part, dynamic):
        def run(*args):
            compiled.append(part)
            return part(*args)
        return run

    monkeypatch.setattr(torch, "compile", compile_)
    plain = train_locally(small_config("plain", method__name=method, train__epochs=1), tmp_path)
    assert compiled == []
    run = train_locally(small_config("compiled", method__name=method, train__epochs=1, train__compile=True), tmp_path)
    assert torch._functorch.config.donated_buffer is False
    assert len(set(compiled)) == {"backlink": 3 + 2 + 2, "greedy": 3 + 2, "bp": 3}[method]  # bodies, tails, heads
    left, right = state_of(plain), state_of(run)
    assert all(torch.equal(left[key], right[key]) for key in left)


def noting(function, results):
    def noted(*given):
        results.append(function(*given))
        return results[-1]
    return noted


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler's own
def test_parts_that_compute_nothing_leave_the_others_compiled(monkeypatch):
    """The head of the last stage, and the body of a stage that is all tail; with dropout, to tell the two apart."""
    config = parse_config(small_config("compiled", model__args={"dropout": 0.5}, partition__stages=2, train__epochs=1,
                                       method__link={"delay": 0, "length": "all", "keep": "recompute"},
                                       method__head="linear", train__compile=True))
    set_up(config)
    data, outputs = open_data(config.data, config.seed), []
    engine = LocalEngine(make_plan(config, data.spec), data, CPU)
    tail = engine.stages[0].tail
    for name in ("_run", "_run_again"):
        monkeypatch.setattr(tail, name, noting(getattr(tail, name), outputs))
    engine.train(0, 0, lambda step: step < 3, lambda: None)
    assert len(outputs) == 6
    for out, again in zip(outputs[::2], outputs[1::2], strict=True):
        assert torch.equal(out, again)


@pytest.mark.parametrize("on", [False, True])
def test_deterministic_algorithms_alone_are_used_where_asked_for(on, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_up(parse_config(small_config("same", runtime__deterministic=on)))
        assert torch.are_deterministic_algorithms_enabled() is on
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is on
    finally:
        torch.use_deterministic_algorithms(False)
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_norms_of_maps_in_channels_last_do_without_cudnn_and_nothing_else_does(monkeypatch):
    used = []
    norm = nn.functional.batch_norm
    monkeypatch.setattr(nn.functional, "batch_norm", lambda *given, **named: (
        used.append(torch.backends.cudnn.enabled), norm(*given, **named))[1])
    part = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    plain = deepcopy(part)
    spare_cudnn_norms(part)
    part = deepcopy(part)  # which holds its own copies
    x = torch.randn(2, 3, 5, 6)
    for each in (x, x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(part(each), plain(each))
    assert used == [True, True, False, True]
    assert torch.backends.cudnn.enabled
    assert part.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(part[1].running_mean, plain[1].running_mean)


@pytest.mark.parametrize(("maps", "may_be"), [
    (torch.zeros(2, 3, 5, 6), False),
    (torch.zeros(2, 3, 5, 6).to(memory_format=torch.channels_last), True),
    (torch.zeros(32).as_strided((4, 8, 1, 1), (8, 1, 8, 8)), True),  # as pooling gives them, and contiguous
    (torch.zeros(24).as_strided((4, 1, 2, 3), (6, 1, 3, 1)), True),
    (torch.zeros(32).as_strided((4, 8, 1, 1, 1), (8, 1, 8, 8, 8)), True),
    (torch.zeros(2, 3, 4, 5, 6), False),
    (torch.zeros(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d), True),
    (torch.zeros(4, 8), False), (torch.zeros(4, 8, 5), False)])
def test_maps_that_torch_may_take_for_channels_last(maps, may_be):
    assert _may_be_channels_last(maps) is may_be
