"""The contract of a layer mapper: integers only. Blocks are counted from 1 (the first) to L (the last); 0 is the embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from distily.errors import DistilyError

LayerPair = tuple[int, int]
LayerMapper = Callable[[int, int], Iterable[LayerPair]]
"""``(student_layers, teacher_layers) -> pairs (student block, teacher block)``."""


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
