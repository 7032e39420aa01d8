"""Does distilling help on real, trained teachers? Student, labels-only control, untrained student and teacher on held-out text.

    DISTILY_DATA=path/to/data python benchmarks/real_models.py [--only demo] [--steps 2000] [--results benchmarks/results]

The demo pair needs nothing; the TinyStories teachers need DISTILY_DATA. Writes one Markdown page with every figure.
The student has one learning rate, the control the best of three by held-out perplexity: the comparison favours the control.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from distily import distill
from distily.card import metrics_table, verdict
from distily.environment import commit, machine, versions

RATES = [1e-3, 2e-3, 4e-3]


def pairs(data: Path | None) -> dict[str, dict[str, Any]]:
    """Configurations by name."""
    found: dict[str, dict[str, Any]] = {
        "demo": {
            "teacher": "demo",
            "student": {
                "config": {"num_hidden_layers": 2, "intermediate_size": 320},
                "copy": ["model.embed_tokens", "model.norm"],
            },
            "data": {"dataset": "demo", "max_length": 256},
        }
    }
    if data is not None:
        stories = {
            "dataset": str(data / "text/tinystories/train_head.parquet"),
            "eval_dataset": str(data / "text/tinystories/valid_head_stories.parquet"),
            "max_length": 512,
            "long_documents": "truncate",
            "append_eos": False,
        }
        for name, layers in (("stories260K", 2), ("TinyStories-656K", 1)):
            found[name] = {
                "teacher": str(data / "models" / name),
                "student": {"config": {"num_hidden_layers": layers}},
                "data": stories,
            }
    return found


def run(name: str, config: dict[str, Any], steps: int, rows: int, folder: Path) -> str:
    """One pair, as a section of the page."""
    began = time.perf_counter()
    record = distill(
        {
            **config,
            "objectives": ["forward_kl"],
            "control": {"learning_rates": RATES},
            "loggers": [],
            "train": {
                "max_steps": steps,
                "per_device_train_batch_size": rows,
                "per_device_eval_batch_size": 32,
                "learning_rate": RATES[1],
                "warmup_steps": steps // 20,
                "save_strategy": "no",
                "logging_steps": max(1, steps // 10),
            },
            "output_dir": str(folder / name),
        }
    )
    controls = ", ".join(f"{entry['learning_rate']:g}: {entry['metrics']['perplexity']:.4g}" for entry in record.control)
    share = record.student_parameters / record.teacher_parameters
    return f"""## {name}

{record.student_parameters:,} of {record.teacher_parameters:,} parameters ({share:.1%}); {steps:,} steps of {rows} sequences of at most
{config["data"]["max_length"]} tokens; {time.perf_counter() - began:,.0f} seconds for everything.

{metrics_table(record)}

{verdict(record)} Perplexity of the controls by learning rate: {controls}; the student's rate: {RATES[1]:g}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="name of one pair")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each training")
    parser.add_argument("--rows", type=int, default=16, help="sequences in a step")
    parser.add_argument("--results", type=Path, help="folder for real_models.md; nothing: print only")
    chosen = parser.parse_args()
    data = os.environ.get("DISTILY_DATA")
    available = pairs(Path(data) if data else None)
    if chosen.only and chosen.only not in available:
        sys.exit(f"--only: {chosen.only!r} is unknown or needs DISTILY_DATA; allowed: {', '.join(available)}.")
    with tempfile.TemporaryDirectory() as folder:
        names = [chosen.only] if chosen.only else list(available)
        sections = [run(name, available[name], chosen.steps, chosen.rows, Path(folder)) for name in names]
    described = machine()
    hardware = ", ".join(described.get("gpus", [])) or f"{described['cores']} CPU cores"
    page = (
        f"# Real teachers\n\nCommand: `python {' '.join(sys.argv)}`. Machine: {hardware}. Commit: {commit()}.\n"
        f"Versions: {', '.join(f'{name} {value}' for name, value in versions().items())}.\n"
        "One seed each. Held-out text: the demo's held-out modules; TinyStories validation, a story at a time, cut at 512 tokens.\n\n"
        + "\n".join(sections)
    )
    print(page)
    if chosen.results:
        (chosen.results / "real_models.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
