"""Combiners and weights (D1–D18) against torchjd, scipy's solvers, autograd and what the papers prove of their solutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor

from oracles.case import Case, Check
from oracles.installed import component

Oracle = Callable[[Tensor], Any]


def gradients(terms: int, seed: int, width: int = 6) -> Tensor:
    """Rows of unequal length; every second set is in conflict."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(terms, width, generator=generator, dtype=torch.float64)
    if seed % 2:
        rows[1] -= 1.2 * rows[0]
    return rows * torch.linspace(1.0, 0.4, terms, dtype=torch.float64)[:, None]


def combined(name: str, rows: Tensor, **options: Any) -> Tensor:
    """The update of a combiner: its coefficients for the rows' Gram matrix, times the rows."""
    made = component("combiners", name, **options)(len(rows))
    return made.coefficients(rows @ rows.T) @ rows


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN where one is."""
    return float(np.max(list(errors)))


def apart(found: Any, expected: Any) -> float:
    found, expected = (torch.as_tensor(each, dtype=torch.float64) for each in (found, expected))
    return float((found - expected).norm() / expected.norm())


def against(name: str, oracle: Oracle, terms: Iterable[int] = (2, 3), **options: Any) -> float:
    """The largest relative distance of a combiner's update from the oracle's, over sets of gradients."""
    sets = [gradients(count, seed) for count in terms for seed in range(8)]
    return worst(apart(combined(name, rows, **options), oracle(rows)) for rows in sets)


def update(item: str, name: str, oracle: str, function: Oracle, tolerance: float = 1e-12, note: str = "", **facts: Any) -> Check:
    return Check(item, name, oracle, "gradient", partial(against, name, function, **facts), tolerance, note)


# --- gradients: the primary one and auxiliary ones ---


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return torch.cosine_similarity(first, second, dim=0)


def orthogonal_part(vector: Tensor, reference: Tensor) -> Tensor:
    """What numpy's least squares leaves of ``vector`` beside ``reference``."""
    factor = np.linalg.lstsq(reference[:, None].numpy(), vector.numpy(), rcond=None)[0]
    return vector - float(factor[0]) * reference


def balanced(rows: Tensor, kappa: float = 0.3) -> Tensor:
    primary, *others = rows
    return primary + sum(kappa / len(others) * primary.norm() * torch.nn.functional.normalize(each, dim=0) for each in others)


def gated(rows: Tensor) -> Tensor:
    primary, *others = rows
    return primary + sum(max(0.0, float(cosine(each, primary))) * each for each in others)


def projected(rows: Tensor) -> Tensor:
    primary, *others = rows
    return primary + sum(orthogonal_part(each, primary) if each @ primary < 0 else each for each in others)


def guarded(rows: Tensor) -> Tensor:
    """Capped, then projected if it opposes by more than the threshold."""
    primary, *others = rows
    total = primary.clone()
    for each in others:
        longest = 0.3 * primary.norm() / len(others)
        short = each * min(1.0, float(longest / each.norm()))
        total += orthogonal_part(short, primary) if cosine(each, primary) < -0.05 else short
    return total


def at_angles() -> float:
    """``gradient_weighted`` at cosines in all three of its ranges and near their borders."""
    errors = []
    for angle in (1.0, 0.6, 0.051, 0.049, 0.0, -0.049, -0.051, -0.6, -1.0):
        for length in (0.1, 0.3, 1.0, 30.0):
            rows = torch.tensor([[2.0, 0.0], [2 * length * angle, 2 * length * math.sqrt(1 - angle**2)]], dtype=torch.float64)
            errors.append(apart(combined("gradient_weighted", rows), guarded(rows)))
    return worst(errors)


# --- gradients: all terms alike ---


def torchjd(name: str, *given: Any, scale: float | None = None, **options: Any) -> Oracle:
    """An aggregator of torchjd's; ``scale`` None: a mean, which becomes a sum."""

    def aggregate(rows: Tensor) -> Tensor:
        import torchjd.aggregation

        factor = len(rows) if scale is None else scale
        return factor * getattr(torchjd.aggregation, name)(*given, **options)(rows)

    return aggregate


