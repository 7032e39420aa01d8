"""The page and the plot of the step benchmark, from what step.py measured in one run or several.

python benchmarks/step_page.py run1/step.json run2/step.json --out benchmarks/results
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import asked, write_page
from provenance import clocks_sentence, sentence

GIB = 2**30
OURS = "distily"


def main() -> None:
    write(*asked("step", __doc__))


def write(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """step.md, .png, .svg and .json."""
    write_page("step", runs, folder, page(runs), lambda: plot(runs, folder))


def page(runs: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# The whole step beside its peers",
        "",
        "What is measured and how: `benchmarks/step.py`.",
        "",
        "![Time and memory](step.svg)",
        "",
    ]
    for run in runs:
        lines += [f"## Run of {run['provenance']['day']}: {run['like']}", "", sentence(run["provenance"]), ""]
        lines += [work(run), clocks_sentence(run["clocks"]), "", *best(run), "", *table(run), "", "Configurations:", ""]
        lines += [f"- {title(row)}: `{row['flags']}`" for row in run["table"]]
        lines += ["", *(f"- {name}: {remark}" for name, remark in run["remarks"].items()), ""]
    return "\n".join(lines).rstrip() + "\n"


# What is read off the figures.


def title(row: dict[str, Any]) -> str:
    return f"{row['name']}, {row['objective']}, {row['weights']}"


def floor(run: dict[str, Any]) -> float:
    """Milliseconds that the operations take at the ceiling."""
    return float(1e3 * sum(run["operations"].values()) / run["rate"])


def work(run: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {count / 1e12:.4g}" for name, count in run["operations"].items())
    return (
        f"A step: {run['rows']} × {run['length']:,} tokens, {sum(run['operations'].values()) / 1e12:.4g} TFLOP ({parts}); "
        f"ceiling {run['rate'] / 1e12:.0f} TFLOP/s, so {floor(run):.1f} ms at least in bf16."
    )


def best(run: dict[str, Any]) -> list[str]:
    """Ours beside the fastest trainer and the fastest composition, for the same objective and weights."""
    lines = ["| objective | weights | distily | fastest trainer | fastest composition of parts |", "|---|---|---|---|---|"]
    done = [row for row in run["table"] if "ms" in row]
    for objective, weights in dict.fromkeys((row["objective"], row["weights"]) for row in done):
        same = [row for row in done if (row["objective"], row["weights"]) == (objective, weights)]
        groups = [
            [row for row in same if row["name"] == OURS],
            [row for row in same if row["name"].startswith("trl ")],
            [row for row in same if " + " in row["name"]],
        ]
        cells = [min(group, key=lambda row: row["ms"], default=None) for group in groups]
        texts = ["none" if row is None else f"{row['name']}: {row['ms']:.1f} ms, {row['peak'] / GIB:.1f} GiB" for row in cells]
        lines.append(f"| {objective} | {weights} | {' | '.join(texts)} |")
    return lines


def table(run: dict[str, Any]) -> list[str]:
    columns = ("contender", "objective", "weights", "ms (round 1, 2; repeats)", "tokens/s", "MFU", "peak GiB", "reserved GiB")
    columns += ("loss, first → last", "first s")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cells(row, run))} |" for row in run["table"]]


def cells(row: dict[str, Any], run: dict[str, Any]) -> list[str]:
    start = [row["name"], row["objective"], row["weights"]]
    if "ms" not in row or "failed" in row:
        return [*start, row.get("failed", "not run").replace("|", "/"), *["–"] * 6]
    medians = ", ".join(f"{value:.1f}" for value in row["medians"])
    return [
        *start,
        f"{row['ms']:.1f} ({medians}; {sum(len(each['ms']) for each in row['rounds'])})",
        f"{1e3 * run['rows'] * run['length'] / row['ms']:,.0f}",
        f"{floor(run) / row['ms']:.3f}",
        *(f"{row[key] / GIB:.1f}" for key in ("peak", "reserved")),
        " → ".join(f"{value:.4f}" for value in row["losses"]),
        f"{row['first seconds']:.1f}",
    ]


def row_line(row: dict[str, Any], run: dict[str, Any]) -> str:
    """A row for the screen."""
    return " | ".join(cells(row, run))


def plot(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """For each run a bar of milliseconds for each contender, fastest first, with its peak memory; the floor as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [
        (run, sorted((row for row in run["table"] if "ms" in row and "failed" not in row), key=lambda row: -row["ms"]))
        for run in runs
    ]
    shown = [(run, rows) for run, rows in shown if rows]
    if not shown:
        return
    heights = [1.2 + 0.32 * len(rows) for _, rows in shown]
    figure, panels = plt.subplots(
        len(shown), figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for panel, (run, rows) in zip(panels[:, 0], shown, strict=True):
        colours = ["tab:blue" if row["name"].startswith(OURS) else "tab:grey" for row in rows]
        bars = panel.barh([title(row) for row in rows], [row["ms"] for row in rows], color=colours)
        panel.bar_label(bars, [f"{row['ms']:.3g} ms, {row['peak'] / GIB:.2g} GiB" for row in rows], padding=3, fontsize=8)
        panel.axvline(floor(run), color="black", linewidth=0.8, linestyle="--")
        panel.set(xlabel="milliseconds of a step; dashed: its floor in bf16", title=run["like"])
        panel.margins(x=0.18)
        panel.tick_params(axis="y", labelsize=8)
    for ending in ("png", "svg"):
        figure.savefig(folder / f"step.{ending}", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
