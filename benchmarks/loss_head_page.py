"""The page and the plot of the loss-head benchmark, from what loss_head.py measured in one run or several.

python benchmarks/loss_head_page.py run1/loss_head.json run2/loss_head.json --out benchmarks/results
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pages import asked, write_page
from provenance import clocks_sentence, sentence

GIB = 2**30
BOUND = 5e-2
"""Error above which a case does not count."""
EXACT = 5e-3
"""Gradient error of what is called exact here."""
OURS = "distily"


def main() -> None:
    write(*asked("loss_head", __doc__))


def write(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """loss_head.md, .png, .svg and .json."""
    write_page("loss_head", runs, folder, page(runs), lambda: plot([cell for run in runs for cell in run["cells"]], folder))


def page(runs: Sequence[dict[str, Any]]) -> str:
    cells = [cell for run in runs for cell in run["cells"]]
    lines = ["# The loss head beside its peers", "", "What is measured and how: `benchmarks/loss_head.py`.", ""]
    lines += [*overview(cells), "", "![Ratio and memory](loss_head.svg)", ""]
    for run in runs:
        lines += [f"## Run of {run['provenance']['day']}", "", sentence(run["provenance"]), ""]
        for cell in run["cells"]:
            lines += [*cell_lines(cell), ""]
        lines += [*flags(run["cells"]), ""]
        lines += [*(f"- {name}: {remark}" for name, remark in run["remarks"].items()), ""]
    return "\n".join(lines).rstrip() + "\n"


# What is read off the figures.


def ceiling(cell: dict[str, Any]) -> float:
    """Milliseconds of the four products, aligned where that is another thing."""
    return cell.get("aligned", cell["products"])["all"]["ms"]


def gradient_error(row: dict[str, Any]) -> float:
    return max(row["errors"][1:]) if not any(map(math.isnan, row["errors"])) else math.inf


def is_right(row: dict[str, Any]) -> bool:
    return "failed" not in row and all(value <= BOUND for value in row["errors"])


def fastest(rows: Iterable[dict[str, Any]], bound: float) -> dict[str, Any] | None:
    """Of the peers' rows that are right within ``bound``."""
    peers = [row for row in rows if not row["name"].startswith(OURS) and is_right(row) and gradient_error(row) <= bound]
    return min(peers, key=lambda row: row["ms"], default=None)


def own(cell: dict[str, Any], objective: str) -> dict[str, Any] | None:
    rows = (row for row in cell["rows"] if row["name"] == OURS and row["objective"] == objective)
    return next((row for row in rows if "failed" not in row), None)


# Words.


def label(cell: dict[str, Any]) -> str:
    return f"{cell['case']}, N {cell['tokens']:,}{', fp32 head' if cell['master'] else ''}"


def memory(row: dict[str, Any]) -> str:
    return f"{row['peak'] / GIB:.2f}" if "peak" in row else "–"


def short(row: dict[str, Any] | None, cell: dict[str, Any], named: bool = True) -> str:
    """A row as ``ms, ratio, GiB, gradient error``."""
    if row is None:
        return "none"
    start = f"{row['name']}: " if named else ""
    return f"{start}{row['ms']:.1f} ms, {ceiling(cell) / row['ms']:.2f}, {memory(row)} GiB, {gradient_error(row):.1e}"