def surgery(rows: Tensor) -> Tensor:
    """PCGrad's algorithm on the vectors themselves."""
    total = torch.zeros_like(rows[0])
    for i, vector in enumerate(rows):
        for j, other in enumerate(rows):
            if i != j and vector @ other < 0:
                vector = orthogonal_part(vector, other)
        total = total + vector
    return total


def turned_against_itself() -> float:
    """Three gradients of which the last, without what opposes the others, points away from where it was; that is left as it is."""
    angles = torch.tensor([150.0, 210.0, 0.0], dtype=torch.float64).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    return apart(combined("pcgrad", rows), surgery(rows))


def vaccinated() -> float:
    """Eight steps; torchjd moves its goal after each use."""
    import torchjd.aggregation

    peer, ours = torchjd.aggregation.GradVac(beta=0.3), component("combiners", "gradvac", ema_decay=0.7)(2)
    errors = []
    for seed in range(8):
        rows = gradients(2, seed)
        errors.append(apart(ours.coefficients(rows @ rows.T) @ rows, peer(rows)))
        ours.advance(rows @ rows.T, rows.new_ones(len(rows)), 0.0)
    return worst(errors)


def turned_to_the_goal() -> float:
    """Each gradient of two, once turned, has the cosine ρ with the other one; the update is their sum."""
    ours = component("combiners", "gradvac", ema_decay=0.0)(2)
    goal, rows = torch.tensor([[1.0, 0.3], [0.3, 1.0]], dtype=torch.float64), gradients(2, 1)
    ours.advance(goal, goal.new_ones(2), 0.0)

    def turned(vector: Tensor, other: Tensor) -> Tensor:
        def excess(factor: float) -> float:
            return float(cosine(vector + factor * other, other)) - 0.3

        return vector + scipy.optimize.brentq(excess, 0.0, 1e3, xtol=1e-15) * other

    return apart(ours.coefficients(rows @ rows.T) @ rows, turned(rows[0], rows[1]) + turned(rows[1], rows[0]))


def shortest(rows: Tensor) -> Tensor:
    """K times the shortest vector of the convex hull, by non-negative least squares (Wolfe 1976: rows under a row of ones)."""
    system = np.vstack([rows.T.numpy(), np.ones(len(rows))])
    weights, _ = scipy.optimize.nnls(system, np.array([0.0] * rows.shape[1] + [1.0]))
    return len(rows) * torch.from_numpy(weights / weights.sum()) @ rows


def duality_gap(radius: float) -> float:
    """CAGrad: min_k ⟨g_k, d⟩ of the update d is never above min_w ⟨g_w, g_0⟩ + radius ‖g_0‖ ‖g_w‖; they meet at the solution alone."""
    errors = []
    for terms in (2, 3, 4):
        for seed in range(6):
            rows = gradients(terms, seed)
            mean = rows.mean(0)
            ball = radius * mean.norm()
            found = combined("cagrad", rows, radius=radius) * (1 + radius) / terms

            def dual(raw: Any, rows: Tensor = rows, mean: Tensor = mean, ball: Tensor = ball) -> float:
                weighed = torch.from_numpy(raw**2 / (raw**2).sum()) @ rows
                return float(weighed @ mean + ball * weighed.norm())

            least = scipy.optimize.minimize(dual, np.ones(terms), method="BFGS", options={"gtol": 1e-10}).fun
            size = float(mean @ mean)
            errors += [abs(least - float((rows @ found).min())) / size, abs(float(((found - mean).norm() - ball) / mean.norm()))]
    return worst(errors)


def polar(rows: Tensor) -> Tensor:
    """The rows of the nearest matrix with orthonormal rows, summed, times the smallest singular value."""
    orthonormal, _ = scipy.linalg.polar(rows.numpy())
    return float(np.linalg.svd(rows.numpy(), compute_uv=False)[-1]) * torch.from_numpy(orthonormal).sum(0)


