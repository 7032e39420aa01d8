"""Normalizers: what they make of an error, massive dimensions, calibration and running statistics. Formulas: ``tests/oracles``."""

from __future__ import annotations

import doctest

import distily_normalizers
import numpy as np
import pytest
import tiny
import torch
from distily_features import cosine, mse
from distily_normalizers import BatchNorm, Standardize, Whiten, l2, layernorm, rms
from hypothesis import given, settings
from hypothesis import strategies as st

from distily.loss.calibration import calibrate


def rows(n: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def observed(module, teacher: torch.Tensor, parts: int = 1):
    module = module.double()
    for part in teacher.chunk(parts):
        module.observe(part, part)
    module.conclude()
    return module


def test_the_examples_are_true():
    assert doctest.testmod(distily_normalizers).failed == 0


def test_what_becomes_of_a_squared_error():
    """2 (1 − Pearson) after layernorm, 2 (1 − cosine) after rms, that over H after l2; exact but for the small numbers inside."""
    a, b = rows(5) * 100, rows(5, seed=1) * 100
    pearson = torch.tensor([np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)])
    torch.testing.assert_close(mse(layernorm(a), layernorm(b)), 2 * (1 - pearson), rtol=1e-7, atol=0)
    torch.testing.assert_close(mse(rms(a), rms(b)), 2 * cosine(a, b), rtol=1e-7, atol=0)
    torch.testing.assert_close(mse(l2(a), l2(b)), 2 * cosine(a, b) / 6, rtol=1e-7, atol=0)
    torch.testing.assert_close(rms(a) / 6**0.5, l2(a), rtol=1e-7, atol=0)


def test_a_massive_dimension_owns_the_raw_error_and_hides_all_others_after_rms_and_layernorm_but_not_after_standardize():
    """Every dimension is wrong by a tenth of its deviation. A row with one spike is all spike once its length is 1."""
    teacher = rows(200, 32)
    teacher[:, 3] = 800.0 + 40.0 * teacher[:, 3]
    student = teacher + 0.1 * teacher.std(0) * rows(200, 32, 1)

    def errors(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
        squared = (mine - theirs).square().mean(0)
        return (squared[3] / squared.sum()).item(), squared.mean().item()

    assert errors(student, teacher)[0] > 0.97
    for normalize in (rms, layernorm):
        assert errors(normalize(student), normalize(teacher))[1] < 1e-6
    share, mean = errors(*observed(Standardize(32), teacher)(student, teacher))
    assert share == pytest.approx(1 / 32, rel=0.3)
    assert mean == pytest.approx(0.01, rel=0.1)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(12, 60), parts=st.integers(1, 5), seed=st.integers(0, 99))
def test_whitening_makes_the_covariance_the_identity_however_the_rows_came(n, parts, seed):
    teacher = rows(n, 4, seed) @ rows(4, 4, seed + 1) + 5.0
    for method in ("zca", "cholesky"):
        module = observed(Whiten(4, method=method, shrinkage=0.0), teacher, parts)
        white = module(teacher, teacher)[1]
        torch.testing.assert_close(white.T @ white / n, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
        assert white.mean(0).abs().max() < 1e-8
        if method == "zca":
            torch.testing.assert_close(module.matrix, module.matrix.T, atol=1e-9, rtol=1e-9)


def test_both_whitenings_give_the_same_squared_error_and_raise_noise_that_shrinkage_lowers():
    teacher = rows(100, 5) @ torch.diag(torch.tensor([10.0, 1.0, 1.0, 1.0, 1e-3], dtype=torch.float64))
    student = teacher + rows(100, 5, 1) * 1e-2
    errors = {}
    for shrinkage in (0.0, 1e-3, 1e-1):
        values = [
            mse(*observed(Whiten(5, method=method, shrinkage=shrinkage), teacher)(student, teacher))
            for method in ("zca", "cholesky")
        ]
        torch.testing.assert_close(*values, rtol=1e-6, atol=1e-9)
        errors[shrinkage] = values[0].mean().item()
    assert errors[0.0] > 100 * errors[1e-3] > 100 * errors[1e-1]


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="saw 4 rows of width 4"):
        observed(Whiten(4), rows(4, 4))
    with pytest.raises(ValueError, match="do not vary in every direction"):
        observed(Whiten(4, shrinkage=0.0), rows(20, 1).expand(20, 4))
    with pytest.raises(ValueError, match="half of the teacher's dimensions do not vary"):
        observed(Standardize(4), torch.ones(20, 4))
    with pytest.raises(ValueError, match="saw no row"):
        Standardize(4).conclude()


def test_equal_sides_stay_equal_and_are_left_alone_until_calibrated():
    a = rows(5)
    for make in (Standardize, Whiten):
        fresh = make(6).double()
        assert all(torch.equal(side, a) for side in fresh(a, a))
        mine, theirs = observed(make(6), rows(50, seed=2))(a, a)
        assert torch.equal(mine, theirs)


def test_batchnorm_knows_nothing_in_the_first_step_and_averages_the_next_ones():
    module = BatchNorm(6, momentum=0.1).double()
    steps = [(rows(400, seed=seed) + 2.0, rows(400, seed=seed + 50) * 5.0) for seed in range(8)]
    student = steps[0][0].clone().requires_grad_()
    mine, theirs = module(student, steps[0][1])
    assert not mine.any()
    assert not theirs.any()
    (gradient,) = torch.autograd.grad((mine - theirs).square().sum(), student)
    assert not gradient.any()
    for student, teacher in steps:
        module.pending.zero_()
        module(student, teacher)
        module.advance(0.5)
    mean = torch.cat([student for student, _ in steps]).mean(0)  # of fewer than 1 / momentum steps: a plain average
    torch.testing.assert_close(module.running[0, 1], mean)
    mine, theirs = module(*steps[0])
    for side in (mine, theirs):  # each by its own statistics
        assert side.mean(0).abs().max() < 0.2
        torch.testing.assert_close(side.std(0), torch.ones(6, dtype=torch.float64), atol=0.15, rtol=0)


def test_batchnorm_waits_where_no_rows_came():
    module = BatchNorm(3)
    module.advance(0.1)
    assert module.steps.item() == 0
    assert not module(torch.ones(2, 3), torch.ones(2, 3))[0].any()


@pytest.mark.parametrize("normalizer", ["standardize", "whiten", "batchnorm", "rms"])
@pytest.mark.parametrize("normalized", ["both", "teacher"])
def test_in_the_driver_the_division_of_the_batch_does_not_show(normalizer, normalized):
    losses = []
    for sizes in ((6,), (2, 3, 1)):
        student, teacher = (tiny.model(seed=seed, dtype=torch.float64) for seed in (1, 2))
        driver = tiny.driver(student, teacher, f"mse:normalizer={normalizer},normalized={normalized}")
        driver.loss.double()
        calibrate(driver, [tiny.collate(tiny.documents(10, seed=5, prompt=0))])
        documents, values = tiny.documents(6), []
        parts = [documents[sum(sizes[:place]) : sum(sizes[: place + 1])] for place in range(len(sizes))]
        for progress in (0.1, 0.6):
            values.append(tiny.accumulate(driver, student, [tiny.collate(part) for part in parts], progress)[0])
            driver.advance(progress)
        losses.append(torch.stack(values))
        driver.detach()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-12)
    assert losses[0][1].isfinite()
    assert losses[0][1] > 0
