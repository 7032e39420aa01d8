"""Layer mappings that choose, weigh or mix teacher layers while the student trains.

Each compares many pairs of blocks, so each costs as many projections and distances, and captures every layer of both models. None is
established for decoders; compare with ``penultimate_k``, ``uniform`` and the controls ``reverse`` and ``random``.

Letters: P pairs, M matches, N rows, H width, D documents, L_s and L_t blocks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from distily import hookimpl
from distily.layers import LayerPair
from distily.mappings import LayerMapping
from distily.schema import Between
from distily.state import Adaptive

Count = Annotated[int, Between(1)]


def _every_pair(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    return [(i, j) for i in range(1, student_layers + 1) for j in range(1, teacher_layers + 1)]


class RandomInOrder(LayerMapping):
    """Student block i with the i-th of L_s teacher blocks that are drawn, in order, again and again during the training.

    A regularizer: no block gets used to one target. The source draws in every epoch; here the training is divided into ``draws`` equal
    parts. Blocks of all draws are compared all the time and count only in their own part.

    Options: ``draws``, how often blocks are drawn. ``seed``.

    Source: Haidar et al. 2022 (RAIL-KD, its layer-wise form), arXiv:2109.10164.

    >>> RandomInOrder(2, 3, draws=1, seed=1).pairs
    [(1, 1), (2, 3)]
    """

    aliases = ("rail", "rail_kd")
    table: Tensor

    def __init__(
        self, student_layers: int, teacher_layers: int, *, draws: Count = 4, seed: Annotated[int, Between(0, 2**32 - 1)] = 0
    ) -> None:
        if student_layers > teacher_layers:
            raise ValueError(
                f"it needs a teacher at least as deep as the student, not {teacher_layers} and {student_layers} blocks"
            )
        generator = random.Random(seed)
        drawn = [sorted(generator.sample(range(1, teacher_layers + 1), student_layers)) for _ in range(draws)]
        parts = [list(enumerate(blocks, start=1)) for blocks in drawn]
        super().__init__(sorted({pair for part in parts for pair in part}))
        counts = torch.tensor([[float(pair in part) for pair in self.pairs] for part in parts])
        self.register_buffer("table", counts / student_layers, persistent=False)

    def shares(self, values: Tensor, progress: float) -> Tensor:
        part = min(int(progress * len(self.table)), len(self.table) - 1)
        return self.table[part].to(values.dtype)


class AttentionPooling(LayerMapping):
    """Student block i with a mixture of all teacher blocks, weighted by their likeness to it in the document at hand.

    w_ij = softmax_j ⟨mean a_ij, mean b_ij⟩ / (T √H), with the means over a document's supervised tokens; a_ij is the student's block i,
    projected, b_ij the teacher's block j. Target: Σ_j w_ij b_ij. The weights are held constant in the gradient: a student
    must not lower its loss by choosing easier targets.

    Raw hidden states differ in scale by block, and the weights go to the largest: a ``normalizer`` such as ``rms`` belongs to it.

    Options: ``temperature`` T; small ones choose one block, large ones weigh all alike.

    Source: Passban et al. 2021 (ALP-KD), arXiv:2012.14022; scores are divided by √H here, and documents' means stand for [CLS].

    >>> mapping = AttentionPooling(1, 2)
    >>> features = [torch.ones(3, 4), torch.ones(3, 4)]
    >>> student, teacher = mapping.matches(features, [torch.ones(3, 4), 3 * torch.ones(3, 4)], torch.zeros(3))[0]
    >>> f"{teacher[0, 0].item():.4f}"  # 1 and 3, weighted as softmax(4 / 2, 12 / 2)
    '2.9640'
    """

    aliases = ("alp", "alp_kd")
    projector_for = "block"

    def __init__(
        self, student_layers: int, teacher_layers: int, *, temperature: Annotated[float, Between(0, excluding=(0,))] = 1.0
    ) -> None:
        super().__init__(_every_pair(student_layers, teacher_layers))
        self.depth = teacher_layers
        self.temperature = temperature

    def matches(self, student: Sequence[Tensor], teacher: Sequence[Tensor], sequence_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        documents = _documents(sequence_ids)
        return [
            self._mixed(student[first : first + self.depth], teacher[first : first + self.depth], documents)
            for first in range(0, len(student), self.depth)
        ]

    def _mixed(self, student: Sequence[Tensor], teacher: Sequence[Tensor], documents: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides in the same mixture: the student's rows are the same for every j, unless a normalizer made them different."""
        scores = torch.stack(
            [(_means(a, documents) * _means(b, documents)).sum(-1) for a, b in zip(student, teacher, strict=True)]
        )
        weights = (scores / (self.temperature * teacher[0].shape[-1] ** 0.5)).softmax(0)[:, documents, None]
        return _weighted(weights, student), _weighted(weights, teacher)


