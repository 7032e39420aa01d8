"""Likeness of spaces: what it sees, what it forgets, and where its estimators break."""

from __future__ import annotations

import doctest

import distily_alignment
import numpy as np
import pytest
import torch
from distily_alignment import cca, cka, gram, procrustes, projection_weighted_cca
from torch.utils._python_dispatch import TorchDispatchMode

EVERY = [cka, cca, projection_weighted_cca, procrustes, gram]
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}
DECOMPOSITIONS = {"_linalg_svd", "_linalg_eigh", "linalg_eig"}


def rows(n: int, *widths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for width in widths]


def orthogonal(width: int) -> torch.Tensor:
    return torch.linalg.qr(rows(width, width, seed=7)[0]).Q


def value(objective, student: torch.Tensor, teacher: torch.Tensor, **chosen) -> float:
    return objective(student, teacher, **chosen).mean().item()


def gradient(objective, student: torch.Tensor, teacher: torch.Tensor, **chosen) -> torch.Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(objective(student, teacher, **chosen).mean(), student)[0]


def invertible(a: torch.Tensor) -> torch.Tensor:
    return a @ (torch.eye(4, dtype=a.dtype) + rows(4, 4, seed=9)[0].tril())


class TestInvariances:
    MOVES = {  # noqa: RUF012
        "rotation": lambda a: a @ orthogonal(4),
        "scale": lambda a: 100 * a,
        "shift": lambda a: a + torch.arange(4),
        "invertible": invertible,
        "order": lambda a: a.flip(0),
    }
    CHANGED_BY = {  # noqa: RUF012
        cka: {"invertible", "order"},
        cca: {"order"},
        projection_weighted_cca: {"order"},
        procrustes: {"invertible", "order"},
        gram: {"invertible", "order"},
    }

    @pytest.mark.parametrize("move", MOVES)
    @pytest.mark.parametrize("objective", EVERY)
    def test_a_moved_student_is_the_same_or_not(self, objective, move):
        """Under its own name each forgets what it says it forgets, and nothing else. Without truncation, for CCA."""
        (noise, b), chosen = rows(40, 4, 5), {"variance": 1.0} if "cca" in objective.__name__ else {}
        a = b[:, :4] + noise
        change = abs(value(objective, self.MOVES[move](a), b, **chosen) - value(objective, a, b, **chosen))
        if move in self.CHANGED_BY[objective]:
            assert change > 1e-3
        else:
            assert change < 1e-9


@pytest.mark.parametrize("objective", EVERY)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_documents_have_a_value_and_a_gradient(objective, n):
    for teacher in rows(n, 5, 4, seed=n):
        student = rows(n, 4)[0]
        result = objective(student, teacher)
        assert result.shape == (n,)
        assert result.isfinite().all()
        assert gradient(objective, student.float(), teacher.float()).isfinite().all()
        if n == 1 or (objective in (cka, cca, projection_weighted_cca)):
            assert result.abs().max() < 1e-12


@pytest.mark.parametrize("objective", EVERY)
def test_a_student_whose_rows_are_all_alike_is_as_far_as_can_be_and_finite(objective):
    (teacher,) = rows(20, 4)
    student = torch.ones(20, 4, dtype=torch.float64)
    expected = (
        1.0
        if objective is not gram
        else (teacher - teacher.mean(0)).T.cov(correction=0).square().sum() / (teacher.var(0, correction=0).sum().square())
    )
    assert value(objective, student, teacher) == pytest.approx(float(expected))
    assert (gradient(objective, student, teacher) == 0).all()


class TestCka:
    def test_wide_noise_looks_alike_unless_the_estimate_is_unbiased(self):
        """Independent Gaussian features of width d in n rows: the plain estimate tends to d / (n + d)."""
        for n, width in ((64, 64), (256, 64)):
            a, b = rows(n, width, width)
            assert 1 - value(cka, a, b, debiased=False) == pytest.approx(width / (n + width), abs=0.04)
            assert abs(1 - value(cka, a, b)) < 0.05

    @pytest.mark.parametrize("factor", [1, 30, 1000])
    def test_one_massive_token_costs_no_precision(self, factor):
        a, noise = rows(128, 64, 64)
        b = a @ orthogonal(64) + noise
        a[0] *= factor
        b[0] *= factor
        assert value(cka, a.float(), b.float()) == pytest.approx(value(cka, a, b), abs=1e-5)

    def test_tokens_that_are_all_equally_far_apart_cannot_be_aligned(self):
        """Their kernel is 0 after the unbiased centring; what is left is rounding, in float32 too."""
        a = torch.eye(6)
        b = rows(6, 6)[0].float()
        assert value(cka, a, b) == 1
        assert (gradient(cka, a, b) == 0).all()


