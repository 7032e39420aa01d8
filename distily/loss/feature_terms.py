"""Terms on features: the rows of every matched pair of layers, and what their objective makes of them.

Letters: N supervised tokens, n rows of a chunk or a set, H hidden width, M matches of a term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distily.batch import Supervision, pick
from distily.loss.features import Feature
from distily.loss.heads import select
from distily.loss.readouts import Readout
from distily.loss.terms import READ_SITES, Term
from distily.state import once_observed

Features = Mapping[Feature, Any]
Reader = Callable[[Tensor], Tensor]
"""Rows by their place among the supervised ones: ``(n,) -> (n, …)``."""


class FeatureRows:
    """The features of a step for both models, read at its supervised tokens."""

    def __init__(
        self,
        supervision: Supervision,
        inputs: Mapping[str, Any],
        student: Features,
        teacher: Features,
        readouts: tuple[Readout | None, Readout | None],
        chunk_rows: int,
        seed: int,
    ) -> None:
        self.supervision, self.inputs = supervision, inputs
        self.student, self.teacher = student, teacher
        self.readouts = readouts
        self.chunk_rows, self.seed = chunk_rows, seed

    def values(self, term: Term) -> Tensor:
        """Σ over the supervised tokens of every match of a term: ``(M,)``."""
        if term.site in READ_SITES:
            return torch.stack([self._read_in_chunks(term, pair) for pair in range(len(term.pairs))])
        matches = term.matches(*self.whole(term), self.inputs)
        sets = list(self._sets(term)) if term.is_row_set else []  # the same for every match
        return torch.stack([self._match(term, match, mine, theirs, sets) for match, (mine, theirs) in enumerate(matches)])

    def whole(self, term: Term) -> tuple[list[Tensor], list[Tensor]]:
        """Rows ``(N, H)`` of every pair, student and teacher."""
        index = self.supervision.index
        mine = [select(self.student[feature], index) for feature in term.student_features]
        return mine, [select(self.teacher[feature], index) for feature in term.teacher_features]

    def chunks(self, term: Term, pair: int) -> Iterator[tuple[Tensor, float, Reader, Reader]]:
        """Of a term whose rows are formed when asked for: which rows, how many tokens each stands for, and both readers."""
        readers = [
            self._reader(term, feature[pair], side) for side, feature in enumerate((term.student_features, term.teacher_features))
        ]
        for rows, share in self._sets(term) if term.is_row_set else self._slices():
            yield rows, share, *readers  # type: ignore[misc]

    def _reader(self, term: Term, feature: Feature, side: int) -> Reader:
        source = (self.student, self.teacher)[side][feature]
        index = self.supervision.index
        if term.site == "attentions":
            return lambda rows: source.rows(index[rows])
        readout = self.readouts[side]
        assert readout is not None
        return lambda rows: readout.logits(select(source, index[rows]))

    def _read_in_chunks(self, term: Term, pair: int) -> Tensor:
        """Σ of a pair's values; the rows of a chunk exist once in the forward and once in the backward."""
        total = None
        for rows, share, student, teacher in self.chunks(term, pair):

            def part(rows: Tensor, share: float, student: Reader = student, teacher: Reader = teacher) -> Tensor:
                return term.values(student(rows), teacher(rows), pick(self.inputs, rows), pair).sum() * share

            value = checkpoint(once_observed(part, [term]), rows, share, use_reentrant=False, preserve_rng_state=False)
            total = value if total is None else total + value
        return self._nothing(term, pair) if total is None else total

    def _nothing(self, term: Term, pair: int) -> Tensor:
        """0 with a graph, for a batch without a supervised token."""
        source = self.student[term.student_features[pair]]
        return (source.query if term.site == "attentions" else source)[:0].sum() * 0.0

    def _match(self, term: Term, match: int, student: Tensor, teacher: Tensor, sets: Sequence[tuple[Tensor, float]]) -> Tensor:
        if not term.is_row_set:
            return term.values(student, teacher, self.inputs, match).sum()
        parts = [term.values(student[rows], teacher[rows], pick(self.inputs, rows), match).sum() * share for rows, share in sets]
        return torch.stack(parts).sum() if parts else student.sum() * 0.0

    def _sets(self, term: Term) -> Iterator[tuple[Tensor, float]]:
        return row_sets(self.supervision, term.max_rows, self.seed)

    def _slices(self) -> Iterator[tuple[Tensor, float]]:
        """Chunks that lie within a document, which is what attention scores can be read of."""
        offset = 0
        for length in self.supervision.lengths:
            for start in range(offset, offset + length, self.chunk_rows):
                stop = min(start + self.chunk_rows, offset + length)
                yield torch.arange(start, stop, device=self.supervision.index.device), 1.0
            offset += length


def row_sets(supervision: Supervision, max_rows: int, seed: int) -> Iterator[tuple[Tensor, float]]:
    """For each document a seeded sample of its supervised rows, in order, and how many tokens each sampled row stands for."""
    offset = 0
    for length in supervision.lengths:
        if length:
            size = min(length, max_rows)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + length)
            chosen = torch.randperm(length, generator=generator)[:size].sort().values + offset
            yield chosen.to(supervision.index.device, non_blocking=True), length / size
        offset += length
