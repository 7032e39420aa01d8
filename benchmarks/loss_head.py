"""The logit loss from last hidden states, forward and backward: Distily beside its peers, in one run.

    PYTHONPATH=.:plugins python benchmarks/loss_head.py [--case A B] [--tokens 8192] [--strongest] --out benchmarks/results

Every contender gets the same bf16 hidden states and heads and gives the mean loss and the gradients of student and head.

time      median of the repeats, by CUDA events, after as long a time of warming up, until the clock has settled at the power limit; two
          rounds, the second in reverse order. The heads are larger than the L2 cache.
products  the four matrix products that no exact loss avoids (both logits, both gradients) by torch.mm in bf16 on all tokens, in the
          same rounds; ratio = their time ÷ the whole loss's. Where V is no multiple of 64, also the same products with V padded to one:
          the aligned ceiling.
in turn   Distily's objectives once more, step by step in turn, so that all of them see the same clocks: time ÷ that of its forward_kl,
          the median of the repeats.
memory    the highest that was allocated in one forward and backward over what was before (inputs), so both gradients included.
error     ‖x − truth‖ ÷ ‖truth‖ of the loss and of both gradients; the truth is float32 without TF32. '!': above 5e-2.

Writes loss_head.json, from which loss_head_page.py makes the page and the plot.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from loss_head_contenders import PEERS, Contender, contenders
from loss_head_page import OURS, cell_lines, write
from loss_head_problem import CASES, Problem, Truth, draw, error, truth
from provenance import Clocks, provenance
from torch import Tensor

LEAST, MOST = 5, 200
ALIGNED = 64


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(calls: Sequence[Callable[[], Any]], seconds: float, device: torch.device) -> list[list[float]]:
    """Milliseconds of every call, in turn, over as many repeats as ``seconds`` allow, after as long a time to warm up."""
    synchronize(device)
    began, warm = time.perf_counter(), 0
    while warm < 2 or time.perf_counter() - began < seconds:
        for call in calls:
            call()
        warm += 1
        synchronize(device)
    repeats = max(LEAST, min(MOST, int(warm * seconds / (time.perf_counter() - began))))
    if device.type != "cuda":
        return [[_by_clock(call) for _ in range(repeats)] for call in calls]
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)] for _ in range(repeats)]
    for row in marks:
        row[0].record()
        for call, mark in zip(calls, row[1:], strict=True):
            call()
            mark.record()
    synchronize(device)
    return [[row[place].elapsed_time(row[place + 1]) for row in marks] for place in range(len(calls))]


def _by_clock(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


class Products:
    """The four products in bf16 on all tokens, with V as it is or padded to a multiple of 64."""

    def __init__(self, problem: Problem, vocabulary: int) -> None:
        more = vocabulary - problem.vocabulary
        padded = [
            torch.nn.functional.pad(each.detach().bfloat16(), (0, 0, 0, more)) for each in (problem.head, problem.teacher_head)
        ]
        head, teacher_head = padded
        student = problem.student.detach()
        self.parts: dict[str, Callable[[], Tensor]] = {
            "teacher": lambda: torch.mm(problem.teacher, teacher_head.T),
            "student": self._keep(lambda: torch.mm(student, head.T)),
            "dh": lambda: torch.mm(self.rows, head),
            "dW": lambda: torch.mm(self.rows.T, student),
        }

    def _keep(self, product: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def kept() -> Tensor:
            self.rows = product()  # stands for the gradient at the logits: random numbers of the same shape and type
            return self.rows

        return kept

    def measure(self, seconds: float, device: torch.device) -> dict[str, list[float]]:
        found = dict(zip(self.parts, times(list(self.parts.values()), seconds, device), strict=True))
        del self.rows
        return {"all": [sum(row) for row in zip(*found.values(), strict=True)], **found}


class Entry:
    """One contender on one problem: what it is right about, what it takes, how long."""

    def __init__(self, contender: Contender, problem: Problem, master: bool) -> None:
        self.contender, self.problem, self.master = contender, problem, master
        self.rounds: list[list[float]] = []
        self.facts: dict[str, Any] = {
            "name": contender.name, "objective": contender.objective, "flags": contender.flags, "strongest": contender.strongest
        }  # fmt: skip

    def step(self) -> Tensor:
        """One forward and backward. The gradients are at the leaves."""
        problem = self.problem
        problem.student.grad = problem.head.grad = None
        autocast = torch.autocast(problem.student.device.type, torch.bfloat16) if self.master else nullcontext()
        with autocast:
            loss = self.loss()
        loss.backward()
        return loss.detach()

    def check(self, expected: dict[str, Truth], entropy: float) -> None:
        """The first two steps: compilation, then memory and errors."""
        device = self.problem.student.device
        gc.collect()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # what a contender keeps between steps counts too
        self.loss = self.contender.prepare(self.problem)
        self.step()
        self.problem.student.grad = self.problem.head.grad = None
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = self.step()
        synchronize(device)
        if device.type == "cuda":
            self.facts["peak"] = torch.cuda.max_memory_allocated() - before
        names = self.contender.objective.split(" + ")
        value = sum(expected[name].value for name in names) + (entropy if self.contender.crossed else 0.0)
        gradients = [(self.problem.student.grad, "at_student"), (self.problem.head.grad, "at_head")]
        errors = [abs(found.item() - value) / abs(value)]
        for gradient, field in gradients:
            parts = [getattr(expected[name], field) for name in names]
            errors.append(error(gradient, reduce(torch.add, parts)))
        self.facts["errors"] = errors

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Runs a part of the measurement; where it fails, the reason stands in the contender's place."""
        if "failed" in self.facts:
            return
        try:
            action(*arguments)
        except torch.OutOfMemoryError:
            self.facts["failed"] = "out of memory"
        except Exception as reason:  # a stranger's code may raise anything; it is shown, not hidden
            self.facts["failed"] = f"{type(reason).__name__}: {(str(reason).strip().splitlines() or [''])[0]}"
            gc.collect()
        self.problem.student.grad = self.problem.head.grad = None
        if self.problem.student.device.type == "cuda":
            torch.cuda.empty_cache()

    def time(self, seconds: float) -> None:
        self.rounds += times([self.step], seconds, self.problem.student.device)

    def result(self) -> dict[str, Any]:
        if "failed" not in self.facts:
            self.facts.update(summary(self.rounds))
        return self.facts