class TestCanonicalCorrelations:
    def test_of_one_dimension_is_pearsons(self):
        a, b = rows(30, 1, 1)
        pearson = np.corrcoef(a[:, 0].numpy(), b[:, 0].numpy())[0, 1]
        assert value(cca, a, b) == pytest.approx(1 - abs(pearson))

    def test_as_many_dimensions_as_rows_always_correlate(self):
        """Independent features: perfect for the textbook's formula, so at most n/4 directions are compared."""
        a, b = rows(20, 20, 20)
        bases = [torch.linalg.qr((side - side.mean(0))[:, :19]).Q for side in (a, b)]
        assert torch.linalg.svdvals(bases[0].T @ bases[1]).mean() > 0.999
        assert value(cca, a, b) > 0.3

    def test_equal_correlations_have_a_finite_gradient(self):
        """All are 1 at equality: where the derivatives of singular vectors have poles."""
        (a,) = rows(40, 6)
        for objective in (cca, projection_weighted_cca):
            assert gradient(objective, a, a, variance=1.0).abs().max() < 1e-12
            assert gradient(objective, torch.eye(40, 6).double(), a).isfinite().all()

    def test_the_gradient_is_that_of_the_value_where_no_direction_is_left_out(self):
        a, b = rows(24, 3, 4)
        assert torch.autograd.gradcheck(lambda x: cca(x, b, variance=1.0), a.requires_grad_())

    def test_a_dead_or_repeated_channel_changes_nothing(self):
        a, b = rows(40, 4, 5)
        expected = value(cca, a, b, variance=1.0)
        for more in (torch.zeros(40, 1).double(), a[:, :2]):
            wider = torch.cat((a, more), 1)
            assert value(cca, wider, b, variance=1.0) == pytest.approx(expected, abs=1e-9)
            assert gradient(cca, wider.float(), b.float(), variance=1.0).isfinite().all()

    def test_weights_make_faint_noise_count_little(self):
        """Half of the teacher's directions are faint noise that the student lacks."""
        signal, ours, theirs = rows(400, 3, 3, 3)
        student, teacher = torch.cat((signal, 0.01 * ours), 1), torch.cat((signal, 0.01 * theirs), 1)
        assert value(cca, student, teacher, variance=1.0) == pytest.approx(0.5, abs=0.07)
        assert value(projection_weighted_cca, student, teacher, variance=1.0) < 0.02
        assert value(cca, student, teacher) < 1e-3  # the variance that has to be explained leaves the noise out


class TestProcrustes:
    def test_a_narrower_side_counts_as_padded_with_zeros(self):
        a, b = rows(12, 3, 5)
        padded = torch.nn.functional.pad(a, (0, 2))
        assert value(procrustes, a, b) == pytest.approx(value(procrustes, padded, b), abs=1e-12)
        assert value(procrustes, b, a) == pytest.approx(value(procrustes, a, b), abs=1e-12)

    def test_it_sees_faint_directions_that_cka_hardly_sees(self):
        """The teacher has a second, fainter direction; a student without it is nearly perfect for CKA."""
        signal, faint = rows(200, 1, 1)
        teacher = torch.cat((signal, 0.3 * faint), 1)
        assert value(cka, signal, teacher) < 0.01
        assert value(procrustes, signal, teacher) > 0.04

    @pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
    @pytest.mark.parametrize("smallest", [1.0, 1e-6, 1e-12])
    def test_the_polar_factor_is_that_of_the_singular_value_decomposition(self, shape, smallest):
        left, _, right = torch.linalg.svd(rows(*shape)[0], full_matrices=False)
        lengths = torch.logspace(0, np.log10(smallest), min(shape), dtype=torch.float64)
        found = distily_alignment._polar(left * lengths @ right)
        torch.testing.assert_close(found, left @ right, atol=1e-15 / smallest + 1e-13, rtol=0)

    @pytest.mark.parametrize("rank", [0, 1, 3])
    def test_the_sum_of_the_singular_values_is_right_at_any_rank(self, rank):
        left, right = rows(6, rank, rank)
        matrix = left @ right.T
        found = (matrix * distily_alignment._polar(matrix)).sum()
        torch.testing.assert_close(found, torch.linalg.svdvals(matrix).sum(), atol=1e-12, rtol=0)

    def test_the_gradient_is_that_of_the_value(self):
        a, b = rows(7, 3, 4)
        assert torch.autograd.gradcheck(lambda x: procrustes(x, b).mean(), a.requires_grad_())
        assert gradient(procrustes, b, b @ orthogonal(4)).abs().max() < 1e-12


@pytest.mark.parametrize("objective", [cka, procrustes, gram])
def test_the_host_never_waits(objective):
    """Not even for a decomposition, which would ask whether it has converged; CCA cannot do without and says so."""

    class Watch(TorchDispatchMode):
        seen: set[str] = set()  # noqa: RUF012

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.seen.add(function.overloadpacket.__name__)
            return function(*arguments, **(keywords or {}))

    a, b = rows(8, 5, 4)
    with Watch() as watch:
        gradient(objective, a, b)
    assert not watch.seen & (WAITS | DECOMPOSITIONS)


def test_the_docstrings_examples():
    assert doctest.testmod(distily_alignment).failed == 0