def bargain(rows: Tensor) -> Tensor:
    """The least of ½ aᵀ G a − Σ ln a by scipy, polished as a root of G a = 1 / a, then K ‖g_L‖ long."""
    gram = (rows @ rows.T).numpy()
    start = 1 / np.sqrt(gram.diagonal())
    rough = scipy.optimize.minimize(
        lambda a: a @ gram @ a / 2 - np.log(a).sum(), start, jac=lambda a: gram @ a - 1 / a, bounds=[(1e-9, None)] * len(start)
    )
    fine = scipy.optimize.root(lambda a: gram @ a - 1 / a, rough.x, jac=lambda a: gram + np.diag(a**-2.0), tol=1e-14)
    direction = torch.from_numpy(fine.x) @ rows
    return len(rows) * rows[0].norm() * direction / direction.norm()


def nash_of_torchjd(rows: Tensor) -> Tensor:
    direction: Tensor = torchjd("NashMTL", scale=1.0, n_tasks=len(rows), max_norm=0.0)(rows)
    return len(rows) * rows[0].norm() * direction / direction.norm()


def unopposed(rows: Tensor) -> Tensor:
    """Each gradient projected onto the dual cone by scipy's non-negative least squares."""
    multipliers = [scipy.optimize.nnls(rows.T.numpy(), -row.numpy())[0] for row in rows]
    return torch.stack([row + torch.from_numpy(each) @ rows for row, each in zip(rows, multipliers, strict=True)]).sum(0)


def equal_lengths() -> float:
    """GradNorm's steps are along −∂/∂ ln w of its published loss, and Σ w = K."""
    ours = component("combiners", "gradnorm", alpha=1.5, learning_rate=0.02, every=2)(3)
    weights, first, errors = torch.ones(3, dtype=torch.float64), None, []
    for step in range(60):
        rows = gradients(3, step)
        lengths = rows.norm(dim=1)
        losses = torch.from_numpy(values(step))
        first = losses if first is None else first
        if step % 2 == 0:
            logarithms = weights.log().requires_grad_()
            sizes = logarithms.exp() * lengths
            rates = losses / first
            targets = (sizes.mean() * (rates / rates.mean()) ** 1.5).detach()
            (slope,) = torch.autograd.grad((sizes - targets).abs().sum(), logarithms)
            weights = torch.softmax(logarithms.detach() - 0.02 * slope / sizes.detach(), 0) * 3
        ours.advance(rows @ rows.T, losses, step / 60)
        errors.append(apart(ours.coefficients(rows @ rows.T), weights))
    return worst(errors)


# --- values ---


def values(step: int, terms: int = 3) -> np.ndarray:
    """Losses that fall at unequal rates, with noise."""
    noise = np.random.default_rng(step).uniform(0.8, 1.2, terms)
    return noise * np.array([2.0, 0.01, 300.0][:terms]) * np.exp(-step * np.array([0.02, 0.05, 0.0][:terms]))


def run_of(name: str, steps: int, **options: Any) -> np.ndarray:
    """The coefficients of a combiner of values after these steps."""
    ours = component("combiners", name, **options)(3)
    for step in range(steps):
        measured = torch.from_numpy(values(step))
        ours.advance(measured, measured, step / 100)
    return ours.coefficients(torch.from_numpy(values(steps - 1))).numpy()


def scaled_to_the_primary() -> float:
    last = values(6)
    return abs(float(run_of("ratio", 7) @ last) - 3 * last[0]) / last[0]


def bias_corrected_means() -> float:
    history = np.stack([values(step) for step in range(40)])
    weights = 0.9 ** np.arange(39, -1, -1.0)
    means = weights @ history / weights.sum()
    return apart(run_of("ema_normalized", 40, ema_decay=0.9), np.clip(means[0] / means, 1e-3, 1e3) ** np.array([0, 1, 1]))


def learned_by_autograd() -> float:
    """Plain SGD of torch on the published Σ ½ e^(−u) L + ½ u; the coefficient is twice the paper's."""
    start = torch.tensor(np.log(values(0)))
    logs = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([logs], lr=0.05)
    for step in range(50):
        optimizer.zero_grad()
        (0.5 * (-logs).exp() * torch.from_numpy(values(step)) + 0.5 * logs).sum().backward()
        optimizer.step()
    return apart(run_of("uncertainty", 50, learning_rate=0.05), 2 * 0.5 * (-logs.detach()).exp())


