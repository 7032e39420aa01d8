"""Combiners that weigh terms by their values over the global batch.

Letters: K terms of the run, L_k their unweighted values, L_0 the primary one's; a_k the coefficients, which multiply the terms' weights.
Every value counts as at least 0: a loss with a floor above 0 (``soft_cross_entropy``) or below it means little here.
Coefficients are applied in the step after the values were measured. Before anything was measured all are 1.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from distily.combiners import Combiner, Scope, divide
from distily.hookspecs import aliased, hookimpl
from distily.schema import Between


class _OfValues(Combiner):
    measures: ClassVar[Literal["gradients", "values"]] = "values"
    scopes: ClassVar[tuple[Scope, ...]] = ("step",)


@aliased("dynamic_ratio")
class Ratio(_OfValues):
    """Every auxiliary term scaled to the primary term's value in the last step; its weight then reads as a share of that.

    Shapes: ``(K,) -> (K,)``. a_0 = 1, a_k = min(cap, L_0 / L_k), 0 where L_k < 1e-8. With weights of 1 the loss is K · L_0, and an
    auxiliary loss may be multiplied by any constant. Equal values are not equal gradients: a term that is nearly solved gets ever more
    weight, up to the cap. Values of single steps are noisy: ``ema_normalized`` is calmer.

    Options: ``cap``, the largest coefficient.

    Source: Muralidharan et al. 2024 (Minitron), arXiv:2407.14679.

    >>> Ratio(2).coefficients(torch.tensor([2.0, 8.0]))
    tensor([1.0000, 0.2500])
    """

    def __init__(self, terms: int, *, cap: Annotated[float, Between(0, 1e9, excluding=(0,))] = 1e3) -> None:
        super().__init__(terms)
        self.cap = cap

    def coefficients(self, measured: Tensor) -> Tensor:
        values = measured.clamp(min=0)
        ratios = torch.where(values < 1e-8, 0.0, divide(values[:1], values).clamp(max=self.cap))
        return torch.cat([torch.ones_like(values[:1]), ratios[1:]])


@aliased("ema_norm")
class EmaNormalized(_OfValues):
    """Every auxiliary term scaled to the primary term's value by running means; its weight then reads as a share of that.

    Shapes: ``(K,) -> (K,)``. a_0 = 1, a_k = mean(L_0) / mean(L_k), kept in [1e-3, 1e3]. The means need no correction for their start,
    which is the same factor on both sides. Any constant factor of an auxiliary loss drops out from the first step.

    Options: ``ema_decay``, of the running means. ``freeze_after``, the share of training after which coefficients stay as they are, so that
    the rest of the run has one fixed objective; 1 is never.

    >>> combiner = EmaNormalized(2)
    >>> combiner.advance(torch.tensor([2.0, 8.0]), torch.tensor([2.0, 8.0]), progress=0.0)
    >>> combiner.coefficients(torch.tensor([2.0, 8.0]))
    tensor([1.0000, 0.2500])
    """

    means: Tensor

    def __init__(
        self,
        terms: int,
        *,
        ema_decay: Annotated[float, Between(0, 1, excluding=(1,))] = 0.99,
        freeze_after: Annotated[float, Between(0, 1)] = 1.0,
    ) -> None:
        super().__init__(terms)
        self.ema_decay, self.freeze_after = ema_decay, freeze_after
        self.register_buffer("means", torch.zeros(terms, dtype=torch.float64))

    def coefficients(self, measured: Tensor) -> Tensor:
        ratios = self.means[0] / self.means.clamp(min=torch.finfo(self.means.dtype).tiny)
        primary = torch.arange(self.terms, device=ratios.device) == 0
        untouched = primary | (self.means == 0).all()
        return torch.where(untouched, 1.0, ratios.clamp(1e-3, 1e3)).to(measured.dtype)

    def advance(self, measured: Tensor, values: Tensor, progress: float) -> None:
        if progress <= self.freeze_after:
            self.means.lerp_(measured.clamp(min=0).to(self.means), 1.0 - self.ema_decay)


@aliased("uncertainty_weighting", "kendall")
class Uncertainty(_OfValues):
    """Learned weights that minimise the sum of the terms' logarithms: what is easy to bring to 0 gets ever more weight.

    Shapes: ``(K,) -> (K,)``. a_k = e^(−u_k), where each u_k descends ½ e^(−u_k) L_k + ½ u_k, so that it settles at ln L_k and a term then
    counts as 1. Twice the paper's coefficient: at u = 0 the loss is the plain sum. u ≥ −6 bounds a_k by 403. A step's gradient in u is
    kept within ±½, its own bound downwards, so that one loud batch does not switch a term off.
    Not for signed values. A feature term of a student that starts from its teacher tends to take over.

    Options: ``learning_rate``, of u, by plain gradient descent without decay. ``start``, u at first: ``value`` is the logarithm of the
    first value, ``zero`` is 0.

    Source: Kendall, Gal, Cipolla 2018, arXiv:1705.07115. Shown for vision.

    >>> combiner = Uncertainty(2)
    >>> combiner.advance(torch.tensor([2.0, 8.0]), torch.tensor([2.0, 8.0]), progress=0.0)
    >>> combiner.coefficients(torch.tensor([2.0, 8.0]))
    tensor([0.5000, 0.1250])
    """

    log_variances: Tensor
    started: Tensor

    def __init__(
        self,
        terms: int,
        *,
        learning_rate: Annotated[float, Between(0, 1)] = 0.01,
        start: Literal["value", "zero"] = "value",
    ) -> None:
        super().__init__(terms)
        self.learning_rate = learning_rate
        self.register_buffer("log_variances", torch.zeros(terms, dtype=torch.float64))
        self.register_buffer("started", torch.tensor(start == "zero"))

    def coefficients(self, measured: Tensor) -> Tensor:
        return (-self.log_variances).exp().to(measured.dtype)

    def advance(self, measured: Tensor, values: Tensor, progress: float) -> None:
        values = values.clamp(min=0).to(self.log_variances)
        current = torch.where(self.started, self.log_variances, values.log().clamp(min=-6.0))
        slope = 0.5 * (1 - (-current).exp() * values).clamp(min=-1.0)
        self.log_variances.copy_((current - self.learning_rate * slope).clamp(min=-6.0))
        self.started.fill_(True)


@aliased("dynamic_weight_average")
class Dwa(_OfValues):
    """More weight for terms whose value falls more slowly than the others', from one window of steps to the next.

    Shapes: ``(K,) -> (K,)``. a = K · softmax(r / temperature), r_k the mean of L_k over the last whole window, divided by that of the
    window before; 1 until there are two. Σ a = K. Free of the losses' scales. A term that is stuck at its floor counts as slow: take
    divergences, not cross-entropies.

    Options: ``window``, optimizer steps whose values are averaged. ``temperature``, large ones give more even weights.

    Source: Liu, Johns, Davison 2019, arXiv:1803.10704. Shown for vision.

    >>> combiner = Dwa(2, window=1)
    >>> for values in ([4.0, 1.0], [2.0, 1.0]): combiner.advance(torch.tensor(values), torch.tensor(values), progress=0.0)
    >>> combiner.coefficients(torch.ones(2))  # the first halved, the second stayed
    tensor([0.8756, 1.1244])
    """

    sums: Tensor
    steps: Tensor
    last: Tensor
    before: Tensor

    def __init__(
        self,
        terms: int,
        *,
        window: Annotated[int, Between(1)] = 100,
        temperature: Annotated[float, Between(0, 1e6, excluding=(0,))] = 2.0,
    ) -> None:
        super().__init__(terms)
        self.window, self.temperature = window, temperature
        for name in ("sums", "last", "before"):
            self.register_buffer(name, torch.zeros(terms, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def coefficients(self, measured: Tensor) -> Tensor:
        rates = torch.where(self.before == 0, 1.0, divide(self.last, self.before))
        return (self.terms * torch.softmax(rates / self.temperature, 0)).to(measured.dtype)

    def advance(self, measured: Tensor, values: Tensor, progress: float) -> None:
        self.sums += measured.clamp(min=0).to(self.sums)
        self.steps += 1
        whole = self.steps % self.window == 0
        self.before.copy_(torch.where(whole, self.last, self.before))
        self.last.copy_(torch.where(whole, self.sums, self.last))
        self.sums.copy_(torch.where(whole, 0.0, self.sums))


@hookimpl
def distily_combiners() -> dict[str, type[Combiner]]:
    return {"ratio": Ratio, "ema_normalized": EmaNormalized, "uncertainty": Uncertainty, "dwa": Dwa}
