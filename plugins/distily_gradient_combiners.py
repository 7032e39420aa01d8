"""Combiners that hold the auxiliary terms against the primary one, by the Gram matrix of their gradients where they meet.

Letters: K terms of a meeting; g_L the primary term's gradient, g_F an auxiliary one's, c the cosine of their angle, u = Σ_k a_k g_k
the combined gradient with coefficients a_k. Everything is on the scale of a sum: all coefficients 1 give Σ_k g_k.
What is guaranteed holds to first order for plain gradient descent on what was measured; Adam's preconditioner may bend it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from distily.combiners import Combiner, cosines, divide, norms
from distily.hookspecs import aliased, hookimpl
from distily.schema import Between

Share = Annotated[float, Between(0, 1)]


def _balance(gram: Tensor, kappa: float) -> Tensor:
    """Factors that bring every auxiliary gradient to κ ‖g_L‖ / (K − 1), so that all of them together have at most κ ‖g_L‖; 0 for
    a gradient of 0: ``(…, K, K) -> (…, K − 1)``.
    """
    lengths = norms(gram)
    auxiliaries = max(1, gram.shape[-1] - 1)
    return divide(kappa / auxiliaries * lengths[..., :1], lengths[..., 1:])


def _projected(gram: Tensor, factors: Tensor, opposing: Tensor) -> Tensor:
    """Coefficients of g_L + Σ factor · g_F, each g_F without its part along g_L where ``opposing``: ``(…, K)``."""
    lengths = norms(gram)
    along = divide(cosines(gram)[..., 0, 1:] * lengths[..., 1:], lengths[..., :1])
    removed = torch.where(opposing, factors * along, 0.0)
    return torch.cat([1.0 - removed.sum(-1, keepdim=True), factors], -1)


@aliased("equal_weighting", "linear_scalarization")
class Sum(Combiner):
    """The weighted sum of the terms, as without a combiner; everything is measured and logged.

    For watching: cosines, norms and weights of all meetings at almost no cost.

    Shapes: ``(…, K, K) -> (…, K)``. u = Σ_k g_k. It ascends the primary loss where c < 0 and ‖g_F‖ |c| > ‖g_L‖.

    >>> Sum(2).coefficients(torch.tensor([[1.0, -0.5], [-0.5, 4.0]]))
    tensor([1., 1.])
    """

    def coefficients(self, measured: Tensor) -> Tensor:
        return measured.new_ones(measured.shape[:-1])


class NormBalance(Combiner):
    """Every auxiliary gradient at a fixed share κ of the primary one's length, whatever the scale of its loss.

    Shapes: ``(…, K, K) -> (…, K)``. a_L = 1, a_F = κ ‖g_L‖ / ‖g_F‖. With one auxiliary term ⟨u, g_L⟩ = ‖g_L‖² (1 + κ c), so for κ < 1
    the sum never ascends the primary loss, at any angle and without projection. With K > 2 each auxiliary gets κ / (K − 1), which
    keeps ⟨u, g_L⟩ ≥ ‖g_L‖² (1 − κ). A gradient of 0 gets the coefficient 0; so does every auxiliary one while g_L is 0.

    Options: ``kappa``, the auxiliary terms' length as a share of the primary one's; usual are 0.1 to 0.5. ``cap``, only shorten:
    a_F = min(1, κ ‖g_L‖ / ‖g_F‖).

    >>> NormBalance(2, kappa=0.5).coefficients(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    tensor([1., 1.])
    """

    def __init__(self, terms: int, *, kappa: Annotated[float, Between(0, 1e6)] = 0.3, cap: bool = False) -> None:
        super().__init__(terms)
        self.kappa, self.cap = kappa, cap

    def coefficients(self, measured: Tensor) -> Tensor:
        factors = _balance(measured, self.kappa)
        if self.cap:
            factors = factors.clamp(max=1.0)
        return torch.cat([torch.ones_like(measured[..., :1, 0]), factors], -1)


@aliased("cos_gate", "gradient_similarity")
class CosineGate(Combiner):
    """An auxiliary term only as far as its gradient agrees with the primary one's.

    Shapes: ``(…, K, K) -> (…, K)``. a_L = 1, a_F = max(0, c), or 1 where c ≥ 0 and else 0. ⟨u, g_L⟩ ≥ ‖g_L‖².
    Gradients of many dimensions are almost orthogonal (|c| ~ 1/√dim for random ones), so ``weighted`` almost switches them off.

    Options: ``gate``, ``weighted`` by the cosine or ``hard``.

    Source: Du et al. 2018, arXiv:1812.02224.

    >>> CosineGate(2).coefficients(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    tensor([1., 0.])
    """

    def __init__(self, terms: int, *, gate: Literal["weighted", "hard"] = "weighted") -> None:
        super().__init__(terms)
        self.gate = gate

    def coefficients(self, measured: Tensor) -> Tensor:
        agreement = cosines(measured)[..., 0, 1:]
        gates = agreement.clamp(min=0) if self.gate == "weighted" else (agreement >= 0).to(measured.dtype)
        return torch.cat([torch.ones_like(measured[..., :1, 0]), gates], -1)


@aliased("project_aux", "gradient_regularization")
class ProjectAuxiliary(Combiner):
    """Removes from every auxiliary gradient what opposes the primary one, which stays whole.

    Shapes: ``(…, K, K) -> (…, K)``. u = g_L + Σ_F (g_F − min(0, ⟨g_F, g_L⟩ / ‖g_L‖²) g_L), so ⟨u, g_L⟩ ≥ ‖g_L‖², with equality where
    every c ≤ 0; at c = −1 u is g_L. The auxiliary loss may rise. Long auxiliary gradients stay long: see ``gradient_weighted``.

    Source: Geng, Gao, Fu, Zhang 2021 (RomeBERT), arXiv:2101.09755; Chaudhry et al. 2019 (A-GEM), arXiv:1812.00420.

    >>> ProjectAuxiliary(2).coefficients(torch.tensor([[1.0, -2.0], [-2.0, 4.0]]))  # g_F = −2 g_L: 3 g_L + g_F = g_L
    tensor([3., 1.])
    """

    def coefficients(self, measured: Tensor) -> Tensor:
        factors = torch.ones_like(measured[..., 0, 1:])
        return _projected(measured, factors, cosines(measured)[..., 0, 1:] < 0)


@aliased("gradient_weighted_loss")
class GradientWeighted(Combiner):
    """Auxiliary terms under guard: never longer than a share of the primary gradient, never against it, and off for good once they
    keep opposing it.

    Shapes: ``(…, K, K) -> (…, K)``. First the length: f = min(1, κ ‖g_L‖ / ((K − 1) ‖g_F‖)). Then the angle of each auxiliary term:

    - aligned, c > threshold: u = g_L + f g_F.
    - orthogonal, |c| ≤ threshold: the same. Nothing conflicts; the auxiliary term only takes a share of the step, which f bounds.
    - opposing, c < −threshold: u = g_L + f (g_F − ⟨g_F, g_L⟩ / ‖g_L‖² · g_L), the projection of ``project_auxiliary``.

    ⟨u, g_L⟩ ≥ ‖g_L‖² (1 − κ · threshold); at c = −1 u is g_L. A running mean of c, moved once per optimizer step, decides when an
    auxiliary term of this meeting goes off; it starts from 0, so that one bad batch decides nothing. Off is for good, also over
    restarts. While g_L is 0, so is f.

    Options: ``kappa``, the bound on the auxiliary terms' length together, as a share of the primary one's. ``threshold``, the cosine up
    to which gradients count as orthogonal. ``ema_decay``, of the mean of c. ``off_cosine``, off when the mean stays below it.
    ``off_after``, for how long, as a share of training. ``off_removed``, off at once when −c, the share of ‖g_F‖ that a projection
    removes, is above it in the mean.

    Source: the weighting by agreement follows Du et al. 2018, arXiv:1812.02224, the projection RomeBERT, arXiv:2101.09755, the early
    end HASTE 2025, arXiv:2505.16792; their combination and its defaults are this project's.

    >>> GradientWeighted(2, kappa=0.5).coefficients(torch.tensor([[1.0, -2.0], [-2.0, 4.0]]))  # 1.5 g_L + 0.25 (−2 g_L) = g_L
    tensor([1.5000, 0.2500])
    """

    smoothed: Tensor
    opposed_since: Tensor
    off: Tensor

    def __init__(
        self,
        terms: int,
        *,
        kappa: Share = 0.3,
        threshold: Share = 0.05,
        ema_decay: Annotated[float, Between(0, 1, excluding=(1,))] = 0.9,
        off_cosine: Annotated[float, Between(-1, 0)] = -0.1,
        off_after: Share = 0.05,
        off_removed: Share = 0.5,
    ) -> None:
        super().__init__(terms)
        self.kappa, self.threshold, self.ema_decay = kappa, threshold, ema_decay
        self.off_cosine, self.off_after, self.off_removed = off_cosine, off_after, off_removed
        self.register_buffer("smoothed", torch.zeros(terms - 1, dtype=torch.float64))
        self.register_buffer("opposed_since", torch.full((terms - 1,), torch.inf, dtype=torch.float64))
        self.register_buffer("off", torch.zeros(terms - 1, dtype=torch.bool))

    def coefficients(self, measured: Tensor) -> Tensor:
        factors = torch.where(self.off, 0.0, _balance(measured, self.kappa).clamp(max=1.0))
        return _projected(measured, factors, cosines(measured)[..., 0, 1:] < -self.threshold)

    def advance(self, measured: Tensor, values: Tensor, progress: float) -> None:
        self.smoothed.lerp_(cosines(measured)[0, 1:].to(self.smoothed), 1.0 - self.ema_decay)
        opposed = self.smoothed < self.off_cosine
        self.opposed_since.copy_(torch.where(opposed, self.opposed_since.clamp(max=progress), torch.inf))
        lasting = progress - self.opposed_since >= self.off_after
        self.off |= lasting | (-self.smoothed > self.off_removed)

    def report(self) -> dict[str, Tensor]:
        numbers = {"smoothed_cosine": self.smoothed, "off": self.off}
        return {f"{name}_{k + 1}": values[k] for name, values in numbers.items() for k in range(self.terms - 1)}


class GradNorm(Combiner):
    """Weights that bring all terms' gradients to one length, tilted towards terms that learn slowly.

    Shapes: ``(…, K, K) -> (…, K)``. With G_k = w_k ‖g_k‖, Ḡ their mean and r_k the share L_k / L_k(0) of a term's loss that is left,
    over the mean of all terms, w descends Σ_k |G_k − Ḡ r_k^α| with the targets held constant, then Σ w = K. At α = 0 it settles where
    w_k ∝ 1 / ‖g_k‖.

    One departure from the paper: a step goes along its gradient in ln w, and has the length of ``learning_rate``: ‖g_k‖ has units, and
    in w steps of that size overshoot where norms differ by orders of magnitude.

    Options: ``alpha``, how much slower terms get. ``learning_rate``, the relative change of a weight in one update. ``every``, optimizer
    steps from one update to the next.

    Source: Chen, Badrinarayanan, Lee, Rabinovich 2018, arXiv:1711.02257. Shown for vision.

    >>> combiner = GradNorm(2, alpha=0.0, every=1)
    >>> for step in range(100): combiner.advance(torch.tensor([[9.0, 0.0], [0.0, 1.0]]), torch.ones(2), step / 100)
    >>> combiner.coefficients(torch.eye(2))
    tensor([0.4995, 1.5005])
    """

    weights: Tensor
    first: Tensor
    steps: Tensor

    def __init__(
        self,
        terms: int,
        *,
        alpha: Annotated[float, Between(0, 10)] = 1.5,
        learning_rate: Annotated[float, Between(0, 1)] = 0.025,
        every: Annotated[int, Between(1)] = 10,
    ) -> None:
        super().__init__(terms)
        self.alpha, self.learning_rate, self.every = alpha, learning_rate, every
        self.register_buffer("weights", torch.ones(terms, dtype=torch.float64))
        self.register_buffer("first", torch.zeros(terms, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def coefficients(self, measured: Tensor) -> Tensor:
        return self.weights.to(measured.dtype).expand(measured.shape[:-1])

    def advance(self, measured: Tensor, values: Tensor, progress: float) -> None:
        lengths = norms(measured).to(self.weights)
        values = values.clamp(min=0).to(self.first)
        self.first.copy_(torch.where(self.first == 0, values, self.first))
        rates = divide(values, self.first)
        sizes = self.weights * lengths
        targets = sizes.mean() * divide(rates, rates.mean()) ** self.alpha
        moved = self.weights * torch.exp(-self.learning_rate * torch.sign(sizes - targets))
        due = self.steps % self.every == 0
        self.weights.copy_(torch.where(due, self.terms * moved / moved.sum(), self.weights))
        self.steps += 1


@hookimpl
def distily_combiners() -> dict[str, type[Combiner]]:
    return {
        "sum": Sum,
        "norm_balance": NormBalance,
        "cosine_gate": CosineGate,
        "project_auxiliary": ProjectAuxiliary,
        "gradient_weighted": GradientWeighted,
        "gradnorm": GradNorm,
    }
