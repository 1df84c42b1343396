"""The benchmark of throughputs: a small case in two real processes, and the arithmetic of its tables."""

import json
import signal
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from benchmarks.methods import HEADLESS, JOINT, JOINT_TAIL, LARGER_HEADS
from benchmarks.prediction import vit
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling.report import COLUMNS, PREDICTED
from benchmarks.throughput import __main__ as throughput
from benchmarks.throughput import report
from benchmarks.throughput.cuts import find_cuts
from benchmarks.throughput.methods import make_configs
from benchmarks.throughput.rows import METHODS, REPLICAS
from benchmarks.throughput.settings import case_tree, load_settings
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.errors import ConfigError
from blpipe.forecast.costs import profile
from blpipe.forecast.report import make_report
from blpipe.forecast.stages import balanced_starts
from blpipe.plan import make_network, make_plan
from blpipe.transport.messages import message_bytes

QUICK = REPOSITORY / "benchmarks/throughput/quick.yaml"
FULL = REPOSITORY / "benchmarks/throughput/throughput.yaml"
GPU = REPOSITORY / "benchmarks/throughput/gpu.yaml"
SCALING = REPOSITORY / "benchmarks/scaling/quick.yaml"
OWN = REPOSITORY / "benchmarks/throughput/own.yaml"
OURS = METHODS[:METHODS.index("greedy") + 1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder and the only case of a measurement in two processes under torchrun."""
    folder = tmp_path_factory.mktemp("throughput")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")  # threads that wait leave their core to other tests
        assert throughput.main([str(QUICK), "--device", "cpu", "--out", str(folder)]) == 0
    case, = json.loads((folder / "k2.json").read_text()).values()
    return folder, case


def test_an_interrupted_benchmark_leaves_no_process(tmp_path, start):
    (tmp_path / "sleeper.py").write_text(
        "import os, pathlib, sys, time\npathlib.Path(sys.argv[1], str(os.getpid())).touch()\ntime.sleep(600)\n")
    places = tmp_path / "places"
    places.mkdir()
    code = (f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}]; import benchmarks.command as c; "
            f"c.REPOSITORY = {str(tmp_path)!r}; c.run_processes(2, 'sleeper', {str(places)!r})")
    run = start([sys.executable, "-c", code], tmp_path)
    run.wait_until(lambda: len([*places.iterdir()]) == 2)
    run.process.send_signal(signal.SIGINT)
    assert run.end(30) != 0
    assert not [pid for pid in places.iterdir() if (Path("/proc") / pid.name).exists()]


def plan_of(case, name):
    """The plan of one method of a measured case."""
    tree = case_tree(load_settings(QUICK, {}), "ResNet-8", "cpu")
    config = make_configs(tree, case["cuts"], case["microbatches"], [name])[name]
    return make_plan(config, open_data(config.data, config.seed).spec)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured_in_every_process(measured, method):
    _, case = measured
    found, = (rows[method] for rows in case["rounds"])
    assert len(found["windows"]) == (1 if method == "one process" else 2)
    for window in found["windows"]:
        assert window["seconds"] > 0
        assert 0 < window["busy"] <= 1
        assert 0 <= window["waiting"] <= 1
        if method not in (*OURS, REPLICAS):
            assert window["waiting"] == 1 - window["busy"]
    row = report.summary(case)[method]
    assert row["samples_per_second"] > 0
    assert (row["efficiency"] is None) == (method in ("DDP", "one process"))
    assert row["efficiency"] is None or min(row["efficiency"], row["efficiency_side_by_side"]) > 0


@pytest.mark.parametrize("method", OURS)
def test_stages_send_what_their_layouts_say(measured, method):
    _, case = measured
    plan = plan_of(case, method)
    train = plan.config.train
    size = train.microbatch_size
    activations = message_bytes((plan.outputs[size][0], plan.targets(size)))
    errors = message_bytes((plan.error(size, 0),)) if plan.links[0].hops_in else 0
    windows = case["rounds"][0][method]["windows"]
    assert [window["sent_bytes"] for window in windows] == [train.microbatches * activations,
                                                            train.microbatches * errors]


@pytest.mark.parametrize(("method", "edges"), [
    ("GPipe", [(0, 0, 1)]), ("1F1B", [(0, 0, 1)]),
    ("interleaved 1F1B", [(0, 0, 1), (1, 1, 0), (2, 0, 1)]),  # (after stage, from rank, to rank)
    ("zero-bubble", [(0, 0, 1), (2, 1, 0)])])
def test_schedules_send_activations_and_their_gradients(measured, method, edges):
    _, case = measured
    plan = plan_of(case, method)
    sent = [0, 0]
    for stage, source, target in edges:
        shape, dtype = plan.outputs[plan.config.train.microbatch_size][stage]
        for rank in (source, target):
            sent[rank] += plan.config.train.microbatches * prod(shape) * dtype.itemsize
    assert [window["sent_bytes"] for window in case["rounds"][0][method]["windows"]] == sent


def test_data_parallel_sends_its_gradients_around_a_ring(measured):
    _, case = measured
    gradients = sum(p.nbytes for p in plan_of(case, "DDP").model.parameters())
    assert report.sent_bytes(case, "DDP") == 2 * gradients
    assert report.sent_bytes(case, "one process") == 0


def test_replicas_send_gradients_and_buffers_around_a_ring(measured):
    _, case = measured
    model = plan_of(case, REPLICAS).model  # in two processes each has all blocks as its only stage
    parameters = [*model.parameters()]
    gradients = sum(p.nbytes for p in parameters)
    flags, buffers = 4 * len(parameters), sum(buffer.nbytes for buffer in model.buffers())
    assert report.sent_bytes(case, REPLICAS) == 2 * (gradients + flags + buffers)


def test_the_table_has_a_row_a_method_and_says_whether_aims_are_reached(measured, capfd):
    folder, case = measured
    table = (folder / "k2.md").read_text()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[4:4 + len(METHODS)]] == list(METHODS)
    assert table.splitlines()[-1].startswith("| ResNet-8 | BackLink d=1 / own speed | ≥ 0.97 | ")
    assert table.splitlines()[-1].endswith((" yes |", " no |"))
    assert {"device", "cores", "torch", "commit"} <= case["environment"].keys()
    assert throughput.main([str(QUICK), "--device", "cpu", "--out", str(folder), "--table"]) == 0
    assert capfd.readouterr().out.strip() == table.strip()


def test_scaling_measures_what_the_machine_has_and_predicts_the_rest(measured, tmp_path, capfd, monkeypatch):
    def measure_case(settings, name, device):  # the same case, which need not run again
        assert (settings.stages, name, device.type) == (2, "ResNet-8", "cpu")
        assert case_tree(settings, name, "cpu") == case_tree(load_settings(QUICK, {}), name, "cpu")
        return measured[1]

    monkeypatch.setattr(scaling, "measure_case", measure_case)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert scaling.main([str(SCALING), "--device", "cpu", "--stages", "2,4", "--out", str(tmp_path)]) == 0
    path, = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert set(found["measured"]) == {"1", "2"} and set(found["predicted"]) == {"1", "2", "4"}
    assert all(set(found["predicted"][count]) == set(PREDICTED) for count in ("2", "4"))
    assert set(COLUMNS) <= set(found["measured"]["2"])
    config = parse_config(case_tree(load_settings(SCALING, {}), "ResNet-8", "cpu"))
    assert config.train.microbatches == 1  # one device trains whole batches
    assert found["predicted"]["1"]["one device"] == make_report(config).methods[-1].samples_per_second
    assert all(value > 0 for rows in (found["measured"], found["predicted"])
               for row in rows.values() for value in row.values())
    table = path.with_suffix(".md").read_text()
    kinds = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| ")]
    assert kinds[2:] == [["2", "measured"], ["2", "predicted"], ["4", "predicted"]]
    assert path.with_suffix(".png").exists()
    assert table in capfd.readouterr().out


def test_ratios_are_formed_within_a_round():
    def window(seconds):
        return {"windows": [{"seconds": seconds}, {"seconds": seconds / 2}]}

    # The machine is slower from round to round; the method is always twice as fast.
    slow = {"own_seconds": [0.5, 0.25], "side_by_side_seconds": [1.0, 0.5]}
    case = {"batch": 8, "like": {"GPipe": "1F1B"}, "rounds": [
        {"1F1B": window(2.0 * k) | slow, "GPipe": window(1.0 * k)} for k in (1, 2, 4)]}
    assert report.ratio(case, "GPipe", "1F1B") == 2.0
    assert report.samples_per_second(case, "GPipe") == 4.0
    assert report.efficiency(case, "GPipe", "own_seconds") == 0.25
    assert report.efficiency(case, "1F1B", "side_by_side_seconds") == 0.25


@pytest.mark.parametrize(("arguments", "said"), [
    (["--only", "ResNet"], "--only: no case is named 'ResNet'; there are ResNet-8"),
    (["--stages", "1"], "stages: 1 leaves nothing to compare; use 2 or more"),
    (["--stages", "3"], "cases.ResNet-8: a batch of 16 does not divide among 4 microbatches and 3 processes; use a "
                        "multiple of 12"),
    (["--stages", "4"], "stages: 4: schedules with two stages a process need 8 blocks, and ResNet-8 has 5; use fewer "
                        "stages"),
    (["--rounds", "0"], "rounds: "),
    (["--table"], "--table: "),
])
def test_what_a_user_can_put_right_is_said_in_one_line(arguments, said, tmp_path, capsys):
    assert throughput.main([str(QUICK), "--device", "cpu", "--out", str(tmp_path / "none"), *arguments]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"throughput: {said}")


def test_all_that_is_wrong_with_a_config_is_said(tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(QUICK.read_text().replace("method: BackLink d=1", "method: BackLink d=2")
                    .replace("base:", "base:\n  method: greedy"))
    assert throughput.main([str(path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "throughput: base.method: leave it out; all of them are measured"
    assert second.startswith("throughput: cases.ResNet-8.aims.0.method: unknown 'BackLink d=2' (did you mean")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpus_that_are_not_there_are_said(capsys):
    assert throughput.main([str(QUICK), "--device", "cuda"]) == 2
    assert "2 stages need a GPU each, and torch sees 0 here" in capsys.readouterr().err


def test_the_shipped_cases_are_sound():
    for path, most in ((QUICK, 2), (FULL, 4), (GPU, 4)):
        for stages in range(2, most + 1, 2):
            settings = load_settings(path, {"stages": stages})
            configs = [parse_config(case_tree(settings, name, "cpu")) for name in settings.cases]
        for config in configs:
            assert len(make_network(config, open_data(config.data, 0).spec).block_names) >= 2 * most


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_the_example_for_a_model_of_ones_own_is_a_config(stages):
    settings = load_settings(OWN, {"stages": stages})
    (name,) = settings.cases
    assert parse_config(case_tree(settings, name, "cpu")).partition.stage_count == stages


def test_half_layers_are_the_layers():
    torch.manual_seed(0)
    whole = torch.nn.Sequential(vit.blocks(12, depth=2))
    torch.manual_seed(0)
    halves = torch.nn.Sequential(vit.half_layers(12, depth=2))
    assert len(halves) == len(whole) + 2
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(halves(x), whole(x))


def test_every_method_has_the_cuts_that_suit_it():
    settings = load_settings(FULL, {"stages": 3})
    base = {**settings.base, "train": {"batch_size": 48}}
    tree = case_tree(settings.model_copy(update={"base": base}), "ResNet-20, width 2", "cpu")
    tree["partition"]["costs"] = "analytic"
    cuts = find_cuts(tree, METHODS, 8, torch.device("cpu"))
    for kind, method in (("stages", {}), ("larger_heads", LARGER_HEADS), ("joint_tail", JOINT_TAIL),
                         ("joint", JOINT), ("no_heads", HEADLESS)):
        config = parse_config({**tree, "method": method})
        network = make_network(config, open_data(config.data, config.seed).spec)
        starts = balanced_starts(profile(network, torch.device("cpu")), "backlink", config.partition)[1:]
        assert cuts[kind] == [network.block_names[start] for start in starts]
    assert cuts["joint"] not in (cuts["stages"], cuts["joint_tail"])
    assert find_cuts(tree, ["no heads d=1", "1F1B"], 8, torch.device("cpu")) == {
        kind: cuts[kind] for kind in ("stages", "no_heads")}


def test_some_methods_are_measured_beside_what_they_are_compared_with():
    changes = {"methods": ["one process", "no heads d=1", REPLICAS], "stages": 3}
    assert load_settings(FULL, changes | {"cases": {}}).measured == ["no heads d=1", "1F1B", "DDP", "one process"]
    with pytest.raises(ConfigError, match=r"^methods: unknown 'no head' \(did you mean 'no heads d=1'\?\); some of"):
        load_settings(FULL, {"methods": ["no head"], "cases": {}})
    with pytest.raises(ConfigError, match=r"^cases\.ResNet-20, width 2\.aims\.0\.method: unknown 'BackLink d=1'"):
        load_settings(FULL, changes)


def test_replicas_have_half_as_many_stages_and_half_of_every_batch():
    settings = load_settings(FULL, {"stages": 4})
    tree = case_tree(settings, "ResNet-20, width 2", "cpu")
    tree["partition"]["costs"] = "analytic"
    cuts = find_cuts(tree, [REPLICAS], 8, torch.device("cpu"))
    replica = make_configs(tree, cuts, 8, [REPLICAS])[REPLICAS]
    assert (replica.partition.stage_count, replica.train.replicas, replica.train.microbatch_size) == (2, 2, 32)
    halves = {**tree, "train": {**tree["train"], "replicas": 2},
              "partition": {"stages": 2, "strategy": "balanced", "costs": "analytic"}}
    config = parse_config(halves)
    network = make_network(config, open_data(config.data, config.seed).spec)
    start, = balanced_starts(profile(network, torch.device("cpu")), "backlink", config.partition)[1:]
    assert replica.partition.cuts == (network.block_names[start],)
