"""The tables that are committed are those of the data beside them."""

import json
import re

import pytest
from conftest import REPOSITORY

from benchmarks.ablation.__main__ import as_markdown as ablation_table
from benchmarks.accuracy.execute import read_results
from benchmarks.accuracy.report import as_markdown as accuracy_table
from benchmarks.accuracy.sweep import load_sweep
from benchmarks.byte_lm.__main__ import table as language_model_table
from benchmarks.memory.cases import Size
from benchmarks.memory.report import as_markdown as memory_table
from benchmarks.memory.results import Results
from benchmarks.models.__main__ import rows_of
from benchmarks.models.report import as_markdown as models_table
from benchmarks.models.report import by_live_tensors, exceptions, more_live, summary
from benchmarks.overview.__main__ import ACCURACY, accuracies, peaks_by_k, speeds
from benchmarks.prediction.__main__ import as_markdown as prediction_tables
from benchmarks.scaling.report import as_markdown as scaling_table
from benchmarks.soak.report import as_markdown as soak_tables
from benchmarks.throughput.report import as_markdown as throughput_tables

BENCHMARKS = REPOSITORY / "benchmarks"
SPEED = {"BackLink, a batch late": "BackLink d=1", "BackLink, a microbatch late": "BackLink d=1/M",
         "the last loss, a microbatch late": "last loss d=1/M", "interleaved 1F1B": "interleaved 1F1B",
         "zero-bubble": "zero-bubble", "DDP, the whole model in each process": "DDP",
         "one process with both cores": "one process"}
MEMORY = {"1F1B": ("microbatches", "bp"),
          "BackLink, on time or a microbatch late": ("microbatches", "BackLink, length 1, d = 1/M"),
          "the last loss, a microbatch late": ("microbatches", "last loss, d = 1/M"),
          "BackLink, a batch late": ("microbatches", "BackLink, length 1, d = 1"),
          "BackLink, a batch late, whole batches": ("pipeline", "BackLink, length 1, d = 1")}


def shown(section):
    """The rows of the table in this section of the README: a name, and numbers."""
    text = re.search(rf"^### {section}\n(.*?)^##", (REPOSITORY / "README.md").read_text(), re.M | re.S)[1]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in rows[2:]}


@pytest.mark.parametrize(("pattern", "table"), [
    ("ablation/results/*/*.json", ablation_table), ("scaling/results/**/*.json", scaling_table),
    ("soak/results/*.json", soak_tables), ("throughput/results/*/*.json", throughput_tables)])
def test_tables_follow_from_their_data(pattern, table):
    paths = list(BENCHMARKS.glob(pattern))
    assert paths
    for path in paths:
        assert path.with_suffix(".md").read_text() == table(json.loads(path.read_text())), path


@pytest.mark.parametrize("folder", ["cpu", "nvidia-h200-16-cores"])
def test_tables_of_memory_follow_from_their_rows(folder):
    path = BENCHMARKS / "memory/results" / folder
    rows = Results(path / "results.jsonl", {}).rows
    assert (path / "table.md").read_text() == memory_table(rows, Size(110, 1024, (2, 4, 8, 16)))


@pytest.mark.parametrize("name", ["cpu", "gpu", "gpu_short", "search", "vit"])
def test_tables_of_accuracy_follow_from_their_rows(name):
    sweep, combinations = load_sweep(BENCHMARKS / f"accuracy/{name}.yaml")
    path = BENCHMARKS / "accuracy/results" / name
    results = read_results(path / "results.jsonl")
    assert (path / "table.md").read_text() == accuracy_table(sweep, combinations, results)


def test_tables_of_models_follow_from_their_rows():
    path = BENCHMARKS / "models/results"
    rows = rows_of(path / "results.jsonl")
    assert (path / "table.md").read_text() == models_table(rows)
    readme = (BENCHMARKS / "models/README.md").read_text()
    assert summary(rows) in readme
    assert exceptions(rows) in readme
    assert more_live(rows) in readme
    rows, _ = by_live_tensors(rows)
    equal = [row for row in rows if row["training"] == row["evaluation"] == 0 and row["buffers"]]
    trained = [row for row in rows if "losses" in row and row["stages"] == 4]
    told = " ".join((REPOSITORY / "README.md").read_text().split())
    assert f"Of {len(rows)}, one of every module" in told
    assert len(equal) == len(rows)
    assert f"and {len(trained)} train a BackLink step in four stages" in told


def test_the_readme_shows_the_tables_of_the_predictions():
    tables = prediction_tables(json.loads((BENCHMARKS / "prediction/results.json").read_text())["rows"])
    readme = (BENCHMARKS / "prediction/README.md").read_text()
    assert all(table in readme for table in tables.split("\n\n"))


def test_the_readme_shows_the_table_of_the_language_model():
    runs = json.loads((BENCHMARKS / "byte_lm/results.json").read_text())["runs"]
    assert language_model_table(runs) in (BENCHMARKS / "byte_lm/README.md").read_text()


def test_the_readme_shows_what_the_results_say():
    assert list(shown("Accuracy").values()) == [[f"{100 * share:.1f}" for share in accuracies(*row)]
                                                for row in ACCURACY.values()]
    assert shown("Speed") == {name: [f"{ratio:.2f}" for ratio in speeds(method)] for name, method in SPEED.items()}
    whole = peaks_by_k("microbatches", "bp", again=False)
    shares = {name: [peaks_by_k(*method, again)[k] / whole[k] for k in (4, 16) for again in (False, True)]
              for name, method in MEMORY.items()}
    assert shown("Memory") == {name: [f"{share:.2f}" for share in row] for name, row in shares.items()}
