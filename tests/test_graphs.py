"""Recordings: a run with CUDA graphs is the run without them.

Here a tape of operations stands in for a graph. It repeats them as a graph does, on the same memory, and so shows
where a result is used after it was overwritten. tests/test_gpu.py does the same with real graphs.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_run, small_config, train_locally
from test_checkpoints import METHODS, go_on, rewound, saved_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blpipe import graphs
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.engines import build, local
from blpipe.engines.common import train_epoch
from blpipe.engines.local import LocalEngine
from blpipe.errors import RecordingError, StageError
from blpipe.graphs import Graph, Recording, recorder_on
from blpipe.plan import make_plan
from blpipe.tail import TailRun

RECORDED = {name: changes for name, changes in METHODS.items() if name != "bp"} | {
    "recomputed": {"method__link": {"delay": 1, "length": 2, "keep": "recompute", "normalize": True},
                   "train__channels_last": True},
    "from_zero": {"method__link": {"delay": 0, "schedule": {"name": "one-cycle", "start": 0.0}},
                  "train__microbatches": 4},
    "all_from_zero": {"method__link": {"length": "all", "schedule": {"name": "one-cycle", "start": 0.0}},
                      "train__microbatches": 4},
    "scheduled": {"method__link": {"delay": 2, "schedule": {"name": "one-cycle", "start": 0.0}}, "train__wire": "bf16"},
    "loss_with_weights": {"method__loss": "pred_sim"},
    "skipping": {"train__on_nonfinite": "skip", "train__precision": "bf16"},
}


class Tape(TorchDispatchMode):
    """Notes operations, and does them again: on the same tensors, and into the same results."""

    def __init__(self):
        super().__init__()
        self._done = []
        self._just_recorded = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self._done.append((function, args, kwargs or {}, results))
        self._just_recorded = True
        return results

    @torch.no_grad()
    def replay(self):
        """As a graph's; but what was just recorded has been done already."""
        for function, args, kwargs, results in [] if self._just_recorded else self._done:
            given = memory_of((args, kwargs))
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                if memory_of(old) - given:  # neither a view nor done in place
                    old.data.copy_(new)  # autograd does not notice, as with a graph
        self._just_recorded = False


def memory_of(tree):
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


class TapedGraph(Graph):
    """A tape in place of a graph."""

    def _record(self, graph, function):
        self._graph = Tape()
        try:
            with self._graph:
                return function(*self._inputs)
        except Exception as error:
            raise RecordingError(error) from error


class Noted(Recording):
    """A recording, on a list."""

    made = []

    def __init__(self, stream):
        super().__init__(stream)
        self.made.append(self)

    def run(self, part, function, *inputs):
        """As ever; but what is left of the microbatch before is spoiled, as memory that is used again may be."""
        if part == "body":
            for graph in self._graphs.values():
                runs = [vars(result) for result in tree_leaves(graph._results) if isinstance(result, TailRun)]
                for result in tree_leaves([graph._results, runs]):
                    live = isinstance(result, torch.nn.Parameter)
                    if isinstance(result, torch.Tensor) and result.is_floating_point() and not live:
                        result.data.fill_(torch.nan)
        return super().run(part, function, *inputs)


@pytest.fixture
def recorded(monkeypatch):
    """Has the local engine record; returns the recordings made."""
    Noted.made.clear()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(graphs, "Graph", TapedGraph)
    monkeypatch.setattr(graphs, "Recording", Noted)
    monkeypatch.setattr(graphs, "_on", lambda stream, function: function())
    monkeypatch.setattr(local, "recording_stream", lambda plan, device: SimpleNamespace(device=device))
    return Noted.made


@pytest.mark.parametrize("name", RECORDED)
def test_recordings_change_nothing(name, tmp_path, recorded, monkeypatch):
    config = saved_config(name, **RECORDED[name])
    with_them = train_locally(config, tmp_path / "recorded")
    assert recorded
    monkeypatch.setattr(local, "recording_stream", lambda plan, device: None)
    assert_same_run(with_them, train_locally(config, tmp_path / "plain"))


@pytest.mark.parametrize(("delay", "microbatches", "linked"), [(0, 4, 2), (1, 1, 2), (3, 1, 4), (1, 4, 5)])
def test_there_are_as_many_recordings_as_microbatches_under_way(delay, microbatches, linked, tmp_path, recorded):
    train_locally(small_config("few", method__link={"delay": delay}, train__microbatches=microbatches), tmp_path)
    assert len(recorded) == 2 * linked + 1  # the last stage has no link


def test_a_recorded_run_goes_on_without_recordings(tmp_path, recorded, monkeypatch):
    whole = train_locally(saved_config("three_late", **METHODS["three_late"]), tmp_path)
    assert recorded
    monkeypatch.setattr(local, "recording_stream", lambda plan, device: None)
    assert_same_run(whole, go_on(rewound(whole, 10, tmp_path / "resumed")))


def test_microbatches_of_one_size_are_recorded_once_libraries_have_started(recorded):
    recorder, sizes = recorder_on(SimpleNamespace(device=torch.device("cpu"))), [8, 16, 16, 8, 16, 8, 16]
    runners = [recorder.begin(torch.empty(size, 2)) for size in sizes]
    assert [runner in recorded for runner in runners] == [False, False, False, False, True, False, True]
    assert runners[4] is not runners[6]
    recorder.end(runners[6])
    assert recorder.begin(torch.empty(16, 2)) is runners[6]


def test_recurrent_layers_leave_their_weights_where_recordings_find_them(recorded, monkeypatch):
    """On a GPU they would move them, whenever a snapshot or an average has been in their place."""
    monkeypatch.setattr(build, "has_graphs", lambda config, device: True)
    tree = small_config("recurrent", model={"target": "models_under_test:recurrent_net"}, partition__stages=2,
                        train__ema=0.9)
    config = parse_config(tree)
    data = open_data(config.data, config.seed)
    engine = LocalEngine(make_plan(config, data.spec), data, torch.device("cpu"))
    monkeypatch.setattr(torch.nn.RNNBase, "flatten_parameters", lambda layer: pytest.fail("moves its weights"))
    for epoch in (0, 1):
        train_epoch(engine, epoch)
        engine.evaluate()
    assert recorded


def test_a_buffer_that_is_replaced_is_refused(tmp_path, recorded):
    model = {"target": "models_under_test:averaging_net"}
    with pytest.raises(StageError, match="^stage 2 .*: a module replaces a buffer; have it change its values in place"):
        train_locally(small_config("averages", model=model), tmp_path)
