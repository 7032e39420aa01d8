"""The report of a run: loss curves and a comparison of the models, as PNG and SVG, with one HTML page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from distily.card import ORDER, TITLES, shown_metrics, verdict
from distily.files import whole_folder, write_text
from distily.record import RunRecord, read_metrics

COLORS = {"teacher": "#4c566a", "untrained": "#b0b7c3", "control": "#d08770", "student": "#2e7d6b"}
UNITS = {
    "perplexity": "perplexity (lower is better)",
    "perplexity_nats": "nats a token (lower is better)",
    "agreement_kl": "KL to the teacher, nats (lower is better)",
    "agreement_top1": "same first token as the teacher (higher is better)",
}


def write_report(record: RunRecord) -> None:
    """``report/`` with report.html, loss and comparison plots; whole or not at all."""
    with whole_folder(record.folder / "report") as folder:
        pictures = [_loss_plot(record, folder), _comparison_plot(record, folder)]
        write_text(folder / "report.html", _page(record, [name for name in pictures if name]))


def _axes(columns: int, size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return figure, axes


def _save(figure: Any, folder: Path, name: str) -> str:
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=150)
    return f"{name}.svg"


def _loss_plot(record: RunRecord, folder: Path) -> str | None:
    """The loss and each weighted term over steps."""
    rows = [row for row in read_metrics(record.folder / "metrics.jsonl") if "loss" in row]
    if len(rows) < 2:
        return None
    figure, (axis,) = _axes(1, (7, 4))
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["loss"] for row in rows], color=COLORS["student"], linewidth=2, label="loss")
    terms = sorted({key for row in rows for key in row if key.startswith("term_") and key.endswith("_weighted")})
    for key in terms if len(terms) > 1 else []:
        label = key.removeprefix("term_").removesuffix("_weighted")
        axis.plot(steps, [row.get(key) for row in rows], linewidth=1, label=f"{label} (weighted)")
    axis.set(xlabel="optimizer step", ylabel="loss a supervised token", title="Training loss")
    axis.legend(frameon=False)
    return _save(figure, folder, "loss")


def _comparison_plot(record: RunRecord, folder: Path) -> str | None:
    """One panel a metric, one bar a model."""
    names = [name for name in shown_metrics(record) if name in UNITS and name != "perplexity_nats"][:4]
    if not names:
        return None
    figure, axes = _axes(len(names), (4.2 * len(names), 4))
    for axis, name in zip(axes, names, strict=True):
        models = [model for model in ORDER if name in record.metrics.get(model, {})]
        values = [record.metrics[model][name] for model in models]
        bars = axis.bar(range(len(models)), values, color=[COLORS[model] for model in models])
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.set_xticks(range(len(models)), ["labels only" if model == "control" else model for model in models])
        if name == "perplexity" and min(values) > 0 and max(values) / min(values) > 20:
            axis.set_yscale("log")
        axis.set_title(UNITS[name], fontsize=10)
    return _save(figure, folder, "comparison")


def _page(record: RunRecord, pictures: list[str]) -> str:
    names = shown_metrics(record)
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    body = ""
    for model in ORDER:
        if model in record.metrics:
            cells = "".join(
                f"<td>{record.metrics[model][name]:.4g}</td>" if name in record.metrics[model] else "<td>–</td>" for name in names
            )
            body += f"<tr><th>{html.escape(TITLES[model])}</th>{cells}</tr>\n"
    images = "\n".join(f'<img src="{name}" alt="{Path(name).stem}">' for name in pictures)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Distillation report</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }}
tr > th:first-child {{ text-align: left }} img {{ max-width: 100%; margin: 1rem 0 }}
</style>
<h1>Distillation report</h1>
<p>{html.escape(verdict(record))}</p>
<p>Student {record.student_parameters:,} parameters, teacher {record.teacher_parameters:,}; {record.steps:,} steps
in {record.train_seconds:,.0f} seconds.</p>
<table><tr><th></th>{head}</tr>
{body}</table>
{images}
</html>
"""
