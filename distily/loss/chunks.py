"""The chunked loss: logits of a few rows at a time, every logit term on them, and their gradients, in one pass.

Plain PyTorch; the reference for every faster path. Memory is O(chunk · V), whatever the number of tokens.
Letters: N supervised tokens, n rows of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distily.batch import pick
from distily.errors import DistilyError
from distily.loss.fused import FusedTerms, fused_rows
from distily.loss.gradients import Gradients, accumulate
from distily.loss.heads import OutputHead
from distily.loss.meetings import Meeting
from distily.loss.terms import Term
from distily.products import Product, upcast
from distily.state import once_observed
from distily.teachers import LogitSource


@dataclass(frozen=True)
class Piece:
    """Some supervised rows and the terms that read them. ``share``: how many tokens each row stands for."""

    rows: slice | Tensor
    terms: Sequence[Term]
    share: float


@dataclass
class ChunkWalk:
    """One pass over the supervised rows of a micro-batch. ``fused``: terms that are in no piece, since a kernel computes them."""

    head: OutputHead
    source: LogitSource | None
    pieces: Sequence[Piece]
    inputs: Mapping[str, Any]
    weights: Mapping[str, float | Tensor]
    items: Tensor
    vocabulary: int
    compute_dtype: torch.dtype
    term_gradients: bool = False
    meeting: Meeting | None = None
    fused: FusedTerms | None = None
    block_rows: int | None = None
    parameters: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        unique = {id(p): p for piece in self.pieces for term in piece.terms for p in term.parameters() if p.requires_grad}
        self.parameters = list(unique.values())

    @property
    def keys(self) -> list[str]:
        return list(self.weights)

    def terms(self, piece: Piece, raw: Tensor) -> Tensor:
        """Σ over the piece's rows ÷ N of every term on the head's output ``raw`` (n, V); 0 for terms not in the piece: ``(K,)``."""
        logits = self.head.finish(upcast(raw))
        teacher = None
        if self.source is not None and any(term.description.needs_teacher for term in piece.terms):
            teacher = self.source.chunk(piece.rows).to(logits.dtype)
        inputs = pick(self.inputs, piece.rows)
        share = piece.share / self.items.to(logits.dtype)
        sums = {term.key: term.values(logits, teacher, inputs).sum() * share for term in piece.terms}
        zero = logits.new_zeros(())
        return torch.stack([sums.get(key, zero).to(logits.dtype) for key in self.keys])

    def weighted(self, sums: Tensor) -> Tensor:
        """Σ weight · term, with the coefficients that a meeting holds for this step: ``(K,) -> ()``."""
        parts = torch.stack([sums[place] * weight for place, weight in enumerate(self.weights.values())])
        return parts.sum() if self.meeting is None else (parts * self.meeting.current.to(parts.dtype)).sum()

    def met(self, per_term: Sequence[Tensor]) -> Tensor:
        """The gradients of single terms, weighted and combined where they meet: K times ``(N, H)`` to ``(N, H)``."""
        assert self.meeting is not None
        return self.meeting.combine([own * weight for own, weight in zip(per_term, self.weights.values(), strict=True)])


def chunked_loss(walk: ChunkWalk, rows: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The weighted sum of the logit terms on hidden rows ``(N, H)``: ``(loss, each term's Σ ÷ N, each term's gradient at rows)``."""
    if not walk.head.is_linear:
        if walk.term_gradients or walk.meeting is not None:
            raise DistilyError(f"a head of type {type(walk.head.module).__name__} gives no gradients of single terms.")
        loss, sums = _by_checkpoint(walk, rows)
        return loss, dict(zip(walk.keys, sums.detach(), strict=True)), {}
    head: Any = walk.head.module
    loss, sums, *gradients = _ChunkedLinear.apply(rows, head.weight, head.bias, walk, *walk.parameters)
    return loss, dict(zip(walk.keys, sums, strict=True)), dict(zip(walk.keys, gradients, strict=False))