def sum_of_logarithms() -> float:
    """At rest the paper's loss is Σ ½ (1 + ln L), found by scipy's minimiser."""
    still, ours = torch.tensor([2.0, 0.05, 30.0]), component("combiners", "uncertainty", start="zero", learning_rate=0.5)(3)
    for _ in range(500):
        ours.advance(still, still, 0.0)
    rest = scipy.optimize.minimize_scalar
    least = sum(rest(lambda u, L=float(each): 0.5 * math.exp(-u) * L + 0.5 * u).fun for each in still)
    half = ours.coefficients(still.double()) / 2
    return abs(float((half * still - 0.5 * (2 * half).log()).sum()) - least)


def windows() -> float:
    history = np.stack([values(step) for step in range(12)]).reshape(3, 4, 3).mean(1)
    rates = history[2] / history[1]
    weights = np.exp(rates / 2)
    return apart(run_of("dwa", 14, window=4), 3 * weights / weights.sum())


# --- weights and what is logged ---


def fixed_weights() -> float:
    """The student's gradient is λ₁ of the first term's and λ₂ of the second's, by autograd on dense logits."""
    import tiny

    student, teacher = (tiny.model("gpt2", seed, torch.float64, bos_token_id=None, eos_token_id=None) for seed in (1, 2))
    batch = tiny.collate(tiny.documents(3))
    plain = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        target = teacher(**plain).logits.log_softmax(-1)
    predicted = student(**plain).logits.log_softmax(-1)
    kept = batch["shift_labels"] != -100
    terms = [(b.exp() * (b - a)).sum(-1)[kept].mean() for a, b in ((predicted, target), (target, predicted))]
    separate = [torch.autograd.grad(term, list(student.parameters()), retain_graph=True) for term in terms]
    expected = {name: 0.7 * a + 2.5 * b for (name, _), a, b in zip(student.named_parameters(), *separate, strict=True)}
    built = tiny.driver(student, teacher, "forward_kl:weight=0.7", "reverse_kl:weight=2.5")
    return tiny.distance(tiny.accumulate(built, student, [batch])[1], expected)


def scheduled(name: str, expected: Callable[[np.ndarray], np.ndarray], **options: Any) -> float:
    from distily.schedules import SCHEDULES

    made, shares = SCHEDULES[name](**options), np.linspace(0, 1, 41)
    return float(np.abs(np.array([made.at(float(share)) for share in shares]) - expected(shares)).max())


