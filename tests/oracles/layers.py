"""C1 to C4: layer mappers, projectors, normalizers, and what a student takes from its teacher."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special
import tiny
import torch
from torch import Tensor

from oracles.case import Check

DEPTHS = [(student, teacher) for student in range(1, 13) for teacher in range(1, 13)]


def build(kind: str, name: str, *positional: int, **options: Any) -> Any:
    """A component as the core makes it; modules in float64."""
    made = tiny.plugins().find(kind, name).build(options)
    made = made(*positional) if positional else made
    return made.double() if isinstance(made, torch.nn.Module) else made


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gap(found: Any, expected: Any) -> float:
    """The largest difference over the largest expected value, or over 1."""
    found, expected = (
        np.asarray(each.detach() if torch.is_tensor(each) else each, dtype=np.float64) for each in (found, expected)
    )
    assert found.shape == expected.shape, f"{found.shape} against {expected.shape}"
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


# --- C1: layer mappers ---


def round_half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def wrong_pairs(
    name: str, rule: Callable[[int, int], Iterable[tuple[int, int]]], fits: Callable[[int, int], bool], **options: Any
) -> float:
    """Pairs too many and too few, over all depths up to 12 that fit."""
    depths = [pair for pair in DEPTHS if fits(*pair)]
    assert len(depths) > 5
    return float(sum(len(set(build("layer_mappers", name, *pair, **options)) ^ set(rule(*pair))) for pair in depths))


def at_relative_depth(student: int, teacher: int) -> list[tuple[int, int]]:
    return [(i, max(1, round_half_up(Fraction(i * teacher, student)))) for i in range(1, student + 1)]


def kept_ends(student: int, teacher: int) -> list[tuple[int, int]]:
    return [(i, 1 + round_half_up(Fraction((i - 1) * (teacher - 1), max(1, student - 1)))) for i in range(1, student + 1)]


def before_the_next_copy(student: int, teacher: int) -> list[tuple[int, int]]:
    """Walks over the teacher's blocks; each belongs to the student block whose copy came last."""
    copied = [block for _, block in kept_ends(student, teacher)]
    owner: dict[int, int] = {}
    for block in range(1, teacher + 1):
        owner[sum(each <= block for each in copied)] = block
    return sorted(owner.items())


def every_block_once(student: int, teacher: int) -> list[tuple[int, int]]:
    """Teacher block j goes to the first student block whose end, at the same relative depth, is not before it."""
    ends = at_relative_depth(student, teacher)
    return [(min(i for i, end in ends if end >= j), j) for j in range(1, teacher + 1)]


def from_the_end(k: int, skip: int) -> Callable[[int, int], Iterable[tuple[int, int]]]:
    return lambda student, teacher: [*zip(range(1, student + 1)[::-1], range(1, teacher + 1)[::-1], strict=False)][
        skip : skip + k
    ]


def repeats() -> float:
    """Random pairs: teacher blocks that were drawn twice, student blocks without one, and seeds that gave the same."""
    pairs = [build("layer_mappers", "random", 6, 12, seed=seed) for seed in range(10)]
    twice = sum(6 - len({block for _, block in each}) for each in pairs)
    return float(twice + sum([i for i, _ in each] != list(range(1, 7)) for each in pairs) + 10 - len(set(map(tuple, pairs))))


def drawn_in_order() -> float:
    """In each part of the training, the pairs that count are rising, one for every student block, with equal shares."""
    mapping = build("layer_mappers", "random_in_order", 4, 9, draws=5, seed=3)
    error, seen = 0.0, set()
    for part in range(5):
        for progress in (part / 5 + 1e-6, (part + 1) / 5 - 1e-6):
            shares = mapping.shares(torch.ones(len(mapping.pairs), dtype=torch.float64), progress)
            counted = [pair for pair, share in zip(mapping.pairs, shares.tolist(), strict=True) if share > 0]
            blocks = [block for _, block in sorted(counted)]
            error += sum(a >= b for a, b in pairwise(blocks)) + ([i for i, _ in sorted(counted)] != [1, 2, 3, 4])
            error += gap(shares[shares > 0], np.full(4, 0.25))
            seen.add(tuple(blocks))
    return error + (len(seen) == 1)


