"""Which student block is compared with which teacher block. Blocks count from 1; functions of two numbers of blocks."""

from __future__ import annotations

from typing import Annotated

from distily import hookimpl
from distily.layers import LayerPair
from distily.schema import Between

Count = Annotated[int, Between(1)]


def all_blocks(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """Block i with block i: for models of equal depth."""
    if student_layers != teacher_layers:
        raise ValueError(f"it needs models of equal depth, not {student_layers} and {teacher_layers} blocks")
    return [(block, block) for block in range(1, student_layers + 1)]


def last_k(student_layers: int, teacher_layers: int, *, k: Count = 1) -> list[LayerPair]:
    """The last k blocks, counted from the end on both sides."""
    return [(student_layers - back, teacher_layers - back) for back in _backwards(k, student_layers, teacher_layers)]


def penultimate_k(student_layers: int, teacher_layers: int, *, k: Count = 1) -> list[LayerPair]:
    """The k blocks before the last one, counted from the end on both sides. A model of one block gives that block.

    The last block's output only prepares the prediction, which a logit term covers already.
    """
    if min(student_layers, teacher_layers) == 1:
        return [(student_layers, teacher_layers)]
    backwards = _backwards(k, student_layers - 1, teacher_layers - 1)
    return [(student_layers - 1 - back, teacher_layers - 1 - back) for back in backwards]


def _backwards(k: int, *depths: int) -> range:
    if k > min(depths):
        raise ValueError(f"k is {k}, but only {min(depths)} blocks can be paired")
    return range(k)


def uniform(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """Student block i with the teacher block at the same relative depth, rounded half up; the last blocks are paired."""
    depths = range(1, student_layers + 1)
    return [(i, max(1, (2 * i * teacher_layers + student_layers) // (2 * student_layers))) for i in depths]


def index(student_layers: int, teacher_layers: int, *, pairs: list[list[int]]) -> list[LayerPair]:
    """Pairs by hand, such as ``pairs=[[1,2],[-1,-1]]``: student block, teacher block; negative ones from the end, 0 the embedding."""
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("pairs must be a list of [student block, teacher block]")
    return [(student, teacher) for student, teacher in pairs]


@hookimpl
def distily_layer_mappers() -> dict[str, object]:
    return {
        "all": all_blocks,
        "last_k": last_k,
        "penultimate_k": penultimate_k,
        "uniform": uniform,
        "index": index,
    }
