"""``python tests/oracles``: computes and prints the table of what is proved; ``python tests/oracles A4 sinkhorn`` a part of it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from oracles.measure import EXPLAINED, Row, table

WIDTHS = {"item": 5, "component": 56, **dict.fromkeys(EXPLAINED, 9)}


def line(cells: dict[str, str], rest: str) -> str:
    """The cells at their widths, longer ones as they are, and what follows them."""
    return "".join(cells.get(column, "–").ljust(width - 1) + " " for column, width in WIDTHS.items()) + rest


def shown(row: Row) -> str:
    """A row of the table; an error that is too large has an exclamation mark."""
    errors = {column: f"{error:.0e}"[:5] + "!" * (column in row.failures) for column, error in row.errors.items()}
    errors = {column: "0" if row.errors[column] == 0 else error for column, error in errors.items()}
    return line({"item": row.item, "component": row.component, **errors}, f"{row.oracles}{'; ' * bool(row.note)}{row.note}")


def main(words: list[str]) -> int:
    """Prints the rows that mention one of the words, or all. 1 where an error is too large."""
    torch.set_num_threads(1)  # the tensors are tiny
    for column, meaning in EXPLAINED.items():
        print(f"{column}: {meaning}")
    print()
    print(line({column: column for column in WIDTHS}, "oracles and notes"))
    failed = False
    for row in table(words):
        print(shown(row), flush=True)
        failed |= bool(row.failures)
    return int(failed)


sys.exit(main(sys.argv[1:]))