def pooled(of: str) -> float:
    """Attention pooling by loops over documents and blocks in numpy, and the gradient of a squared error with the target held."""
    students, teachers = random_rows(2, 7, 4), random_rows(3, 7, 4, seed=1)
    ids = np.array([0, 0, 0, 1, 1, 4, 4])
    mapping = build("layer_mappers", "attention_pooling", 2, 3, temperature=0.5)
    student = [students[i - 1].clone().requires_grad_() for i, _ in mapping.pairs]
    matches = mapping.matches(student, [teachers[j - 1] for _, j in mapping.pairs], torch.tensor(ids))
    targets = np.zeros((2, 7, 4))
    for i in range(2):
        for document in set(ids):
            here = ids == document
            scores = [students[i].numpy()[here].mean(0) @ teachers[j].numpy()[here].mean(0) / (0.5 * 2.0) for j in range(3)]
            weights = scipy.special.softmax(scores)
            targets[i, here] = sum(weight * teachers[j].numpy()[here] for j, weight in enumerate(weights))
    if of == "value":
        return max(gap(matches[i][1], targets[i]) + gap(matches[i][0], students[i]) for i in range(2))
    total = sum((mine - theirs).square().sum() for mine, theirs in matches)
    gradients = torch.autograd.grad(total, student)
    found = [sum(gradients[place] for place, pair in enumerate(mapping.pairs) if pair[0] == i + 1) for i in range(2)]
    return max(gap(found[i], 2 * (students[i].numpy() - targets[i])) for i in range(2))


