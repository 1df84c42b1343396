"""Tables for the benchmarks' results."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """The first row as head; so many columns of text, then numbers."""
    head, *body = rows
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *body])
