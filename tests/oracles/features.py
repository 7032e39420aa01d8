"""Feature objectives (B1–B14, B20–B23) against peers where they are right, and formulas that are written out here."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg
import scipy.spatial.distance
import scipy.stats
import torch
from torch import Tensor

from oracles.case import Case, Check, RowMaker


def rows(n: int, student: int, teacher: int, scale: float = 1.0) -> RowMaker:
    """Random rows of these widths, the sides correlated."""

    def make() -> tuple[Tensor, Tensor, dict[str, Any]]:
        generator = torch.Generator().manual_seed(n)
        shared, *noise = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (3, student, teacher))
        sides = [scale * (own + shared @ torch.ones(3, own.shape[1], dtype=torch.float64).tril()) for own in noise]
        return *sides, {"input_ids": torch.arange(n) % (n - 2)}

    return make


def by_row(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A peer's loss of one row at a time."""
    return lambda student, teacher: torch.stack([function(a[None], b[None]) for a, b in zip(student, teacher, strict=True)])


def textbrewer(name: str) -> Callable[..., Tensor]:
    """A loss of textbrewer's, imported when it is called."""

    def loss(*states: Any) -> Tensor:
        import textbrewer.losses

        return getattr(textbrewer.losses, name)(*states)

    return loss


def torchdistill(name: str, **options: Any) -> Any:
    """A loss of torchdistill's, imported when it is made."""
    import torchdistill.losses.mid_level

    return getattr(torchdistill.losses.mid_level, name)(**options)


def io(**outputs: Any) -> dict[str, dict[str, Any]]:
    """Torchdistill's form of captured features."""
    return {path: {"output": value} for path, value in outputs.items()}


def _pairs(student: str = "x", teacher: str = "x") -> dict[str, Any]:
    return {"pair": {side: {"path": path, "io": "output"} for side, path in (("student", student), ("teacher", teacher))}}


# --- row by row ---


def relative_error(student: Tensor, teacher: Tensor) -> np.ndarray:
    a, b = student.numpy(), teacher.numpy()
    return np.linalg.norm(a - b, axis=1) ** 2 / np.linalg.norm(b, axis=1) ** 2


def scipy_cosine(student: Tensor, teacher: Tensor) -> np.ndarray:
    return np.array([scipy.spatial.distance.cosine(a, b) for a, b in zip(student.numpy(), teacher.numpy(), strict=True)])


def scipy_cityblock(student: Tensor, teacher: Tensor) -> np.ndarray:
    return np.array(
        [scipy.spatial.distance.cityblock(a, b) / len(a) for a, b in zip(student.numpy(), teacher.numpy(), strict=True)]
    )


def huber(student: Tensor, teacher: Tensor, delta: float = 1.0) -> Tensor:
    return torch.nn.functional.huber_loss(student, teacher, delta=delta, reduction="none").mean(-1) / delta


def log_power_sum(student: Tensor, teacher: Tensor, exponent: float = 4.0, epsilon: float = 1e-6) -> np.ndarray:
    return np.log(epsilon + (np.abs((student - teacher).numpy()) ** exponent).sum(1))


@by_row
def srd(student: Tensor, teacher: Tensor) -> Tensor:
    """Equal logits leave twice the feature part."""
    paths = {f"{side}_{part}_module_{kind}": value for side in ("student", "teacher")
             for part, path in (("feature", "x"), ("linear", "y")) for kind, value in (("path", path), ("io", "output"))}  # fmt: skip
    loss = torchdistill("SRDLoss", **paths, exponent=4.0)
    logits = torch.zeros(1, 3, dtype=torch.float64)
    return loss(io(x=student, y=logits), io(x=teacher, y=logits)) / 2


def normal_density(student: Tensor, teacher: Tensor, component: Any) -> np.ndarray:
    weight, bias, raw = (each.detach().numpy() for each in (component.mean.weight, component.mean.bias, component.raw_variance))
    variance = np.log1p(np.exp(raw)) + 1e-5
    density = scipy.stats.norm.logpdf(teacher.numpy(), student.numpy() @ weight.T + bias, np.sqrt(variance))
    return -density.mean(1) - math.log(2 * math.pi) / 2


