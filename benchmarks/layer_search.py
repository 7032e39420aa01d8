"""Does it matter which layers are compared? Held-out KL to a real teacher by layer mapper, over several seeds.

    DISTILY_DATA=path/to/data python benchmarks/layer_search.py [--steps 1000] [--seeds 3] [--jobs 6] [--results benchmarks/results]

The teacher is stories260K (5 blocks), the student has 3 of its blocks, copied or at random. Each student learns by forward KL and a
feature term on the pairs of a mapper: the pairs that ``distily search-layers`` found, rules, the controls ``reverse`` and ``random``,
and none. The search reads a copied student as it starts; one at random as forward KL alone has trained it.
First, what the search finds for students copied from known blocks. Writes one Markdown page with every figure.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from distily import data, distill, models
from distily.config import StudentConfig, TeacherConfig, resolve
from distily.environment import commit, machine, versions
from distily.layer_search import monotone, search_layers, similarity_matrix
from distily.loss.features import decoder_blocks
from distily.plugins import load
from distily.sources import load_documents

TEACHER, BLOCKS, COPIED = "stories260K", 3, [1, 3, 5]
MAPPERS = {
    "none": None,
    "searched": "searched(file={file})",
    "penultimate_k": "penultimate_k",
    "last-2": "penultimate_k(skip=2)",
    "uniform": "uniform",
    "segment_end": "segment_end",
    "reverse": "reverse",
    "random": "random(seed={seed})",
}
STARTS: dict[str, dict[str, Any]] = {"copied": {"layers": COPIED}, "random": {"initialize": "random", "embeddings": "copy"}}
SILENCED = ("o_proj.weight", "down_proj.weight")
"""What a Llama block adds to the residual stream goes through these."""
Trained = tuple[dict[str, float], list[int] | None]


def settings(folder: Path) -> dict[str, Any]:
    """Teacher and text."""
    return {
        "teacher": str(folder / "models" / TEACHER),
        "data": {
            "dataset": str(folder / "text/tinystories/train_head.parquet"),
            "eval_dataset": str(folder / "text/tinystories/valid_head_stories.parquet"),
            "max_length": 512,
            "long_documents": "truncate",
            "append_eos": False,
        },
    }


def planted(config: dict[str, Any], rows: int) -> str:
    """For every choice of blocks: what is found for their copies, in the teacher as it is, and in one whose other blocks are silent."""
    resolved = resolve({**config, "output_dir": "."})
    tokenizer = models.load_tokenizer(resolved.teacher.model, "teacher.model")
    documents = load_documents(resolved.data.dataset, None, "train", False)
    sequences, _ = data.sequences(data.draw(documents, 64, 0), resolved.data, tokenizer, 256)
    loader = torch.utils.data.DataLoader(sequences, 8, collate_fn=data.collator_for(tokenizer))
    lines = ["| copied from | found | found where the other blocks do nothing |", "|---|---|---|"]
    right = [0, 0]
    for copied in itertools.combinations(range(1, 6), BLOCKS):
        found = []
        for silent in (False, True):
            teacher = models.load_teacher(TeacherConfig(resolved.teacher.model), torch.device("cpu"))
            for number, block in enumerate(decoder_blocks(teacher), start=1):
                for name, parameter in block.named_parameters():
                    if silent and number not in copied and name.endswith(SILENCED):
                        parameter.data.zero_()
            shape = StudentConfig(config={"num_hidden_layers": BLOCKS}, layers=list(copied))
            student = models.build_student(shape, teacher, seed=0).eval()
            matrix, _ = similarity_matrix(student, teacher, loader, rows)
            found.append(tuple(block for _, block in monotone(matrix)))
            right[silent] += found[-1] == copied
        lines.append("| " + " | ".join(", ".join(map(str, blocks)) for blocks in (copied, *found)) + " |")
    return "\n".join([*lines, f"| all ten, exactly | {right[0]} | {right[1]} |"])


def train(
    config: dict[str, Any], start: str, name: str, seed: int, feature: str, file: Path, folder: Path, chosen: argparse.Namespace
) -> tuple[float, str]:
    """One student: its held-out KL from the teacher, and its folder."""
    mapper = MAPPERS[name]
    objectives = ["forward_kl"]
    if mapper is not None:
        objectives.append(f"{feature}{',' if ':' in feature else ':'}mapper={mapper.format(file=file, seed=seed)}")
    record = distill(
        {
            **config,
            "student": {"config": {"num_hidden_layers": BLOCKS}, **STARTS[start]},
            "objectives": objectives,
            "evaluators": ["agreement"],
            "loggers": [],
            "seed": seed,
            "train": {
                "max_steps": chosen.steps,
                "per_device_train_batch_size": chosen.rows,
                "per_device_eval_batch_size": 32,
                "learning_rate": chosen.learning_rate,
                "warmup_steps": chosen.steps // 20,
                "save_strategy": "no",
                "logging_steps": chosen.steps,
            },
            "output_dir": str(folder / f"{start}-{name}-{seed}"),
        },
        say=lambda line: None,
    )
    return record.metrics["student"]["agreement_kl"], str(record.student_dir)


def trained(
    config: dict[str, Any], start: str, seed: int, names: tuple[str, ...], folder: Path, chosen: argparse.Namespace
) -> Trained:
    """The held-out KL of some mappers' students, and the teacher blocks that the search found where ``searched`` is among them."""
    transformers.utils.logging.disable_progress_bar()
    values: dict[str, float] = {}
    blocks, file, student = None, folder / f"{start}-{seed}.json", ""
    for name in names:  # none comes before searched: the search reads what it trained
        if name == "searched":
            shape = {"config": {"num_hidden_layers": BLOCKS}, **STARTS[start]} if start == "copied" else {"model": student}
            resolved = resolve({**config, "student": shape, "seed": seed, "output_dir": "."})
            blocks = [block for _, block in search_layers(resolved, load(), file).pairs]
        began = time.perf_counter()
        values[name], student = train(config, start, name, seed, chosen.feature, file, folder, chosen)
        seconds = time.perf_counter() - began
        print(f"{start}, seed {seed}, {name}: {values[name]:.4f} ({seconds:.0f} s); {blocks=}", file=sys.stderr, flush=True)
    return values, blocks


