"""On a GPU: every engine learns what the CPU learns, to rounding. Skipped where there is none."""

import re
import sys
import warnings
import weakref
from contextlib import contextmanager

import pytest
import torch
import yaml
from conftest import assert_same_run, metrics_of, small_config, train_in_processes, train_locally
from test_api import still
from test_checkpoints import METHODS, go_on, rewound, saved_config
from test_graphs import RECORDED, Noted
from test_live_tensors import config as of_several_tensors

import blpipe
from blpipe import graphs
from blpipe.checkpoint.folders import checkpoints
from blpipe.checkpoint.state import load
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.device import set_up
from blpipe.engines import local
from blpipe.engines.common import LossWatch, train_epoch
from blpipe.plan import make_plan
from blpipe.trainer import open_local

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none here")]

MIXED = {"mixup": 0.4, "cutmix": 1.0}
RECURRENT = {"model": {"target": "models_under_test:recurrent_net"}, "partition": {"stages": 2}}
SEVERAL_TENSORS = {"model": {"target": "test_live_tensors:Masked", "live_tensors": 2},
                   "data": {"target": "test_live_tensors:texts"}}
WITH_GRAPHS = RECORDED | {"recurrent": RECURRENT, "recurrent_averages": {**RECURRENT, "train__ema": 0.9},
                          "several_tensors": SEVERAL_TENSORS}
RESUMED = {name: METHODS[name] for name in ("three_late", "far", "joint", "bp")} | {
    "nadam": {"optimizer": {"name": "nadam", "lr": 0.01}},
    "tensors_of_groups": {"optimizer": {"target": "optimizers_under_test:Measuring", "lr": 0.05}}}

NO_DROPOUT = {"target": "models_under_test:conv_net", "args": {"dropout": 0.0}}
LATE = small_config("late", method__link={"delay": 1, "length": 2}, train__microbatches=2, model=NO_DROPOUT)
ON_GPU = {**LATE, "runtime": {"device": "cuda"}}
BP = small_config("bp", method="bp", partition__stages=2, train__microbatches=2, train__ema=0.9, data__augment=MIXED,
                  model=NO_DROPOUT, runtime__device="cuda")


def learned(run):
    return [number for row in metrics_of(run) for number in row[3:] if number is not None]


def on_gpu(**changes):
    return small_config("gpu", runtime__device="cuda", **changes)


def on_the_gpu(tree):
    return {**tree, "runtime": {**tree["runtime"], "device": "cuda"}}


def test_the_local_engine_learns_as_on_the_cpu(tmp_path):
    on_cpu, on_gpu = train_locally(LATE, tmp_path / "cpu"), train_locally(ON_GPU, tmp_path / "gpu")
    assert learned(on_gpu) == pytest.approx(learned(on_cpu), rel=0.05, abs=0.05)


def test_a_model_made_from_a_seed_moves_no_stream_of_the_gpu():
    config, before = parse_config(ON_GPU), torch.cuda.get_rng_state()
    make_plan(config, open_data(config.data, config.seed).spec)
    assert torch.equal(torch.cuda.get_rng_state(), before)


FAST = {**ON_GPU, "name": "fast", "train": {**ON_GPU["train"], "precision": "bf16", "channels_last": True}}
PACKED = of_several_tensors("packed", "UNet", "scenes", partition__stages=3, train__microbatches=2,
                            method__link={"length": "all"}, runtime__device="cuda")


def with_graphs(tree):
    return {**tree, "name": f"graphs_{tree['name']}", "runtime": {**tree["runtime"], "cuda_graphs": True}}


def test_the_pipeline_learns_as_the_local_engine(tmp_path):
    """Over NCCL with three GPUs or more; with fewer, through host memory."""
    trees = [ON_GPU, FAST, PACKED, with_graphs(PACKED)]
    for tree, run in zip(trees, train_in_processes(trees, 3, tmp_path), strict=True):
        assert learned(run) == pytest.approx(learned(train_locally(tree, tmp_path)), rel=0.05, abs=0.05)