def vid(student: Tensor, teacher: Tensor, component: Any) -> Tensor:
    loss = torchdistill("VIDLoss", feature_pairs=_pairs())
    variance = torch.log1p(component.raw_variance.detach().exp()) + 1e-5
    mean = student @ component.mean.weight.detach().T + component.mean.bias.detach()
    return torch.stack([loss(io(x=(a[None], variance)), io(x=b[None])) for a, b in zip(mean, teacher, strict=True)])


# --- information ---


def info_nce(
    student: Tensor, teacher: Tensor, component: Any, input_ids: Tensor, temperature: float = 0.1, symmetric: bool = True,
    exclude_same_token: bool = False,
) -> Tensor:  # fmt: skip
    """One row after the other, the negatives chosen one by one."""
    sides = []
    for features, head in ((student, component.student_head), (teacher, component.teacher_head)):
        mapped = features @ head.weight.detach().T
        sides.append(mapped / mapped.square().sum(1, keepdim=True).sqrt())
    total = torch.zeros((), dtype=student.dtype)
    for a, b in [sides, sides[::-1]] if symmetric else [sides]:
        for i in range(len(a)):
            kept = [j for j in range(len(b)) if j == i or not exclude_same_token or input_ids[i] != input_ids[j]]
            scores = b[kept] @ a[i] / temperature
            total = total + torch.nn.functional.cross_entropy(scores[None], torch.tensor([kept.index(i)]))
    return total / len(student) / (2 if symmetric else 1)


def _covariances(student: Tensor, teacher: Tensor, ridge: float) -> tuple[np.ndarray, ...]:
    a, b = ((each - each.mean(0)).numpy() for each in (student, teacher))
    a, b = (each / np.sqrt((each**2).sum() / each.shape[1]) for each in (a, b))
    return a.T @ a + ridge * np.eye(a.shape[1]), b.T @ b + ridge * np.eye(b.shape[1]), a.T @ b


def gaussian_by_correlations(student: Tensor, teacher: Tensor, ridge: float = 1e-3) -> float:
    """The canonical correlations are the roots of an eigenvalue problem."""
    own, other, cross = _covariances(student, teacher, ridge)
    squares = scipy.linalg.eigh(cross @ np.linalg.solve(other, cross.T), own, eigvals_only=True)
    return 0.5 * np.log1p(-squares).sum()


def gaussian_by_determinants(student: Tensor, teacher: Tensor, ridge: float = 1e-3) -> float:
    own, other, cross = _covariances(student, teacher, ridge)
    joint = np.block([[own, cross], [cross.T, other]])
    return 0.5 * sum(sign * np.linalg.slogdet(matrix)[1] for sign, matrix in ((1, joint), (-1, own), (-1, other)))


def gaussian_at_equality(student: Tensor, teacher: Tensor, ridge: float = 1e-3) -> float:
    """Each variance λ correlates as λ/(λ + ridge) with itself."""
    variances = np.linalg.eigvalsh(_covariances(student, teacher, 0.0)[0])
    return 0.5 * np.log1p(-((variances / (variances + ridge)) ** 2)).sum()