def _by_checkpoint(walk: ChunkWalk, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Heads that are no plain linear layer (LoRA, quantised): each piece under autograd, recomputed in the backward."""
    head = walk.head.module

    def piece_sums(chunk: Tensor, piece: Piece) -> Tensor:
        return walk.terms(piece, type(head).forward(head, chunk)[..., : walk.vocabulary])

    sums = upcast(rows.new_zeros(len(walk.keys)))
    for piece in walk.pieces:
        sums = sums + checkpoint(once_observed(piece_sums, piece.terms), rows[piece.rows], piece, use_reentrant=False)
    return walk.weighted(sums) + upcast(rows.sum()) * 0.0, sums


class _ChunkedLinear(torch.autograd.Function):
    """Forms the gradients of hidden rows, head and bias while the logits of a chunk exist; the backward only scales them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, walk: ChunkWalk, *parameters: Tensor) -> Any:
        needed = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]]
        head = walk.head.product_of(rows, weight, bias, walk.vocabulary, walk.compute_dtype)
        once = walk.fused is not None and not walk.pieces and rows.dtype == walk.compute_dtype
        ctx.gradients = Gradients([rows, weight, bias, *parameters], needed, once)
        apart = (walk.term_gradients or walk.meeting is not None) and needed[0]
        per_term = [torch.zeros_like(upcast(head.hidden)) for _ in walk.keys] if apart else []
        sums = upcast(head.hidden).new_zeros(len(walk.keys))
        if walk.fused is not None:
            sums += _fused(walk, walk.fused, head, ctx.gradients if any(needed) else None)
        for piece in walk.pieces:
            sums += _piece(walk, piece, head, ctx.gradients if any(needed) else None, per_term)
        if walk.meeting is not None and ctx.gradients.rows is not None:
            ctx.gradients.rows.copy_(walk.met(per_term))
        ctx.mark_non_differentiable(sums, *per_term)
        return (walk.weighted(sums), sums, *per_term)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, *unused: Any) -> Any:
        rows, weight, bias, *learned = ctx.gradients.scaled(scale)
        return (rows, weight, bias, None, *learned)


def _fused(walk: ChunkWalk, fused: FusedTerms, head: Product, gradients: Gradients | None) -> Tensor:
    """The fused terms' sums over all rows, in the places of ``walk.keys``."""
    source = walk.source if fused.needs_teacher else None
    own = fused_rows(fused, head, source, walk.inputs, walk.weights, walk.items, gradients, walk.block_rows)
    sums = dict(zip((term.key for term in fused.terms), own, strict=True))
    return torch.stack([sums.get(key, own.new_zeros(())) for key in walk.keys])


def _piece(walk: ChunkWalk, piece: Piece, head: Product, gradients: Gradients | None, per_term: list[Tensor]) -> Tensor:
    """The terms' sums on one piece; its gradients are added to ``gradients``."""
    product = head.rows(piece.rows)
    chunk, raw = product.hidden, product.formed()
    if gradients is None:
        return walk.terms(piece, raw)
    with torch.enable_grad():
        raw.requires_grad_()
        sums = walk.terms(piece, raw)
        total = walk.weighted(sums)
        present = {term.key for term in piece.terms}
        for place, total_of_term in enumerate(per_term):
            if walk.keys[place] not in present:
                continue
            (own,) = torch.autograd.grad(sums[place], raw, retain_graph=True, allow_unused=True, materialize_grads=True)
            accumulate(total_of_term, piece.rows, upcast(own.to(chunk.dtype) @ head.weight))
        at_logits, *at_learned = torch.autograd.grad(total, [raw, *walk.parameters], allow_unused=True, materialize_grads=True)
    gradients.add(piece.rows, at_logits.to(chunk.dtype), chunk, head.weight, with_rows=walk.meeting is None)
    gradients.add_learned(at_learned)
    return sums.detach()
