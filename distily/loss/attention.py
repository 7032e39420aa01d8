"""Attention scores without eager attention: queries and keys are kept where the model scores them, rows are formed when asked for.

A model whose attention is watched runs its own implementation (SDPA, say) through a wrapper that is registered with transformers.
Letters: B batch, S sequence, A attention heads, n rows of one document, D width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from distily.errors import DistilyError
from distily.products import upcast

PREFIX = "distily_"
"""The wrapper of an implementation is registered under the implementation's name with this before it."""
IMPLEMENTATIONS = ("sdpa", "eager")
"""Implementations that are told by a mask which keys a query may look at. The flash kernels are not."""


@dataclass(frozen=True)
class Scoring:
    """How one attention module makes scores of queries and keys: scale, soft cap, mask.

    ``mask`` ``(B or 1, A or 1, S, S)`` is true, or 0 in floats, where a query may look; None stands for a causal mask where ``causal``,
    else for none.
    """

    scale: float
    softcap: float | None
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True)
class AttentionScores:
    """The scores of one block's attention before the softmax, from its queries ``(B, A, S, D)`` and keys (perhaps of fewer heads).

    Both are those that the attention gets, after rotary embedding and norms; whatever gradient they have reaches the rows.
    """

    query: Tensor
    key: Tensor
    scoring: Scoring

    def rows(self, index: Tensor) -> Tensor:
        """Scores of the positions ``index`` (n,) of the flattened batch, all of one document: ``(n, A, S)``, float32 at least.

        Entry k is the document's token k, -inf where the query may not look. Memory and work are O(n · A · S).
        """
        heads, length, width = self.query.shape[1:]
        row, positions = index[:1] // length, index % length
        columns = self._starts[row, positions[:1]] + torch.arange(length, device=index.device)
        inside = columns < length
        columns = columns.clamp(max=length - 1)
        allowed = self._allowed(row, positions)[..., columns] & inside
        query = upcast(self.query.index_select(0, row)[0].index_select(1, positions))
        key = upcast(self.key.index_select(0, row)[0].index_select(1, columns))
        seen = allowed.flatten(0, 1).any(0)  # what nobody looks at takes part in nothing, whatever its value
        key = torch.where(seen[:, None], key, 0.0)
        grouped = query.reshape(key.shape[0], -1, width)  # neighbouring heads share a key
        scores = (grouped @ key.mT).reshape(heads, -1, length) * self.scoring.scale
        if self.scoring.softcap is not None:
            scores = torch.tanh(scores / self.scoring.softcap) * self.scoring.softcap
        return torch.where(allowed, scores, -torch.inf).transpose(0, 1)

    def _allowed(self, row: Tensor, positions: Tensor) -> Tensor:
        """Where some queries of a batch row may look: ``(A or 1, n, S)``."""
        if self.scoring.mask is not None:
            return self._mask.index_select(0, row)[0].index_select(1, positions)
        keys = torch.arange(self.key.shape[2], device=positions.device)
        last = positions if self.scoring.causal else torch.full_like(positions, len(keys))
        return (keys <= last[:, None])[None]

    @cached_property
    def _mask(self) -> Tensor:
        """The mask as true and false, ``(B, A or 1, S, S)``."""
        mask = self.scoring.mask
        assert mask is not None
        mask = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
        return mask.expand(self.query.shape[0], -1, -1, -1)[..., : self.key.shape[2]]

    @cached_property
    def _starts(self) -> Tensor:
        """Where the document of each position starts, ``(B, S)``: a document's first token does not see the token before it."""
        batch, _, length, _ = self.query.shape
        if self.scoring.mask is None:
            return torch.zeros(batch, length, dtype=torch.long, device=self.query.device)
        sees_before = self._mask[:, 0].diagonal(-1, -2, -1)
        first = nn.functional.pad(~sees_before, (1, 0), value=True)
        return torch.where(first, torch.arange(length, device=first.device), 0).cummax(-1).values


Receiver = Callable[[Tensor, Tensor, Scoring], None]
_receivers: WeakKeyDictionary[nn.Module, Receiver] = WeakKeyDictionary()


@contextmanager
def watched(receivers: Mapping[nn.Module, Receiver]) -> Iterator[None]:
    """Inside, an attention module among ``receivers`` hands its queries, its keys and how it scores them to its receiver."""
    _receivers.update(receivers)
    try:
        yield
    finally:
        for module in receivers:
            _receivers.pop(module, None)


def make_watchable(model: Any) -> Callable[[], None]:
    """Lets ``model`` run its attention through the wrapper; returns what undoes that.

    Raises ``DistilyError`` for a model whose attention is not looked up by name, or is of a kind that gets no mask.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    config = model.config.get_text_config()
    name = str(config._attn_implementation).removeprefix(PREFIX)
    if name not in IMPLEMENTATIONS:
        raise DistilyError(
            f"{type(model).__name__}: attention scores cannot be read from the implementation {name!r}; "
            f"allowed: {', '.join(IMPLEMENTATIONS)}."
        )
    AttentionInterface.register(PREFIX + name, partial(_attention, name))
    AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation(PREFIX + name)
    if config._attn_implementation != PREFIX + name:
        raise DistilyError(
            f"{type(model).__name__}: attention scores cannot be read, since its attention does not use transformers' "
            "AttentionInterface; allowed: model classes that do, and objectives on queries and keys."
        )
    return lambda: model.set_attn_implementation(name)


@torch.compiler.disable  # a compiled block would leave the receiver out
def _attention(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Any:
    """The attention function ``name`` of the module's own model class; before it runs, the module's receiver is told."""
    receiver = _receivers.get(module)
    if receiver is not None:
        receiver(query, key, _scoring(module, query, mask, options))
    home: Any = sys.modules[type(module).__module__]
    function = home.ALL_ATTENTION_FUNCTIONS.get_interface(name, home.eager_attention_forward)
    return function(module, query, key, value, mask, **options)


def _scoring(module: nn.Module, query: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> Scoring:
    for name, meaning in (("position_bias", "a position bias"), ("s_aux", "attention sinks")):
        if options.get(name) is not None:
            raise DistilyError(f"{type(module).__name__}: attention scores with {meaning} cannot be read.")
    scale, causal = options.get("scaling"), options.get("is_causal")
    return Scoring(
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        softcap=options.get("softcap"),
        mask=mask,
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
    )