FAR = small_config("far", partition__stages=3, method__local_weight=0.5, train__microbatches=4, model=NO_DROPOUT,
                   method__link={"length": "all", "reach": 2, "delay_unit": "microbatch"}, runtime__device="cuda",
                   train__on_nonfinite="skip")
JOINT = small_config("joint", partition__stages=3, method__link={"length": "all", "joint": True}, model=NO_DROPOUT,
                     data__place="host", runtime__device="cuda")
IN_BF16 = small_config("wire", partition__stages=3, method__link={"delay": 2, "wire": "bf16", "keep": "recompute"},
                       train__wire="bf16", model=NO_DROPOUT, runtime__device="cuda",
                       optimizer={"target": "optimizers_under_test:Counting", "lr": 0.05})
ON_TIME = small_config("on_time", partition__stages=3, method__link={"delay": 0}, train__microbatches=2,
                       model=NO_DROPOUT, train__ema=0.9, data__augment=MIXED, runtime__device="cuda")
LAST_LOSS = small_config("last_loss", partition__stages=3, train__microbatches=2, model=NO_DROPOUT,
                         method={"local_weight": 0.0, "head": "none",
                                 "link": {"length": "all", "reach": "all", "take": "farthest"}},
                         data__augment={"transforms": [{"name": "RandomResizedCrop", "args": {"size": 8}}]},
                         data__workers=2, runtime__device="cuda")
# Microbatches of 25 begin where vectors of numbers do not; and BatchNorm, as below.
PIXELS = small_config("pixels", partition__stages=3, model={"target": "models_under_test:pixels_net"},
                      data__args={"shape": [3, 5, 5], "classes": 4, "samples": 256}, train__batch_size=100,
                      train__microbatches=4, train__channels_last=True, train__recompute=True, runtime__device="cuda")
# BatchNorm's kernels for these must not wait for a receive that runs beside them.
WIDE_MAPS = small_config("wide_maps", partition__stages=3, model={"name": "resnet_cifar", "args": {"depth": 14}},
                         data__args={"shape": [3, 32, 32], "classes": 4, "samples": 512}, train__channels_last=True,
                         train__batch_size=256, train__precision="tf32", runtime__device="cuda")
REPLICAS = small_config("replicas", partition__stages=3, train__replicas=2, train__microbatches=2, model=NO_DROPOUT,
                        runtime__device="cuda")
REPLICAS_OF_ALL = small_config("replicas_of_all", partition__stages=3, train__replicas=2, train__channels_last=True,
                               train__ema=0.9, train__on_nonfinite="skip", optimizer__clip_norm=0.5,
                               data__augment=MIXED, method__link={"joint": True, "length": 2}, model=NO_DROPOUT,
                               runtime__device="cuda")


@pytest.mark.parametrize("environment", [{}, {"NCCL_ON_ONE_GPU": "1"}], ids=["as it is", "nccl on one GPU"])
@pytest.mark.parametrize(("ranks", "trees", "alone"), [
    (3, [ON_GPU, FAR, JOINT, IN_BF16, ON_TIME, WIDE_MAPS, LAST_LOSS], [PIXELS]), (6, [REPLICAS_OF_ALL], [REPLICAS])],
    ids=["stages", "replicas"])
def test_the_pipeline_equals_the_local_engine_bit_for_bit(ranks, trees, alone, environment, tmp_path, monkeypatch):
    """With deterministic algorithms; `alone` without graphs only. As it is: over NCCL with a GPU for each rank, through
    host memory with fewer. On one GPU, NCCL goes over sockets.
    """
    trees = [*trees, *alone, *map(with_graphs, trees)]
    runs = train_in_processes(trees, ranks, tmp_path, timeout=240, DETERMINISTIC="1", **environment)
    with deterministic(monkeypatch):
        for tree, run in zip(trees, runs, strict=True):
            assert_same_run(run, train_locally(tree, tmp_path))