def summary(rounds: list[list[float]]) -> dict[str, Any]:
    """Median of all repeats, that of each round, and how many there were."""
    every = [value for row in rounds for value in row]
    return {"ms": statistics.median(every), "rounds": [statistics.median(row) for row in rounds], "repeats": len(every)}


def in_turn(entries: Sequence[Entry], seconds: float, device: torch.device) -> dict[str, float]:
    """Of Distily's objectives: time ÷ that of the first, each repeat by itself."""
    own = [entry for entry in entries if entry.contender.name == OURS and "failed" not in entry.facts]
    if len(own) < 2:
        return {}
    first, *others = times([entry.step for entry in own], seconds * len(own), device)
    ratios = [statistics.median(mine / base for mine, base in zip(row, first, strict=True)) for row in others]
    return dict(zip((entry.contender.objective for entry in own[1:]), ratios, strict=True))


def cell(name: str, tokens: int, taking_part: Sequence[Contender], chosen: argparse.Namespace, clocks: Clocks) -> dict[str, Any]:
    """One case at one number of tokens."""
    case, device, began = CASES[name], torch.device(chosen.device), time.monotonic()
    torch.compiler.reset()
    problem = draw(case, tokens, chosen.seed, device, chosen.master)
    expected, seen = truth(problem)
    known = time.monotonic()
    entries = [Entry(contender, problem, chosen.master) for contender in taking_part]
    for entry in entries:
        entry.attempt(entry.check, expected, seen["teacher entropy"])
    expected.clear()
    sizes = {"products": case.vocabulary, "aligned": -(-case.vocabulary // ALIGNED) * ALIGNED}
    products = {key: Products(problem, size) for key, size in sizes.items() if key == "products" or size != case.vocabulary}
    measured: dict[str, dict[str, list[list[float]]]] = {key: {} for key in products}

    def floors() -> None:
        for key, each in products.items():
            for part, row in each.measure(chosen.seconds, device).items():
                measured[key].setdefault(part, []).append(row)

    contests = [partial(entry.attempt, entry.time, chosen.seconds) for entry in entries]
    half = len(contests) // 2
    actions = [floors, *contests[:half], floors, *contests[half:]]
    started = time.monotonic()
    for action in (*actions, *reversed(actions)):
        action()
    beside = in_turn(entries, chosen.seconds, device)
    return {
        "case": name,
        "title": case.title,
        "tokens": tokens,
        "master": chosen.master,
        "operations": case.operations(tokens),
        "inputs": seen,
        **{key: {part: summary(rows) for part, rows in parts.items()} for key, parts in measured.items()},
        "clocks": clocks.since(started),
        "rows": [entry.result() for entry in entries],
        "in turn": beside,
        "seconds": {"truth": known - began, "checks": started - known, "rounds": time.monotonic() - started},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in CASES if name != "tiny"]
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=usual, help=f"default: {' '.join(usual)}")
    parser.add_argument("--tokens", type=int, nargs="+", help="N; default: those of the case")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="contenders by name and objective, such as 'distily*' or '*, jsd'"
    )
    parser.add_argument("--strongest", action="store_true", help="of every library only its strongest forms")
    parser.add_argument("--seconds", type=float, default=0.4, help="for the repeats of one contender in one round")
    parser.add_argument("--quick", action="store_true", help="4096 tokens and a tenth of a second, unless given")
    parser.add_argument("--master", action="store_true", help="the student's head in float32, computed in bf16 (peers: autocast)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for loss_head.json, .md, .png and .svg; nothing: print only")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.tokens = chosen.tokens or [4096]
        chosen.seconds = min(chosen.seconds, 0.1)
    return chosen


def main() -> None:
    chosen = arguments()
    everyone, remarks = contenders()
    wanted = [each for each in everyone if each.strongest or not chosen.strongest]
    if chosen.only:
        wanted = [each for each in wanted if any(fnmatch.fnmatch(each.title, pattern) for pattern in chosen.only)]
    facts = provenance(*PEERS)
    run: dict[str, Any] = {"provenance": facts, "remarks": remarks, "cells": []}
    for name, remark in remarks.items():
        print(f"{name}: {remark}", flush=True)
    with Clocks() as clocks:
        for name in chosen.case:
            for tokens in chosen.tokens or CASES[name].tokens:
                measured = cell(name, tokens, wanted, chosen, clocks)
                run["cells"].append(measured)
                took = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in measured["seconds"].items())
                print("\n".join(cell_lines(measured)), f"\nTook: {took}.\n", flush=True)
                if chosen.out:
                    chosen.out.mkdir(parents=True, exist_ok=True)
                    (chosen.out / "loss_head.json").write_text(json.dumps([run], indent=1), encoding="utf-8")
    if chosen.out:
        write([run], chosen.out)


if __name__ == "__main__":
    main()
