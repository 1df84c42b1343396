"""The accuracy sweep of benchmarks/: what it expands to, what it runs and resumes, what it reports."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, child_environment, interrupt_second_save, small_config

from benchmarks.accuracy import execute, plots, report
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.sweep import identity, in_order, load_sweep
from blpipe.config_file import parse_config
from blpipe.runs import train_run

BASE = {key: value for key, value in small_config("none", train__epochs=1).items() if key != "name"}
GREEDY, LINK = {"method.name": "greedy"}, {"method.link.delay": [0, 1]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory from which run processes find the package and the tests' models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(REPOSITORY / "tests")
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture
def no_process(monkeypatch):
    """Starting a run is an error."""
    def refuse(*_):
        raise AssertionError("started a run")
    monkeypatch.setattr(execute, "_command", refuse)


def write(groups, name="sweep.yaml", **keys):
    """A sweep's file in the working directory."""
    path = Path(name)
    path.write_text(yaml.safe_dump({"base": BASE, "groups": groups, **keys}, sort_keys=False))
    return path


def sweep(*arguments):
    """The exit code of the sweep in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def labels(path):
    """Its runs in order."""
    return [f"{row.label}, seed {run.seed}" for row, run in in_order(load_sweep(path)[1])]


def test_rows_are_the_products_of_their_values_and_run_seed_by_seed(folder):
    path = write([{"name": "greedy", "sweep": {"partition.stages": [3, 2], **GREEDY}},
                  {"name": "link", "sweep": LINK, "seeds": [4]}], seeds=[0, 1])
    assert labels(path) == ["greedy, K 3, seed 0", "greedy, K 2, seed 0", "link, d 0, seed 4", "link, d 1, seed 4",
                            "greedy, K 3, seed 1", "greedy, K 2, seed 1"]
    run = load_sweep(path)[1][1].runs[1]
    assert (run.config.seed, run.config.partition.stages, run.config.method.name) == (1, 2, "greedy")


def test_a_value_may_be_a_list_or_a_section(folder):
    weights = {"partition": {"cuts": ["2", "4"]}, "method.link.weight": [[1.0, 0.5], 1]}
    heads = {"method.head": ["linear", {"name": "conv", "args": {"hidden": 8}}]}
    path = write([{"name": "lists", "sweep": weights}, {"name": "heads", "sweep": heads}])
    rows = load_sweep(path)[1]
    assert [row.config.method.link.weight for row in rows[:2]] == [(1.0, 0.5), 1.0]
    assert rows[0].config.partition.stage_count == 3
    assert [row.label for row in rows[2:]] == ["heads, head linear", "heads, head conv hidden=8"]


def test_rows_that_are_the_same_run_share_it(folder):
    path = write([{"name": "delays", "sweep": LINK},
                  {"name": "defaults", "sweep": {"method.link.length": [1, 2], "method.link.delay": 1}}])
    rows = load_sweep(path)[1]
    assert rows[1].runs[0].id == rows[2].runs[0].id  # length 1 is the default
    assert labels(path) == ["delays, d 0, seed 0", "delays, d 1, seed 0", "defaults, length 2, d 1, seed 0"]


def test_a_run_is_what_can_change_its_learning():
    tree = small_config("one")
    same = [small_config("other"), small_config("one", runtime__threads=2),
            small_config("one", method__link={"delay": 1}), small_config("one", checkpoint__every_epochs=3)]
    other = [small_config("one", seed=1), small_config("one", train__epochs=3), small_config("one", method="bp")]
    assert {identity(parse_config(one)) for one in same} == {identity(parse_config(tree))}
    assert len({identity(parse_config(one)) for one in [tree, *other]}) == 4


BAD = {
    "misspelt": ({"groups": [{"name": "a", "sweeps": {}}]}, r"groups\.0\.sweeps: unknown key"),
    "nothing": ({"groups": []}, r"groups: give at least one, got \[\]"),
    "key": ({"groups": [{"name": "a", "sweep": {"method.link.dealy": 1}}]},
            r"groups\.0 \(a\): method\.link\.dealy: unknown key; did you mean method\.link\.delay\?"),
    "value": ({"groups": [{"name": "a", "sweep": {"method.link.delay": [0, -1], "partition.stages": [2, 3]}}]},
              r"groups\.0 \(a\): method\.link\.delay: should be greater than or equal to 0, got -1"),
    "empty": ({"groups": [{"name": "a", "sweep": {"method.link.delay": []}}]},
              r"groups\.0 \(a\): sweep\.method\.link\.delay: an empty list; give at least one value"),
    "seed": ({"groups": [{"name": "a", "sweep": {"seed": [0, 1]}}]},
             r"groups\.0 \(a\): sweep\.seed: leave it out; seeds lists the seeds"),
    "base": ({"base": {**BASE, "seed": 3}, "groups": [{"name": "a"}]},
             r"base\.seed: leave it out; seeds lists the seeds"),
    "cost": ({"groups": [{"name": "a"}], "cost_reference": "b"}, r"cost_reference: no group is named 'b'; there are a"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_on_one_line(folder, capsys, no_process, case):
    keys, expected = BAD[case]
    assert sweep(write(**keys)) == 2
    said = capsys.readouterr()
    assert re.fullmatch(f"accuracy: {expected}\n", said.err)
    assert said.out == ""


def test_all_problems_are_said_at_once(folder, capsys):
    path = write([{"name": "a", "sweep": {"train.epochs": 0}}, {"name": "b", "sweep": {"method.name": "best"}}])
    assert sweep(path) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("accuracy: groups.0 (a): train.epochs: ")
    assert second.startswith("accuracy: groups.1 (b): method.name: ")
    assert sweep("none.yaml") == 2
    assert capsys.readouterr().err.startswith("accuracy: none.yaml: no such file")
    assert sweep(write([{"name": "a"}]), "--only", "c") == 2
    assert capsys.readouterr().err == "accuracy: --only: no group is named 'c'; there are a\n"


def test_the_shipped_sweeps_fit_together():
    for name, first in (("cpu", "bp, K 7, seed 0"), ("gpu", "bp, depth 32, K 16, seed 0")):
        assert labels(REPOSITORY / f"benchmarks/accuracy/{name}.yaml")[0] == first


def test_where_a_gpu_or_the_data_are_missing_nothing_starts(folder, capsys, monkeypatch, no_process):
    monkeypatch.setattr(execute, "_gpu_name", lambda: None)
    assert sweep(REPOSITORY / "benchmarks/accuracy/gpu.yaml", "--out", folder) == 2
    rows = len(in_order(load_sweep(REPOSITORY / "benchmarks/accuracy/gpu.yaml")[1]))
    assert capsys.readouterr().err == \
        f"accuracy: runtime.device: cuda, but torch sees no GPU here; {rows} rows stay pending\n"
    assert sweep(REPOSITORY / "benchmarks/accuracy/cpu.yaml", "--out", folder) == 2
    assert capsys.readouterr().err == "accuracy: data.root: data/cifar10.npz: no such file\n"


def test_a_sweep_runs_resumes_and_does_nothing_twice(folder, capsys, monkeypatch):
    path = write([{"name": "greedy", "sweep": GREEDY}, {"name": "link", "sweep": {"train.epochs": 2}}])
    link, greedy = (next(run for row, run in in_order(load_sweep(path)[1]) if row.group == name)
                    for name in ("link", "greedy"))
    interrupt_after_one_epoch(link, monkeypatch)
    assert sweep(path, "--jobs", 2) == 0
    assert "link, epochs 2, seed 0: goes on\n" in capsys.readouterr().out
    log = Path(f"runs/accuracy/{link.id}.log").read_text()
    assert "epoch 2/2" in log
    assert "epoch 1/2" not in log
    rows = [json.loads(line) for line in Path("results/sweep/results.jsonl").read_text().splitlines()]
    assert {row["id"]: (row["group"], row["settings"], row["epochs"]) for row in rows} == {
        greedy.id: ("greedy", GREEDY, 1), link.id: ("link", {"train.epochs": 2}, 2)}
    for row in rows:
        result = json.loads(Path(f"runs/accuracy/{row['id']}/result.json").read_text())
        assert row["val_accuracy"] == row["stage_val_accuracy"][-1] == result["val_accuracy"]
        assert len(row["stage_val_accuracy"]) == 3
        assert row["seconds_per_epoch"] > 0 and row["peak_memory_bytes"] > 1e6
        assert (row["engine"], row["seed"], row["device"]["threads"]) == ("local", 0, 1)
        assert row["versions"]["torch"] and row["commit"] and row["device"]["name"]

    # What is done is not done again, not even where only its run folder is left.
    monkeypatch.setattr(execute, "_command", lambda *_: pytest.fail("started a run"))
    assert sweep(path) == 0
    assert "2 of 2 rows done" in capsys.readouterr().out
    Path("results/sweep/results.jsonl").unlink()
    assert sweep(path) == 0
    again = [json.loads(line) for line in Path("results/sweep/results.jsonl").read_text().splitlines()]
    assert {row["id"]: row["val_accuracy"] for row in again} == {row["id"]: row["val_accuracy"] for row in rows}


def interrupt_after_one_epoch(run, monkeypatch):
    """Leave the run's folder as an interruption in its second epoch does."""
    every = run.config.model_copy(update={
        "runtime": run.config.runtime.model_copy(update={"runs": "runs/accuracy", "threads": 1}),
        "checkpoint": run.config.checkpoint.model_copy(update={"every_epochs": 1})})
    with monkeypatch.context() as patch:
        interrupt_second_save(patch)
        with pytest.raises(KeyboardInterrupt):
            train_run(every)