def _documents(sequence_ids: Tensor) -> Tensor:
    """The documents' numbers without gaps, ``(N,) -> (N,)``: rows of a document lie together."""
    borders = torch.zeros_like(sequence_ids, dtype=torch.long)
    borders[1:] = sequence_ids[1:] != sequence_ids[:-1]
    return borders.cumsum(0)


def _means(rows: Tensor, documents: Tensor) -> Tensor:
    """The mean row of every document, detached: ``(N, H) -> (N, H)``, of which the first D count (D is not known on the host)."""
    sums = torch.zeros_like(rows).index_add_(0, documents, rows.detach())
    counts = rows.new_zeros(len(rows)).index_add_(0, documents, rows.new_ones(len(rows)))
    return sums / counts.clamp(min=1.0)[:, None]


def _weighted(weights: Tensor, rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * row for weight, row in zip(weights, rows, strict=True)]).sum(0)


class Transport(LayerMapping, Adaptive):
    """All pairs of blocks, weighted by an optimal transport plan from student to teacher blocks: similar ones find each other.

    Cost of a pair: the objective's own value over the whole previous global batch. Plan: the exact earth mover's, each student block
    sends 1 / L_s and each teacher block gets 1 / L_t; Σ plan · value is then at most that of any one-to-one mapping of equal depths.
    Held constant in the gradient. In the first step, blocks are weighted by the depth that they share.

    Once per step the L_s × L_t costs go to the host, where the plan is found: the device waits for that.

    Source: Li et al. 2020 (BERT-EMD), arXiv:2010.06133, which solves for every batch alone and also learns what the blocks send.

    >>> Transport(2, 2).plan
    tensor([0.5000, 0.0000, 0.0000, 0.5000], dtype=torch.float64)
    """

    aliases = ("emd", "earth_mover")
    projector_for = "block"
    plan: Tensor

    def __init__(self, student_layers: int, teacher_layers: int) -> None:
        super().__init__(_every_pair(student_layers, teacher_layers))
        self.depths = (student_layers, teacher_layers)
        shared = [
            min(i / student_layers, j / teacher_layers) - max((i - 1) / student_layers, (j - 1) / teacher_layers)
            for i, j in self.pairs
        ]
        self.register_buffer("plan", torch.tensor(shared, dtype=torch.float64).clamp(min=0.0))
        self.register_buffer("pending", torch.zeros(len(self.pairs), dtype=torch.float64), persistent=False)

    def shares(self, values: Tensor, progress: float) -> Tensor:
        if torch.is_grad_enabled():
            self.pending += values.detach().double()
        return self.plan.to(values.dtype)

    def advance(self, progress: float) -> None:
        import ot  # costs seconds

        costs = self.pending.cpu()
        if not costs.isfinite().all() or not costs.any():  # a term that was idle, or overflowed, says nothing
            return
        marginals = [torch.full((depth,), 1.0 / depth, dtype=torch.float64).numpy() for depth in self.depths]
        self.plan.copy_(torch.from_numpy(ot.emd(*marginals, costs.reshape(self.depths).numpy())).flatten())


@hookimpl
def distily_layer_mappers() -> dict[str, object]:
    return {"random_in_order": RandomInOrder, "attention_pooling": AttentionPooling, "transport": Transport}
