"""Models of other packages as blocks: what a row says, what becomes of a failing model, and what is kept."""

import os
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import jsonl
from benchmarks.models import __main__ as models
from benchmarks.models import measure as measuring
from benchmarks.models.cases import Case, all_cases
from benchmarks.models.measure import measure, measured
from benchmarks.models.report import as_markdown, exceptions, more_live, summary
from benchmarks.models.same import EQUAL, differences, plain_state


class Tiny(nn.Module):
    """Five layers with a residual connection, which begins with a branch of zeros."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 3)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.out(self.norm(x))


class Crossing(nn.Module):
    """The first layer's output is needed up to the last one."""

    def __init__(self):
        super().__init__()
        self.layers, self.out = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)

    def forward(self, x):
        first = y = self.layers[0](x)
        for layer in self.layers[1:]:
            y = layer(y * first)
        return self.out(y + first)


class Decides(Tiny):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Overflows(Tiny):
    def forward(self, x):
        return super().forward(x) * float("inf")


def ends():
    os._exit(3)


def case(name="Tiny", library="timm"):
    return Case(library, name, f"test_models_benchmark:{name}", {}, (4,), classes=3)


def test_a_row_says_how_a_model_is_cut_that_its_blocks_are_it_and_what_a_step_gave():
    row = measure(case())
    assert row | EQUAL == row and row["state_dict"]
    assert (row["blocks"], row["parameters"], row["stages"], len(row["losses"])) == (5, 4 * 20 + 8 + 15, 4, 4)
    assert (row["largest_block"], row["largest_weight"]) == (round(28 / 103, 4), round(16 / 103, 4))
    assert "why" not in row and row["seconds"] >= 0 and row["peak_bytes"] > 0
    assert exceptions([row]) == "No exceptions."


def test_several_tensors_at_a_cut_are_a_table_of_their_own():
    one, two = measure(case("Crossing")), measure(replace(case("Crossing"), model="Crossing, 2 live", live_tensors=2))
    assert (one["blocks"], two["blocks"], two["stages"], two["live_tensors"]) == (3, 4, 4, 2)
    assert summary([one, two]) == summary([one]) and exceptions([one, two]) == exceptions([one])
    line = "| Crossing | 2 | 3 → 4 | 53.3 % → 26.7 % | bit for bit | 4 stages |"
    assert more_live([one, two]).splitlines()[-1] == line and more_live([one]) == ""


def test_outputs_that_differ_are_noticed(monkeypatch):
    plain, x = Tiny(), torch.rand(2, 4)
    other = nn.Sequential(plain, nn.Dropout(0.5))
    apart = differences(plain, other, x)
    assert apart["training"] > 0 and apart["evaluation"] == 0
    monkeypatch.setattr(measuring, "as_blocks", lambda model, x, live: nn.Sequential(*model.layers))
    row = measure(case())
    assert row["evaluation"] > 0 and row["training"] > 0 and row["repeats"] and not row["state_dict"]
    table = exceptions([row])
    assert "evaluation by up to" in table and "state_dict does not load" in table
    assert summary([row]).splitlines()[-1] == "| timm | 1 | 1 | 0 | 0 | 0 | 1 | 1 |"


def test_buffers_that_differ_are_noticed():
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
    fixed = nn.Sequential(*plain, nn.BatchNorm1d(4, affine=False))
    plain.add_module("2", fixed[2])
    skipping = nn.Sequential(plain[0], plain[1], nn.BatchNorm1d(4, affine=False))
    assert differences(plain, skipping, torch.rand(2, 4)) == EQUAL | {"buffers": False}
    assert plain_state(skipping).keys() == plain.state_dict().keys()


@pytest.mark.parametrize(("name", "exception", "why"), [
    ("Decides", "not cut, or not run", "ConfigError: model: cannot be traced at .*: TraceError: symbolically traced"),
    ("Overflows", "no step", "StageError: stage 4 .*: its loss or weights are NaN or infinite"),
])
def test_a_model_that_fails_has_a_row_with_the_reason(name, exception, why):
    row = measure(case(name))
    assert re.match(why, row["why"])
    assert f"| {name} | {exception} | {row['why'][:20]}" in exceptions([row])


def test_the_rest_goes_on_when_a_process_ends_and_a_file_goes_on_with_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "find_spec", lambda name: name)
    monkeypatch.setattr(models, "version", lambda name: "1.0")
    path = tmp_path / "results.jsonl"
    models.run([case()], path)
    models.run([case(), case("ends"), replace(case(), model="Again")], path)
    rows = models.rows_of(path)
    assert [row["model"] for row in rows] == ["Tiny", "ends", "Again"] and len(jsonl.read(path)) == 3
    assert rows[1]["why"] == "its process ended: memory was short, or 300 s were over"
    assert rows[2]["blocks"] == 5 and rows[2]["version"] == "1.0" and rows[2]["commit"]
    assert "Again: 5 blocks" in capsys.readouterr().out
    assert models.main(["--table", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{summary(rows)}\n\n{exceptions(rows)}\n"
    assert (tmp_path / "table.md").read_text() == as_markdown(rows)


@pytest.mark.parametrize(("arguments", "says"), [
    (["--only", "resnet18"], "timm: is not installed; run `pip install timm`, or give the models of another library "
                             "with --only"),
    (["--only", "resnet19"], "--only: unknown 'resnet19' (did you mean 'resnet18'?); give a model of "
                             "benchmarks/models/cases.py, or one of its libraries"),
    (["--table"], "{path}: has no rows; leave out --table"),
])
def test_what_is_missing_is_told_in_a_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert models.main([*arguments, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"models: {says.format(path=tmp_path / 'results.jsonl')}\n"


def test_models_are_named_once():
    names = [(case.library, case.model) for case in all_cases()]
    assert len(set(names)) == len(names) > 100
    assert list(measured([])) == []