def test_without_time_nothing_runs_and_rows_are_pending(folder, capsys, no_process):
    path = write([{"name": "greedy", "sweep": GREEDY}, {"name": "link", "sweep": LINK}])
    assert sweep(path, "--minutes", 0) == 0
    said = capsys.readouterr().out
    assert said.endswith("0 of 3 rows done, next: greedy, seed 0\n")
    table = Path("results/sweep/table.md").read_text()
    assert table in said
    assert table.count("| pending | 0 of 1 |") == 3
    assert sweep(path, "--list", "--only", "link") == 0
    assert [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "pending  link, d 0, seed 0", "pending  link, d 1, seed 0"]


SLEEP = "import time; print('asleep', flush=True); time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + SLEEP


@pytest.mark.parametrize(("code", "grace"), [(SLEEP, 30.0), (STUBBORN, 0.3)])
def test_interrupted_it_leaves_no_process(folder, capsys, monkeypatch, code, grace):
    started = stand_in(monkeypatch, code)
    monkeypatch.setattr(execute, "_GRACE_SECONDS", grace)
    threading.Thread(target=interrupt_when, args=(lambda: asleep(started, 2),)).start()
    assert sweep(write([{"name": "link", "sweep": LINK}]), "--jobs", 2) == 130
    assert "accuracy: interrupted; the same command goes on" in capsys.readouterr().err
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


