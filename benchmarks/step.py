"""A whole optimizer step of distillation, from token ids to new weights: Distily beside its peers, in one run.

    PYTHONPATH=.:plugins python benchmarks/step.py [--case llama] [--only 'distily*'] --out benchmarks/results

Teacher 1.24B and student 0.75B of random weights, 8 × 2,048 random tokens, the same ones for all; every contender starts from the
same weights. Teacher's forward, student's forward and backward, the loss, clipping, and the fused AdamW. --case small: 135M and 81M,
8 × 512 tokens, a step in which the device waits for the host.

time      median of the repeats, by CUDA events, without waiting between steps unless the contender itself waits; two rounds, the
          second in reverse order, each from fresh models, after two steps to warm up, of small models twelve; ours after as many as
          it may take to decide how a step runs.
MFU       operations that the step must do (step_problem.py) ÷ time ÷ ceiling; the ceiling is the best rate of a block's product in
          bf16, measured at the start. Above 1 is possible in 8 bits.
memory    the highest of a round after warming up: allocated, with what CUDA graphs keep, and reserved by the allocator. Weights,
          gradients, optimizer included. torch.compile's graphs stay after a round; what they keep is taken off from the next ones,
          also from a later contender that computes in it, so of two by reduce-overhead the second one shows too little.
loss      of the first step and of the last one of a round.
first     seconds of the first step of round 1, with whatever is compiled in it.

Writes step.json, from which step_page.py makes the page and the plot.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from provenance import Clocks, provenance
from step_contenders import Contender, contenders
from step_page import row_line, work, write
from step_problem import CASES, Case, rate_of_products

from distily import memory
from distily.benchmark import Stopwatch, synchronize

PACKAGES = ("trl", "liger-kernel", "torchao")
FIRST_ROUND = 0.65
"""Share of the time for round 1, which also compiles."""


def round_of(contender: Contender, case: Case, repeats: int, device: torch.device) -> dict[str, Any]:
    """Fresh models, a few steps to warm up, then ``repeats`` timed ones."""
    clear(device)
    kept = memory.kept_by_graphs() if device.type == "cuda" else 0  # of contenders before, by torch.compile
    before = torch.cuda.memory_allocated() + kept if device.type == "cuda" else 0
    with contender.opened(case, device) as step:
        began = time.perf_counter()
        losses = [step()]
        synchronize(device)
        found: dict[str, Any] = {"first seconds": time.perf_counter() - began}
        losses += [step() for _ in range(max(case.warm, contender.warm) - 1)]
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        watch = Stopwatch(device)
        for _ in range(repeats):
            watch.mark("step")
            losses.append(step())
            watch.mark("step, done")
        synchronize(device)
        found["ms"] = watch.between("step", "step, done")
        found["losses"] = [float(loss) for loss in losses]
        if device.type == "cuda":
            found |= {
                "peak": torch.cuda.max_memory_allocated() + memory.kept_by_graphs() - before,
                "reserved": torch.cuda.max_memory_reserved() - kept,
                "left": before,
            }
    if not all(map(math.isfinite, found["losses"])):
        raise ArithmeticError(f"losses {found['losses'][0]} … {found['losses'][-1]}")
    return found


def clear(device: torch.device) -> None:
    """Nothing of the contender before stays."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(row: dict[str, Any], contender: Contender, case: Case, chosen: argparse.Namespace, device: torch.device) -> None:
    """Adds a round to the row; where it fails, the reason stands in its place."""
    try:
        row["rounds"].append(round_of(contender, case, chosen.repeats, device))
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except Exception as reason:  # a stranger's code may raise anything; it is shown, not hidden
        row["failed"] = f"{type(reason).__name__}: {(str(reason).strip().splitlines() or [''])[0][:300]}"
    rounds = row["rounds"]
    if rounds and "failed" not in row:
        row["ms"] = statistics.median([value for each in rounds for value in each["ms"]])
        row["medians"] = [statistics.median(each["ms"]) for each in rounds]
        row["peak"], row["reserved"] = (max(each.get(key, 0) for each in rounds) for key in ("peak", "reserved"))
        row["losses"] = [rounds[0]["losses"][0], rounds[0]["losses"][-1]]
        row["first seconds"] = rounds[0]["first seconds"]


def compare(case: Case, taking_part: list[Contender], chosen: argparse.Namespace, run: dict[str, Any], clocks: Clocks) -> None:
    """Adds both rounds of all contenders to ``run``, as far as the time goes; the first ones in the list first."""
    device, began, started = torch.device(chosen.device), time.monotonic(), chosen.started
    run |= {"case": chosen.case, "like": case.like, "rows": case.rows, "length": case.length, "operations": case.operations}
    run |= {"rate": rate_of_products(case, device), "repeats": chosen.repeats}
    print(work(run), flush=True)
    told = run["table"] = [
        {"name": each.name, "objective": each.objective, "weights": each.weights, "flags": each.flags, "rounds": []}
        for each in taking_part
    ]
    pairs = list(zip(told, taking_part, strict=True))

    def turn(name: str, row: dict[str, Any], contender: Contender) -> None:
        since = time.monotonic()
        attempt(row, contender, case, chosen, device)
        row.setdefault("took", time.monotonic() - since)
        print(f"{name}:", row_line(row, run), flush=True)
        run["seconds"], run["clocks"] = time.monotonic() - began, clocks.since(began)
        save(run, chosen.out)

    for row, contender in pairs:
        if time.monotonic() - started > chosen.limit * FIRST_ROUND:
            row["failed"] = "not run: the time was over"
        else:
            turn("round 1", row, contender)
    again = [(row, contender) for row, contender in reversed(pairs) if "failed" not in row]
    for place, (row, contender) in enumerate(again):
        needed = sum(each["took"] - each["first seconds"] for each, _ in again[place:])  # the first in the list come last
        if time.monotonic() - started + needed < chosen.limit or place == len(again) - 1:
            turn("round 2", row, contender)


def save(run: dict[str, Any], folder: Path | None) -> None:
    """What is known so far, as JSON."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.json").write_text(json.dumps([run], indent=1), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), default="llama")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="contenders by name, objective and weights, such as 'distily*'"
    )
    parser.add_argument("--repeats", type=int, default=6, help="timed steps in a round")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which nothing new is started")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for step.json, .md, .png and .svg; nothing: print only")
    chosen = parser.parse_args()
    chosen.started = time.monotonic()
    return chosen


def main() -> None:
    chosen = arguments()
    everyone, remarks = contenders()
    wanted = [each for each in everyone if any(fnmatch.fnmatch(each.title, pattern) for pattern in chosen.only or ["*"])]
    for name, remark in remarks.items():
        print(f"{name}: {remark}", flush=True)
    run: dict[str, Any] = {"provenance": provenance(*PACKAGES), "remarks": remarks}
    with Clocks() as clocks:
        compare(CASES[chosen.case], wanted, chosen, run, clocks)
    if chosen.out:
        write([run], chosen.out)
    print(f"Took {run['seconds']:.0f} s.")


if __name__ == "__main__":
    main()