def annealed(shares: np.ndarray) -> np.ndarray:
    """Torch's cosine annealing from 3 to 0.5 as a schedule of the learning rate."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3.0)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(shares) - 1, eta_min=0.5)
    rates = []
    for _ in shares:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        annealing.step()
    return np.array(rates)


def logged() -> float:
    """What ``sum`` shows of one step: norms and cosines of the gradients of a batch, weights of 1, nothing removed."""
    import tiny

    from distily.loss.meetings import Combination, Meeting

    entry = tiny.plugins().find("combiners", "sum")
    errors = []
    for scope in ("step", "token", "micro_batch"):
        meeting = Meeting(Combination(entry.factory, entry.factory.measures, scope), 3)
        batches = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for batch in batches:
            meeting.combine(list(batch))
        meeting.advance(0.5)
        rows = batches.transpose(0, 1).reshape(3, -1).numpy()
        expected = {f"norm_{k}": np.linalg.norm(rows[k]) for k in range(3)} | {f"weight_{k}": 1.0 for k in range(3)}
        expected |= {"removed_share": 0.0} | {
            f"cosine_{k}": np.corrcoef(np.stack([np.r_[r, -r] for r in rows]))[0, k] for k in (1, 2)
        }
        errors += [abs(float(meeting.log[name]) - expected[name]) for name in expected]
    return worst(errors)


def value(item: str, name: str, oracle: str, error: Callable[[], float], tolerance: float = 1e-12, note: str = "") -> Check:
    return Check(item, name, oracle, "value", error, tolerance, note)


CASES: list[Case | Check] = [
    Check("D1", "sum", "autograd on dense logits, term by term", "gradient", fixed_weights, 1e-9, "the terms' fixed weights"),
    value("D2", "weight=linear", "numpy.interp", partial(
        scheduled, "linear", lambda p: np.interp(p, [0.2, 0.7], [3, 0.5]), start=3, end=0.5, begin=0.2, until=0.7)),
    value("D2", "weight=cosine", "torch CosineAnnealingLR", partial(scheduled, "cosine", annealed, start=3, end=0.5)),
    value("D2", "weight=step", "numpy.where", partial(
        scheduled, "step", lambda p: np.where(p < 0.05, 3, 0), start=3, end=0, at_progress=0.05)),
    value("D2", "weight=wsd", "numpy.interp", partial(
        scheduled, "wsd", lambda p: np.interp(p, [0, 0.1, 0.8, 1], [0, 2, 2, 0.5]), peak=2, end=0.5, warmup=0.1, decay=0.2)),
    value("D2", "weight=constant", "the number", partial(scheduled, "constant", lambda p: 0 * p + 2.5, value=2.5)),
    value("D3", "ratio", "the sum is K times the primary value", scaled_to_the_primary),
    value("D4", "ema_normalized", "numpy, bias-corrected", bias_corrected_means),
    value("D5", "uncertainty", "torch SGD on the published loss", learned_by_autograd, note="twice the paper's coefficient"),
    value("D5", "uncertainty", "scipy minimize_scalar, Σ ½ (1 + ln L)", sum_of_logarithms, 1e-8),
    value("D6", "dwa", "numpy, published formula", windows),
    value("D7", "gradnorm", "autograd of the published loss", equal_lengths,
          note="steps in ln w; squared norms for the loss's rate: see its entry"),
    update("D8", "norm_balance", "unit vectors", balanced),
    update("D8", "gradient_weighted", "numpy least squares on vectors", guarded),
    Check("D8", "gradient_weighted", "likewise at the borders of its three ranges", "gradient", at_angles, 1e-12),
    update("D9", "cosine_gate", "torch cosine_similarity", gated),
    update("D10", "project_auxiliary", "numpy least squares on vectors", projected),
    update("D11", "pcgrad", "torchjd PCGrad", torchjd("PCGrad", scale=1.0), terms=(2,)),
    update("D11", "pcgrad", "published algorithm on vectors", surgery, terms=(2, 3, 4), note="torchjd draws the order of three or more"),
    Check("D11", "pcgrad", "likewise, where a gradient comes to oppose itself", "gradient", turned_against_itself, 1e-12),
    Check("D12", "gradvac", "torchjd GradVac over 8 steps", "gradient", vaccinated, 1e-6, "torchjd adds 1e-8 to denominators"),
    Check("D12", "gradvac", "scipy brentq on the angle", "gradient", turned_to_the_goal, 1e-12),
    update("D13", "mgda", "torchjd MGDA", torchjd("MGDA"), terms=(2,), note="torchjd's Frank-Wolfe stops early for three or more"),
    update("D13", "mgda", "scipy nnls", shortest, 1e-8, terms=(2, 3, 4)),
    Check("D14", "cagrad", "duality gap, scipy BFGS on the dual", "gradient", partial(duality_gap, 0.4), 1e-8),
    Check("D14", "cagrad", "torchjd CAGrad", "gradient", partial(
        against, "cagrad", lambda rows: torchjd("CAGrad", c=0.5, norm_eps=1e-12)(rows) / 1.5, radius=0.5), 1e-3, "its solver's precision"),
    update("D15", "aligned_mtl", "torchjd AlignedMTL", torchjd("AlignedMTL"), 1e-10, terms=(2, 3, 4)),
    update("D15", "aligned_mtl", "scipy polar", polar, 1e-10, terms=(2, 3, 4)),
    update("D16", "nash", "scipy root", bargain, 1e-9, terms=(2, 3, 4), note="scaled to K times the primary gradient's length"),
    update("D16", "nash", "torchjd NashMTL, direction", nash_of_torchjd, 1e-6, terms=(2,),
           note="under conflict of three, torchjd may stop early or at the plain sum"),
    update("D17", "upgrad", "scipy nnls", unopposed, 1e-9, terms=(2, 3, 4)),
    update("D17", "upgrad", "torchjd UPGrad", torchjd("UPGrad"), 5e-3, note="torchjd regularises the Gram matrix by 1e-4"),
    value("D18", "sum", "numpy on the gradients of a batch", logged),
]  # fmt: skip
