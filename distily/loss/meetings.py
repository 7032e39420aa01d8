"""Where terms meet: their gradients (or values) are measured, combined by a combiner's coefficients, and logged.

Letters: K terms of a meeting, n tokens, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distily.combiners import COMBINER_KEYS, Combiner, Scope, cosines
from distily.products import upcast
from distily.spec import Component
from distily.state import Adaptive


@dataclass(frozen=True)
class Combination:
    """The combiner of a run. ``make(K)`` builds one for a meeting; ``decay`` smooths what ``step`` scope measures."""

    make: Callable[[int], Combiner]
    measures: str = "gradients"
    scope: Scope = "step"
    decay: float = 0.9


def combination(component: Component | None, builder: Any) -> Combination | None:
    """The combiner that a component names, from the plugins ``builder``; None for none."""
    if component is None:
        return None
    options = {name: value for name, value in component.options.items() if name not in COMBINER_KEYS}
    core = {name: component.options[name] for name in ("scope", "decay") if name in component.options}
    make = builder.build("combiners", Component(component.name, options))
    return Combination(make, builder.find("combiners", component.name).factory.measures, **core)


class Meeting(Adaptive):
    """Combines K gradients that meet at one tensor of the student; the first is the primary one."""

    gram: Tensor
    weight: Tensor
    current: Tensor

    def __init__(self, combination: Combination, terms: int) -> None:
        super().__init__()
        self.scope, self.decay = combination.scope, combination.decay
        self.combiner = combination.make(terms)
        self.terms = terms
        self.register_buffer("gram", torch.zeros(terms, terms, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("current", torch.ones(terms, dtype=torch.float64))
        # the Gram matrix, the terms' values, the squared length of what was taken away, the coefficients' sum and their number
        self.register_buffer("pending", torch.zeros(terms * terms + 2 * terms + 2, dtype=torch.float64), persistent=False)
        self.log: dict[str, Tensor] = {}

    def combine(self, gradients: Sequence[Tensor]) -> Tensor:
        """K gradients ``(n, H)`` to the combined one, ``(n, H)``; what was measured is added to ``pending``."""
        per_token = torch.stack([torch.stack([(a * b).sum(-1) for b in gradients], -1) for a in gradients], -2)
        whole = per_token.sum(0).double()
        if self.scope == "token":
            coefficients = self.combiner.coefficients(per_token)
        else:
            coefficients = self.current if self.scope == "step" else self.combiner.coefficients(whole)
        coefficients = coefficients.to(gradients[0].dtype)
        combined = torch.stack([coefficients[..., k, None] * gradient for k, gradient in enumerate(gradients)]).sum(0)
        removed = (torch.stack(list(gradients)).sum(0) - combined).double().square().sum()
        rows = coefficients.double().reshape(-1, self.terms)
        number = rows.new_full((1,), rows.shape[0])
        values = rows.new_zeros(self.terms)
        self.pending += torch.cat([whole.reshape(-1), values, removed[None], rows.sum(0), number])
        return combined

    def observe(self, values: Sequence[Tensor]) -> None:
        """Takes in the weighted values of the K terms on a micro-batch."""
        size = self.terms**2
        self.pending[size : size + self.terms] += torch.stack([value.detach().double() for value in values])

    def advance(self, progress: float) -> None:
        k = self.terms
        gram, values, removed, applied, number = self.pending.split([k * k, k, 1, k, 1])
        gram, applied = gram.view(k, k), applied / number.clamp(min=1)
        if self.scope == "step":
            self.gram.lerp_(gram, 1.0 - self.decay)
            self.weight.lerp_(torch.ones_like(self.weight), 1.0 - self.decay)
            gram = self.gram / self.weight
        self.combiner.advance(gram, values, progress)
        if self.scope == "step":
            self.current.copy_(self.combiner.coefficients(gram))
        self._record(gram, removed[0], applied)

    def _record(self, gram: Tensor, removed: Tensor, applied: Tensor) -> None:
        others = self.pending[: self.terms**2].view(self.terms, self.terms)[1:, 1:].sum().clamp(min=1e-60)
        self.log = {"removed_share": (removed / others).sqrt(), **self.combiner.report()}
        agreement = cosines(gram)[0]
        for k in range(self.terms):
            self.log[f"weight_{k}"] = applied[k]
            self.log[f"norm_{k}"] = gram[k, k].clamp(min=0).sqrt()
            if k:
                self.log[f"cosine_{k}"] = agreement[k]


class ValueMeeting(Adaptive):
    """Coefficients for all K terms of a run from their values in the steps before."""

    current: Tensor

    def __init__(self, combination: Combination, terms: int) -> None:
        super().__init__()
        self.combiner = combination.make(terms)
        self.register_buffer("current", torch.ones(terms, dtype=torch.float64))
        self.register_buffer("pending", torch.zeros(terms, dtype=torch.float64), persistent=False)
        self.log: dict[str, Tensor] = {}

    def advance(self, progress: float) -> None:
        self.combiner.advance(self.pending, self.pending, progress)
        self.log = {f"weight_{k}": value for k, value in enumerate(self.current.clone())} | self.combiner.report()
        self.current.copy_(self.combiner.coefficients(self.pending))


def advance(loss: nn.Module, progress: float) -> None:
    """Moves the state of every adaptive module of the loss, after an optimizer step: one sum over the ranks for all of them."""
    modules = [module for module in loss.modules() if isinstance(module, Adaptive)]
    if not modules:
        return
    pending = torch.cat([module.pending.reshape(-1).double() for module in modules])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(pending)
    finite = pending.isfinite().all()  # a step with an infinite loss moves no state
    offset = 0
    for module in modules:
        size = module.pending.numel()
        kept = [buffer.clone() for buffer in module.buffers()]
        module.pending.copy_(pending[offset : offset + size].nan_to_num(0.0, 0.0, 0.0).view(module.pending.shape))
        module.advance(progress)
        for buffer, before in zip(module.buffers(), kept, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        module.pending.zero_()
        offset += size


class FeatureGradients:
    """The gradients of feature terms at the student's tensors, kept until those from above arrive in the backward."""

    def __init__(self, meetings: Mapping[str, Meeting]) -> None:
        self.meetings = meetings
        self.scale: Tensor | None = None
        self.waiting = 0

    def add(self, loss: Tensor, places: Mapping[str, tuple[Tensor, Tensor]], parameters: Sequence[Tensor]) -> Tensor:
        """``loss`` as an output whose gradients wait. ``places``: the student's tensors, and the leaves that stand for them."""
        tensors, leaves = zip(*places.values(), strict=True)
        at_all = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True, materialize_grads=True)
        for name, tensor, gradient in zip(places, tensors, at_all, strict=False):
            tensor.register_hook(self._hook(self.meetings[name], gradient))
            self.waiting += 1
        announced: Tensor = _Announced.apply(loss.detach(), self, at_all[len(leaves) :], len(tensors), *tensors, *parameters)
        return announced

    def _hook(self, meeting: Meeting, own: Tensor) -> Callable[[Tensor], Tensor]:
        def combine(incoming: Tensor) -> Tensor:
            assert self.scale is not None, "the loss's own backward comes first"
            self.waiting -= 1
            above, below = (_tokens(upcast(each)) for each in (incoming / self.scale, own))
            combined = meeting.combine([above, below]) * self.scale
            return _like(combined, incoming).to(incoming.dtype)

        return combine


def _tokens(gradient: Tensor) -> Tensor:
    """``(B, S, H)`` or ``(B, heads, S, d)`` by token: ``(B · S, ·)``."""
    if gradient.dim() == 4:
        gradient = gradient.transpose(1, 2)
    return gradient.reshape(gradient.shape[0] * gradient.shape[1], -1)


def _like(tokens: Tensor, gradient: Tensor) -> Tensor:
    """The inverse of ``_tokens``."""
    if gradient.dim() == 4:
        batch, heads, length, width = gradient.shape
        return tokens.view(batch, length, heads, width).transpose(1, 2)
    return tokens.view(gradient.shape)


class _Announced(torch.autograd.Function):
    """A loss whose gradients are formed: its backward tells the hooks the incoming scale, and scales those of parameters.

    The tensors are arguments so that it runs before their hooks; they get nothing from it.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: FeatureGradients, at_parameters: Sequence[Tensor], hooked: int, *inputs: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.hooked = gradients, hooked
        ctx.save_for_backward(*at_parameters)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        ctx.gradients.scale = scale
        return (*[None] * (4 + ctx.hooked), *(gradient * scale for gradient in ctx.saved_tensors))