@cache
def _gaussian(count: int, dimensions: int, correlation: float = 0.9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dimensions)
    x, noise = (torch.randn(count, dimensions, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


def gaussian_truth() -> float:
    """Jointly normal features have −(d/2) log(1 − ρ²) nats; 20,000 rows leave a standard error of 0.01 for d = 4."""
    from distily_contrastive import gaussian_information

    return abs(-gaussian_information(*_gaussian(20_000, 4), ridge=1e-9)[0].item() + 2.0 * math.log(1 - 0.81))


def info_nce_truth(negatives: int) -> float:
    """With the critic log p(y|x)/p(y) the bound must lie below both I and log n; how far above the smaller it is, if at all."""
    from distily_contrastive import contrast

    rho, bounds = 0.9, []
    for x, y in zip(*(side.split(negatives) for side in _gaussian(negatives * 40, 1)), strict=True):
        bounds.append(math.log(negatives) - contrast(_log_ratio(x, y, rho)).mean().item())
    mean, error = np.mean(bounds), np.std(bounds) / math.sqrt(len(bounds))
    return max(0.0, mean - min(-0.5 * math.log(1 - rho**2), math.log(negatives)) - 4 * error)


def _log_ratio(x: Tensor, y: Tensor, rho: float) -> Tensor:
    return -0.5 * math.log(1 - rho**2) - (y.T - rho * x) ** 2 / (2 * (1 - rho**2)) + y.T**2 / 2


# --- spaces ---


def hsic(k: np.ndarray, h: np.ndarray) -> float:
    """The unbiased estimate as Song et al. 2012 write it."""
    n = len(k)
    k, h = k - np.diag(np.diag(k)), h - np.diag(np.diag(h))
    means = k.sum() * h.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ h).sum()
    return float((np.trace(k @ h) + means) / (n * (n - 3)))


def unbiased_cka(student: Tensor, teacher: Tensor) -> float:
    k, h = ((each @ each.T).numpy() for each in (student, teacher))
    return 1 - hsic(k, h) / math.sqrt(hsic(k, k) * hsic(h, h))


def cka_of_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """Kornblith et al. 2019, the form in covariances."""
    a, b = (each - each.mean(0) for each in (student, teacher))
    norm = torch.linalg.matrix_norm
    return 1 - norm(b.T @ a) ** 2 / (norm(a.T @ a) * norm(b.T @ b))


def canonical(student: Tensor, teacher: Tensor) -> Tensor:
    """Nothing left out: QR of each side."""
    bases = [torch.linalg.qr(each - each.mean(0)).Q for each in (student, teacher)]
    return 1 - torch.linalg.svdvals(bases[0].T @ bases[1]).mean()


def _main_directions(side: Tensor, variance: float) -> np.ndarray:
    left, lengths, _ = np.linalg.svd((side - side.mean(0)).numpy(), full_matrices=False)
    explained = np.cumsum(lengths**2) / (lengths**2).sum()
    return left[:, : int(np.argmax(explained >= variance)) + 1]


def svcca(student: Tensor, teacher: Tensor, variance: float = 0.99) -> float:
    bases = [_main_directions(side, variance) for side in (student, teacher)]
    return 1 - np.cos(scipy.linalg.subspace_angles(*bases)).mean()


def pwcca(student: Tensor, teacher: Tensor, variance: float = 0.99) -> float:
    a, b = (_main_directions(side, variance) for side in (student, teacher))
    _, correlations, right = np.linalg.svd(a.T @ b, full_matrices=False)
    weights = np.abs((teacher - teacher.mean(0)).numpy().T @ (b @ right.T)).sum(0)
    return 1 - float(weights @ correlations / weights.sum())


def _entire(*sides: Tensor) -> list[np.ndarray]:
    moved = [(side - side.mean(0)).numpy() for side in sides]
    return [side / np.sqrt((side**2).sum()) for side in moved]


def scipy_procrustes(student: Tensor, teacher: Tensor) -> float:
    a, b = _entire(student, teacher)
    width = max(a.shape[1], b.shape[1])
    a, b = (np.pad(side, ((0, 0), (0, width - side.shape[1]))) for side in (a, b))
    rotation, _ = scipy.linalg.orthogonal_procrustes(a, b)
    return float(((a @ rotation - b) ** 2).sum())


def gram_by_entries(student: Tensor, teacher: Tensor) -> float:
    a, b = _entire(student, teacher)
    return sum((a[i] @ a[j] - b[i] @ b[j]) ** 2 for i in range(len(a)) for j in range(len(a)))


# --- relations ---


def rkd(method: str) -> Callable[..., Tensor]:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        peer = torchdistill(
            "RKDLoss", student_output_path="x", teacher_output_path="x", dist_factor=1, angle_factor=1, reduction="mean"
        )
        return getattr(peer, f"compute_rkd_{method}_loss")(teacher, student)

    return loss


def scipy_distances(student: Tensor, teacher: Tensor) -> float:
    a, b = (scipy.spatial.distance.pdist(side.numpy()) for side in (student, teacher))
    gap = np.abs(a / a.mean() - b / b.mean())
    return float(2 * np.where(gap < 1, gap**2 / 2, gap - 0.5).sum() / len(student) ** 2)


def triangles(student: Tensor, teacher: Tensor) -> float:
    n, total = len(student), 0.0
    for i, j, k in np.ndindex(n, n, n):
        if i not in (j, k):
            a, b = (
                1 - scipy.spatial.distance.cosine(side[j] - side[i], side[k] - side[i])
                for side in (student.numpy(), teacher.numpy())
            )
            gap = abs(a - b)
            total += gap**2 / 2 if gap < 1 else gap - 0.5
    return total / n**3


def neighbors(student: Tensor, teacher: Tensor, diagonal: bool = False) -> float:
    chosen = []
    for side in (student, teacher):
        nearness = 1 - scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(side.numpy(), "cosine")) / 2
        nearness -= 0 if diagonal else np.eye(len(nearness))
        chosen.append(nearness / nearness.sum(1, keepdims=True))
    p, q = chosen
    return float((q * np.log((q + 1e-7) / (p + 1e-7))).sum() / len(p))


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """torchdistill takes the mean over all n² entries."""
    return torchdistill("PKTLoss", **dict.fromkeys(["student_module_path", "teacher_module_path"], "x"),
                        **dict.fromkeys(["student_module_io", "teacher_module_io"], "output")
                        ).cosine_similarity_loss(student, teacher) * len(student)  # fmt: skip


