"""The checks of the conformance kit for combiners.

Letters: K terms of a meeting.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from distily.combiners import COMBINER_KEYS, SCOPES, Combiner
from distily.conformance.objectives import Subject, close, require

STEPS = 25
"""Optimizer steps that a combiner's state is moved by."""


def combiners(subject: Subject) -> Iterator[str]:
    """Finite coefficients for whatever gradients meet, one matrix by itself, and state that a checkpoint carries."""
    yield "construction"
    taken = sorted(set(COMBINER_KEYS) & set(subject.entry.options))
    require(not taken, f"{', '.join(taken)}: such options belong to the core")
    made = [each for each in (_made(subject, terms) for terms in (2, 3)) if each is not None]
    require(made, "it refused two terms and three")
    require(made[0].measures in ("gradients", "values"), f"measures is {made[0].measures!r}; allowed: gradients, values")
    require(
        made[0].scopes and set(made[0].scopes) <= set(SCOPES), f"scopes is {made[0].scopes}; allowed: some of {', '.join(SCOPES)}"
    )
    for combiner in made:
        require(not list(combiner.parameters()), "state belongs in buffers: nothing trains a parameter of a combiner")
        yield from _coefficients(combiner)
        yield from _state(subject, combiner)


def _made(subject: Subject, terms: int) -> Combiner | None:
    """The combiner for K terms, None where it refuses as many."""
    try:
        made = subject.make()(terms)
    except ValueError:
        return None
    require(isinstance(made, Combiner), f"it made {type(made).__name__}, not a Combiner")
    require(made.terms == terms, f"terms is {made.terms} of {terms}; call super().__init__(terms)")
    return made


def _measured(combiner: Combiner, *shape: int, seed: int = 0) -> Tensor:
    """What a combiner might get: positive values ``(K,)``, or Gram matrices ``(*shape, K, K)`` of gradients of unequal lengths."""
    generator, terms = torch.Generator().manual_seed(seed), combiner.terms
    if combiner.measures == "values":
        return torch.rand(terms, generator=generator, dtype=torch.float64) + 0.1
    return _gram(torch.randn(*shape, terms, 5, generator=generator, dtype=torch.float64) * torch.arange(1, terms + 1)[:, None])


def _values(combiner: Combiner, measured: Tensor) -> Tensor:
    """The terms' values beside what was measured of them, ``(K,)``."""
    return measured if combiner.measures == "values" else measured.diagonal(dim1=-2, dim2=-1).square()


def _gram(gradients: Tensor) -> Tensor:
    return gradients @ gradients.mT


def _extremes(combiner: Combiner) -> dict[str, Tensor]:
    """Inputs at the edges of what may come."""
    terms = combiner.terms
    usual, zeros, first = _measured(combiner), torch.zeros(terms), torch.eye(terms)[0]
    if combiner.measures == "values":
        return {
            "values of 0": zeros,
            "a single value above 0": first,
            "no value but the first at 0": 1 - first,
            "small": usual * 1e-12,
        }
    ones, signs = torch.ones(terms, 1), torch.ones(terms, 1)
    signs[-1] = -1.0
    across = torch.eye(terms)
    return {
        "no gradient": torch.zeros(terms, terms),
        "no gradient but the first": _gram(first[:, None]),
        "no first gradient": _gram((1 - first)[:, None]),
        "equal gradients": _gram(ones),
        "opposite gradients": _gram(signs),
        "opposite gradients of unequal length": _gram(signs * torch.arange(1, terms + 1)[:, None]),
        "orthogonal gradients": across,
        "small gradients": usual * 1e-20,
        "large gradients": usual * 1e20,
        "unequal gradients": _gram(across * 10.0 ** torch.linspace(-5, 5, terms)[:, None]),
    }


def _coefficients(combiner: Combiner) -> Iterator[str]:
    leads = [()] if combiner.measures == "values" else [(), (4,), (2, 3)]
    yield "shape"
    for lead in leads:
        found = combiner.coefficients(_measured(combiner, *lead)).shape
        require(found == (*lead, combiner.terms), f"{combiner.terms} terms, led by {lead}, got coefficients {tuple(found)}")
    yield "dtype"
    for dtype in (torch.float32, torch.float64):
        coefficients = combiner.coefficients(_measured(combiner).to(dtype))
        require(coefficients.dtype == dtype, f"{dtype} came back as {coefficients.dtype}")
    yield "finite"
    for what, measured in _extremes(combiner).items():
        for dtype in (torch.float32, torch.float64):
            moved = copy.deepcopy(combiner)
            for when in ("", ", after a step of them")[: 2 if combiner.state_dict() else 1]:
                require(moved.coefficients(measured.to(dtype)).isfinite().all(), f"{what}{when}: a coefficient is not finite")
                moved.advance(measured.to(dtype), _values(combiner, measured).to(dtype), 0.0)
    if combiner.measures == "gradients":
        yield "matrices"
        many = _measured(combiner, 6)
        together, alone = combiner.coefficients(many), torch.stack([combiner.coefficients(each) for each in many])
        close(together, alone, 1e-9, "a matrix among others got other coefficients than alone")
        yield "scale"  # gradients are divided by the tokens of the batch
        close(combiner.coefficients(many * 2.0**-20), together, 1e-6, "gradients of 1/1024 of the length got other coefficients")


def _state(subject: Subject, combiner: Combiner) -> Iterator[str]:
    yield "purity"
    steps = [_measured(combiner, seed=seed) for seed in range(STEPS)]
    kept, before = steps[0].clone(), copy.deepcopy(combiner.state_dict())
    first, second = (combiner.coefficients(steps[0]).clone() for _ in range(2))
    require(torch.equal(first, second), "the same input got other coefficients the second time")
    _same(before, combiner, "coefficients changed the state")
    yield "advance"
    for step, measured in enumerate(steps):
        combiner.advance(measured, _values(combiner, measured), step / STEPS)
    require(torch.equal(kept, steps[0]), "it changed what was measured in place")
    moved, steps[-1][...] = copy.deepcopy(combiner.state_dict()), 0.0
    _same(moved, combiner, "the state is a view of what was measured")
    numbers = combiner.report()
    require(all(each.numel() == 1 for each in numbers.values()), f"report gave {', '.join(numbers)}, not all of them one number")
    yield "checkpoint"
    restored = _made(subject, combiner.terms)
    assert restored is not None
    restored.load_state_dict(combiner.state_dict())
    for each in (combiner, restored):
        each.advance(kept, _values(each, kept), 1.0)
    require(
        torch.equal(restored.coefficients(kept), combiner.coefficients(kept)),
        "restored from its state it gives other coefficients",
    )
    yield "no host synchronisation"
    for device in ["meta", *(["cuda"] if torch.cuda.is_available() else [])]:
        placed, measured = copy.deepcopy(combiner).to(device), kept.to(device)
        _step(placed, measured)
        if device == "cuda":  # once more, now that everything is set up
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                _step(placed, measured)
            finally:
                torch.cuda.set_sync_debug_mode(mode)


def _step(combiner: Combiner, measured: Tensor) -> None:
    combiner.advance(measured, _values(combiner, measured), 0.5)
    combiner.coefficients(measured)
    combiner.report()


def _same(before: dict[str, Tensor], combiner: Combiner, seen: str) -> None:
    now = combiner.state_dict()
    changed = [name for name in now if not torch.equal(now[name], before[name])]
    require(not changed, f"{seen}: {changed}")
