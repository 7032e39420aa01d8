"""Which student block is compared with which teacher block: rules that are fixed before training.

Blocks count from 1 to L; block i's hidden state is its output before the final norm, 0 is the embedding. The state after the final
norm has no number: the head reads it, so a term on logits scores it already. What chooses or mixes layers while it trains is in
``distily_learned_mappers``.

Published evidence for one rule over another is mixed: Minitron (arXiv:2407.14679) lost by wrong pairs, Yu et al. 2025
(arXiv:2502.04499) found that even ``reverse`` hardly mattered. Compare with ``reverse``, ``random`` and no term at all before a
choice is called good.
"""

from __future__ import annotations

import random
from typing import Annotated

from distily import hookimpl
from distily.hookspecs import aliased
from distily.layers import LayerPair, saved_pairs, spread
from distily.schema import Between

Count = Annotated[int, Between(1)]
Seed = Annotated[int, Between(0, 2**32 - 1)]


@aliased("full", "one_to_one")
def all_blocks(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """Block i with block i: for models of equal depth.

    >>> all_blocks(3, 3)
    [(1, 1), (2, 2), (3, 3)]
    """
    if student_layers != teacher_layers:
        raise ValueError(f"it needs models of equal depth, not {student_layers} and {teacher_layers} blocks")
    return [(block, block) for block in range(1, student_layers + 1)]


@aliased("last")
def last_k(student_layers: int, teacher_layers: int, *, k: Count = 1) -> list[LayerPair]:
    """The last k blocks, counted from the end on both sides.

    Options: ``k``, blocks.

    >>> last_k(6, 12, k=2)
    [(6, 12), (5, 11)]
    """
    return _from_the_end(k, 0, student_layers, teacher_layers)


@aliased("penultimate")
def penultimate_k(student_layers: int, teacher_layers: int, *, k: Count = 1, skip: Count = 1) -> list[LayerPair]:
    """Blocks before the last ones, counted from the end on both sides. The default: a late pair, and not the last.

    The last block's output only prepares the prediction, which a term on logits covers already. A model with no block left gives its
    first one. It has no alias ``last-2``: in the field that is -2 (``skip=1``) as well as L − 2 (``skip=2``).

    Options: ``k``, blocks. ``skip``, blocks at the end to leave out: 2 is the best pair of Minitron, blocks 14 of 16 and 30 of 32.

    Source: Muralidharan et al. 2024 (Minitron), arXiv:2407.14679.

    >>> penultimate_k(16, 32), penultimate_k(16, 32, skip=2)
    ([(15, 31)], [(14, 30)])
    """
    if min(student_layers, teacher_layers) <= skip and k == 1:
        return [(max(1, student_layers - skip), max(1, teacher_layers - skip))]
    return _from_the_end(k, skip, student_layers, teacher_layers)


def _from_the_end(k: int, skip: int, student_layers: int, teacher_layers: int) -> list[LayerPair]:
    left = min(student_layers, teacher_layers) - skip
    if k > left:
        raise ValueError(f"k is {k}, but only {left} blocks can be paired")
    return [(student_layers - skip - back, teacher_layers - skip - back) for back in range(k)]


@aliased("skip")
def uniform(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """Student block i with the teacher block at the same relative depth, i·L_t / L_s rounded half up; the last blocks are paired.

    Where L_s divides L_t this is the "skip" of PKD: every (L_t / L_s)-th teacher block.

    Source: Sun, Cheng, Gan, Liu 2019 (PKD), arXiv:1908.09355.

    >>> uniform(4, 12)
    [(1, 3), (2, 6), (3, 9), (4, 12)]
    """
    depths = range(1, student_layers + 1)
    return [(i, max(1, (2 * i * teacher_layers + student_layers) // (2 * student_layers))) for i in depths]


def uniform_ends(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """Evenly spread with the first and the last block kept: the blocks that a student is initialised from.

    As a target it asks each block to stay what it was copied as; ``segment_end`` asks for the work of the blocks that were left out.

    >>> uniform_ends(4, 12)
    [(1, 1), (2, 5), (3, 8), (4, 12)]
    """
    return list(enumerate(spread(student_layers, teacher_layers), start=1))


def segment_end(student_layers: int, teacher_layers: int, *, layers: list[Count] | None = None) -> list[LayerPair]:
    """For a student copied from teacher blocks φ(1) < φ(2) < …: block i with block φ(i+1) − 1, the last with the teacher's last.

    Student block i stands where the teacher has the blocks from φ(i) to φ(i+1) − 1, so the output of the last of them is what it now
    has to produce. With ``uniform_ends`` the depth that was left out is nobody's task. An inference, not a published result.

    Options: ``layers``, φ: the teacher block that each student block was copied from, as in ``student.layers``; null: the evenly
    spread ones that Distily copies by default.

    >>> segment_end(3, 12, layers=[1, 5, 9])
    [(1, 4), (2, 8), (3, 12)]
    """
    copied = layers or spread(student_layers, teacher_layers)
    if len(copied) != student_layers or sorted(set(copied)) != copied or copied[-1] > teacher_layers:
        raise ValueError(
            f"layers must be {student_layers} rising blocks of the teacher, from 1 to {teacher_layers}, not {copied}"
        )
    return list(enumerate([*(following - 1 for following in copied[1:]), teacher_layers], start=1))


@aliased("uniform_cons")
def uniform_consecutive(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """Each student block with all teacher blocks since the previous one's: every teacher block is compared once.

    Student block i gets the blocks after ``uniform``'s for i − 1, up to ``uniform``'s for i. Where L_s divides L_t, these are the groups
    of the source; its ⌈L_t / L_s⌉ blocks each would leave the last students of 6 on 9 with none.

    Source: Udagawa et al. 2023, arXiv:2310.08797.

    >>> uniform_consecutive(2, 5)
    [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5)]
    """
    if student_layers > teacher_layers:
        raise ValueError(f"it needs a teacher at least as deep as the student, not {teacher_layers} and {student_layers} blocks")
    ends = [0, *(teacher for _, teacher in uniform(student_layers, teacher_layers))]
    return [(i, block) for i in range(1, student_layers + 1) for block in range(ends[i - 1] + 1, ends[i] + 1)]


@aliased("uniform_last")
def uniform_and_last(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """``uniform``, and every student block with the teacher's last block too: 2·L_s − 1 different pairs.

    Source: Udagawa et al. 2023 ("uniform + last"), arXiv:2310.08797.

    >>> uniform_and_last(2, 6)
    [(1, 3), (2, 6), (1, 6)]
    """
    pairs = uniform(student_layers, teacher_layers)
    return pairs + [(i, teacher_layers) for i in range(1, student_layers + 1) if (i, teacher_layers) not in pairs]


def index(student_layers: int, teacher_layers: int, *, pairs: list[list[int]]) -> list[LayerPair]:
    """Pairs by hand.

    Options: ``pairs``, each [student block, teacher block]; negative ones from the end (-1 is the last), 0 the embedding.

    >>> index(4, 12, pairs=[[1, 2], [-1, -1]])
    [(1, 2), (-1, -1)]
    """
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("pairs must be a list of [student block, teacher block]")
    return [(student, teacher) for student, teacher in pairs]


@aliased("embed")
def embeddings(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """The inputs of the first blocks: token embeddings, with positions where the model adds them.

    Source: Jiao et al. 2019 (TinyBERT), arXiv:1909.10351; Minitron, arXiv:2407.14679: a further term, small and early.

    >>> embeddings(4, 12)
    [(0, 0)]
    """
    return [(0, 0)]


def reverse(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """A control: ``uniform`` upside down, the first student block with the deepest target.

    If a feature term helps as much with it as with another mapper, the layers are not why it helps.

    Source: Yu et al. 2025, arXiv:2502.04499.

    >>> reverse(3, 12)
    [(1, 12), (2, 8), (3, 4)]
    """
    targets = [teacher for _, teacher in uniform(student_layers, teacher_layers)]
    return list(enumerate(reversed(targets), start=1))


def random_blocks(student_layers: int, teacher_layers: int, *, seed: Seed = 0) -> list[LayerPair]:
    """A control: every student block with a teacher block drawn once, before training, in no order.

    Different ones as long as there are any: where the student is deeper than the teacher, each is drawn as often as another, or once more.

    Options: ``seed``.

    >>> random_blocks(3, 12, seed=1)
    [(1, 3), (2, 10), (3, 2)]
    """
    generator = random.Random(seed)
    targets: list[int] = []
    while len(targets) < student_layers:
        targets += generator.sample(range(1, teacher_layers + 1), teacher_layers)
    return list(enumerate(targets[:student_layers], start=1))


@aliased("cka_search")
def searched(student_layers: int, teacher_layers: int, *, file: str) -> list[LayerPair]:
    """The pairs that ``distily search-layers`` found by their centred kernel alignment and saved.

    Refuses a file that was made for other depths.

    Options: ``file``, the JSON file that the command wrote.

    Source: similarity: Kornblith et al. 2019, arXiv:1905.00414.
    """
    return saved_pairs(file, student_layers, teacher_layers)


@hookimpl
def distily_layer_mappers() -> dict[str, object]:
    return {
        "all": all_blocks,
        "last_k": last_k,
        "penultimate_k": penultimate_k,
        "uniform": uniform,
        "uniform_ends": uniform_ends,
        "segment_end": segment_end,
        "uniform_consecutive": uniform_consecutive,
        "uniform_and_last": uniform_and_last,
        "index": index,
        "embeddings": embeddings,
        "reverse": reverse,
        "random": random_blocks,
        "searched": searched,
    }