def test_runs_of_blpipe_train_follow_each_other_over_nccl(tmp_path, monkeypatch):
    """They end early, or are refused; with deterministic algorithms. `bp` over NCCL is the local engine's to rounding.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    search = {**still("any"), "call": "api_under_test:search_without_failures"}
    run, _ = train_in_processes([BP, on_the_gpu(search)], 2, tmp_path, DETERMINISTIC="1", NCCL_ON_ONE_GPU="1")
    with deterministic(monkeypatch):
        assert learned(run) == pytest.approx(learned(train_locally(BP, tmp_path)), rel=0.05, abs=0.05)
        for name, changes in (("patient", {"train.patience": 2}), ("after", {"train.epochs": 1})):
            blpipe.train(on_the_gpu(still(name)), {"runtime.runs": tmp_path / "local", **changes})
            assert_same_run(tmp_path / "pipeline" / name, tmp_path / "local" / name)


def test_a_run_of_a_shared_gpu_follows_one_that_failed(tmp_path):
    """Through host memory, which a failed stage leaves."""
    train_in_processes([on_the_gpu({**still("any"), "call": "api_under_test:search"})], 2, tmp_path,
                       CUDA_VISIBLE_DEVICES="0")


def test_a_second_run_with_graphs_has_the_gpu_to_itself(tmp_path, monkeypatch):
    """And torch's settings are as they were after each."""
    recordings, left = [], []

    class Seen(graphs.Recording):
        def __init__(self, stream):
            super().__init__(stream)
            recordings.append(weakref.ref(self))

    def look(rows):
        left.append([seen() is not None for seen in recordings[:made]])

    monkeypatch.setattr(graphs, "Recording", Seen)
    matmul, made, peaks = torch.backends.cuda.matmul, 0, []
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        for name in ("one", "two"):
            result = blpipe.train(with_graphs({**ON_GPU, "name": name}), {"runtime.runs": tmp_path}, on_epoch=look)
            made = len(recordings)
            peaks.append([stage["peak_memory_bytes"] for stage in result["stages"]])
            assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert made and left[0] == [] and left[-1] and not any(left[-1])
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path, monkeypatch):
    """With deterministic algorithms; dropout's random stream is the GPU's."""
    with deterministic(monkeypatch):
        whole = train_locally(saved_config(name, runtime__device="cuda", **RESUMED[name]), tmp_path)
        assert_same_run(whole, go_on(rewound(whole, 5, tmp_path / "resumed")))


@pytest.mark.filterwarnings("ignore:RNN module weights")  # of a snapshot are not in one piece
@pytest.mark.parametrize("name", WITH_GRAPHS)
def test_cuda_graphs_change_nothing(name, tmp_path, monkeypatch):
    """With deterministic algorithms. The last batch of an epoch is smaller, and runs without."""
    monkeypatch.setattr(graphs, "Recording", Noted)
    try:
        with deterministic(monkeypatch):
            plain, recorded = (
                train_locally(saved_config(name, runtime={"device": "cuda", "cuda_graphs": on}, **WITH_GRAPHS[name]),
                              tmp_path / str(on)) for on in (False, True))
            assert Noted.made
            assert_same_run(plain, recorded)
    finally:
        Noted.made.clear()


def test_averages_are_evaluated_as_on_the_cpu(tmp_path):
    run = train_locally({**ON_TIME, "partition": {"stages": 2}}, tmp_path)
    on_gpu, on_cpu = (blpipe.evaluate(run, {"runtime.device": device}) for device in ("cuda", "cpu"))
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_what_waits_for_the_gpu_is_not_recorded(tmp_path, start):
    """In a process of its own: CUDA is of no more use to it."""
    tree = on_gpu(runtime__cuda_graphs=True, model={"target": "models_under_test:waiting_net"})
    (tmp_path / "waiting.yaml").write_text(yaml.safe_dump(tree))
    run = start([sys.executable, "-m", "blpipe", "train", "waiting.yaml"], tmp_path)
    assert run.end() == 1
    assert re.search(r"stage 2 .* failed at step 2: .*set runtime\.cuda_graphs=false", run.said)