def transported(student: int, teacher: int) -> float:
    """The cost of the plan after a step against a linear program over all plans."""
    mapping = build("layer_mappers", "transport", student, teacher)
    costs = torch.rand(student * teacher, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mapping.shares(costs * 0.25, 0.1)
    mapping.shares(costs * 0.75, 0.1)
    mapping.advance(0.1)
    plan = mapping.shares(costs, 0.2).numpy().reshape(student, teacher)
    grid = np.arange(student * teacher).reshape(student, teacher)
    marginals = np.stack([np.isin(grid, line).ravel() for line in [*grid, *grid.T]]).astype(float)
    amounts = np.concatenate([np.full(student, 1 / student), np.full(teacher, 1 / teacher)])
    best = scipy.optimize.linprog(costs.numpy(), A_eq=marginals, b_eq=amounts, bounds=(0, None)).fun
    return gap(plan.ravel() @ costs.numpy(), best) + gap(marginals @ plan.ravel(), amounts)


def one_to_one() -> float:
    """Equal depths with D_ii < D_ij: the plan is the identity over L."""
    mapping = build("layer_mappers", "transport", 4, 4)
    mapping.shares(torch.ones(4, 4, dtype=torch.float64).fill_diagonal_(0.5).flatten(), 0.1)
    mapping.advance(0.1)
    return gap(mapping.shares(torch.ones(16, dtype=torch.float64), 0.2).reshape(4, 4), np.eye(4) / 4)


def read_again() -> float:
    """Pairs of a planted file, and a refusal for other depths."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layers.json"
        file.write_text(json.dumps({"student_layers": 2, "teacher_layers": 6, "pairs": [[1, 3], [2, 5]]}))
        error = len(set(build("layer_mappers", "searched", 2, 6, file=str(file))) ^ {(1, 3), (2, 5)})
        try:
            build("layer_mappers", "searched", 2, 7, file=str(file))
        except ValueError:
            return float(error)
    return 1.0


def mapper(name: str, oracle: str, rule: Any, fits: Any = lambda student, teacher: True, **options: Any) -> Check:
    shown = ",".join(f"{key}={value}" for key, value in options.items())
    error = partial(wrong_pairs, name, rule, fits, **options)
    return Check("C1", f"{name}:{shown}" if shown else name, oracle, "value", error, 0.0)


def shallower(student: int, teacher: int) -> bool:
    return student <= teacher


# --- C2: projectors ---


def projected(name: str, expected: Callable[[Any, np.ndarray], np.ndarray], widths: tuple[int, int], **options: Any) -> float:
    """The projection of random rows against ``expected(module, rows)`` in numpy."""
    torch.manual_seed(1)
    module, rows = build("projectors", name, *widths, **options), random_rows(5, widths[0])
    return gap(module(rows), expected(module, rows.numpy()))


def weights(module: Any) -> list[np.ndarray]:
    return [parameter.detach().numpy() for parameter in module.parameters()]


def gelu_network(module: Any, rows: np.ndarray) -> np.ndarray:
    into, shift, out, bias = weights(module)
    hidden = rows @ into.T + shift
    return hidden * 0.5 * (1 + scipy.special.erf(hidden / np.sqrt(2))) @ out.T + bias


def padded_identity(module: Any, rows: np.ndarray) -> np.ndarray:
    return rows @ np.eye(rows.shape[1], module.weight.shape[0])


def scattered(module: Any, rows: np.ndarray) -> np.ndarray:
    result = np.zeros((len(rows), 6))
    result[:, [5, 0, 2]] = rows
    return result


def orthonormality(student: int, teacher: int) -> float:
    """A'A = I or AA' = I after steps of training, and lengths and angles where the teacher is not narrower."""
    torch.manual_seed(2)
    module = build("projectors", "orthogonal", student, teacher)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for step in range(3):
        optimizer.zero_grad()
        (module(random_rows(9, student, seed=step)) - random_rows(9, teacher, seed=10 + step)).square().sum().backward()
        optimizer.step()
    weight = module.weight.detach().numpy()
    gram = weight.T @ weight if teacher >= student else weight @ weight.T
    rows = random_rows(6, student)
    kept = gap(module(rows) @ module(rows).T, rows @ rows.T) if teacher >= student else 0.0
    return gap(gram, np.eye(len(gram))) + kept


def calibrated(name: str, *widths: int, rows: int = 60, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """A projector or normalizer that saw correlated rows in two batches."""
    module = build("projectors" if len(widths) == 2 else "normalizers", name, *widths, **options)
    mixing = random_rows(widths[-1], widths[-1], seed=7)
    teacher = random_rows(rows, widths[-1], seed=8) @ mixing + 3.0
    student = random_rows(rows, widths[0], seed=9) + teacher[:, :1]
    for part in (slice(0, 25), slice(25, None)):
        module.observe(student[part], teacher[part])
    module.conclude()
    return module, student, teacher


def eckart_young() -> float:
    """What is lost of the teacher in its k leading directions is the sum of the other squared singular values."""
    module, _, teacher = calibrated("pca", 3, 7)
    centred = teacher.numpy() - teacher.numpy().mean(0)
    coordinates = torch.from_numpy(centred) @ module.map.weight.detach()
    lost = (module(coordinates) - teacher).square().sum()
    return gap(lost, (np.linalg.svd(centred, compute_uv=False)[3:] ** 2).sum())


def ridge_regression(student: Tensor, teacher: Tensor, share: float) -> np.ndarray:
    """The fitted values of numpy's least squares on rows augmented by the penalty."""
    x, y = (each.numpy() - each.numpy().mean(0) for each in (student, teacher))
    penalty = np.sqrt(share * (x**2).mean() * len(x)) * np.eye(x.shape[1])
    solution, *_ = np.linalg.lstsq(
        np.concatenate([x, penalty]), np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None
    )
    return x @ solution + teacher.numpy().mean(0)


def fitted(share: float) -> float:
    module, student, teacher = calibrated("least_squares", 4, 6, ridge=share)
    return gap(module(student), ridge_regression(student, teacher, share))


def stationary() -> float:
    """The gradient of the ridge objective at the beginning."""
    module, student, teacher = calibrated("least_squares", 4, 6, ridge=0.1)
    penalty = 0.1 * (student - student.mean(0)).square().mean()
    value = (module(student) - teacher).square().sum() / len(student) + penalty * module.map.weight.square().sum()
    return max(gradient.abs().max().item() for gradient in torch.autograd.grad(value, list(module.parameters())))


# --- C3: normalizers ---


def by_row(name: str, expected: Callable[[np.ndarray], np.ndarray]) -> float:
    rows = random_rows(5, 8) * 4 + 1
    return gap(build("normalizers", name)(rows), np.stack([expected(row) for row in rows.numpy()]))


def standardized() -> float:
    module, student, teacher = calibrated("standardize", 6)
    mean, deviation = teacher.numpy().mean(0), teacher.numpy().std(0)
    expected = [(side.numpy() - mean) / deviation for side in (student, teacher)]
    return max(gap(found, want) for found, want in zip(module(student, teacher), expected, strict=True))


def floored() -> float:
    """A dimension that hardly varies is divided by the floor times the median deviation."""
    module, teacher = build("normalizers", "standardize", 3, floor=0.5), random_rows(50, 3) * torch.tensor([1e-9, 1.0, 3.0])
    module.observe(teacher, teacher)
    module.conclude()
    deviation = teacher.numpy().std(0)
    return gap(module(teacher, teacher)[0][:, 0], (teacher[:, 0] - teacher[:, 0].mean()) / (0.5 * np.median(deviation)))


def whitened(method: str) -> float:
    """Rows against scipy's matrix square root or triangular solve; without shrinkage the covariance is the identity."""
    module, student, teacher = calibrated("whiten", 5, method=method, shrinkage=0.0)
    values = teacher.numpy()
    covariance = np.cov(values.T, bias=True)
    if method == "zca":
        expected = np.linalg.solve(scipy.linalg.sqrtm(covariance).real, (student.numpy() - values.mean(0)).T).T
    else:
        lower = scipy.linalg.cholesky(covariance, lower=True)
        expected = scipy.linalg.solve_triangular(lower, (student.numpy() - values.mean(0)).T, lower=True).T
    mine, theirs = module(student, teacher)
    return gap(mine, expected) + gap(np.cov(theirs.numpy().T, bias=True), np.eye(5)) + gap(theirs.mean(0), np.zeros(5))


def shrunk() -> float:
    """The covariance that is left: W' Σ W with the W of the shrunk Σ."""
    module, student, teacher = calibrated("whiten", 5, shrinkage=0.2)
    covariance = np.cov(teacher.numpy().T, bias=True)
    root = np.linalg.inv(scipy.linalg.sqrtm(0.8 * covariance + 0.2 * np.trace(covariance) / 5 * np.eye(5)).real)
    return gap(np.cov(module(student, teacher)[1].numpy().T, bias=True), root @ covariance @ root)


def batch_normalized() -> float:
    """torch's BatchNorm1d after the same two batches, each of whose averages it takes with momentum; its variance is n / (n − 1)."""
    module = build("normalizers", "batchnorm", 4, momentum=0.7)
    layers = [torch.nn.BatchNorm1d(4, eps=1e-4, momentum=0.7, affine=False).double() for _ in range(2)]
    for seed in range(2):
        sides = [random_rows(30, 4, seed=2 * seed + side) for side in range(2)]  # of one mean, so that mean squares average too
        sides = [(side - side.mean(0)) * (1 + seed) for side in sides]
        module.pending.zero_()
        for part in (slice(0, 11), slice(11, None)):
            module(*(side[part] for side in sides))
        module.advance(0.1)
        for layer, side in zip(layers, sides, strict=True):
            if seed == 0:  # it begins with variance 1; here the first batch is the beginning
                layer.running_var.copy_(side.var(0, correction=0))
            else:
                layer(side * (29 / 30) ** 0.5)
    rows = [random_rows(5, 4, seed=8), random_rows(5, 4, seed=9)]
    with torch.no_grad():
        found = module(*rows)
        expected = [layer.eval()(side) for layer, side in zip(layers, rows, strict=True)]
    return max(gap(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


# --- C4: what a student takes from its teacher ---


def student_of(teacher: Any, **settings: Any) -> Any:
    from distily.config import StudentConfig
    from distily.models import build_student

    return build_student(StudentConfig(**settings), teacher, seed=0)


def copied() -> float:
    """Logits of a student of the teacher's shape."""
    teacher = tiny.model("qwen2", seed=3)
    with torch.no_grad():
        tokens = torch.tensor([[1, 2, 3, 4]])
        return (
            (student_of(teacher, config={"use_cache": False}).eval()(tokens).logits - teacher(tokens).logits).abs().max().item()
        )


def reduced() -> float:
    """Inner products of the reduced embedding's rows against numpy's best approximation of the width, up to the documented factor."""
    teacher = tiny.model("llama", seed=3)
    student = student_of(teacher, config={"hidden_size": 16}, embeddings="pca")
    errors = []
    for mine, theirs in zip(
        *((each.get_input_embeddings().weight, each.get_output_embeddings().weight) for each in (student, teacher)), strict=True
    ):
        left, sizes, _ = np.linalg.svd(
            theirs.detach().double().numpy() - theirs.detach().double().numpy().mean(0), full_matrices=False
        )
        best = (left[:, :16] * sizes[:16] ** 2) @ left[:, :16].T
        gram = (mine @ mine.T).detach().double().numpy()
        errors.append(gap(gram / np.trace(gram), best / np.trace(best)))
    return max(errors)


def tied() -> float:
    """Places at which embedding and head of a tied student differ, after copying, and after training the one."""
    student = student_of(tiny.model("qwen2", seed=3), config={"num_hidden_layers": 1})
    embedding, head = student.get_input_embeddings().weight, student.get_output_embeddings().weight
    with torch.no_grad():
        embedding.add_(1.0)
    return float((embedding != head).sum()) + float(embedding.data_ptr() != head.data_ptr())


def frozen() -> float:
    """How far frozen weights move in ten steps of the driver."""
    teacher = tiny.model(seed=3)
    student = student_of(teacher, config={"num_hidden_layers": 1}, freeze=["model.embed_tokens"])
    weight = student.get_input_embeddings().weight
    driver = tiny.driver(student, teacher, "forward_kl")
    optimizer = torch.optim.SGD([each for each in student.parameters() if each.requires_grad], lr=0.1, weight_decay=0.1)
    batch = [tiny.collate(tiny.documents(2))]
    for _ in range(10):
        tiny.accumulate(driver, student, batch)
        optimizer.step()
    driver.detach()
    return (weight - teacher.get_input_embeddings().weight).abs().max().item() + (weight.grad is not None)


CASES = [
    mapper("all", "(i, i)", lambda s, t: [(i, i) for i in range(1, s + 1)], lambda s, t: s == t),
    mapper("last_k", "slices from the end", from_the_end(3, 0), lambda s, t: min(s, t) >= 3, k=3),
    mapper("penultimate_k", "slices from the end", from_the_end(2, 2), lambda s, t: min(s, t) >= 4, k=2, skip=2),
    mapper("uniform", "exact fractions, half up", at_relative_depth),
    mapper("uniform_ends", "exact fractions, half up", kept_ends),
    mapper("segment_end", "a walk over the teacher's blocks", before_the_next_copy, shallower),
    mapper("uniform_consecutive", "first end not before the block", every_block_once, shallower),
    mapper(
        "uniform_and_last", "union", lambda s, t: {*at_relative_depth(s, t), *((i, t) for i in range(1, s + 1))}
    ),
    mapper("index", "the list", lambda s, t: [(1, 1), (-1, -1)], pairs=[[1, 1], [-1, -1]]),
    mapper("embeddings", "(0, 0)", lambda s, t: [(0, 0)]),
    mapper(
        "reverse", "exact fractions, turned round", lambda s, t: [(s + 1 - i, j) for i, j in at_relative_depth(s, t)]
    ),
    Check("C1", "random", "no block twice", "value", repeats, 0.0, "a control"),
    Check("C1", "random_in_order", "rising blocks, equal shares", "value", drawn_in_order, 1e-12),
    Check("C1", "attention_pooling", "loops in numpy", "value", partial(pooled, "value"), 1e-12),
    Check("C1", "attention_pooling", "2 (a − target)", "gradient", partial(pooled, "gradient"), 1e-12, "the weights are held constant"),
    Check("C1", "transport", "scipy linprog, 4 blocks on 4", "value", partial(transported, 4, 4), 1e-9),
    Check("C1", "transport", "scipy linprog, 3 blocks on 5", "value", partial(transported, 3, 5), 1e-9),
    Check("C1", "transport", "I / L where D_ii < D_ij", "value", one_to_one, 1e-12),
    Check("C1", "searched", "a planted file", "value", read_again, 0.0, "the search itself: tests/test_layer_search.py"),
    Check("C2", "identity", "numpy", "value", partial(projected, "identity", lambda _, rows: rows, (4, 4)), 0.0),
    Check("C2", "linear", "numpy.eye, 19 on 20", "value", partial(projected, "linear", padded_identity, (19, 20)), 1e-12),
    Check("C2", "linear", "numpy", "value", partial(projected, "linear", lambda m, rows: rows @ weights(m)[0].T, (4, 9)), 1e-12),
    Check("C2", "mlp", "scipy erf", "value", partial(projected, "mlp", gelu_network, (4, 5)), 1e-12),
    Check("C2", "orthogonal", "A'A = I, 5 on 8", "value", partial(orthonormality, 5, 8), 2e-6, "in float32"),
    Check("C2", "orthogonal", "AA' = I, 8 on 5", "value", partial(orthonormality, 8, 5), 2e-6, "in float32"),
    Check("C2", "truncate", "numpy, into channels", "value", partial(projected, "truncate", scattered, (3, 6), keep=[5, 0, 2]), 0.0),
    Check(
        "C2", "truncate", "numpy, out of channels", "value",
        partial(projected, "truncate", lambda _, rows: rows[:, [4, 1]], (5, 2), keep=[4, 1]), 0.0,
    ),
    Check(
        "C2", "ensemble", "one map of the mean weight", "value",
        partial(projected, "ensemble", lambda m, rows: rows @ np.mean(weights(m), 0).T, (4, 6)), 1e-12,
    ),
    Check("C2", "pca", "numpy SVD, Eckart-Young", "value", eckart_young, 1e-12),
    Check("C2", "least_squares", "numpy lstsq", "value", partial(fitted, 0.0), 1e-10),
    Check("C2", "least_squares:ridge=0.1", "numpy lstsq, augmented rows", "value", partial(fitted, 0.1), 1e-10),
    Check("C2", "least_squares:ridge=0.1", "0 of the ridge objective", "gradient", stationary, 1e-10),
    Check("C3", "none", "numpy", "value", partial(by_row, "none", lambda row: row), 0.0),
    Check(
        "C3", "layernorm", "numpy", "value",
        partial(by_row, "layernorm", lambda row: (row - row.mean()) / np.sqrt(row.var() + 1e-5)), 1e-12,
    ),
    Check("C3", "rms", "numpy", "value", partial(by_row, "rms", lambda row: row / np.sqrt((row**2).mean() + 1e-6)), 1e-12),
    Check("C3", "l2", "numpy", "value", partial(by_row, "l2", lambda row: row / np.linalg.norm(row)), 1e-12),
    Check("C3", "standardize", "numpy", "value", standardized, 1e-12),
    Check("C3", "standardize:floor=0.5", "numpy", "value", floored, 1e-10),
    Check("C3", "whiten", "scipy sqrtm; covariance = I", "value", partial(whitened, "zca"), 1e-9),
    Check("C3", "whiten:method=cholesky", "scipy solve_triangular; covariance = I", "value", partial(whitened, "cholesky"), 1e-10),
    Check("C3", "whiten:shrinkage=0.2", "scipy sqrtm", "value", shrunk, 1e-9),
    Check("C3", "batchnorm", "torch BatchNorm1d in evaluation", "value", batch_normalized, 1e-12, "with the steps before, see its entry"),
    Check("C4", "student.embeddings: copy", "the teacher itself", "value", copied, 0.0, "bit for bit"),
    Check("C4", "student.embeddings: pca", "numpy SVD, Eckart-Young", "value", reduced, 1e-6, "weights are float32"),
    Check("C4", "student, tied", "one storage", "value", tied, 0.0),
    Check("C4", "student.freeze", "the weights before", "value", frozen, 0.0),
]  # fmt: skip
