"""The command line: translates words into a RunConfig. What needs torch is imported inside the commands, so that help is instant."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import distily
from distily.errors import DistilyError
from distily.terminal import Group, reported

if TYPE_CHECKING:
    from distily.record import RunRecord

REPEATED = {"objective": "objectives", "evaluator": "evaluators", "logger": "loggers"}
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "critical",  # what it logs as an error, ours says on its one line
    "TOKENIZERS_PARALLELISM": "false",
}
QUIET_LOGGERS = ("torchao", "torch.utils._pytree")
"""What is said where torchao is installed, used or not: kernels that were built for other machines, a call that grows old."""
DEMO_CONFIG = Path(__file__).parent / "demo" / "demo.yaml"


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(distily.__version__, prog_name="distily")
@click.option("--debug", is_flag=True, help="Show tracebacks instead of one-line errors.")
def main(debug: bool) -> None:
    """Distil a Hugging Face causal language model into a smaller, a 1.58-bit or a differently shaped student."""
    if not debug:  # the libraries' own bars and notices; ours say what a run does
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        for name in QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)


KEY_VALUE: dict[str, Any] = {"multiple": True, "metavar": "KEY=VALUE"}
SHARED = {
    "config": click.argument("config", required=False, type=click.Path(path_type=Path)),
    "teacher": click.option("--teacher", metavar="ID|PATH", help="Teacher: hub id or folder.  [default: the demo's]"),
    "student": click.option(
        "--student", metavar="ID|PATH", help="Student to start from: hub id or folder.  [default: built from the teacher]"
    ),
    "shape": click.option("--student-config", help="Override of the teacher's configuration for the student.", **KEY_VALUE),
    "dataset": click.option("--dataset", metavar="ID|PATH", help="Text: hub id, file or folder.  [default: the demo's]"),
    "objective": click.option(
        "--objective", multiple=True, metavar="SPEC", help='Term of the loss, such as "cosine:mapper=last_k(k=2),weight=0.3".'
    ),
    "combiner": click.option(
        "--combiner", metavar="SPEC", help="How the terms are combined where they meet, such as gradient_weighted."
    ),
    "quantizer": click.option("--quantizer", metavar="SPEC", help="Train the student quantised, such as ternary."),
    "train": click.option("--train", "train_settings", help="Any field of transformers.TrainingArguments.", **KEY_VALUE),
    "set": click.option("--set", "settings", help="Any key of the configuration, such as data.max_length=512.", **KEY_VALUE),
}
"""CONFIG and flags that several commands take."""


def takes(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds some of ``SHARED`` to a command."""
    return lambda command: reduce(lambda inner, name: SHARED[name](inner), reversed(names), command)


