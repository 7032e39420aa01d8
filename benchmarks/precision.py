"""Does a student trained in 8 bits learn as much? Held-out KL and perplexity beside bf16's, after the same tokens.

    PYTHONPATH=.:plugins python benchmarks/precision.py [--minutes 6] [--precisions bf16 fp8 int8] --out benchmarks/results

Text: Python sources that are on this machine, the standard library's and PyTorch's, in an order drawn once; or --text FILE. Whole files
are held out, chosen by a hash of their name. The tokenizer is the demo's.
Teacher: a Llama of width 768 and 12 blocks, trained here on labels for 0.3 of the time, and not beyond three passes over the text,
with which it would learn it by heart. Student: half its blocks, copied, float32 weights; forward KL. All students see the same batches
of a seed; only `speed.precision` differs, which in 8 bits covers the student's forward and backward and the teacher's forward. Measured
is always the plain model, in bf16, against the plain teacher, whose weights are in bf16, so that fp8 covers its logits too.
The number of steps is the same for all, and what fits into --minutes, as a few steps of each precision take.

Writes precision.json and precision.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import Clocks, clocks_sentence, provenance, sentence
from transformers import AutoModelForCausalLM, LlamaConfig

from distily.assembly import Assembly, assemble
from distily.config import resolve
from distily.evaluation import measure
from distily.plugins import load
from distily.precision import UNITS, refusal
from distily.record import read_metrics
from distily.run import train
from distily.sources import DEMO

SHAPES = {
    "768": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
GRAPHS = "Speed, graphs: "
METRICS = {"agreement_kl": "held-out KL", "perplexity": "held-out perplexity", "agreement_top1": "same first token"}
TEACHER_SHARE, RESERVE = 0.3, 1.1
PASSES = 3
"""Of the teacher over its text, at most."""
PILOT, EVERY = 40, 10
HELD_OUT = 40
"""One file of so many is held out."""


# Text and models.


def write_text(folder: Path, megabytes: float) -> str:
    """Files of Python source as documents, some of them held out; in words, what they are."""
    import torch as package

    roots = {"the standard library": Path(sysconfig.get_paths()["stdlib"]), "PyTorch": Path(package.__file__).parent}
    files = []
    for root in roots.values():
        found = (path.relative_to(root) for path in root.rglob("*.py"))
        outside = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
        files += [(str(path), root / path) for path in sorted(found) if not outside & set(path.parts)]
    random.Random(0).shuffle(files)
    sizes, counts = {"train": 0, "heldout": 0}, {"train": 0, "heldout": 0}
    limits = {"train": megabytes * 1e6, "heldout": max(2e4, megabytes * 2e4)}
    with (folder / "train.jsonl").open("w", encoding="utf-8") as first, (folder / "heldout.jsonl").open("w") as second:
        for name, path in files:
            part = "train" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT else "heldout"
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) > 300 and sizes[part] < limits[part]:
                (first if part == "train" else second).write(json.dumps({"text": text}) + "\n")
                sizes[part] += len(text)
                counts[part] += 1
    told = ", ".join(f"{part} {counts[part]:,} files with {sizes[part] / 1e6:.1f} MB" for part in sizes)
    return f"Python sources of {' and '.join(roots)}: {told}"


def settings(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What all trainings here have in common."""
    data = {"dataset": str(folder / "train.jsonl"), "eval_dataset": str(folder / "heldout.jsonl")}
    if chosen.text:
        data = {"dataset": str(chosen.text), "eval_size": 0.02}
    return {
        "data": {**data, "max_length": chosen.length},
        "evaluators": ["perplexity", "agreement"],
        "loggers": [],
        "train": {
            "max_steps": PILOT,
            "per_device_train_batch_size": chosen.rows,
            "per_device_eval_batch_size": 32,
            "logging_steps": EVERY,
            "save_strategy": "no",
        },
        "output_dir": str(folder / "run"),
    }


