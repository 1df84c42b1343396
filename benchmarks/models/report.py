"""The tables: counts by library, the exceptions with their reasons, and every model."""

from collections.abc import Iterator, Sequence
from math import isfinite

from benchmarks import markdown
from benchmarks.jsonl import Row
from benchmarks.models.same import EQUAL
from blpipe.text import percent

TITLES = {"timm": "timm", "transformers": "Transformers"}


def as_markdown(rows: Sequence[Row]) -> str:
    """All tables, and on what the rows were measured."""
    rows = sorted(rows, key=lambda row: (row["library"], row["model"].lower()))
    single, _ = by_live_tensors(rows)
    parts = ["# Models as blocks", counts_and_exceptions(rows)]
    for library in _libraries(single):
        parts.append(f"## {TITLES[library]}\n\n{_every_model([row for row in single if row['library'] == library])}")
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in _notes(rows))]) + "\n"


def counts_and_exceptions(rows: Sequence[Row]) -> str:
    """The tables that say it all in short."""
    return "\n\n".join(filter(None, [summary(rows), exceptions(rows), more_live(rows)]))


def by_live_tensors(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of models that are cut where a single tensor is live, and those with more."""
    return [row for row in rows if "live_tensors" not in row], [row for row in rows if "live_tensors" in row]


def summary(rows: Sequence[Row]) -> str:
    """How many models of each library are cut where a single tensor is live, equal, loaded and trained."""
    rows, _ = by_live_tensors(rows)
    table = [["library", "models", "cut into blocks", "outputs equal, evaluation", "outputs equal, training",
              "state_dict loads", "a BackLink step", "largest block at most half"]]
    for library in _libraries(rows):
        found = [row for row in rows if row["library"] == library]
        counts = [len(found), sum("blocks" in row for row in found),
                  sum(row.get("evaluation") == 0 for row in found),
                  sum(row.get("training") == 0 and row["buffers"] for row in found),
                  sum(row.get("state_dict") is True for row in found), sum(map(_trained, found)),
                  sum("blocks" in row and row["largest_block"] <= 0.5 for row in found)]
        table.append([TITLES[library], *map(str, counts)])
    return markdown.table(table)


def exceptions(rows: Sequence[Row]) -> str:
    """A line for all of these that is not as it is with the others, and why."""
    rows, _ = by_live_tensors(rows)
    found = [[row["model"], what, why.replace("|", "\\|")] for row in rows for what, why in _exceptions(row)]
    return markdown.table([["model", "exception", "why"], *found], texts=3) if found else "No exceptions."


def more_live(rows: Sequence[Row]) -> str:
    """What is gained where several tensors may be live at a cut; empty where none of the models was cut so."""
    single, more = by_live_tensors(rows)
    if not more:
        return ""
    before = {row["model"]: row for row in single}
    table = [["model", "`live_tensors`", "blocks", "largest block", "as the model", "a BackLink step in"]]
    for row in more:
        name = row["model"].rpartition(", ")[0]
        if "blocks" not in row or "blocks" not in before.get(name, {}):
            table.append([name, str(row["live_tensors"]), *["–"] * 4])
            continue
        off = max(row["training"], row["evaluation"])
        alike = row["buffers"] and row["state_dict"]
        table.append([name, str(row["live_tensors"]), f"{before[name]['blocks']} → {row['blocks']}",
                      f"{percent(before[name]['largest_block'])} → {percent(row['largest_block'])}",
                      ("bit for bit" if off == 0 else f"to {off:.0e}") if alike else "no",
                      f"{row['stages']} stages" if _trained(row) else "–"])
    return markdown.table(table)


def _exceptions(row: Row) -> Iterator[tuple[str, str]]:
    if "blocks" not in row:
        yield "not cut, or not run", row["why"]
        return
    differs = [f"{mode} by up to {row[mode]:.1g}" for mode in ("evaluation", "training") if row[mode] != 0]
    if differs or not row["buffers"]:
        yield ", ".join(differs or ["buffers"]) + " differ", \
            "not found" if row["repeats"] else "the model itself gives other outputs each time"
    if not row["state_dict"]:
        yield "state_dict does not load", "names or values differ"
    if row["largest_block"] > 0.5:
        yield f"{percent(row['largest_block'])} in one block", _why_uncut(row)
    if not _trained(row):
        yield "no step", row.get("why") or f"losses {row['losses']}"


def _why_uncut(row: Row) -> str:
    if row["largest_weight"] > 0.5:
        return f"one weight holds {percent(row['largest_weight'])} of the parameters"
    notes = [note.partition(" in one piece: ")[2] for note in row["notes"] if " in one piece: " in note]
    return notes[0] if notes else "a module of the model's own, which stays whole"


def _trained(row: Row) -> bool:
    return bool(row.get("losses")) and all(map(isfinite, row["losses"]))


def _every_model(rows: Sequence[Row]) -> str:
    table = [["model", "parameters", "blocks", "largest block", "stages", "as the model", "seconds"]]
    for row in rows:
        cut = "blocks" in row
        alike = cut and all(row[name] == value for name, value in EQUAL.items()) and row["state_dict"]
        cells = [f"{row['parameters']:,}", str(row["blocks"]), percent(row["largest_block"])] if cut else ["–"] * 3
        table.append([row["model"], *cells, str(row["stages"]) if _trained(row) else "–", "yes" if alike else "no",
                      f"{row['seconds']:.1f}" if "seconds" in row else "–"])
    return markdown.table(table)


def _libraries(rows: Sequence[Row]) -> list[str]:
    return [library for library in TITLES if any(row["library"] == library for row in rows)]


def _notes(rows: Sequence[Row]) -> list[str]:
    def distinct(*names: str) -> str:
        return "; ".join(dict.fromkeys(", ".join(f"{name} {row[name]}" for name in names if name in row)
                                       for row in rows))
    return [distinct("device", "cores"), distinct("python", "torch"), f"versions: {_versions(rows)}",
            distinct("commit"), f"{sum(row.get('seconds', 0) for row in rows) / 60:.0f} minutes"]


def _versions(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(f"{row['library']} {row['version']}" for row in rows))
