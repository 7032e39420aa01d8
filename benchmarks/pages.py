"""Pages of benchmarks: made from the figures that one run or several measured, without a GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Runs = Sequence[dict[str, Any]]


def asked(name: str, description: str | None) -> tuple[Runs, Path]:
    """What a page's own command line names: the runs of all files NAME.json, and the folder to write to."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="+", help=f"files {name}.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the page, the plots and all the figures as JSON")
    chosen = parser.parse_args()
    return [run for path in chosen.measured for run in json.loads(path.read_text(encoding="utf-8"))], chosen.out


def write_page(name: str, runs: Runs, folder: Path, page: str, plot: Callable[[], None]) -> None:
    """NAME.json and NAME.md in ``folder``, and what ``plot`` writes, where matplotlib is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(runs, indent=1), encoding="utf-8")
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    try:
        plot()
    except ImportError as error:
        print(f"no plot: {error}; {name}_page.py makes it from {name}.json elsewhere.")