def write_shape(shape: dict[str, int], length: int, folder: Path) -> None:
    """The teacher's shape with random weights, and the demo's tokenizer."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(DEMO / "teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape,
        vocab_size=len(words),
        max_position_embeddings=length,
        tie_word_embeddings=True,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words.save_pretrained(folder)


# Trainings.


class Trainings:
    """Trainings in one folder: each with steps, seconds a step, and what was measured after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def one(self, parts: Assembly, steps: int, rate: float, evaluate: bool = True) -> tuple[Any, dict[str, Any]]:
        """``(student, figures)`` of one training."""
        self.count += 1
        place = self.folder / f"training-{self.count}"
        place.mkdir()
        student, quantizer = parts.new_student()
        said: list[str] = []

        def say(line: str) -> None:
            print(line)
            said.append(line)

        train(parts, student, quantizer, parts.config.objectives, place, None, say, max_steps=steps, learning_rate=rate)
        rows = [row for row in read_metrics(place / "metrics.jsonl") if "train_seconds" in row]
        seconds = statistics.median(row["train_seconds"] for row in rows[1:] or rows) / EVERY
        figures: dict[str, Any] = {"steps": steps, "seconds a step": seconds, "losses": [row["loss"] for row in rows]}
        choices = [line for line in said if line.startswith(GRAPHS)]
        figures["graphs"] = "yes" if choices and not choices[-1].startswith(f"{GRAPHS}none") else "no"
        began = time.monotonic()
        if evaluate:
            figures |= measure(parts.evaluators, student, parts.context)
        figures["seconds to measure"] = time.monotonic() - began
        return student, figures


def teach(config: dict[str, Any], shape: dict[str, int], seconds: float, trainings: Trainings, folder: Path) -> dict[str, Any]:
    """A teacher from scratch on labels, saved to ``folder``; what it reached."""
    random_student = {"config": {"num_hidden_layers": shape["num_hidden_layers"]}, "initialize": "random"}
    started = {"teacher": str(folder), "student": random_student, "objectives": ["cross_entropy"]}
    parts = assemble(resolve({**config, **started}), load())
    began = time.monotonic()
    _, pilot = trainings.one(parts, PILOT, 1e-3, evaluate=False)
    left = seconds - (time.monotonic() - began)
    most = PASSES * len(parts.data.train) / parts.config.train["per_device_train_batch_size"]
    steps = max(PILOT, int(min(most, left / (RESERVE * pilot["seconds a step"]))) // EVERY * EVERY)
    student, figures = trainings.one(parts, steps, 1e-3)
    student.save_pretrained(folder)
    return figures


def compare(
    every: dict[str, Assembly], chosen: argparse.Namespace, trainings: Trainings, end: float
) -> tuple[int, list[dict[str, Any]]]:
    """Pilots, then every seed in every precision: ``(steps, the figures of each training)``."""
    pilots = {name: trainings.one(parts, PILOT, 5e-4, evaluate=False)[1] for name, parts in every.items()}
    _, last = trainings.one(next(iter(every.values())), EVERY, 5e-4)
    print({name: f"{1e3 * pilot['seconds a step']:.1f} ms a step" for name, pilot in pilots.items()}, flush=True)
    fixed = len(every) * (last["seconds to measure"] + 3.0)
    each = (end - time.monotonic()) / chosen.seeds - fixed
    steps = int(each / (RESERVE * sum(pilot["seconds a step"] for pilot in pilots.values()))) // EVERY * EVERY
    steps = max(EVERY, min(chosen.steps, steps))
    rows = []
    for seed in range(chosen.seeds):
        for name, parts in every.items():
            _, figures = trainings.one(replace(parts, config=replace(parts.config, seed=seed)), steps, 5e-4)
            rows.append({"precision": name, "seed": seed, **figures})
            told = ", ".join(f"{title} {figures[key]:.5g}" for key, title in METRICS.items() if key in figures)
            print(f"seed {seed}, {name}: {told}, {1e3 * figures['seconds a step']:.1f} ms a step", flush=True)
    return steps, rows


# The page.


def page(runs: Sequence[dict[str, Any]]) -> str:
    lines = ["# 8 bits beside bf16: what a student learns", "", "What is measured and how: `benchmarks/precision.py`.", ""]
    return "\n".join(lines + [line for run in runs for line in section(run)]).rstrip() + "\n"


def section(run: dict[str, Any]) -> list[str]:
    rows, teacher = run["rows"], run["teacher"]
    first = rows[0]["precision"]
    seeds = sorted({row["seed"] for row in rows})
    lines = [f"## Run of {run['provenance']['day']}, {1e3 * teacher['seconds a step']:.0f} ms a step of the teacher", ""]
    lines += [
        sentence(run["provenance"]),
        clocks_sentence(run["clocks"]),
        "",
        *(f"{name}: {reason}." for name, reason in run["absent"].items()),
    ]
    lines += [f"Text: {run['text']}. Data: {run['data']}."]
    lines += [
        f"Teacher: {run['parameters']['teacher']:,} parameters, {teacher['steps']:,} steps on labels, held-out perplexity "
        f"{teacher['perplexity']:.4g} (that of its last training batches {math.exp(teacher['losses'][-1]):.3g}). Students: "
        f"{run['parameters']['student']:,} parameters, {run['steps']:,} steps of "
        f"{run['batch'][0]} × {run['batch'][1]} tokens at most, {len(seeds)} seeds.",
        *(f"Loss, {name}: {way}." for name, way in run["loss"].items()),
        "",
        "| precision | " + " | ".join(METRICS.values()) + " | ms a step |",
        "|---" * (len(METRICS) + 2) + "|",
    ]
    by_precision = {
        name: [row for row in rows if row["precision"] == name] for name in dict.fromkeys(row["precision"] for row in rows)
    }
    for name, own in by_precision.items():
        cells = [_spread([row[key] for row in own]) for key in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} | {1e3 * statistics.median(row['seconds a step'] for row in own):.1f} |")
    lines += ["", "Mean ± standard deviation over the seeds.", ""]
    for name, own in by_precision.items():
        if name != first:
            lines += [f"**{name} − {first}, seed by seed: {_difference(own, by_precision[first])}.**", ""]
    lines += ["| seed | precision | " + " | ".join(METRICS.values()) + " | CUDA graphs |", "|---" * (len(METRICS) + 3) + "|"]
    for row in rows:
        cells = [str(row["seed"]), row["precision"], *(f"{row[key]:.5g}" for key in METRICS), row["graphs"]]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.5g}" + (f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else "")