def test_when_its_time_is_over_it_stops_what_is_running(folder, capsys, monkeypatch):
    started = stand_in(monkeypatch, SLEEP)
    assert sweep(write([{"name": "link", "sweep": LINK}]), "--minutes", 0.02) == 0
    assert capsys.readouterr().out.endswith("0 of 2 rows done, next: link, d 0, seed 0\n")
    assert len(started) == 1
    assert started[0].returncode not in (None, 0)


def test_a_run_that_fails_is_reported_and_the_others_go_on(folder, capsys, monkeypatch):
    started = stand_in(monkeypatch, "print('what went wrong'); raise SystemExit(3)")
    assert sweep(write([{"name": "link", "sweep": LINK}])) == 1
    said = capsys.readouterr().out
    assert len(started) == 2
    assert "link, d 0, seed 0: failed with exit code 3; runs/accuracy/" in said
    assert ".log ends with\n    what went wrong\n" in said
    assert "0 of 2 rows done" in said


def test_two_sweeps_do_not_do_the_same_run(folder, capsys, no_process):
    path = write([{"name": "link"}])
    run = load_sweep(path)[1][0].runs[0]
    Path("runs/accuracy").mkdir(parents=True)
    with Path(f"runs/accuracy/{run.id}.log").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert sweep(path) == 0
    assert "link, seed 0: another sweep is at it" in capsys.readouterr().out