@main.command()
@takes(*SHARED)
@click.option(
    "--evaluator", multiple=True, metavar="SPEC", help="Measurement before and after.  [default: perplexity, agreement]"
)
@click.option("--logger", multiple=True, metavar="SPEC", help="Where metrics go besides metrics.jsonl.  [default: progress]")
@click.option("--control/--no-control", default=None, help="Also train the student on labels alone, for comparison.")
@click.option("--output-dir", metavar="DIR", help="Folder of the run.  [default: runs/<date>-<time>]")
@click.option("--push-to-hub", metavar="OWNER/NAME", help="Upload the student.  [default: nothing is uploaded]")
@click.option("--resume", is_flag=True, help="Go on with the run in --output-dir, or start it.")
@click.option("--dry-run", is_flag=True, help="Print what would run, with sizes and predicted memory, and stop.")
@click.option("--gpus", type=click.IntRange(1), metavar="N", help="Launch on N GPUs of this machine.  [default: one]")
@reported
def train(resume: bool, dry_run: bool, gpus: int | None, **words: Any) -> None:
    """Distil a student. CONFIG is a YAML file; flags go over it."""
    from distily.config import resolve

    values = _values(**words)
    if "output_dir" not in values:
        if resume:
            raise DistilyError("--resume: it needs the folder of the run; name it by --output-dir.")
        values["output_dir"] = str(Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
    config = resolve(values)
    if gpus and gpus > 1 and "LOCAL_RANK" not in os.environ:
        sys.exit(_launch(gpus, config.output_dir))
    if dry_run:
        from distily.dry_run import describe

        click.echo(describe(config))
        return
    from distily.run import distill

    _finish(distill(config, resume=resume))


def _values(
    config: Path | None = None,
    teacher: str | None = None,
    student: str | None = None,
    student_config: tuple[str, ...] = (),
    dataset: str | None = None,
    combiner: str | None = None,
    quantizer: str | None = None,
    control: bool | None = None,
    train_settings: tuple[str, ...] = (),
    settings: tuple[str, ...] = (),
    output_dir: str | None = None,
    push_to_hub: str | None = None,
    **repeated: tuple[str, ...],
) -> dict[str, Any]:
    """File and flags as one mapping; with neither teacher nor data named, the demo's shapes and settings come first."""
    from distily.config import assign, expand, merge, read_file

    values = expand(read_file(config)) if config else {}
    flags: dict[str, Any] = {
        key: value for key, value in {"teacher": teacher, "student": student, "data": dataset}.items() if value is not None
    }
    flags |= {"output_dir": output_dir} if output_dir is not None else {}
    single = {"combiner": combiner, "quantizer": quantizer}
    flags |= {key: spec for key, spec in single.items() if spec is not None}
    flags |= {"control": control} if control is not None else {}
    flags |= {"push_to_hub": push_to_hub} if push_to_hub is not None else {}
    flags |= {REPEATED[name]: list(specs) for name, specs in repeated.items() if specs}
    values = merge(values, expand(flags))
    values = merge(values, {"student": {"config": assign(student_config, "--student-config")}} if student_config else {})
    values = merge(values, {"train": assign(train_settings, "--train")} if train_settings else {})
    values = merge(values, expand(assign(settings, "--set")))
    naming = {"teacher": ("model",), "student": ("model", "config"), "data": ("dataset",)}
    if not any(key in values.get(section, {}) for section, keys in naming.items() for key in keys):
        demo = {key: value for key, value in read_file(DEMO_CONFIG).items() if key in naming or key == "train"}
        values = merge(demo, values)
    return values


def _launch(gpus: int, output_dir: str) -> int:
    """The same command under torchrun, with a folder that all ranks share."""
    arguments = sys.argv[1:]
    place = next(index for index, word in enumerate(arguments) if word.startswith("--gpus"))
    del arguments[place : place + (1 if "=" in arguments[place] else 2)]
    if not any(word.startswith("--output-dir") for word in arguments):
        arguments += ["--output-dir", output_dir]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m", "distily"]
    return subprocess.run([*launcher, *arguments]).returncode


def _finish(record: RunRecord) -> None:
    """The last lines of a run."""
    from distily.card import verdict
    from distily.record import is_main_process

    if not is_main_process():
        return
    share = record.student_parameters / max(1, record.teacher_parameters)
    click.echo()
    click.echo(_table(record))
    click.echo(
        f"\nStudent: {record.student_parameters:,} parameters, {share:.1%} of the teacher's {record.teacher_parameters:,}."
    )
    click.echo(verdict(record))
    click.echo(f"Student, model card and report: {record.output_dir}")


def _table(record: RunRecord) -> str:
    from distily.card import ORDER, TITLES, shown_metrics

    names = shown_metrics(record)
    widths = [max(10, len(name)) for name in names]
    lines = [" " * 26 + "  ".join(name.replace("_", " ").rjust(width) for name, width in zip(names, widths, strict=True))]
    for model in ORDER:
        if model in record.metrics:
            values = [record.metrics[model].get(name) for name in names]
            cells = [("–" if value is None else f"{value:.4g}").rjust(width) for value, width in zip(values, widths, strict=True)]
            lines.append(TITLES[model].ljust(26) + "  ".join(cells))
    return "\n".join(lines)


@main.command()
@click.option("--output-dir", default="runs/demo", show_default=True, metavar="DIR", help="Folder of the run; it is made anew.")
@reported
def demo(output_dir: str) -> None:
    """Distil the small teacher that comes with Distily, with a labels-only control; about two minutes on two cores."""
    from distily.demo import run_demo

    record, continuations = run_demo(output_dir)
    _finish(record)
    for name, text in continuations.items():
        click.echo(f"\n{name} goes on: {text}")


@main.command()
@click.argument("model")
@click.option(
    "--dataset", metavar="ID|PATH", default="demo", help="Held-out text: hub id, file or folder.  [default: the demo's]"
)
@click.option("--teacher", metavar="ID|PATH", help="Teacher for the agreement.")
@click.option("--evaluator", multiple=True, metavar="SPEC", help="[default: perplexity, and agreement with a teacher]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Keys of the data, such as data.max_length=512.")
@reported
def evaluate(model: str, dataset: str, teacher: str | None, evaluator: tuple[str, ...], settings: tuple[str, ...]) -> None:
    """Measure MODEL (a hub id, a folder, or a run's student) on held-out text; prints JSON."""
    from distily.measurement import evaluate_model

    click.echo(json.dumps(evaluate_model(model, dataset, teacher, evaluator, settings), indent=2))


@main.command("search-layers")
@takes("config", "teacher", "student", "shape", "dataset", "set")
@click.option("--rows", type=click.IntRange(4), default=4096, show_default=True, metavar="N", help="Tokens to compare.")
@click.option(
    "--method",
    type=click.Choice(["monotone", "assignment"]),
    default="monotone",
    show_default=True,
    help="Teacher blocks in rising order, which may repeat; or each at most once, in any order.",
)
@click.option("--output", type=click.Path(path_type=Path), default="layers.json", show_default=True, metavar="FILE")
@reported
def search_layers(output: Path, method: str, rows: int, **words: Any) -> None:
    """Find and save the pairs of blocks that are most alike, for mapper=searched. CONFIG is a YAML file; flags go over it."""
    from distily.config import resolve
    from distily.layer_search import search_layers as search
    from distily.plugins import load

    config = resolve(_values(**words) | {"output_dir": "."})
    click.echo(search(config, load(), output, method, rows))
    click.echo(f'\nSaved. To train on these pairs: mapper="searched(file={output})"')


@main.group(cls=Group)
def benchmark() -> None:
    """What training costs on this machine; `speed` times a step."""


@benchmark.command()
@takes(*(name for name in SHARED if name != "dataset"))
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=15.0,
    show_default=True,
    metavar="N",
    help="Measuring time of each way to take the step.",
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Also write the figures as JSON.")
@reported
def speed(output: Path | None, seconds: float, **words: Any) -> None:
    """Time a training step with its loss head on this machine. CONFIG is a YAML file; flags go over it."""
    from distily.benchmark import benchmark_speed
    from distily.config import resolve
    from distily.files import write_json
    from distily.plugins import load

    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise DistilyError(f"--output: {str(output)!r} is not allowed; allowed: a file in a folder that exists.")
    config = resolve(_values(**words) | {"output_dir": "."})
    report = benchmark_speed(config, load(), seconds, say=lambda line: click.echo(line, err=True))
    click.echo(report)
    if output is not None:
        write_json(output, report.values())


@main.group(cls=Group, invoke_without_command=True)
@click.pass_context
def plugins(context: click.Context) -> None:
    """Installed plugins; `new` writes one, `check` runs the conformance kit on one."""
    if context.invoked_subcommand is None:
        context.invoke(list_plugins)


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def list_plugins(as_json: bool = False) -> None:
    """Packages with their components; broken ones last, with the reason."""
    from distily.listing import plugin_lines, plugin_values
    from distily.plugins import load

    found = load()
    click.echo(json.dumps(plugin_values(found), indent=2) if as_json else "\n".join(plugin_lines(found)))


@plugins.command("new")
@click.argument("name")
@click.option("--directory", type=click.Path(path_type=Path), default=Path(), help="Where the package's folder goes.")
@reported
def new_plugin(name: str, directory: Path) -> None:
    """Write a working plugin package NAME with its test."""
    from distily.scaffold import write_plugin

    folder = write_plugin(name, directory)
    click.echo(f"{folder} is written. Next: pip install -e {folder} && distily plugins check {name}")


@plugins.command("check")
@click.argument("name")
@reported
def check_plugin(name: str) -> None:
    """Run the conformance kit on every component of plugin NAME."""
    from distily.plugins import load
    from distily.testing import check_package

    for line in check_package(load(), name):
        click.echo(line)


@main.command()
@click.argument("word", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print the page docs/objectives.md: all that makes a loss.")
@reported
def components(word: str | None, as_json: bool, markdown: bool) -> None:
    """Components by kind. WORD is a kind (objectives …), a name or alias, whose entry is printed, or a word to find."""
    from distily.catalogue import page
    from distily.listing import component_lines, component_values
    from distily.plugins import load

    found = load()
    text = json.dumps(component_values(found, word), indent=2) if as_json else "\n".join(component_lines(found, word))
    click.echo(page(found) if markdown else text)


@main.command()
@reported
def env() -> None:
    """Versions, machine and plugins, for a bug report."""
    from distily.environment import commit, machine, versions
    from distily.plugins import load

    found = load()
    described = {"versions": versions(), "commit": commit(), "contract": distily.CONTRACT_VERSION, "machine": machine()}
    described["broken plugins"] = {package.name: package.error for package in found.broken}
    click.echo(json.dumps(described, indent=2))
