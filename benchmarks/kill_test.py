"""Kill a run with SIGKILL, give the same command with ``--resume``, and compare the student's weights bit for bit.

One uninterrupted run in a process of its own is the reference. Then a tiny run is killed at chosen places (in the middle of a
checkpoint, an evaluation, the control, the export …) and at random instants; every one is resumed to its end, and so is one
run that is killed again and again::

    python benchmarks/kill_test.py --random 20 --seed 0 --out benchmarks/results/kill_test.md

Killed and resumed runs are forked from a process that has imported everything and run nothing, so that a run costs seconds and
every instant drawn falls into the run, none into its imports. Each has data caches of its own. Exit code 0: every student has
the reference's SHA-256, and the record its metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
STEPS, SAVE, EVALUATE = 12, 3, 4
CHECKPOINTS = STEPS // SAVE
CONFIG: dict[str, Any] = {
    "teacher": "demo",
    "student": {
        "config": {
            "num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3,
            "intermediate_size": 192, "attention_dropout": 0.1,
        },
    },
    "data": {"dataset": "demo", "max_length": 64, "samples": 6, "eval_samples": 3},
    "objectives": [
        "forward_kl",
        {"name": "cosine", "mapper": {"name": "last_k", "k": 1}, "projector": {"name": "linear", "bias": True}, "weight": 0.5},
        {"name": "adaptive_target", "weight": 0.5},
    ],
    "combiner": {"name": "gradient_weighted"},
    "control": True,
    "train": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": STEPS, "save_steps": SAVE,
        "eval_strategy": "steps", "eval_steps": EVALUATE, "logging_steps": 1, "save_total_limit": 2, "learning_rate": 2.0e-3,
        "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2,
    },
}  # fmt: skip
"""An epoch and a half with dropout, accumulation, a projector, a target and a combiner that adapt, and a rate that never is zero: whatever
a resume loses shows."""


TRAINER = "transformers:Trainer"


# ------------------------------------------------------------------- dying on the spot


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def replaced(target: str, make: Callable[[Any], Any]) -> None:
    """Puts ``make(original)`` in the place of ``module:name.name``; a module on the way is replaced for its owner alone."""
    module, _, path = target.partition(":")
    owner: Any = sys.modules[module]
    *outer, name = path.split(".")
    for part in outer:
        inner = getattr(owner, part)
        if isinstance(inner, ModuleType):
            inner = SimpleNamespace(**vars(inner))
            setattr(owner, part, inner)
        owner = inner
    setattr(owner, name, make(getattr(owner, name)))


def at_call(target: str, call: int, instead: Callable[..., None], when: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Runs ``instead(original, …)`` for the ``call``-th call of ``target`` with such arguments."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += when(*arguments, **keywords)
            if calls == call:
                return instead(original, *arguments, **keywords)
            return original(*arguments, **keywords)

        return wrapper

    replaced(target, make)


def before(target: str, call: int = 1, **when: Any) -> Callable[[], None]:
    """Dies when ``target`` is called for the ``call``-th time, before it does anything."""
    return lambda: at_call(target, call, die, **when)


def after(target: str, call: int = 1, **when: Any) -> Callable[[], None]:
    """Dies when the ``call``-th call of ``target`` returns."""

    def instead(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        original(*arguments, **keywords)
        die()

    return lambda: at_call(target, call, instead, **when)


def interrupted(number: int, step: int) -> Callable[[], None]:
    """Sends this process a signal at the beginning of a training step, as Ctrl-C or a cluster does."""

    def instead(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    return lambda: at_call(f"{TRAINER}.training_step", step, instead)


def cut_weights() -> None:
    """Dies with half of a checkpoint's weights in their file."""

    def instead(original: Any, trainer: Any, folder: str) -> None:
        file = Path(folder) / "model.safetensors"
        os.truncate(file, file.stat().st_size // 2)
        die()

    at_call(f"{TRAINER}._save_optimizer_and_scheduler", 2, instead)


def cut_rotation(call: int) -> None:
    """Dies with an old checkpoint removed in part."""

    def instead(original: Any, folder: Path) -> None:
        for file in sorted(folder.iterdir())[:3]:
            file.unlink()
        die()

    at_call("distily.checkpoints:shutil.rmtree", call, instead)


def cut_line() -> None:
    """Dies in the middle of a line of ``metrics.jsonl``."""

    def instead(original: Any, logger: Any, *_: Any, **__: Any) -> None:
        with logger.path.open("a", encoding="utf-8") as stream:
            stream.write('{"step": 5, "lo')
        die()

    at_call("distily.record:MetricsFile.on_log", 6, instead)


@dataclass(frozen=True)
class Place:
    """A place to die at: ``prepare`` patches the process that is about to run."""

    name: str
    prepare: Callable[[], None]
    status: int = -signal.SIGKILL


PLACES = [
    Place("data: while the text is written to the cache", after("datasets.arrow_writer:ArrowWriter.write_table", 1)),
    Place("data: while sequences are written to the cache", after("datasets.arrow_writer:ArrowWriter.write_batch", 2)),
    Place("start: configuration written, no record yet", before("distily.record:RunRecord.save", 1)),
    Place("start: teacher measured, record not saved", after("distily.run:measure", 1)),
    Place("checkpoint: half of the weights written", cut_weights),
    Place("checkpoint: no trainer_state.json yet", before("transformers.trainer_callback:TrainerState.save_to_json", 2)),
    Place("checkpoint: complete, not sealed", before("distily.checkpoints:seal", 3)),
    Place("checkpoint: manifest not in place", before("distily.checkpoints:write_json", 3)),
    Place("checkpoint: old one removed in part", lambda: cut_rotation(1)),
    Place("checkpoint: last one, an old one removed in part", lambda: cut_rotation(CHECKPOINTS - 2)),
    Place("training: between two steps", before(f"{TRAINER}.training_step", 2 * 8)),
    Place("training: in a line of metrics.jsonl", cut_line),
    Place("training: SIGINT", interrupted(signal.SIGINT, 2 * 8), status=130),
    Place("training: SIGTERM in the first step", interrupted(signal.SIGTERM, 1), status=130),
    Place("evaluation during training", before("distily.trainer:measure", 2)),
    Place("evaluation after training", before("distily.run:measure", 3)),
    Place("control: between two steps", before(f"{TRAINER}.training_step", 2 * (STEPS + 8))),
    Place("control: SIGINT", interrupted(signal.SIGINT, 2 * (STEPS + 8)), status=130),
    Place("control: checkpoint not sealed", before("distily.checkpoints:seal", CHECKPOINTS + 2)),
    Place("control: measured, record not saved", after("distily.run:measure", 4)),
    Place("control: recorded, its checkpoints not removed", before("distily.run:shutil.rmtree", 1)),
    Place("export: weights written, tokenizer not", after("transformers:PreTrainedModel.save_pretrained", 2 * CHECKPOINTS + 1)),
    Place(
        "export: complete, not in place",
        before("distily.files:Path.replace", when=lambda path, _: path.name == "student.partial"),
    ),
    Place("export: in place, no report yet", before("distily.run:write_report", 1)),
    Place("export: in place, record not saved", after("distily.run:write_report", 1)),
]


# ----------------------------------------------------------------------------- runs


@dataclass
class Life:
    """A run's folder with its caches and the command that (re)starts it."""

    folder: Path
    config: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def command(self) -> list[str]:
        return ["train", str(self.config), "--output-dir", str(self.run)]

    @property
    def environment(self) -> dict[str, str]:
        return {"DISTILY_CACHE": str(self.folder / "distily"), "HF_DATASETS_CACHE": str(self.folder / "datasets")}

    def fork(self, *, resume: bool, prepare: Callable[[], None] | None = None) -> int:
        """The command in a child of this process; gives its id."""
        self.folder.mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            import datasets

            import distily.cli

            os.environ.update(self.environment)
            datasets.config.HF_DATASETS_CACHE = Path(self.environment["HF_DATASETS_CACHE"])
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if prepare is not None:
                prepare()
            distily.cli.main([*self.command, *(["--resume"] if resume else [])], prog_name="distily", standalone_mode=False)
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def finish(self) -> float:
        """Resumes until the run is done; gives the seconds. Raises where it fails."""
        began = time.perf_counter()
        status = wait(self.fork(resume=True))
        if status != 0:
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise RuntimeError(f"--resume ended with {status}:\n{tail}")
        return time.perf_counter() - began

    def state(self) -> str:
        """What a resume will find: the phases done and the newest sealed checkpoint."""
        from distily.checkpoints import folders, is_whole, step_of

        with contextlib.suppress(OSError, ValueError):
            done = json.loads((self.run / "record.json").read_text(encoding="utf-8"))["done"]
            where = "control/0" if "student" in done else "."
            steps = [step_of(entry) for entry in folders(self.run / where) if is_whole(entry)]
            if "control" in done:
                return "complete" if "export" in done else "export"
            return f"{'control' if where != '.' else 'student'} step {max(steps, default=0)}"
        return "nothing"


def wait(child: int) -> int:
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> bool:
    """Waits and kills; whether the child was still there."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(min(0.005, left))
    os.kill(child, signal.SIGKILL)
    return wait(child) == -signal.SIGKILL


# -------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Outcome:
    """What must be equal, however often a run was killed."""

    weights: str
    metrics: str
    steps: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, run: Path) -> Outcome:
        from distily.record import read_metrics

        record = json.loads((run / "record.json").read_text(encoding="utf-8"))
        measured = json.dumps([record["metrics"], record["control"], record["steps"], record["done"]])
        rows = [row for place in (".", "control/0") for row in read_metrics(run / place / "metrics.jsonl")]
        return cls(
            hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest(),
            measured,
            tuple((row["step"], row["loss"]) for row in rows if "loss" in row),
        )

    def differences(self, other: Outcome) -> list[str]:
        names = {"weights": "weights", "metrics": "metrics in record.json", "steps": "losses in metrics.jsonl"}
        return [title for name, title in names.items() if getattr(self, name) != getattr(other, name)]


def leftovers(run: Path) -> list[str]:
    """Half-written and half-removed things in a finished run."""
    from distily.checkpoints import folders, is_whole

    found = [
        *run.rglob("*.partial"),
        *run.glob("control/*/checkpoint-*"),
        *(entry for entry in folders(run) if not is_whole(entry)),
    ]
    return [str(entry.relative_to(run)) for entry in found]


@dataclass(frozen=True)
class Row:
    """One killed run."""

    name: str
    found: str
    seconds: float
    weights: str
    problems: list[str]

    def __str__(self) -> str:
        verdict = "; ".join(self.problems) if self.problems else "equal"
        return f"{self.name:<55} resumed from {self.found:<17} {self.seconds:5.1f} s  {self.weights[:12]}  {verdict}"


class Test:
    """The reference and the kills against it."""

    def __init__(self, folder: Path) -> None:
        import yaml

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
        self.rows: list[Row] = []

    def life(self, name: str) -> Life:
        return Life(self.folder / name, self.config)

    def measure_reference(self, *, own_process: bool) -> None:
        """The uninterrupted run: in a new process as anyone would start it, and forked for the seconds that it takes."""
        if own_process:
            life = self.life("reference")
            life.folder.mkdir()
            environment = {**os.environ, **life.environment}
            subprocess.run([sys.executable, "-m", "distily", *life.command], check=True, env=environment, capture_output=True)
            self.reference = Outcome.of(life.run)
        life = self.life("forked")
        began = time.perf_counter()
        if wait(life.fork(resume=False)) != 0:
            raise RuntimeError(f"the uninterrupted run failed:\n{life.log.read_text(encoding='utf-8')[-3000:]}")
        self.duration = time.perf_counter() - began
        forked = Outcome.of(life.run)
        if own_process and forked.differences(self.reference):
            raise RuntimeError(f"two uninterrupted runs differ in {', '.join(forked.differences(self.reference))}")
        self.reference = forked

    def compare(self, name: str, life: Life, found: str) -> None:
        """Resumes a killed run and notes what came of it."""
        weights, seconds = "-", 0.0
        try:
            seconds = life.finish()
            outcome = Outcome.of(life.run)
            weights = outcome.weights
            problems = [f"{entry} differ" for entry in outcome.differences(self.reference)]
            problems += [f"left behind: {entry}" for entry in leftovers(life.run)]
        except (RuntimeError, OSError) as error:
            problems = [str(error)]
        row = Row(name, found, seconds, weights, problems)
        self.rows.append(row)
        print(row, flush=True)
        if not problems:
            shutil.rmtree(life.folder)

    def at(self, place: Place) -> None:
        life = self.life(re.sub(r"\W+", "-", place.name))
        status = wait(life.fork(resume=False, prepare=place.prepare))
        if status != place.status:
            self.rows.append(Row(place.name, "-", 0.0, "-", [f"was not reached (exit code {status})"]))
            print(self.rows[-1], flush=True)
            return
        self.compare(place.name, life, life.state())

    def at_instant(self, number: int, draw: random.Random) -> None:
        for attempt in range(10):
            seconds = draw.uniform(0, self.duration)
            life = self.life(f"random-{number}-{attempt}")
            if kill_after(life.fork(resume=False), seconds):
                self.compare(f"random {number}: at {seconds:.2f} of {self.duration:.2f} s", life, life.state())
                return
        raise RuntimeError("the run ended before it could be killed, ten times")

    def again_and_again(self, kills: int, draw: random.Random) -> None:
        """Each life of one run is killed within a third of a second after it got further than the one before."""
        life = self.life("many")
        found = [life.state()]
        for _ in range(kills):
            child = life.fork(resume=len(found) > 1)
            while life.state() == found[-1] and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.01)
            if not kill_after(child, draw.uniform(0, 0.3)):
                break
            found.append(life.state())
        self.compare(f"one run, killed {len(found) - 1} times", life, ", ".join(found[1:]))


def write(path: Path, test: Test, arguments: argparse.Namespace, seconds: float) -> None:
    """The results as Markdown."""
    from distily.environment import commit, machine, versions

    described, packages = machine(), versions()
    names = [name for name in ("python", "torch", "transformers", "accelerate", "datasets") if name in packages]
    shown = ", ".join(f"{name} {packages[name]}" for name in names)
    good = sum(not row.problems for row in test.rows)
    options = f"--random {arguments.random} --lives {arguments.lives} --seed {arguments.seed} --out {arguments.out}"
    lines = [
        "# Kill test",
        "",
        "A run stopped by SIGKILL (or a signal that is named) and resumed with the same command and `--resume`, against the",
        "uninterrupted run.",
        "",
        f"**{good} of {len(test.rows)} stopped runs ended with the uninterrupted run's `model.safetensors`, bit for bit,**",
        "with its metrics in `record.json`, with its losses in `metrics.jsonl`, and with nothing half-written left behind.",
        "",
        "```",
        f"python benchmarks/kill_test.py {options}",
        "```",
        "",
        f"{time.strftime('%Y-%m-%d')}; {described['cores']} CPU cores ({described['processor']}), one thread a run; {shown};",
        f"commit {commit() or 'unknown'}; {seconds:.0f} s in all.",
        "",
        "The run: the demo teacher and text, a student of two blocks of width 96 with attention dropout, forward KL and a cosine",
        f"term with a trained projector, {STEPS} steps of 2 × 4 sequences over an epoch and a half, a checkpoint every {SAVE}",
        f"steps of which 2 are kept, an evaluation every {EVALUATE}, and a labels-only control. Uninterrupted it takes",
        f"{test.duration:.1f} s without imports. Its weights, in a process of its own and forked, have the SHA-256",
        f"`{test.reference.weights}`.",
        "",
        "Killed runs are forked from a process that imported everything and ran nothing; each has data caches of its own. Named",
        "places are reached by patching the function at which the process sends itself the signal; random instants are uniform",
        "over the uninterrupted run's duration, drawn again where the run had ended before.",
        "",
        "| stopped at | resumed from | seconds to finish | SHA-256 | against the uninterrupted run |",
        "|---|---|---:|---|---|",
    ]
    for row in test.rows:
        verdict = "; ".join(row.problems).replace("\n", " ").replace("|", "\\|") or "equal"
        lines.append(f"| {row.name} | {row.found} | {row.seconds:.1f} | `{row.weights[:12]}` | {verdict} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=20, help="kills at random instants, each of a new run")
    parser.add_argument("--lives", type=int, default=8, help="kills of the one run that is killed again and again")
    parser.add_argument("--seed", type=int, default=0, help="seed of the instants")
    parser.add_argument("--only", action="append", metavar="TEXT", help="only places whose name contains TEXT; may be repeated")
    parser.add_argument("--out", type=Path, help="Markdown file for the results")
    parser.add_argument("--folder", type=Path, help="where the runs go and failed ones stay; default: a temporary folder")
    arguments = parser.parse_args()

    for name in THREADS:
        os.environ[name] = "1"
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import transformers

    transformers.Trainer, transformers.PreTrainedModel  # noqa: B018  # lazily imported otherwise
    import distily.cli
    import distily.plugins
    import distily.report
    import distily.run

    distily.plugins.load()
    if threading.active_count() > 1:
        raise RuntimeError("threads run already, forking is not safe")

    began = time.perf_counter()
    kept = arguments.folder is not None
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="distily-kill-"))
    test = Test(folder)
    chosen = [place for place in PLACES if not arguments.only or any(text in place.name for text in arguments.only)]
    test.measure_reference(own_process=not arguments.only)
    print(f"uninterrupted: {test.duration:.1f} s, sha256 {test.reference.weights}", flush=True)
    for place in chosen:
        test.at(place)
    draw = random.Random(arguments.seed)
    for number in range(1, arguments.random + 1):
        test.at_instant(number, draw)
    if arguments.lives:
        test.again_and_again(arguments.lives, draw)
    bad = [row for row in test.rows if row.problems]
    seconds = time.perf_counter() - began
    print(f"{len(test.rows) - len(bad)} of {len(test.rows)} killed runs equal the uninterrupted one, {seconds:.0f} s")
    if arguments.out:
        write(arguments.out, test, arguments, seconds)
    if bad:
        print(f"failed runs are kept in {folder}")
    elif not kept:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