def compare(results: list[Trained]) -> str:
    """All mappers from one start, as a table; differences from ``none`` are of the same seed."""
    lines = [
        "| mapper | held-out KL, mean | standard deviation | mean difference from none | its standard error |",
        "|---|---|---|---|---|",
    ]
    for name in MAPPERS:
        each = [values[name] for values, _ in results]
        differences = [values[name] - values["none"] for values, _ in results]
        spread, error = (statistics.stdev(numbers) if len(numbers) > 1 else float("nan") for numbers in (each, differences))
        numbers = (statistics.mean(each), spread, statistics.mean(differences), error / len(each) ** 0.5)
        lines.append(f"| {name} | " + " | ".join(f"{number:.4f}" for number in numbers) + " |")
    return "\n".join([*lines, "", f"Teacher blocks that the search found, by seed: {[blocks for _, blocks in results]}."])


def together(config: dict[str, Any], folder: Path, chosen: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The planted mappings, and every start's table, from ``--jobs`` processes: each seed's ``none`` and ``searched`` in one."""
    groups = [("none", "searched"), *((name,) for name in MAPPERS if name not in ("none", "searched"))]
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(planted, config, 4096)
        futures = {
            (start, seed, names): pool.submit(trained, config, start, seed, names, folder, chosen)
            for names in groups  # the longest first
            for start in STARTS
            for seed in range(chosen.seeds)
        }
        tables = {}
        for start in STARTS:
            results: list[Trained] = []
            for seed in range(chosen.seeds):
                parts = [futures[start, seed, names].result() for names in groups]
                results.append(({name: value for values, _ in parts for name, value in values.items()}, parts[0][1]))
            tables[start] = compare(results)
        return found.result(), tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each training")
    parser.add_argument("--rows", type=int, default=16, help="sequences in a step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--heldout", type=int, help="stories to measure on; nothing: all 849")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each a process")
    parser.add_argument("--feature", default="cosine:weight=1.0", help="the feature term, without its mapper")
    parser.add_argument("--results", type=Path, help="folder for layer_search.md; nothing: print only")
    chosen = parser.parse_args()
    if "DISTILY_DATA" not in os.environ:
        sys.exit("DISTILY_DATA is not set; allowed: the folder of the real models and texts.")
    config = settings(Path(os.environ["DISTILY_DATA"]))
    config["data"]["eval_samples"] = chosen.heldout
    with tempfile.TemporaryDirectory() as folder:
        found, tables = together(config, Path(folder), chosen)
    sections = [f"## Students copied from known blocks of {TEACHER}\n\n{found}\n"]
    sections += [f"## A student of {BLOCKS} blocks, start: {start}\n\n{table}\n" for start, table in tables.items()]
    described = machine()
    hardware = ", ".join(described.get("gpus", [])) or f"{described['cores']} CPU cores"
    page = (
        f"# Which layers to compare\n\nCommand: `python {' '.join(sys.argv)}`. Machine: {hardware}. Commit: {commit()}.\n"
        f"Versions: {', '.join(f'{name} {value}' for name, value in versions().items())}.\n"
        f"Feature term: `{chosen.feature}` beside forward KL; {chosen.steps} steps of {chosen.rows} stories, {chosen.seeds} seeds.\n"
        "Held-out: TinyStories validation, a story at a time; KL(teacher‖student) in nats for each token, lower is better.\n\n"
        + "\n".join(sections)
    )
    print(page)
    if chosen.results:
        (chosen.results / "layer_search.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
