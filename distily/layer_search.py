"""``distily search-layers``: which teacher block each student block resembles most, measured on text before training.

Letters: L_s and L_t blocks of student and teacher, B batch, S sequence, n rows, H width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distily import data, models
from distily.batch import model_inputs, moved, supervise
from distily.config import RunConfig
from distily.environment import versions
from distily.errors import DistilyError
from distily.files import write_json
from distily.layers import LayerPair, layer_pairs
from distily.loss.features import FeatureCapture, decoder_blocks
from distily.loss.heads import select
from distily.plugins import Plugins
from distily.similarity import SMALLEST_SET, linear_hsic
from distily.sources import load_documents
from distily.spec import Component

SET_ROWS = 512
"""Rows that are compared with each other at a time. Their unbiased estimates are averaged, which is unbiased again."""
BATCH_SIZE = 8
CONTROLS = ("uniform", "penultimate_k", "reverse", "random")
"""Mappers to judge a choice by: their pairs in the same matrix."""


@dataclass(frozen=True)
class LayerSearch:
    """The chosen pairs, and the matrix of unbiased CKA that they were chosen by: row i is student block i + 1."""

    pairs: Sequence[LayerPair]
    matrix: Tensor
    rows: int
    controls: Mapping[str, Sequence[LayerPair]]

    def total(self, pairs: Iterable[LayerPair]) -> float:
        """Σ CKA of some pairs."""
        return sum(self.matrix[student - 1, teacher - 1].item() for student, teacher in pairs)

    def __str__(self) -> str:
        lines = ["student  teacher     CKA"]
        lines += [f"{student:7d}  {teacher:7d}  {self.total([(student, teacher)]):6.3f}" for student, teacher in self.pairs]
        lines += ["", "mapper          pairs  Σ CKA"]
        for name, pairs in {"searched": self.pairs, **self.controls, "none": []}.items():
            lines.append(f"{name:14s}  {len(pairs):5d}  {self.total(pairs):5.2f}")
        return "\n".join(lines)


def search_layers(config: RunConfig, plugins: Plugins, output: Path, method: str = "monotone", rows: int = 4096) -> LayerSearch:
    """Compares the configuration's student, as it starts or from its checkpoint, with its teacher on its training text, and writes
    the pairs that ``method`` picks to ``output``.

    Raises ``DistilyError`` for wrong input; nothing is written then.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise DistilyError(f"--output: {str(output)!r} is not allowed; allowed: a file in a folder that exists.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = models.load_tokenizer(config.teacher.model, "teacher.model", config.trust_remote_code)
    if config.student.model is not None:
        other = models.load_tokenizer(config.student.model, "student.model", config.trust_remote_code)
        models.check_tokenizers(tokenizer, other)
    teacher = models.load_teacher(config.teacher, device, config.trust_remote_code)
    student = models.build_student(config.student, teacher, config.seed, config.trust_remote_code).to(device).eval()
    documents = load_documents(config.data.dataset, config.data.subset, config.data.split, False)
    chosen = data.draw(documents, config.data.samples or rows, config.seed)  # a document gives a row or more
    length = models.max_length(config.data.max_length, tokenizer, teacher, student)
    sequences, report = data.sequences(chosen, config.data, tokenizer, length)
    loader = DataLoader(sequences, BATCH_SIZE, collate_fn=data.collator_for(tokenizer))
    matrix, seen = similarity_matrix(student, teacher, loader, rows)
    found = LayerSearch(METHODS[method](matrix), matrix, seen, _controls(plugins, config.seed, *matrix.shape))
    student_layers, teacher_layers = matrix.shape
    write_json(
        output,
        {
            "student_layers": student_layers,
            "teacher_layers": teacher_layers,
            "pairs": found.pairs,
            "method": method,
            "similarity": "unbiased linear CKA of hidden states",
            "matrix": [[round(value, 6) for value in row] for row in matrix.tolist()],
            "totals": {name: found.total(pairs) for name, pairs in {"searched": found.pairs, **found.controls}.items()},
            "teacher": {"model": config.teacher.model, "sha256": fingerprint(teacher)},
            "student": {"model": config.student.model, "sha256": fingerprint(student)},
            "data": {"dataset": config.data.dataset, "fingerprint": report.fingerprint, "rows": seen},
            "seed": config.seed,
            "versions": versions(),
        },
    )
    return found


def fingerprint(model: Any) -> str:
    """SHA-256 of all weights with their names."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _controls(plugins: Plugins, seed: int, student_layers: int, teacher_layers: int) -> dict[str, list[LayerPair]]:
    result = {}
    for name in CONTROLS:
        options = {"seed": seed} if name == "random" else {}
        mapper = plugins.build("layer_mappers", Component(name, options))
        result[name] = layer_pairs(name, mapper, student_layers, teacher_layers)
    return result


@torch.no_grad()
def similarity_matrix(student: Any, teacher: Any, batches: Iterable[Mapping[str, Any]], rows: int) -> tuple[Tensor, int]:
    """Unbiased CKA of every student block's output with every teacher block's, ``(L_s, L_t)`` in float64 on the CPU, and the number of
    rows that it is of: supervised tokens, less the first one of a text, whose huge activations would be all that is compared.

    Raises ``DistilyError`` where the text is too short, or where a block's output is the same for all tokens.
    """
    totals: list[Tensor] = []
    seen = 0
    for mine, theirs in _sets(student, teacher, batches):
        if seen >= rows:
            break
        found = [len(mine[0]) * each for each in (_hsic(mine, theirs), *(_own_hsic(side) for side in (mine, theirs)))]
        totals = [total + more for total, more in zip(totals, found, strict=True)] if totals else found
        seen += len(mine[0])
    if not seen:
        raise DistilyError(f"data.dataset: no batch has {SMALLEST_SET} tokens to compare; allowed: longer documents.")
    cross, *own = totals
    if not all((each > 0).all() for each in own):
        raise DistilyError("search-layers: a block's output is the same for all tokens, or not finite, so it resembles nothing.")
    return cross / (own[0][:, None] * own[1]).sqrt(), seen


def _hsic(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Of every student block with every teacher block, ``(L_s, L_t)`` on the CPU."""
    return torch.stack([torch.stack([linear_hsic(one, other) for other in theirs]) for one in mine]).cpu()


def _own_hsic(side: Sequence[Tensor]) -> Tensor:
    """Of every block with itself, ``(L,)`` on the CPU."""
    return torch.stack([linear_hsic(each, each) for each in side]).cpu()


def _sets(student: Any, teacher: Any, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Rows ``(n, H)`` of every block of both models, a set at a time, in float64."""
    captures = [
        FeatureCapture(model, [("hidden_states", block) for block in range(1, len(decoder_blocks(model)) + 1)])
        for model in (student, teacher)
    ]
    device = next(student.parameters()).device
    try:
        for batch in batches:
            placed = moved(batch, device)
            index = supervise(placed).index
            index = index[index % placed["input_ids"].shape[1] > 0]
            sides = []
            for model, capture in zip((student, teacher), captures, strict=True):
                with capture.opened() as tensors:
                    model(**model_inputs(placed), use_cache=False)
                    sides.append([select(capture.feature(feature, tensors), index).double() for feature in capture.wanted])
            for rows in torch.arange(len(index), device=device).split(SET_ROWS):
                if len(rows) >= SMALLEST_SET:
                    yield tuple([each[rows] for each in side] for side in sides)  # type: ignore[misc]
    finally:
        for capture in captures:
            capture.remove()


def monotone(matrix: Tensor) -> list[LayerPair]:
    """A teacher block for each student block, never an earlier one than that of the block before, with the largest Σ of ``matrix``.

    Of equal ones the earliest.
    """
    scores = matrix.tolist()
    best, origins = scores[0], []
    for row in scores[1:]:
        origin = [max(range(column + 1), key=best.__getitem__) for column in range(len(row))]
        origins.append(origin)
        best = [value + best[before] for value, before in zip(row, origin, strict=True)]
    column = max(range(len(best)), key=best.__getitem__)
    columns = [column]
    for origin in reversed(origins):
        columns.append(origin[columns[-1]])
    return [(i, column + 1) for i, column in enumerate(reversed(columns), start=1)]


def assignment(matrix: Tensor) -> list[LayerPair]:
    """A teacher block of its own for each student block, in any order, with the largest Σ of ``matrix`` (the Hungarian problem)."""
    from scipy.optimize import linear_sum_assignment

    if matrix.shape[0] > matrix.shape[1]:
        raise DistilyError(f"--method: assignment needs {matrix.shape[0]} teacher blocks or more, not {matrix.shape[1]}.")
    _, columns = linear_sum_assignment(matrix.numpy(), maximize=True)
    return [(i, int(column) + 1) for i, column in enumerate(columns, start=1)]


METHODS: Mapping[str, Callable[[Tensor], list[LayerPair]]] = {"monotone": monotone, "assignment": assignment}
"""How pairs are picked, by name."""