def similarities(student: Tensor, teacher: Tensor) -> float:
    grams = [side.numpy() @ side.numpy().T for side in (student, teacher)]
    a, b = (gram / np.sqrt((gram**2).sum(1, keepdims=True)) for gram in grams)
    return float(((a - b) ** 2).sum() / len(a) ** 2)


def cckd(kernel: str) -> Callable[..., Tensor]:
    """torchdistill's Taylor series with 40 terms, on rows of length 1; it returns the norm, not its square."""

    def loss(student: Tensor, teacher: Tensor, gamma: float = 0.4) -> Tensor:
        config = {"type": kernel, "gamma": gamma, "max_p": 40}
        peer = torchdistill("CCKDLoss", student_linear_path="x", teacher_linear_path="x", kernel_config=config, reduction="sum")
        a, b = (side / side.square().sum(1, keepdim=True).sqrt() for side in (student, teacher))
        return (peer(io(x=a), io(x=b)) / len(a)) ** 2

    return loss


def squared_distances_through_a_kernel(student: Tensor, teacher: Tensor, gamma: float = 0.4) -> float:
    a, b = (side.numpy() / np.linalg.norm(side.numpy(), axis=1, keepdims=True) for side in (student, teacher))
    kernels = [np.exp(-gamma * scipy.spatial.distance.cdist(side, side, "sqeuclidean")) for side in (a, b)]
    return float(((kernels[0] - kernels[1]) ** 2).mean())


# --- moments ---


def textbrewer_fsp(student: Tensor, teacher: Tensor) -> Tensor:
    def pair(side: Tensor, layer: int) -> list[Tensor]:
        return [side[None, :, layer], side[None, :, layer + 1]]

    layers = range(student.shape[1] - 1)
    return torch.stack([textbrewer("fsp_loss")(pair(student, layer), pair(teacher, layer)) for layer in layers]).mean()


def products_of_channels(student: Tensor, teacher: Tensor) -> float:
    a, b = (np.einsum("nlh,nlk->lhk", side[:, :-1].numpy(), side[:, 1:].numpy()) / len(side) for side in (student, teacher))
    return float(((a - b) ** 2).mean())


def _directions(*sides: Tensor) -> list[np.ndarray]:
    return [side.numpy() / np.linalg.norm(side.numpy(), axis=-1, keepdims=True) for side in sides]