def _difference(own: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], key: str = "agreement_kl") -> str:
    """Of the held-out KL in percent of the base's, with its standard error."""
    each = [100 * (mine[key] / other[key] - 1) for mine, other in zip(own, base, strict=True)]
    error = f" ± {statistics.stdev(each) / len(each) ** 0.5:.2f} (standard error)" if len(each) > 1 else ""
    return f"held-out KL {statistics.mean(each):+.2f} %{error}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="for everything")
    parser.add_argument("--precisions", nargs="+", help="the first is compared with; default: bf16, and fp8 or, without it, int8")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10**6, help="at most, for a student")
    parser.add_argument("--rows", type=int, default=32, help="sequences in a step")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shape", choices=list(SHAPES), default="768")
    parser.add_argument("--megabytes", type=float, default=16.0, help="of Python sources")
    parser.add_argument("--text", type=Path, help="a file of documents instead of Python sources; 2 %% of them are held out")
    parser.add_argument("--out", type=Path, help="folder for precision.json and .md; nothing: print only")
    return parser.parse_args()


def possible(wanted: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """Precisions that this machine has, and why it has not the others."""
    asked = list(wanted or ["bf16", "fp8" if refusal("fp8") is None else "int8"])
    absent = {name: reason for name in asked if name in UNITS and (reason := refusal(name))}
    return [name for name in asked if name not in absent], absent


def main() -> None:
    chosen, began = arguments(), time.monotonic()
    precisions, absent = possible(chosen.precisions)
    for name, reason in absent.items():
        print(f"{name}: absent, {reason}.", flush=True)
    shape = SHAPES[chosen.shape]
    with tempfile.TemporaryDirectory() as name, Clocks() as clocks:
        folder = Path(name)
        text = f"`{chosen.text}`" if chosen.text else write_text(folder, chosen.megabytes)
        write_shape(shape, chosen.length, folder / "teacher")
        config, trainings = settings(chosen, folder), Trainings(folder)
        teacher = teach(config, shape, 60 * chosen.minutes * TEACHER_SHARE, trainings, folder / "teacher")
        print(
            f"Teacher after {time.monotonic() - began:.0f} s: {teacher['steps']} steps, perplexity {teacher['perplexity']:.4g}",
            flush=True,
        )
        config |= {"teacher": {"model": str(folder / "teacher"), "dtype": "bfloat16"}, "objectives": ["forward_kl"]}
        config["student"] = {"config": {"num_hidden_layers": shape["num_hidden_layers"] // 2}}
        every = {name: assemble(resolve({**config, "speed": {"precision": name}}), load()) for name in precisions}
        steps, rows = compare(every, chosen, trainings, began + 60 * chosen.minutes)
        parts = every[precisions[0]]
        run = {
            "text": text,
            "data": "; ".join(f"{part}: {report}" for part, report in parts.data.report.items()),
            "parameters": {"teacher": parts.teacher.num_parameters(), "student": parts.new_student()[0].num_parameters()},
            "teacher": teacher,
            "steps": steps,
            "batch": [chosen.rows, chosen.length],
            "rows": rows,
            "loss": {name: each.speed.loss or "plain PyTorch" for name, each in every.items()},
            "absent": absent,
            "clocks": clocks.since(began),
            "provenance": provenance("torchao"),
        }
    written = page([run])
    print(f"{written}\nTook {time.monotonic() - began:.0f} s.", flush=True)
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "precision.json").write_text(json.dumps([run], indent=1), encoding="utf-8")
        (chosen.out / "precision.md").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
