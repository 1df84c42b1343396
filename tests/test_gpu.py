"""On a GPU: every engine learns what the CPU learns, to rounding. Skipped where there is none."""

import re
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
import yaml
from conftest import assert_same_run, metrics_of, small_config, train_in_processes, train_locally
from test_checkpoints import METHODS, go_on, rewound, saved_config
from test_graphs import RECORDED, Noted

from blpipe import graphs
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.device import set_up
from blpipe.engines import local
from blpipe.engines.common import LossWatch, train_epoch
from blpipe.plan import make_plan
from blpipe.trainer import open_local

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none here")]

NO_DROPOUT = {"target": "models_under_test:conv_net", "args": {"dropout": 0.0}}
LATE = small_config("late", method__link={"delay": 1, "length": 2}, train__microbatches=2, model=NO_DROPOUT)
ON_GPU = {**LATE, "runtime": {"device": "cuda"}}


def learned(run):
    return [number for row in metrics_of(run) for number in row[3:]]


def on_gpu(**changes):
    return small_config("gpu", runtime__device="cuda", **changes)


def test_the_local_engine_learns_as_on_the_cpu(tmp_path):
    on_cpu, on_gpu = train_locally(LATE, tmp_path / "cpu"), train_locally(ON_GPU, tmp_path / "gpu")
    assert learned(on_gpu) == pytest.approx(learned(on_cpu), rel=0.05, abs=0.05)


def test_a_model_made_from_a_seed_moves_no_stream_of_the_gpu():
    config, before = parse_config(ON_GPU), torch.cuda.get_rng_state()
    make_plan(config, open_data(config.data, config.seed).spec)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_the_pipeline_learns_as_the_local_engine(tmp_path):
    """Over NCCL with three GPUs or more; with fewer, through host memory."""
    run, = train_in_processes([ON_GPU], 3, tmp_path)
    assert learned(run) == pytest.approx(learned(train_locally(ON_GPU, tmp_path)), rel=0.05, abs=0.05)


def test_the_pipeline_learns_as_the_local_engine_in_bf16_and_channels_last(tmp_path):
    tree = {**ON_GPU, "train": {**ON_GPU["train"], "precision": "bf16", "channels_last": True}}
    run, = train_in_processes([tree], 3, tmp_path)
    assert learned(run) == pytest.approx(learned(train_locally(tree, tmp_path)), rel=0.05, abs=0.05)


FAR = small_config("far", partition__stages=3, method__local_weight=0.5, train__microbatches=4, model=NO_DROPOUT,
                   method__link={"length": "all", "reach": 2, "delay_unit": "microbatch"}, runtime__device="cuda")
JOINT = small_config("joint", partition__stages=3, method__link={"length": "all", "joint": True}, model=NO_DROPOUT,
                     runtime__device="cuda")
IN_BF16 = small_config("wire", partition__stages=3, method__link={"delay": 2, "wire": "bf16", "keep": "recompute"},
                       train__wire="bf16", model=NO_DROPOUT, runtime__device="cuda")


ON_TIME = small_config("on_time", partition__stages=3, method__link={"delay": 0}, train__microbatches=2,
                       model=NO_DROPOUT, runtime__device="cuda")
# BatchNorm's kernels for these must not wait for a receive that runs beside them.
WIDE_MAPS = small_config("wide_maps", partition__stages=3, model={"name": "resnet_cifar", "args": {"depth": 14}},
                         data__args={"shape": [3, 32, 32], "classes": 4, "samples": 512}, train__channels_last=True,
                         train__batch_size=256, train__precision="tf32", runtime__device="cuda")
REPLICAS = small_config("replicas", partition__stages=2, train__replicas=2, train__microbatches=2, model=NO_DROPOUT,
                        runtime__device="cuda")


@pytest.mark.parametrize("environment", [{}, {"NCCL_ON_ONE_GPU": "1"}], ids=["as it is", "nccl on one GPU"])
@pytest.mark.parametrize(("ranks", "trees"), [(3, [ON_GPU, FAR, JOINT, IN_BF16, ON_TIME, WIDE_MAPS]), (4, [REPLICAS])],
                         ids=["stages", "replicas"])
def test_the_pipeline_equals_the_local_engine_bit_for_bit(ranks, trees, environment, tmp_path, monkeypatch):
    """With deterministic algorithms. As it is: over NCCL with a GPU for each rank, through host memory with fewer. On
    one GPU, NCCL goes over sockets.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    recorded = [{**tree, "name": f"graphs_{tree['name']}", "runtime": {**tree["runtime"], "cuda_graphs": True}}
                for tree in trees]
    runs = train_in_processes([*trees, *recorded], ranks, tmp_path, DETERMINISTIC="1", **environment)
    torch.use_deterministic_algorithms(True)
    try:
        for tree, run in zip([*trees, *recorded], runs, strict=True):
            assert_same_run(run, train_locally(tree, tmp_path))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["three_late", "far", "joint", "bp"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path, monkeypatch):
    """With deterministic algorithms; dropout's random stream is the GPU's."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        whole = train_locally(saved_config(name, runtime__device="cuda", **METHODS[name]), tmp_path)
        assert_same_run(whole, go_on(rewound(whole, 5, tmp_path / "resumed")))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", RECORDED)
def test_cuda_graphs_change_nothing(name, tmp_path, monkeypatch):
    """With deterministic algorithms. The last batch of an epoch is smaller, and runs without."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(graphs, "Recording", Noted)
    torch.use_deterministic_algorithms(True)
    try:
        plain, recorded = (train_locally(saved_config(name, runtime={"device": "cuda", "cuda_graphs": on},
                                                      **RECORDED[name]), tmp_path / str(on)) for on in (False, True))
        assert Noted.made
        assert_same_run(plain, recorded)
    finally:
        torch.use_deterministic_algorithms(False)
        Noted.made.clear()


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
], ids=["late", "recompute", "joint", "bp", "graphs", "blocks on time", "blocks late", "supcon", "pred_sim", "adamw"])
def test_nothing_in_the_training_loop_waits_for_the_gpu(precision, changes, monkeypatch):
    engine = opened(on_gpu(train__precision=precision, **changes))
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
def no_waiting():
    """torch raises where an operation makes the host wait for the GPU, as far as it notices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it does not notice all
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