def overview(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Ours and the fastest peers by objective, then what further objectives cost beside the KL."""
    lines = [
        "Milliseconds, ratio of the (aligned) four products' time to it, peak GiB over inputs, larger error of the two gradients:",
        "",
        f"| case | objective | distily | fastest peer, gradient error ≤ {EXACT:g} | fastest peer, error ≤ {BOUND:g} |",
        "|---|---|---|---|---|",
    ]
    for cell in cells:
        for objective in ("forward_kl", "jsd", "reverse_kl"):
            rows = [row for row in cell["rows"] if row["objective"] == objective]
            if any(not row["name"].startswith(OURS) for row in rows):
                best = [short(fastest(rows, bound), cell) for bound in (EXACT, BOUND)]
                ours = short(own(cell, objective), cell, named=False)
                lines.append(f"| {label(cell)} | {objective} | {ours} | {' | '.join(best)} |")
    return [*lines, *marginal(cells)]


def marginal(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Time of Distily's other objectives and sums ÷ that of its forward KL, taken in turn."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.get("in turn", {})))
    if not names:
        return []
    lines = [
        "",
        "Time of distily's ÷ time of its forward_kl, both taken in turn:",
        "",
        f"| case | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for cell in cells:
        found = cell.get("in turn", {})
        if found:
            ratios = [f"{found[name]:.3f}" if name in found else "–" for name in names]
            lines.append(f"| {label(cell)} | {' | '.join(ratios)} |")
    return lines


def cell_lines(cell: dict[str, Any]) -> list[str]:
    """One case at one number of tokens, as Markdown."""
    inputs = ", ".join(f"{name} {value:.3g}" for name, value in cell["inputs"].items())
    lines = [f"### {label(cell)}: {cell['title']}", "", f"Inputs: {inputs}."]
    for key, name in (("products", "Four products"), ("aligned", "V padded to a multiple of 64")):
        if key in cell:
            parts = [f"{part} {each['ms']:.2f}" for part, each in cell[key].items() if part != "all"]
            whole = cell[key]["all"]
            rate = cell["operations"] / whole["ms"] / 1e9
            lines.append(f"{name}: {whole['ms']:.2f} ms, {rate:.0f} TFLOP/s ({', '.join(parts)}).")
    lines += [clocks_sentence(cell["clocks"]), ""]
    aligned = " of aligned |" if "aligned" in cell else ""
    lines.append(f"| contender | objective | ms (round 1, 2; repeats) | TFLOP/s | ratio |{aligned} GiB | error: loss | dh | dW |")
    lines.append("|---|---|---|---|---|" + ("---|" if aligned else "") + "---|---|---|---|")
    return lines + [table_row(row, cell) for row in cell["rows"]]


def table_row(row: dict[str, Any], cell: dict[str, Any]) -> str:
    start = f"| {row['name']} | {row['objective']} |"
    columns = 8 if "aligned" in cell else 7
    if "failed" in row:
        return f"{start} {row['failed'].replace('|', '/')} |" + " – |" * (columns - 1)
    rounds = ", ".join(f"{value:.2f}" for value in row["rounds"])
    rate = cell["operations"] / row["ms"] / 1e9
    ratios = [f"{cell[key]['all']['ms'] / row['ms']:.3f}" for key in ("products", "aligned") if key in cell]
    errors = [f"{value:.1e}{'' if value <= BOUND else ' !'}" for value in row["errors"]]
    cells = [f"{row['ms']:.2f} ({rounds}; {row['repeats']})", f"{rate:.0f}", *ratios, memory(row), *errors]
    return f"{start} {' | '.join(cells)} |"


def flags(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Every contender's configuration, once."""
    known = {f"{row['name']}, {row['objective']}": row["flags"] for cell in cells for row in cell["rows"]}
    return ["Configurations:", "", *(f"- {name}: `{value}`" for name, value in known.items())]


# The plot.

MARKERS = "oPsX^vDd<>ph8*"


def plot(cells: Sequence[dict[str, Any]], folder: Path, objective: str = "forward_kl") -> None:
    """Ratio against memory, a panel for each cell, a marker for each contender, its gradient error by colour."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    shown = [
        (cell, [row for row in cell["rows"] if row["objective"] == objective and is_right(row) and "peak" in row])
        for cell in cells
    ]
    shown = [(cell, rows) for cell, rows in shown if any(not row["name"].startswith(OURS) for row in rows)]
    if not shown:
        return
    names = list(dict.fromkeys(row["name"] for _, rows in shown for row in rows))
    markers = {name: "*" if name == OURS else (MARKERS.replace("*", "") * 2)[place] for place, name in enumerate(names)}
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(3.4 * columns + 4, max(4.5, 3.2 * lines)), squeeze=False, layout="constrained"
    )
    scale = LogNorm(1e-3, BOUND)
    for panel, (cell, rows) in zip(panels.flat, shown, strict=False):
        for row in rows:
            panel.scatter(
                row["peak"] / GIB, ceiling(cell) / row["ms"], c=[gradient_error(row)], norm=scale, cmap="viridis",
                marker=markers[row["name"]], s=260 if row["name"] == OURS else 70, edgecolors="black", linewidths=0.6,
            )  # fmt: skip
        panel.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
        panel.set(title=label(cell), xlabel="peak GiB over inputs", ylabel="four products ÷ loss, time", ylim=(0, 1.08))
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=panels, label="larger error of the two gradients", shrink=0.8)
    handles = [
        plt.Line2D([], [], linestyle="", marker=markers[name], markersize=12 if name == OURS else 7, color="grey", label=name)
        for name in names
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.suptitle(f"{objective.replace('_', ' ')}: better is up, left and dark", x=0.01, ha="left")
    for ending in ("png", "svg"):
        figure.savefig(folder / f"loss_head.{ending}", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
