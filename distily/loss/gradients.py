"""Where the gradients of the loss add up while logits come and go: at the hidden rows, the head, its bias, and learned parameters.

Letters: N supervised tokens, n rows, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._triton as triton
from torch import Tensor

from distily.products import wide

MOST_PADDING = 128
"""Columns of zeros that gradients at logits may have beyond the head's rows, so that products have sizes that a GPU likes."""


class Gradients:
    """Sums of gradients, in float32 (float64 where the input was); None for an input that needs none.

    ``once``: every hidden row gets its gradient in one piece, which is then kept as the product made it, in the rows' dtype.
    """

    def __init__(self, inputs: Sequence[Tensor | None], wanted: Sequence[bool], once: bool = False) -> None:
        self.wanted = [want and value is not None for want, value in zip(wanted, inputs, strict=True)]
        self.dtypes = [None if value is None else value.dtype for value in inputs]
        rows, weight, bias, *learned = (value if want else None for want, value in zip(self.wanted, inputs, strict=True))
        self.once = once
        self.rows = None if rows is None else torch.empty_like(rows) if once else _zeros(rows)
        self._head = weight
        self.padding = MOST_PADDING if weight is not None and weight.is_cuda else 0
        self.weight: Tensor | None = None
        self.bias = None if bias is None else _zeros(bias)
        self.learned = [None if value is None else _zeros(value) for value in learned]

    @property
    def head_dtype(self) -> torch.dtype | None:
        """What the head's gradient is wanted in; None where it is not."""
        return self.dtypes[1] if self.wanted[1] else None

    def add(
        self, at: slice | Tensor, at_logits: Tensor, hidden: Tensor, weight: Tensor, with_rows: bool = True, few: bool = False
    ) -> None:
        """From the gradient at logits ``(n, V)`` of rows ``at``: that of their ``hidden`` (n, H), of ``weight`` (V, H) and the bias.

        ``at_logits`` may be wider than V, with zeros. ``few``: the head's comes in few pieces, whose sum needs no wider
        dtype, as that of micro-batches has none.
        """
        at_logits, at_padded = at_logits[:, : len(weight)], at_logits if self.padding else at_logits[:, : len(weight)]
        if self._head is not None:
            self._add_weight(self._head, at_padded, hidden, few)
        if self.rows is not None and with_rows:
            self._add_rows(at, at_logits, weight)
        if self.bias is not None:
            self.bias[: len(weight)] += at_logits.sum(0, dtype=self.bias.dtype)

    def _add_rows(self, at: slice | Tensor, at_logits: Tensor, weight: Tensor) -> None:
        assert self.rows is not None
        if self.once:
            product(at_logits, weight, self.rows[at])
        else:
            accumulate(self.rows, at, at_logits @ weight)

    def add_learned(self, values: Sequence[Tensor]) -> None:
        for total, own in zip(self.learned, values, strict=True):
            if total is not None:
                total += own

    def _add_weight(self, head: Tensor, at_logits: Tensor, hidden: Tensor, few: bool) -> None:
        """The product goes into the sum as it adds up, without a copy of the head in between where the device can do that."""
        width, transposed = at_logits.shape[1], at_logits.T
        first = self.weight is None
        if self.weight is None:
            self.weight = head.new_empty(
                (len(head) + self.padding, head.shape[1]),
                dtype=head.dtype if few and head.dtype in (at_logits.dtype, torch.float32) else wide(head.dtype),
            )
            self.weight[width:].zero_()  # what no product reaches: the padding of the vocabulary
        total = self.weight[:width]
        wider: dict[str, Any] = {} if at_logits.dtype == total.dtype or not at_logits.is_cuda else {"out_dtype": total.dtype}
        if at_logits.dtype != total.dtype and not wider:
            total.copy_(transposed @ hidden) if first else total.add_(transposed @ hidden)
        elif first:
            torch.mm(transposed, hidden, **wider, out=total)
        else:
            torch.addmm(total, transposed, hidden, **wider, out=total)

    def scaled(self, factor: Tensor) -> list[Tensor | None]:
        """The gradients times ``factor`` in the dtypes of the inputs. They are handed over: a second call finds none."""
        weight = None
        if self._head is not None:
            weight = torch.zeros_like(self._head) if self.weight is None else self.weight[: len(self._head)]
        sums = [self.rows, weight, self.bias, *self.learned]
        self.rows = self.weight = self.bias = self._head = None
        self.learned = []
        return [
            _scaled(total, factor, dtype) if want else None
            for total, want, dtype in zip(sums, self.wanted, self.dtypes, strict=True)
        ]


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``left @ right``, (n, V) times (V, H). cuBLAS is five times slower where V is no multiple of 8, so the rest is a product apart."""
    even = left.shape[1] // 8 * 8
    if even == left.shape[1] or not left.is_cuda:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(left[:, even:] @ right[even:], left[:, :even], right[:even], out=out)


def _scaled(values: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor:
    assert values is not None, "the loss was differentiated a second time, which it cannot be"
    assert dtype is not None
    if not values.is_cuda or not triton.has_triton():
        return (values * factor).to(dtype)
    from distily.kernels.scaling import scaled

    return scaled(values, factor, dtype)


def _zeros(value: Tensor) -> Tensor:
    return torch.zeros_like(value, dtype=wide(value.dtype))


def accumulate(total: Tensor, at: slice | Tensor, values: Tensor) -> None:
    """``values`` (n, H) added to the rows ``at`` of ``total`` (N, H); a row may occur more than once."""
    if isinstance(at, slice):
        total[at] += values
    else:
        total.index_add_(0, at, values.to(total.dtype))
