"""Forms: what an objective can be for one kernel to compute it together with others, on logits that exist for a moment only.

A form is a value of two next-token distributions, the student's s and the teacher's t, that the kernels know by name: most are sums
Σ_v f(log s_v, log t_v) over the vocabulary, sparse ones are decided by chosen or drawn tokens. An objective says by ``forms=`` in its
decorator which forms its options come to; it stays what it is everywhere else, and is the oracle of its own kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the configuration is checked without torch
    from torch import Tensor

FORMS = {
    "cross_entropy": "−log s_y, with the label y and at temperature 1",
    "forward_kl": "Σ t log(t/s)",
    "soft_cross_entropy": "−Σ t log s",
    "reverse_kl": "Σ s log(s/t)",
    "jsd": "Σ β t log(t/m) + (1−β) s log(s/m), m = β t + (1−β) s; parameter β",
    "skew_kl": "Σ t log(t/m), m = λ t + (1−λ) s; parameter λ",
    "skew_reverse_kl": "Σ s log(s/m), m = (1−λ) t + λ s; parameter λ",
    "skew_reverse_kl_detached": "the same with m held constant in the gradient; parameter λ",
    "total_variation": "½ Σ |t − s|",
    "alpha_beta": "−(1/αβ) Σ (t^α s^β − α/(α+β) t^{α+β} − β/(α+β) s^{α+β}); parameters α, β",
    "renyi": "log(Σ t^α s^{1−α}) / (α−1); parameter α",
}
"""What the kernels compute, by name: sums over the whole vocabulary."""

SPARSE_FORMS = {
    "sampled": "−(1/n) Σ log s at n tokens drawn from t, with replacement; parameter n",
    "top_bucket": "Σ_S t log(t/s) + t_o log(t_o/s_o), with o for all tokens outside of S together; parameters k, p",
    "top_renormalize": "Σ_S t̂ log(t̂/ŝ), t̂ and ŝ being t and s divided by their mass in S; parameters k, p",
    "top_zero": "Σ_S t log(t/s); parameters k, p",
}
"""What the kernels compute on a part of the vocabulary. S: the k likeliest tokens of t or, with p < 1, as many of them as it takes to
reach the mass p; of equally likely tokens the first come first."""


@dataclass(frozen=True)
class Form:
    """``factor`` times the form ``name`` with its ``parameters``."""

    name: str
    parameters: tuple[float, ...] = ()
    factor: float | Tensor = 1.0

    def __post_init__(self) -> None:
        known = {**FORMS, **SPARSE_FORMS}
        assert self.name in known, f"no form {self.name!r}; there are {', '.join(known)}"