@pytest.mark.parametrize("normalize", [None, {"mean": [0.1, 0.2], "std": [0.7, 0.8]}])
def test_batches_prepared_on_the_gpu_are_those_of_the_host(normalize):
    section = parse_config(on_gpu(data__normalize=normalize)).data
    host = open_data(section, 0)
    placed = host.to(torch.device("cuda", 0))
    assert placed is not host
    for batches in (lambda data: data.train_batches(1, 2, 16, False), lambda data: data.test_batches(16)):
        for (x, y), (u, v) in zip(batches(host), batches(placed), strict=True):
            assert u.is_cuda and v.is_cuda
            assert torch.equal(x, u.cpu()) and torch.equal(y, v.cpu())


def test_one_step_on_the_gpu_is_the_cpus_to_rounding():
    """At the precision that is called float32: no TF32."""
    weights = []
    for device in ("cpu", "cuda"):
        tree = small_config("step", model=NO_DROPOUT, method__link={"delay": 0}, runtime__device=device,
                            data__args={"shape": [2, 8, 8], "classes": 4, "samples": 16}, data__augment={})
        engine = opened(tree)
        train_epoch(engine, 0)
        weights.append([p.cpu() for stage in engine.stages.values() for p in stage.blocks.parameters()])
    for on_cpu, on_cuda in zip(*weights, strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("changes", [
    {"method__link": {"delay": 1, "length": 2}, "train__microbatches": 2},
    {"method__link": {"delay": 0, "length": "all", "keep": "recompute", "normalize": True},
     "train__channels_last": True},
    {"method__link": {"length": "all", "joint": True}},
    {"method__name": "bp"},
    {"method__link": {"delay": 1, "length": 2}, "train__microbatches": 2, "runtime__cuda_graphs": True},
    {"method__link": {"delay": 0, "length": 2}, "train__recompute": True},
    {"method__link": {"length": "all"}, "train__recompute": True},
    {"method__loss": "supcon"},
    {"method__loss": "pred_sim"},
    {"optimizer": {"name": "adamw", "lr": 0.01, "args": {"fused": True}}},
    {"train__ema": 0.9, "data__augment": MIXED},
], ids=["late", "recompute", "joint", "bp", "graphs", "blocks on time", "blocks late", "supcon", "pred_sim", "adamw",
        "averages of mixed images"])
def test_nothing_in_the_training_loop_waits_for_the_gpu(precision, changes, monkeypatch):
    engine = opened(on_gpu(train__precision=precision, **changes))
    train_without_waiting(engine, monkeypatch)


def test_nothing_waits_for_the_gpu_in_a_run_that_is_gone_on_with(tmp_path, monkeypatch):
    """nadam keeps numbers on the host, for each parameter."""
    tree = saved_config("nadam", runtime__device="cuda", optimizer={"name": "nadam", "lr": 0.01})
    engine = opened(tree)
    load(checkpoints(train_locally(tree, tmp_path))[-1], engine.plan, engine)
    train_without_waiting(engine, monkeypatch)


def train_without_waiting(engine, monkeypatch):
    train_epoch(engine, 0)  # libraries start
    monkeypatch.setattr(local, "seconds_since", lambda started, device: 1.0)  # which waits once an epoch, as does
    monkeypatch.setattr(LossWatch, "look", lambda watch: None)
    with no_waiting():
        train_epoch(engine, 1)
        engine.evaluate()
    assert engine.reports()[-1].train_loss < 10


def opened(tree):
    config = parse_config(tree)
    set_up(config)
    data = open_data(config.data, config.seed)
    return open_local(make_plan(config, data.spec), data)


@contextmanager
def deterministic(monkeypatch):
    """torch uses deterministic algorithms alone."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def no_waiting():
    """torch raises where an operation makes the host wait for the GPU, as far as it notices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it does not notice all
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