def test_in_the_pipeline_a_run_has_a_process_for_each_stage(folder):
    path = write([{"name": "link"}])
    run = load_sweep(path)[1][0].runs[0]
    options = execute.Options(Path("results.jsonl"), Path("."), engine="pipeline")
    assert execute._command(run, options, resumed=False)[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "blpipe", "train",
        f"{run.id}-pipeline.yaml", "--overwrite"]
    assert execute._command(run, options, resumed=True)[-2:] == ["--resume", f"{run.id}-pipeline"]


def test_runs_at_the_same_time_are_on_places_of_their_own(folder, capsys, monkeypatch):
    """By its place, a process chooses among the machine's GPUs."""
    stand_in(monkeypatch, "import os, time; print('place', os.environ['LOCAL_RANK'], flush=True); time.sleep(0.5); "
             "raise SystemExit(1)")
    sweep(write([{"name": "link", "sweep": LINK}]), "--jobs", 2)
    said = {path.read_text().strip() for path in Path("runs/accuracy").glob("*.log")}
    assert {line.splitlines()[0] for line in said} == {"place 0", "place 1"}


def stand_in(monkeypatch, code):
    """Let each run be a process with this code; returns the list of those started."""
    started = []
    begin = execute._begin

    def note(*arguments):
        jobs = begin(*arguments)
        started.extend(job.process for job in jobs)
        return jobs

    monkeypatch.setattr(execute, "_command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(execute, "_begin", note)
    return started


def asleep(started, count):
    """Whether so many processes have said so."""
    logs = [path.read_text() for path in Path("runs/accuracy").glob("*.log")]
    return len(started) == count and sum("asleep" in log for log in logs) == count


def interrupt_when(ready):
    """Send this process SIGINT, in time."""
    for _ in range(200):
        if ready():
            os.kill(os.getpid(), signal.SIGINT)
            return
        threading.Event().wait(0.05)


def finish(path, accuracies, **changes):
    """Write rows for the runs of a sweep: by group and settings, the accuracy of each finished seed."""
    lines = []
    for row in load_sweep(path)[1]:
        for run, accuracy in zip(row.runs, accuracies.get(row.label, []), strict=False):
            lines.append(json.dumps({
                "id": run.id, "name": f"{row.label}, seed {run.seed}", "group": row.group, "settings": row.settings,
                "seed": run.seed, "engine": "local", "val_accuracy": accuracy, "stage_val_accuracy": [0.1, accuracy],
                "seconds_per_epoch": 8.0 if row.group == "link" else 4.0, "peak_memory_bytes": 2 ** 20, "epochs": 1,
                "commit": "abc", "versions": {"torch": "2"}, "device": {"name": "cpu", "cores": 2, "threads": 1}}
                | changes.get(row.label, {})))
    Path("results.jsonl").write_text("\n".join(lines) + "\n")
    return execute.read_results(Path("results.jsonl"))


GROUPS = [{"name": "bp", "sweep": {"method.name": "bp"}},
          {"name": "greedy", "sweep": {"partition.stages": [3, 2], **GREEDY}},
          {"name": "link", "sweep": {"partition.stages": [3, 2], **LINK}}]
DONE = {"bp": [0.8, 0.9], "greedy, K 3": [0.5, 0.6, 0.7], "greedy, K 2": [0.5], "link, K 3, d 0": [0.65, 0.75],
        "link, K 3, d 1": [0.55]}


def cells(table):
    """The cells of a table's rows, by the group, K and d."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {tuple(row[:3]): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_the_table_has_means_deviations_differences_and_what_is_pending(folder):
    path = write(GROUPS, seeds=[0, 1, 2], cost_reference="link")
    config, rows = load_sweep(path)
    table = report.as_markdown(config, rows, finish(path, DONE))
    found = cells(table)
    assert list(found) == [("bp", "2", "–"), ("greedy", "2", "–"), ("link", "2", "0"), ("link", "2", "1"),
                           ("bp", "3", "–"), ("greedy", "3", "–"), ("link", "3", "0"), ("link", "3", "1")]
    assert found["link", "3", "0"] == {
        "": "link", "K": "3", "d": "0", "accuracy, %": "70.00 ± 7.07", "seeds": "2 of 3", "over greedy": "+15.00",
        "closed": "50 %", "s/epoch": "8", "cost": "1.00", "peak memory": "1 MiB"}
    assert found["greedy", "3", "–"]["accuracy, %"] == "60.00 ± 10.00"
    assert (found["greedy", "3", "–"]["seeds"], found["greedy", "3", "–"]["cost"]) == ("3", "0.50")
    assert found["link", "3", "1"]["accuracy, %"] == "55.00"
    assert found["link", "2", "0"] == dict.fromkeys(found["link", "2", "0"], "–") | {
        "": "link", "K": "2", "d": "0", "accuracy, %": "pending", "seeds": "0 of 3"}
    assert found["bp", "2", "–"]["accuracy, %"] == found["bp", "3", "–"]["accuracy, %"] == "85.00 ± 7.07"
    assert found["bp", "2", "–"]["over greedy"] == "+30.00"  # over the one seed that both have finished
    assert "- 9 of 21 runs done, 12 pending\n" in table


def test_costs_are_compared_on_one_device_alone(folder):
    path = write(GROUPS, seeds=[0, 1, 2])
    other = {"device": {"name": "gpu", "cores": 2, "threads": None}, "seconds_per_epoch": 1.0}
    found = cells(report.as_markdown(*load_sweep(path), finish(path, DONE, **{"bp": other})))
    assert (found["bp", "3", "–"]["cost"], found["bp", "3", "–"]["s/epoch"]) == ("–", "1")
    assert found["greedy", "3", "–"]["cost"] == "0.50"


def test_the_table_says_which_runs_were_alike_in_the_pipeline_engine(folder):
    path = write(GROUPS, seeds=[0, 1, 2])
    results = finish(path, DONE)
    local = [row for row in results.values() if row["group"] == "link"]
    for row, accuracy in zip(local[:2], (local[0]["val_accuracy"], 0.3), strict=True):
        results["pipeline", row["id"]] = row | {"engine": "pipeline", "stage_val_accuracy": [0.1, accuracy]}
    table = report.as_markdown(*load_sweep(path), results)
    assert "- in the pipeline engine too, with the same accuracy at every stage: link, K 3, d 0, seed 0\n" in table
    assert "- in the pipeline engine too, with other accuracies: link, K 3, d 0, seed 1\n" in table
    assert "- 9 of 21 runs done" in table


def test_a_row_that_was_cut_short_is_left_out(folder):
    path = write(GROUPS, seeds=[0, 1, 2])
    whole = finish(path, DONE)
    with Path("results.jsonl").open("a") as file:
        file.write('{"id": "1234", "val_accu')
    assert execute.read_results(Path("results.jsonl")) == whole


def test_plots_are_drawn_of_what_there_is(folder, monkeypatch):
    path = write(GROUPS, seeds=[0, 1, 2])
    names = ["accuracy_by_k.png", "accuracy_by_delay.png", "accuracy_by_cost.png"]
    lines = report.make_lines(*load_sweep(path), finish(path, DONE))
    assert plots.draw(lines, folder) == [f"{name}: drawn" for name in names]
    assert all((folder / name).stat().st_size > 5000 for name in names)
    nothing = report.make_lines(*load_sweep(path), {})
    assert [line.split(",")[0] for line in plots.draw(nothing, folder)] == [f"{name}: not drawn" for name in names]
    assert not list(folder.glob("*.png"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plots.draw(lines, folder) == ["no plots: they need matplotlib; run `pip install matplotlib`"]


def test_its_help_is_there_without_waiting_for_torch():
    code = ("import sys; from benchmarks.accuracy.__main__ import main\ntry: main(['--help'])\n"
            "except SystemExit as stop: assert stop.code == 0 and 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
                          env=child_environment())
    assert done.stdout.startswith("usage: python -m benchmarks.accuracy")