def kernel_means(student: Tensor, teacher: Tensor, kernel: str = "gaussian") -> float:
    """All pairs, one after the other."""
    a, b = _directions(student, teacher)
    median = np.sort(scipy.spatial.distance.pdist(b))[(len(b) * (len(b) - 1) // 2 - 1) // 2]
    functions = {
        "linear": lambda x, y: x @ y,
        "polynomial": lambda x, y: (x @ y) ** 2,
        "gaussian": lambda x, y: math.exp(-((x - y) @ (x - y)) / (2 * median**2)),
    }
    mean = [np.mean([functions[kernel](x, y) for x in left for y in right]) for left, right in ((a, a), (b, b), (a, b))]
    return float(mean[0] + mean[1] - 2 * mean[2])


def difference_of_means(student: Tensor, teacher: Tensor) -> float:
    a, b = _directions(student, teacher)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum())


def difference_of_second_moments(student: Tensor, teacher: Tensor) -> float:
    a, b = _directions(student, teacher)
    return float(((a.T @ a / len(a) - b.T @ b / len(b)) ** 2).sum())


def channels_as_samples(student: Tensor, teacher: Tensor) -> float:
    """The kernel means over pairs of channels, one after the other."""
    return kernel_means(student.T, teacher.T, "polynomial")


def correlations(student: Tensor, teacher: Tensor) -> float:
    return float(((np.corrcoef(student.numpy().T) - np.corrcoef(teacher.numpy().T)) ** 2).mean())


def covariances(student: Tensor, teacher: Tensor) -> float:
    return float(((np.cov(student.numpy().T) - np.cov(teacher.numpy().T)) ** 2).mean())


def chsim(student: Tensor, teacher: Tensor) -> Tensor:
    return torchdistill("ChSimLoss", feature_pairs={}).batch_loss(student.T[None].contiguous(), teacher.T[None].contiguous())


def channel_similarities(student: Tensor, teacher: Tensor) -> float:
    grams = [side.numpy().T @ side.numpy() for side in (student, teacher)]
    a, b = (gram / np.sqrt((gram**2).sum(1, keepdims=True)) for gram in grams)
    return float(((a - b) ** 2).sum() / len(a))


# --- a recipe of parts ---


def vkd() -> float:
    """A student that is the normalised teacher, turned, is at 0 once the projector turns it back."""
    from distily_features import smooth_l1
    from distily_projectors import orthogonal

    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    target = torch.nn.functional.layer_norm(teacher, (6,))
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    projector = orthogonal(6, 6).double()
    projector.weight = turn
    return smooth_l1(projector(target @ turn), target).max().item()


WIDE = rows(14, 5, 4)
LONG = rows(40, 5, 4)

CASES: list[Case | Check] = [
    Case("B1", "mse", {"textbrewer.hid_mse_loss": by_row(textbrewer("hid_mse_loss"))}),
    Case("B2", "normalized_mse", {"textbrewer.pkd_loss": by_row(textbrewer("pkd_loss"))}),
    Case("B2", "normalized_mse", {"numpy norms": relative_error}, {"variant": "relative"}),
    Case("B3", "cosine", {"textbrewer.cos_loss": by_row(textbrewer("cos_loss")), "scipy cosine": scipy_cosine}),
    Case("B4", "l1", {"scipy cityblock": scipy_cityblock}),
    Case("B4", "smooth_l1", {"torch huber_loss / δ": huber}),
    Case("B4", "smooth_l1", {"torch huber_loss / δ": huber}, {"delta": 0.3}),
    Case("B5", "log_sum", {"formula in numpy": log_power_sum}, floor=math.log(1e-6), note="floor log ε"),
    Case("B5", "log_sum", {"torchdistill SRDLoss": srd}, {"epsilon": 1e-30}, floor=math.log(1e-30),
         note="floor log ε; SRDLoss is twice a row's value, plus a KL that is 0 here"),
    Case("B6", "mutual_information", {"cross-entropy, row by row": info_nce}, rows=WIDE, floor=info_nce,
         note="floor: the same formula on equal features"),
    Case("B6", "mutual_information", {"cross-entropy, row by row": info_nce}, {"symmetric": False, "exclude_same_token": True,
         "temperature": 0.5, "dimensions": 3, "teacher_head": "frozen"}, rows=WIDE, floor=info_nce,
         note="floor: the same formula on equal features"),
    *(Check("B6", "mutual_information", f"bound ≤ min(I, log n) of normal variables, n = {n}", "value",
            lambda n=n: info_nce_truth(n), 1e-12) for n in (16, 128)),
    Case("B7", "variational_information", {"torchdistill VIDLoss": vid, "scipy norm.logpdf": normal_density}, rows=WIDE,
         floor=normal_density, note="floor: the same formula on equal features"),
    Case("B8", "gaussian_information", {"scipy eigh": gaussian_by_correlations, "numpy slogdet": gaussian_by_determinants}, rows=LONG,
         floor=gaussian_at_equality, note="floor in closed form, from the variances"),
    Check("B8", "gaussian_information", "−(d/2) log(1 − ρ²) of normal variables", "value", gaussian_truth, 0.04),
    Case("B9", "cka", {"unbiased HSIC, Song et al.": unbiased_cka}, rows=WIDE),
    Case("B9", "cka", {"covariance form, Kornblith et al.": cka_of_channels}, {"debiased": False}, rows=WIDE),
    Case("B10", "cca", {"torch QR and svdvals": canonical}, {"variance": 1.0}, rows=LONG),
    Case("B10", "cca", {"scipy subspace_angles": svcca}, {"variance": 0.9}, rows=LONG,
         note="the gradient holds the kept directions constant"),
    Case("B10", "projection_weighted_cca", {"numpy svd": pwcca}, {"variance": 0.9}, rows=LONG,
         note="the gradient holds directions and weights constant"),
    Case("B11", "procrustes", {"scipy orthogonal_procrustes": scipy_procrustes}, rows=WIDE),
    Case("B11", "gram", {"all pairs": gram_by_entries}, rows=WIDE),
    Case("B12", "relational_distance", {"torchdistill RKDLoss": rkd("distance"), "scipy pdist": scipy_distances}, rows=WIDE),
    Case("B12", "relational_angle", {"torchdistill RKDLoss": rkd("angle"), "all triangles": triangles}, rows=rows(7, 5, 4)),
    Case("B13", "probabilistic_transfer", {"scipy pdist": neighbors}, rows=WIDE),
    Case("B13", "probabilistic_transfer", {"torchdistill PKTLoss": pkt, "scipy pdist": neighbors}, {"diagonal": True},
         rows=rows(14, 5, 4, scale=1e4), note="large rows, since PKTLoss adds 1e-7 to their lengths; it divides by n² in place of n"),
    Case("B14", "similarity_preserving", {"numpy": similarities}, rows=WIDE, note="torchdistill SPKDLoss takes L1 norms: no oracle"),
    Case("B14", "correlation_congruence", {"torchdistill CCKDLoss": cckd("gaussian"), "scipy cdist": squared_distances_through_a_kernel},
         rows=WIDE, note="CCKDLoss with 40 Taylor terms; it returns the norm in place of its square"),
    Case("B14", "correlation_congruence", {"torchdistill CCKDLoss": cckd("bilinear")}, {"kernel": "bilinear"}, rows=WIDE),
    Case("B20", "flow", {"textbrewer.fsp_loss": textbrewer_fsp, "numpy einsum": products_of_channels}, term={"mapper": "all"},
         tolerances={"masked": 1e-15},
         note="torchdistill FSPLoss sums unsquared column norms: no oracle; gradients of several layers add in another order"),
    *(Case("B21", "mmd", {"all pairs": kernel_means, **further}, {"kernel": kernel}) for kernel, further in (
        ("linear", {"difference of means": difference_of_means}),
        ("polynomial", {"difference of second moments": difference_of_second_moments}),
        ("gaussian", {}))),
    Case("B21", "neuron_selectivity", {"all pairs of channels": channels_as_samples}, rows=WIDE),
    Case("B21", "gram_token", {"textbrewer.mmd_loss": lambda a, b: textbrewer("mmd_loss")([a[None]] * 2, [b[None]] * 2)}, rows=WIDE,
         note="its masked branch has another scale: no oracle"),
    Case("B22", "covariance", {"numpy corrcoef": correlations}),
    Case("B22", "covariance", {"numpy cov": covariances}, {"correlation": False}),
    Case("B22", "channel_correlation", {"torchdistill ChSimLoss": chsim, "numpy": channel_similarities}),
    Check("B23", "smooth_l1", "orthogonal projector, teacher-only layernorm: a turned target is at 0", "value", vkd, 1e-12),
]  # fmt: skip
