"""What `distily train` costs over the bare step: data, logging, transformers' trainer, callbacks.

    PYTHONPATH=.:plugins python benchmarks/overhead.py [--case llama] [--weights float32] [--packing] --out benchmarks/results

A model folder, a tokenizer of the model's whole vocabulary and a text file whose documents fill their rows are written to a temporary
folder; from then on it is the command's own code: `assemble`, then `run.train`, logging every 10 steps to metrics.jsonl and the screen.
The bare step is that of step.py and of `distily benchmark speed`, on the first batch of the same data.

Order: bare, train, train, bare, all in one process, so that nothing is compiled twice. Train: seconds between two logs ÷ steps, as the
run itself logs them, without the first two intervals, in which is compiled and decided how a step runs; that covers everything between
two steps. Bare: wall time of half as many steps in a row as a training has, once that is decided, waiting once at their end.
Last, a run under cProfile: host milliseconds a step by what they were spent on; a host that is ahead of the device costs nothing
until it has to wait.

Writes overhead.json and overhead.md.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import Clocks, clocks_sentence, provenance, sentence
from step_problem import CASES, Case

from distily.assembly import Assembly, assemble
from distily.bare import BareTraining
from distily.batch import moved
from distily.benchmark import synchronize
from distily.config import resolve
from distily.plugins import load
from distily.record import read_metrics
from distily.run import train

EVERY, DECIDED = 10, 2
"""Steps between two logs; and how many such intervals a training begins with before its steps are all alike."""
PARTS = {
    "batches: sequences, collator, pinning, copy to the device": ("trainer.py", "get_batch_samples"),
    "loss: teacher, student, driver": ("trainer.py", "compute_loss"),
    "backward": ("accelerator.py", "backward"),
    "clipping": ("accelerator.py", "clip_grad_norm_"),
    "optimizer": ("optimizer.py", "step"),
    "learning rate": ("scheduler.py", "step"),
    "zeroing gradients": ("module.py", "zero_grad"),
    "callbacks": ("trainer_callback.py", "call_event"),
    "logging, with the wait for the device": ("trainer.py", "_maybe_log_save_evaluate"),
}
"""Functions of transformers, accelerate and Distily by file and name; their time includes what they call."""


def write_inputs(case: Case, rows: int, folder: Path) -> None:
    """A teacher of random weights with a tokenizer of one word a token, and documents of exactly a row's length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    teacher, _ = case.models(torch.bfloat16, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    teacher.save_pretrained(folder / "teacher")
    words = Tokenizer(models.WordLevel({str(number): number for number in range(case.vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0").save_pretrained(folder / "teacher")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", rows), ("heldout", 2)):
        drawn = torch.randint(1, case.vocabulary, (count, case.length), generator=generator).tolist()
        lines = (json.dumps({"text": " ".join(map(str, row))}) for row in drawn)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepared(case: Case, chosen: argparse.Namespace, folder: Path) -> Assembly:
    """What `distily train` would put together."""
    write_inputs(case, case.rows * chosen.steps, folder)
    config = resolve(
        {
            "teacher": {"model": str(folder / "teacher"), "dtype": "bfloat16"},
            "student": {"config": {"num_hidden_layers": case.student}, "dtype": chosen.weights},
            "data": {
                "dataset": str(folder / "train.jsonl"),
                "eval_dataset": str(folder / "heldout.jsonl"),
                "max_length": case.length,
                "append_eos": False,
                "packing": chosen.packing,
            },
            "objectives": ["forward_kl"],
            "train": {
                "max_steps": chosen.steps,
                "per_device_train_batch_size": case.rows,
                "learning_rate": 1e-5,
                "logging_steps": EVERY,
                "save_strategy": "no",
            },
            "output_dir": str(folder / "run"),
        }
    )
    return assemble(config, load())


class Runs:
    """Bare steps and trainings of one student, by turns."""

    def __init__(self, parts: Assembly, steps: int, folder: Path) -> None:
        self.parts, self.steps, self.folder = parts, steps, folder
        self.student, self.quantizer = parts.new_student()
        self.times: dict[str, list[float]] = {"bare": [], "train": []}

    def bare(self) -> None:
        """Milliseconds of a step, twice."""
        parts, size = self.parts, self.parts.config.train["per_device_train_batch_size"]
        batch = moved(parts.data.collator([parts.data.train[place] for place in range(size)]), parts.device)
        training = BareTraining(parts.config, parts.plugins, self.student, parts.teacher, parts.vocabulary, [batch])
        with training.applied:
            for _ in range(3):
                training.step()
            training.settle()
            for _ in range(2):
                synchronize(parts.device)
                began = time.perf_counter()
                for _ in range(self.steps // 2):
                    training.step()
                synchronize(parts.device)
                self.times["bare"].append(1e3 * (time.perf_counter() - began) / (self.steps // 2))
        training.close()

    def train(self) -> None:
        """Milliseconds of a step in each interval between two logs, once it is decided how it runs."""
        place = self.folder / f"run-{len(list(self.folder.glob('run-*')))}"
        place.mkdir()
        train(self.parts, self.student, self.quantizer, self.parts.config.objectives, place, None)
        intervals = [row["train_seconds"] for row in read_metrics(place / "metrics.jsonl") if "train_seconds" in row]
        self.times["train"] += [1e3 * seconds / EVERY for seconds in intervals[DECIDED:]]

    def profile(self) -> dict[str, Any]:
        """Host milliseconds a step: of ``PARTS``, and of the functions with the most of their own."""
        profiler = cProfile.Profile()
        kept = list(self.times["train"])
        profiler.enable()
        self.train()
        profiler.disable()
        self.times["train"] = kept  # these were slowed down
        stats: dict[Any, Any] = pstats.Stats(profiler, stream=sys.stderr).stats  # type: ignore[attr-defined]
        found = {name: _cumulative(stats, *place) / self.steps for name, place in PARTS.items()}
        own = sorted(stats.items(), key=lambda item: -item[1][2])[:12]
        return {
            "parts": found,
            "own": [(f"{Path(file).name}:{line} {name}", 1e3 * row[2] / self.steps) for (file, line, name), row in own],
        }


def _cumulative(stats: dict[Any, Any], ending: str, name: str) -> float:
    """Milliseconds in the functions ``name`` of files with that name, the outermost of a chain of overrides counted."""
    same = {key: row for key, row in stats.items() if key[2] == name and Path(key[0]).name == ending}
    return 1e3 * sum(row[3] for row in same.values() if not any(caller in same for caller in row[4]))


def page(run: dict[str, Any]) -> str:
    times = run["ms"]
    bare, whole = (statistics.median(times[name]) for name in ("bare", "train"))
    lines = ["# `distily train` over the bare step", "", "What is measured and how: `benchmarks/overhead.py`.", ""]
    lines += [sentence(run["provenance"]), clocks_sentence(run["clocks"]), ""]
    lines += [f"{run['like']}; {run['rows']} × {run['length']:,} tokens, weights {run['weights']}, {run['packing']}.", ""]
    lines += ["| | ms a step, median | lowest–highest | measured |", "|---|---|---|---|"]
    for name, each in times.items():
        lines.append(f"| {name} | {statistics.median(each):.2f} | {min(each):.2f}–{max(each):.2f} | {len(each)} times |")
    lines += ["", f"**Over the bare step: {whole - bare:+.2f} ms, {100 * (whole / bare - 1):+.2f} %.**", ""]
    return "\n".join([*lines, *host(run["profile"])]) + "\n"


def host(profiled: dict[str, Any] | None) -> list[str]:
    if profiled is None:
        return []
    lines = ["Host time in the training loop under cProfile, which slows Python down:", "", "| | host ms a step |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in profiled["parts"].items()]
    lines.append("")
    lines += ["Functions with the most host time of their own, the start of the training included:", ""]
    lines += ["| function | host ms a step |", "|---|---|"]
    return [*lines, *(f"| `{name}` | {value:.2f} |" for name, value in profiled["own"])]


def save(run: dict[str, Any], folder: Path | None) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "overhead.json").write_text(json.dumps([run], indent=1), encoding="utf-8")
        (folder / "overhead.md").write_text(page(run), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), default="llama")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of a training, a multiple of 10, at least 30")
    parser.add_argument("--weights", choices=["bfloat16", "float32"], default="bfloat16", help="the student's")
    parser.add_argument("--packing", action="store_true", help="data.packing: the same rows, by position_ids instead of a mask")
    parser.add_argument("--out", type=Path, help="folder for overhead.json and .md; nothing: print only")
    chosen = parser.parse_args()
    least = (DECIDED + 1) * EVERY
    if chosen.steps < least or chosen.steps % EVERY:
        parser.error(f"--steps: {chosen.steps} is not allowed; allowed: a multiple of {EVERY}, at least {least}")
    case, began = CASES[chosen.case], time.monotonic()
    with tempfile.TemporaryDirectory() as name, Clocks() as clocks:
        parts = prepared(case, chosen, Path(name))
        print(f"Prepared after {time.monotonic() - began:.0f} s.", flush=True)
        runs, started = Runs(parts, chosen.steps, Path(name)), time.monotonic()
        for action in (runs.bare, runs.train, runs.train, runs.bare):
            action()
            print({key: [round(value, 2) for value in each] for key, each in runs.times.items()}, flush=True)
        run = {
            "like": case.like,
            "rows": case.rows,
            "length": case.length,
            "weights": chosen.weights,
            "packing": "packed" if chosen.packing else "not packed",
            "ms": runs.times,
            "profile": None,
            "clocks": clocks.since(started),
            "provenance": provenance(),
        }
        save(run, chosen.out)
        run["profile"] = runs.profile()
    save(run, chosen.out)
    print(f"{page(run)}\nTook {time.monotonic() - began:.0f} s.", flush=True)


if __name__ == "__main__":
    main()
