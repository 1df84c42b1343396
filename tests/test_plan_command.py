"""`blpipe plan`: what it shows, writes and refuses; it starts no process group and trains nothing."""

import json
from time import process_time

import pytest
import yaml
from conftest import small_config

from blpipe.cli import main
from blpipe.config_file import load_config
from blpipe.forecast import picture
from blpipe.forecast.report import make_report
from blpipe.program import Kind


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config of three stages in the working directory."""
    monkeypatch.chdir(tmp_path)
    tree = small_config("planned", train__microbatches=2, partition={"stages": 3, "costs": "analytic"})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "c.yaml"


def plan(capsys, *arguments):
    main(["plan", "c.yaml", *arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "c.yaml", *arguments])
    assert ended.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    return line


def test_learning_rates_may_name_heads_of_these_cuts(config, capsys):
    assert "planned: backlink in 3 stages" in plan(capsys, "optimizer.lr_factors={head/1/*: 0.5}")


def test_tables_of_stages_and_methods(config, capsys):
    output = plan(capsys)
    lines = output.splitlines()
    assert lines[0] == "planned: backlink in 3 stages, a step of 16 samples in 2 microbatches"
    header = next(line for line in lines if line.startswith("stage "))
    assert header.split("  ")[0] == "stage"
    for word in ("blocks", "parameters", "FLOP", "step time", "sends on", "sends back", "peak memory"):
        assert word in header
    for method in ("backlink d=1", "backlink d=0", "GPipe", "1F1B", "zero-bubble", "one device"):
        assert any(line.startswith(method) for line in lines)
    assert not (config.parent / "runs").exists()


def test_json_says_what_each_stage_holds_computes_and_sends(config, capsys):
    found = json.loads(plan(capsys, "--json"))
    assert [stage["blocks"] for stage in found["stages"]] == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert found["cuts"] == ["2", "4"]
    first, second, last = found["stages"]
    # Two microbatches of 8 samples: activations of 6 × 8 × 8 floats with an int64 target each; then 8 × 4 × 4.
    assert first["sent_forward_bytes"] == 16 * (6 * 8 * 8 * 4 + 8)
    assert second["sent_back_bytes"] == 16 * 6 * 8 * 8 * 4
    assert last["sent_back_bytes"] == 16 * 8 * 4 * 4 * 4
    assert (first["sent_back_bytes"], last["sent_forward_bytes"]) == (0, 0)
    assert found["costs"] == "analytic"
    for stage in found["stages"]:
        assert stage["seconds"] > 0
        assert stage["flops"] > 0
        assert stage["peak_memory_bytes"] > 4 * stage["params"]
    for method in found["methods"]:
        assert method["samples_per_second"] == pytest.approx(16 / method["seconds_per_step"])
        assert 0 < method["efficiency"] <= 1 + 1e-9


@pytest.mark.parametrize(("method", "back"), [("greedy", False), ("bp", True)])
def test_other_methods(config, capsys, method, back):
    found = json.loads(plan(capsys, "--json", f"method={method}"))
    assert (found["stages"][1]["sent_back_bytes"] > 0) == back
    assert found["methods"][0]["method"] == ("greedy" if method == "greedy" else "1F1B")


def test_measured_costs_take_seconds_and_balance(config, capsys):
    found = json.loads(plan(capsys, "--json", "partition.costs=measured", "partition.strategy=balanced"))
    assert found["costs"] == "measured"
    assert len(found["cuts"]) == 2
    # The cuts that it found are a config of their own.
    cuts = ",".join(found["cuts"])
    again = json.loads(plan(capsys, "--json", f"partition={{cuts: [{cuts}], costs: analytic}}"))
    assert again["cuts"] == found["cuts"]
    assert load_config("c.yaml").partition.cuts is None


@pytest.mark.parametrize("costs", ["measured", "analytic"])
def test_a_model_that_was_cut_into_blocks_by_its_graph(config, capsys, costs, monkeypatch):
    monkeypatch.setattr("blpipe.forecast.costs.perf_counter", process_time)  # others compute meanwhile
    found = json.loads(plan(capsys, "--json", "model={name: torchvision/squeezenet1_1}",
                            f"partition.costs={costs}", "data.args.shape=[3, 32, 32]", "partition.strategy=balanced"))
    names = [name for stage in found["stages"] for name in stage["blocks"]]
    assert names[0] == "features_0"
    assert names[-1] == "classifier"
    assert all(0 < stage["peak_memory_bytes"] < 2**25 for stage in found["stages"])


def test_a_sweep_over_stages_with_a_picture_and_a_trace(config, capsys):
    output = plan(capsys, "--stages", "1,2,6", "--out", "plan.png", "--trace", "plan.json")
    rows = [line.split() for line in output.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["1", "2", "6"]
    assert (config.parent / "plan.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((config.parent / "plan.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"forward", "local backward", "link backward"}


def last_two(blocks, stages):
    """Cuts for three stages, whatever is asked for."""
    return ["4", "5"]


def test_stages_cut_by_a_function_are_those_of_the_same_cuts(config, capsys):
    by_function = json.loads(plan(capsys, "--json", "partition={stages: 3, target: 'test_plan_command:last_two', "
                                                    "costs: analytic}"))
    assert by_function == json.loads(plan(capsys, "--json", "partition={cuts: ['4', '5'], costs: analytic}"))


def test_the_configs_own_method_is_compared_in_its_own_cuts(config, capsys):
    """As the config.yaml of a run that was balanced has them."""
    found = json.loads(plan(capsys, "--json", "--stages", "2,3",
                            "partition={cuts: ['4', '5'], strategy: balanced, costs: analytic}"))
    slowest = max(stage["seconds"] for stage in found["stages"])
    assert found["methods"][0]["seconds_per_step"] >= slowest
    best = json.loads(plan(capsys, "--json", "partition.strategy=balanced"))
    assert best["methods"][0] != found["methods"][0]
    assert best["methods"][1:] == found["methods"][1:]
    assert [row for row in found["sweep"] if row["stages"] == 3] == found["methods"][:-1]


@pytest.mark.parametrize("strategy", ["even", "balanced"])
def test_methods_that_have_no_such_stages_are_left_out(config, capsys, strategy):
    """Here no head fits."""
    found = json.loads(plan(capsys, "--json", "model={target: 'models_under_test:volumes_net'}", "method=bp",
                            f"partition.strategy={strategy}", "--stages", "4"), parse_constant=pytest.fail)
    assert [row["method"] for row in found["methods"]] == ["1F1B", "GPipe", "zero-bubble", "one device"]
    assert [row["method"] for row in found["sweep"]] == ["1F1B", "GPipe", "zero-bubble"]


@pytest.mark.parametrize("method", ["backlink", "bp"])
def test_replicas_share_the_batch_and_take_time_to_add_up(config, capsys, method):
    changes = [f"method={method}", "train.microbatches=2", "train.replicas=2", "--stages", "1,3"]
    assert plan(capsys, *changes).startswith(f"planned: {method} in 3 stages, a step of 16 samples in 2 replicas of 2 "
                                             "microbatches\n")
    half, whole = (json.loads(plan(capsys, *changes, "--json", *more)) for more in (
        (), ("train.replicas=1", "train.batch_size=8")))
    for stage, other in zip(half["stages"], whole["stages"], strict=True):
        assert (stage["flops"], stage["sent_forward_bytes"]) == (other["flops"], other["sent_forward_bytes"])
    for row, other in zip(half["methods"][:-1], whole["methods"][:-1], strict=True):
        assert row["method"] == other["method"]
        assert other["samples_per_second"] < row["samples_per_second"] < 2 * other["samples_per_second"]
    one, same = (found["methods"][-1]["samples_per_second"] for found in (half, whole))
    assert one == pytest.approx(same, rel=0.1)  # a single device
    alone = [row["seconds_per_step"] for row in half["sweep"] if row["stages"] == 1]
    assert len(set(alone)) < len(alone) > 1  # data parallelism, in which methods are alike


@pytest.mark.parametrize("changes", [["method=backlink"], ["method=bp"], ["train.replicas=2"]])
def test_all_that_takes_time_is_in_the_picture(config, changes):
    timeline = make_report(load_config("c.yaml", changes)).timeline
    messages = {Kind.SEND, Kind.RECEIVE, Kind.SEND_ERROR, Kind.RECEIVE_ERROR}
    assert {span.op.kind for span in timeline.spans if span.end > span.start} - messages <= picture._COLOURS.keys()


@pytest.mark.parametrize(("text", "wanted"), [("10GB", 1e10), ("1e9", 1e9), ("2.5", 2.5), ("1KiB", 1024), (None, None)])
def test_a_bandwidth_is_a_number_or_a_text_as_of_memory(text, wanted, monkeypatch):
    class Told(Exception):
        pass

    def make_report(config, stages, latency, bandwidth):
        raise Told(bandwidth)

    monkeypatch.setattr("blpipe.commands.load_config", lambda *_: None)
    monkeypatch.setattr("blpipe.commands.report.make_report", make_report)
    with pytest.raises(Told) as told:
        main(["plan", "c.yaml", *([] if text is None else ["--bandwidth", text])])
    assert told.value.args == (wanted,)


def test_hundreds_of_stages_take_seconds(config, capsys):
    changes = ["model={name: mlp, args: {hidden: 320 * [8]}}".replace("320 * [8]", str([8] * 320)),
               "partition.stages=4", "train.microbatches=4", "--stages", "300", "--json"]
    found = json.loads(plan(capsys, *changes))
    rows = {row["method"]: row for row in found["sweep"]}
    assert all(row["stages"] == 300 for row in rows.values())
    assert rows["backlink d=1"]["samples_per_second"] > rows["1F1B"]["samples_per_second"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--stages", "2,many"], "--stages: '2,many' must be whole numbers from 1 on"),
    (["--stages", "1,7"], "--stages: 7 stages need as many blocks, and the model has 6"),
    (["--out", "plan.docx"], "--out: cannot write plan.docx"),
    (["--trace", "nowhere/plan.json"], "--trace: cannot write nowhere/plan.json"),
    (["--bandwidth", "0"], "--bandwidth: 0.0 must be a number above 0"),
    (["--bandwidth", "fast"], "--bandwidth: 'fast' must be a number of bytes, or such as 500MB or 16GiB"),
    (["partition.stages=40", "partition.strategy=balanced"],
     "partition.stages: 40 stages need as many blocks, but the model has 6"),
    (["partition.speeds=[1, 2]"], "partition: 2 speeds for 3 stages"),
    (["partition.costs=guessed"], "partition.costs: should be 'measured' or 'analytic'"),
])
def test_bad_options_are_one_line_and_exit_code_2(config, capsys, arguments, message):
    assert refused(capsys, *arguments).startswith(f"blpipe: {message}")


def test_what_was_measured_is_shown_before_a_file_fails(config, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "c.yaml", "--out", "nowhere/plan.png"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "samples/s" in said.out
    line, = said.err.splitlines()
    assert line.startswith("blpipe: --out: cannot write nowhere/plan.png")


def test_images_that_are_mixed_change_no_costs(config, capsys):
    mixed = plan(capsys, "data.augment.mixup=0.2", "data.augment.cutmix=1.0")
    assert mixed.replace("  ", " ") == plan(capsys).replace("  ", " ")


@pytest.mark.parametrize(("microbatches", "note"), [(1, "1 microbatch here, and are faster with more"), (8, None)])
def test_baselines_with_few_microbatches_are_said_to_be_that(config, capsys, microbatches, note):
    assert main(["plan", "c.yaml", "partition.costs=analytic", f"train.microbatches={microbatches}"]) == 0
    said = capsys.readouterr().out
    assert ("GPipe, 1F1B and zero-bubble have this config's" in said) is (note is not None)
    assert note is None or note in said
