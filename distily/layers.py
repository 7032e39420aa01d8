"""The contract of a layer mapper. Blocks are counted from 1 (the first) to L (the last); 0 is the embedding.

A mapper is a function ``(student_layers, teacher_layers, *, options)``. Most return a list of pairs (student block, teacher block).
One that learns, mixes or weighs layers while training returns a ``distily.mappings.LayerMapping``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distily.errors import DistilyError

LayerPair = tuple[int, int]
LayerMapper = Callable[..., Any]
"""``(student_layers, teacher_layers) -> pairs or LayerMapping``."""


def layer_pairs(name: str, mapper: LayerMapper, student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """The mapper's pairs for two models, with negative blocks resolved (-1 is the last), checked and without repeats.

    Raises ``DistilyError`` where a pair names a block that a model does not have, or where there is no pair at all.
    """
    pairs: list[LayerPair] = []
    try:
        chosen = list(mapper(student_layers, teacher_layers))
    except ValueError as error:
        raise DistilyError(f"layer mapper {name!r}: {error}.") from error
    for student, teacher in chosen:
        pair = []
        for side, block, count in (("student", student, student_layers), ("teacher", teacher, teacher_layers)):
            resolved = block + count + 1 if block < 0 else block
            if not 0 <= resolved <= count:
                raise DistilyError(
                    f"layer mapper {name!r}: block {block} of the {side} does not exist; allowed: -{count} to {count}."
                )
            pair.append(resolved)
        if (pair[0], pair[1]) not in pairs:
            pairs.append((pair[0], pair[1]))
    if not pairs:
        raise DistilyError(f"layer mapper {name!r} gave no pairs for {student_layers} and {teacher_layers} layers.")
    return pairs


def spread(student_layers: int, teacher_layers: int) -> list[int]:
    """Teacher blocks for a shallower (or deeper) student, first and last kept: 1 + round((i−1)(L_t−1)/(L_s−1))."""
    if student_layers == 1:
        return [1]
    steps = student_layers - 1
    return [1 + (2 * i * (teacher_layers - 1) + steps) // (2 * steps) for i in range(student_layers)]


def saved_pairs(file: str, student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """The pairs in a file of ``distily search-layers``. Raises ``ValueError`` for another file, or one for models of other depths."""
    try:
        found = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file!r} cannot be read: {getattr(error, 'strerror', None) or 'it is not JSON'}") from error
    depths = [found.get(key) for key in ("student_layers", "teacher_layers")] if isinstance(found, Mapping) else []
    if not depths or "pairs" not in found:
        raise ValueError(f"{file!r} was not written by distily search-layers")
    if depths != [student_layers, teacher_layers]:
        raise ValueError(f"{file!r} is for {depths[0]} and {depths[1]} blocks, not for {student_layers} and {teacher_layers}")
    return [(student, teacher) for student, teacher in found["pairs"]]
