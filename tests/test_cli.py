"""The command line as users meet it: help, bad input, run folders, eval, export, resume."""

import gc
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, assert_same_run, child_environment, interrupt_second_save, small_config

from blpipe import cli, metrics, models
from blpipe.config_file import load_config
from blpipe.data import open_data
from blpipe.metrics import read_rows
from blpipe.plan import make_plan
from blpipe.seeds import RandomStream
from blpipe.specs import DataSpec


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a small config in small.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(REPOSITORY / "tests")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small_config("small", train__epochs=1)))
    return tmp_path


def run(*arguments):
    """The exit code of a subcommand in this process."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["export"]])
def test_help_is_there_without_waiting_for_torch(command):
    code = ("import sys; from blpipe import cli\ntry: cli.main([*sys.argv[1:], '--help'])\n"
            "except SystemExit as stop: assert stop.code == 0 and 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *command], capture_output=True, text=True,
                          timeout=60, check=True)
    assert done.stdout.startswith("usage: blpipe")


def test_the_collector_runs_and_leaves_alone_what_modules_hold():
    cli.load_commands()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_an_interrupt_while_torch_is_loading_is_one_line_of_the_first_rank(tmp_path, rank, said):
    (tmp_path / "torch.py").write_text("import os, signal\nprint('loading', flush=True)\nos.kill(os.getpid(), 2)\n"
                                       "signal.pause()\n")
    torchrun = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run([sys.executable, "-m", "blpipe", "train", "small.yaml"], capture_output=True, text=True,
                          timeout=60, cwd=tmp_path, env=child_environment() | torchrun)
    assert (done.returncode, done.stdout) == (130, "loading\n")
    assert done.stderr == said * ("blpipe: interrupted; `train --resume RUN` goes on from the last checkpoint, "
                                  "if there is one\n")


def test_a_run_folder_says_what_was_run_and_how_it_went(folder, capsys):
    assert run("train", "small.yaml", "train.epochs=2") == 0
    said = capsys.readouterr()
    assert "epoch 2/2" in said.out
    assert "run folder: runs/small" in said.out
    table = said.out.splitlines()[-5:-1]
    assert table[0].split() == ["stage", "blocks", "parameters", "accuracy", "busy", "waiting"]
    assert [row.split()[0] for row in table[1:]] == ["1", "2", "3"]
    assert said.err == ""  # no progress bar where the output is no terminal
    result = json.loads((folder / "runs/small/result.json").read_text())
    assert (result["engine"], result["method"], result["steps"]) == ("local", "backlink", 12)
    assert result["val_accuracy"] == result["stage_val_accuracy"][-1]
    assert [stage["blocks"] for stage in result["stages"]] == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert sum(stage["busy_seconds"] for stage in result["stages"]) <= result["train_seconds"]
    assert all(stage["busy_seconds"] > 0 and stage["peak_memory_bytes"] > 1e6 for stage in result["stages"])
    rows = [json.loads(line) for line in (folder / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["stage"]) for row in rows] == [(e, s) for e in (1, 2) for s in (1, 2, 3)]
    assert all(row["samples_per_second"] > 0 and row["train_loss"] > 0 and row["lr"] == 0.05 for row in rows)


def test_tensorboard_gets_the_numbers_of_every_stage_and_epoch(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run("train", "small.yaml", "train.epochs=2", "runtime.tensorboard=true") == 0
    events = EventAccumulator(str(folder / "runs/small/tensorboard")).Reload()
    for row in read_rows(folder / "runs/small"):
        curve = {event.step: event.value for event in events.Scalars(f"val_accuracy/stage {row['stage']}")}
        assert curve[6 * row["epoch"]] == pytest.approx(row["val_accuracy"])
    assert not any("gpu" in tag for tag in events.Tags()["scalars"])  # nothing measured, nothing drawn


def test_tensorboard_that_is_not_installed_is_said_before_anything_is_written(folder, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert run("train", "small.yaml", "runtime.tensorboard=true") == 2
    assert capsys.readouterr().err == ("blpipe: runtime.tensorboard: the package is missing; run `pip install "
                                       "tensorboard`, or leave it out\n")
    assert not (folder / "runs").exists()


def test_the_resolved_config_repeats_the_run(folder):
    assert run("train", "small.yaml", "seed=3") == 0
    assert run("train", "runs/small/config.yaml", "runtime.runs=again") == 0
    assert_same_run(folder / "runs/small", folder / "again/small")


def evaluated(capsys, *words):
    """The loss and the accuracy of every stage, as `eval` prints them."""
    capsys.readouterr()
    assert run("eval", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split() == ["stage", "blocks", "parameters", "loss", "accuracy"]
    return [tuple(line.split()[-3:-1]) for line in lines[-3:]]


def shown(rows):
    return [(f"{row['val_loss']:.4f}", f"{100 * row['val_accuracy']:.1f}") for row in rows]


def test_eval_gives_the_losses_and_accuracies_of_the_run(folder, capsys):
    run("train", "small.yaml")
    assert evaluated(capsys, "runs/small") == shown(read_rows(folder / "runs/small"))


def test_eval_takes_other_data_and_another_batch_size_but_no_other_method(folder, capsys):
    run("train", "small.yaml")
    whole = evaluated(capsys, "runs/small")
    assert evaluated(capsys, "runs/small", "train.eval_batch_size=5", "runtime.threads=1") == whole
    assert evaluated(capsys, "runs/small", "data.test_samples=4") != whole
    assert run("eval", "runs/small", "method.link.delay=0", "optimizer.lr=0.3") == 2
    assert capsys.readouterr().err == "".join(
        f"blpipe: {key}: is the checkpoint's own; eval takes data, runtime, train.eval_batch_size, train.precision and "
        "train.channels_last\n" for key in ("method.link.delay", "optimizer.lr"))


def test_eval_and_export_take_the_best_checkpoint(folder, capsys):
    run("train", "small.yaml", "train.epochs=5", "checkpoint.keep=5", "optimizer.lr=0.5")
    by_epoch = [read_rows(folder / "runs/small")[i:i + 3] for i in range(0, 15, 3)]
    best = max(range(5), key=lambda epoch: (by_epoch[epoch][-1]["val_accuracy"], epoch))
    path = f"runs/small/checkpoints/step_{6 * (best + 1):09d}"
    assert evaluated(capsys, "runs/small", "--best") == evaluated(capsys, path) == shown(by_epoch[best])
    assert run("export", "runs/small", "--best", "--out", "best.pt") == run("export", path, "--out", "one.pt") == 0
    weights = [torch.load(name, weights_only=True) for name in ("best.pt", "one.pt")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert run("eval", path, "--best") == 2
    assert "--best: " in capsys.readouterr().err


def test_eval_takes_data_of_any_length_but_no_labels_that_the_model_does_not_know(folder, capsys):
    run("train", "small.yaml", "model={target: 'models_under_test:conv_net'}")
    assert len(evaluated(capsys, "runs/small", "data.train_samples=1")) == 3
    assert run("eval", "runs/small", "data.args.classes=9") == 2
    line, = capsys.readouterr().err.splitlines()
    assert re.match(r"blpipe: data: .* label \d+ .* of which the model gives logits", line)


@pytest.mark.parametrize(("model", "said"), [
    ("counting_net", "model: 0._extra_state in the stage 0 … 1 is a dict in the state_dict, and a checkpoint holds"),
    ("sparse_net", "model: 1.embedding in the stage 0 … 1 has sparse gradients, which stages do not add up"),
])
def test_a_model_that_cannot_be_trained_or_saved_is_refused_before(folder, capsys, model, said):
    assert run("train", "small.yaml", f"model={{target: 'models_under_test:{model}'}}", "partition={cuts: ['2']}") == 2
    assert capsys.readouterr().err.startswith(f"blpipe: {said}")
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("change", ["name=other", "runtime.runs=elsewhere"])
def test_a_resumed_run_stays_where_it_is(folder, capsys, change):
    run("train", "small.yaml")
    assert run("train", "--resume", "runs/small", change) == 2
    key, value = change.split("=")
    assert capsys.readouterr().err == (f"blpipe: {key}: '{value}', but --resume goes on in runs/small itself; leave it "
                                       "out, or resume a copy of that folder\n")


@pytest.mark.parametrize("model", [{"name": "resnet_cifar", "args": {"depth": 8, "width": 0.25}},
                                   {"name": "mlp", "args": {"hidden": [8, 8]}},
                                   {"target": "models_under_test:conv_net"}])
def test_the_exported_weights_make_the_plain_model(folder, model):
    (folder / "net.yaml").write_text(yaml.safe_dump(small_config("net", model=model, train__epochs=1)))
    assert run("train", "net.yaml") == 0
    assert run("export", "runs/net", "--out", "model.pt") == 0
    state = torch.load("model.pt", weights_only=True)
    plain = {"resnet_cifar": lambda: models.resnet_cifar(8, 0.25, in_channels=2, classes=4),
             "mlp": lambda: models.mlp([8, 8], in_shape=[2, 8, 8], classes=4)}.get(
                 model.get("name"), lambda: __import__("models_under_test").conv_net())()
    plain.load_state_dict(state, strict=True)
    config = load_config("runs/net/config.yaml")
    data = open_data(config.data, config.seed)
    x, targets = next(data.test_batches(data.spec.test_samples))
    accuracy = (plain.eval()(x).argmax(1) == targets).float().mean().item()
    assert accuracy == pytest.approx(json.loads((folder / "runs/net/result.json").read_text())["val_accuracy"])


@pytest.mark.parametrize("method", [{"name": "backlink", "link": {"delay": 2}}, {"name": "bp"}])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(folder, method, monkeypatch, capsys):
    (folder / "run.yaml").write_text(yaml.safe_dump(small_config("run", method=method, train__epochs=3,
                                                                 schedule="cosine", checkpoint__every_epochs=1)))
    assert run("train", "run.yaml", "runtime.runs=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_second_save(patch)
        assert run("train", "run.yaml") == 130
    assert "blpipe: interrupted; `train --resume RUN`" in capsys.readouterr().err
    with (folder / "runs/run/metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "stage"')
    assert run("train", "--resume", "runs/run") == 0
    assert_same_run(folder / "whole/run", folder / "runs/run")


BAD_CONFIGS = {
    "train.epoch=3": r"train\.epoch: unknown key; did you mean train\.epochs\?",
    "train.epochs=many": r"train\.epochs: should be a valid integer, got 'many'",
    "train.epochs": r"train\.epochs: an override is key\.sub=value",
    "partition.stages=7": r"partition\.stages: 7 stages need as many blocks, but the model has 6",
    "partition={cuts: ['2', '9']}": r"partition\.cuts: no block is named '9'",
    "partition={cuts: ['4', '2']}": r"partition\.cuts: '2' is out of order",
    "partition={target: 'models_under_test:conv_net', stages: 2}": r"partition\.target: TypeError: unsupported",
    "method.link.length=-1": r"method\.link\.length: must be a number of blocks ≥ 0, or all, got -1",
    "method.link.delay=-1": r"method\.link\.delay: should be greater than or equal to 0, got -1",
    "method.head=cnov": r"method\.head\.name: unknown 'cnov' \(did you mean 'conv'\?\)",
    "train.microbatches=5": r"train: microbatches 5 does not divide batch_size 16; one that does: 4",
    "train.batch_size=89": r"train\.batch_size: 89 is more than the 88 training samples",
    "train.batch_size=87 model={name: mlp}": r"train\.batch_size: BatchNorm .* set train\.drop_last=true",
    "model.args={classes: 3}": r"data.*: .*have it give 4, or mend the data",
    "data.args={shape: [3, 8, 8], classes: 4, samples: 88}": r"model: block 0 cannot take an input of shape \[16, 3, ",
    "model={name: vgg_cifar}": r"model: block conv4_1 cannot take an input of shape",
    "model={target: 'no_such_module:net'}": r"model\.target: cannot import 'no_such_module:net'",
    "model={target: 'models_under_test:nothing'}": r"model\.target: cannot import 'models_under_test:nothing'",
    "model={target: 'models_under_test:Fails', args: {at: 1}}": r"model: cannot be traced at .*under_test\.py:\d+: ",
    "model.args={width: 3}": r"model\.args: got an unexpected keyword argument 'width'; it takes in_channels, ",
    "data={name: arrays, root: none.npz}": r"data\.root: .*none\.npz",
    "data={name: cifar10}": r"data\.root: .*torchvision\.datasets\.CIFAR10",
    "optimizer.name=sdg": r"optimizer\.name: unknown 'sdg' \(did you mean 'sgd'\?\)",
    "optimizer.args={momentun: 0.9}": r"optimizer\.args: .*momentun",
    "runtime.device=cuda": r"runtime\.device: cuda, but torch sees no GPU here",
    "runtime.engine=pipeline": r"runtime\.engine: pipeline needs a process a stage; run `torchrun ",
    "name=../up": r"name: .*, got '\.\./up'",
}


@pytest.mark.parametrize("override", [pytest.param(o, marks=pytest.mark.skipif(
    o == "runtime.device=cuda" and torch.cuda.is_available(), reason="there is a GPU here")) for o in BAD_CONFIGS])
def test_bad_input_is_one_line_and_leaves_nothing(folder, capsys, override):
    assert run("train", "small.yaml", *re.split(r" (?=\w+=)", override)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    line, = said.err.splitlines()
    assert line.startswith("blpipe: ")
    assert re.search(BAD_CONFIGS[override], line), line
    assert sorted(path.name for path in folder.iterdir()) == ["small.yaml"]


def test_all_problems_are_said_at_once(folder, capsys):
    assert run("train", "small.yaml", "train.epoch=3", "optimizer.lr=-1", "method.name=bq") == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize(("arguments", "expected"), [
    (["train", "none.yaml"], "none.yaml: no such file"),
    (["train"], "CONFIG: which config?"),
    (["train", "small.yaml", "--resume", "runs/x"], "--resume: goes on with the run's own config"),
    (["train", "--resume", "runs/x"], "runs/x: is no run folder"),
    (["eval", "runs/x"], "runs/x: is no run folder"),
    (["export", "runs/x", "--out", "model.pt"], "runs/x: is no run folder"),
    (["eval", "empty"], "empty: holds no checkpoint"),
    (["eval", "empty", "--best"], "empty: holds no checkpoint at the end of an epoch that was evaluated"),
])
def test_bad_arguments_are_one_line(folder, capsys, arguments, expected):
    (folder / "empty").mkdir()
    (folder / "empty/config.yaml").write_text((folder / "small.yaml").read_text())
    assert run(*arguments) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"blpipe: {expected}")


@pytest.mark.parametrize(("arguments", "expected"), [
    ([], "the following arguments are required: COMMAND"),
    (["fly"], ".*invalid choice: 'fly'"),
    (["train", "small.yaml", "--overwritten"], "unrecognized arguments: --overwritten"),
    (["export", "runs/x", "more", "--out", "x.pt"], "unrecognized arguments: more"),
])
def test_bad_usage_exits_with_two(capsys, arguments, expected):
    assert run(*arguments) == 2
    line, = capsys.readouterr().err.splitlines()
    assert re.match(rf"blpipe: {expected}.*; see blpipe.* --help", line)


def test_a_malformed_yaml_file_names_the_place(folder, capsys):
    (folder / "bad.yaml").write_text("model: {name: mlp\npartition: [")
    assert run("train", "bad.yaml") == 2
    assert "blpipe: bad.yaml: not valid YAML: " in capsys.readouterr().err


def test_labels_outside_the_classes_are_found_before_training(folder, capsys):
    images = np.zeros((40, 8, 8, 2), np.uint8)
    labels = np.arange(40) % 5
    np.savez(folder / "five.npz", train_x=images, train_y=labels, test_x=images[:5], test_y=labels[:5])
    assert run("train", "small.yaml", "data={name: arrays, root: five.npz}") == 2
    assert "have it give 5, or mend the data" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_a_run_folder_that_holds_a_run_is_kept_unless_told(folder, capsys):
    assert run("train", "small.yaml") == 0
    before = (folder / "runs/small/result.json").read_text()
    assert run("train", "small.yaml", "seed=1") == 2
    assert "name: runs/small already holds a run; go on with `train --resume runs/small`" in capsys.readouterr().err
    assert run("train", "small.yaml", "--overwrite", "seed=1", "train.epochs=x") == 2
    assert (folder / "runs/small/result.json").read_text() == before
    assert run("train", "small.yaml", "--overwrite", "seed=1") == 0
    assert (folder / "runs/small/result.json").read_text() != before
    assert load_config("runs/small/config.yaml").seed == 1


def test_a_failing_stage_is_named_with_its_step(folder, capsys):
    assert run("train", "small.yaml", "model={target: 'models_under_test:failing_net'}") == 1
    said = capsys.readouterr().err
    assert said.count("RuntimeError: out of luck") == 2  # the traceback's last line, and ours
    assert said.splitlines()[-1] == ("blpipe: stage 2 (rank 1, blocks block2…block3) failed at step 2: "
                                     "RuntimeError: out of luck")


def test_a_stage_that_fails_in_an_evaluation_is_named_so(folder, capsys):
    assert run("train", "small.yaml", "model={target: 'models_under_test:failing_net', args: {at: 7}}") == 1
    assert "failed at evaluation, batch 0: RuntimeError" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_fit_together(path):
    text = path.read_text()
    stages = load_config(path).partition.stage_count
    assert text.startswith(f"# torchrun --standalone --nproc-per-node={stages} -m blpipe train configs/{path.name}")
    config = load_config(path)
    assert config.name == path.stem
    if config.data.name == "digits":
        spec = open_data(config.data, config.seed).spec
    else:
        spec = DataSpec((3, 32, 32), "float32", (), 10, 50000, 10000)
    if config.partition.unsettled:  # any cuts will do, without measuring
        config = load_config(path, ["partition.strategy=even"])
    assert len(make_plan(config, spec).stages) == stages


def test_what_cannot_begin_overwrites_nothing(folder, capsys):
    assert run("train", "small.yaml") == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    assert run("train", "small.yaml", "--overwrite", "optimizer={name: muon, lr: 0.1}") == 2
    assert "optimizer: ValueError: Muon only supports 2D parameters" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")} == before


def test_a_run_without_a_checkpoint_says_to_start_again(folder, capsys):
    (folder / "runs/small").mkdir(parents=True)
    (folder / "runs/small/config.yaml").write_text((folder / "small.yaml").read_text())
    assert run("train", "--resume", "runs/small") == 2
    assert "holds no checkpoint yet; train it from the start, with --overwrite" in capsys.readouterr().err
    (folder / "runs/small/metrics.jsonl").write_text("{}\n")
    assert run("train", "small.yaml") == 2
    assert "already holds a run; replace it with --overwrite, or" in capsys.readouterr().err


def test_a_run_that_failed_before_it_came_to_anything_gives_up_its_name(folder, capsys):
    broken = ["model.target=models_under_test:failing_net", "model.args={at: 2}"]
    assert run("train", "small.yaml", *broken) == 1
    assert (folder / "runs/small/config.yaml").exists()
    assert run("train", "small.yaml") == 0
    assert run("train", "small.yaml") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_written_is_said_with_its_path(folder, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.save", full)
    assert run("train", "small.yaml") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "blpipe: cannot write the checkpoint runs/small/checkpoints/step_000000006: [Errno 28] No space left on "
        "device; what was saved before is still there")


def test_a_run_can_go_on_where_there_is_one_more_random_stream(folder, monkeypatch):
    """As on a GPU after a CPU: its stream starts anew, and evaluating needs none."""
    assert run("train", "small.yaml") == 0
    read = RandomStream.read
    monkeypatch.setattr(RandomStream, "read", lambda stream: [*read(stream), torch.zeros(16, dtype=torch.uint8)])
    monkeypatch.setattr(RandomStream, "_write", lambda stream, state: torch.set_rng_state(state[0]))
    assert run("eval", "runs/small") == 0
    assert run("train", "--resume", "runs/small") == 0


def test_export_to_where_it_cannot_write_leaves_nothing(folder, capsys):
    assert run("train", "small.yaml") == 0
    before = sorted(folder.iterdir())
    assert run("export", "runs/small", "--out", "runs") == 2
    assert run("export", "runs/small", "--out", "no/such/folder/model.pt") == 2
    assert capsys.readouterr().err.count("blpipe: --out: cannot write ") == 2
    assert run("export", "runs/small", "--out", ".") == 2
    no_place = "no place for a file; give a file's name in a folder that is there"
    assert capsys.readouterr().err == f"blpipe: --out: cannot write .: {no_place}\n"
    assert sorted(folder.iterdir()) == before


def test_export_replaces_a_file_only_where_it_is_told_to(folder, capsys):
    assert run("train", "small.yaml") == 0
    before = (folder / "small.yaml").read_bytes()
    assert run("export", "runs/small", "--out", "small.yaml") == 2
    assert capsys.readouterr().err == "blpipe: --out: small.yaml exists; say --overwrite, or give another name\n"
    assert (folder / "small.yaml").read_bytes() == before
    assert run("export", "runs/small", "--out", "model.pt") == run("export", "runs/small", "--out", "model.pt",
                                                                   "--overwrite") == 0


def test_a_run_says_what_it_is_about_to_train(folder, capsys):
    assert run("train", "small.yaml", "train.epochs=1") == 0
    line = capsys.readouterr().out.splitlines()[0]
    stages = json.loads((folder / "runs/small/result.json").read_text())["stages"]
    assert re.fullmatch(rf"backlink in {len(stages)} stages, one process on cpu: {sum(s['params'] for s in stages):,} "
                        r"parameters; \d+ training and \d+ test samples of \[2, 8, 8\], 4 classes; \d+ steps an epoch",
                        line)


def test_a_run_that_is_done_says_so_when_it_is_to_go_on(folder, capsys):
    assert run("train", "small.yaml", "train.epochs=2") == 0
    assert run("train", "--resume", "runs/small") == 0
    said = "note: nothing is left to train: all 2 epochs are done; give more by train.epochs=…"
    assert said in capsys.readouterr().out


def test_a_lone_rank_variable_is_no_torchrun(folder, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert run("train", "none.yaml") == 2
    assert capsys.readouterr().err.startswith("blpipe: none.yaml: no such file")
