"""Projectors: how they begin, what they keep, what is refused. Formulas: ``tests/oracles``."""

from __future__ import annotations

import doctest

import distily_projectors
import pytest
import tiny
import torch
from distily_projectors import PCA, LeastSquares, Truncate, ensemble, identity, linear, orthogonal
from hypothesis import given, settings
from hypothesis import strategies as st

from distily.errors import DistilyError
from distily.loss.calibration import calibrate

WIDTH = st.integers(1, 9)


def rows(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def observed(module, student: torch.Tensor, teacher: torch.Tensor):
    module = module.double()
    module.observe(student, teacher)
    module.conclude()
    return module


def test_the_examples_are_true():
    assert doctest.testmod(distily_projectors).failed == 0


def test_identity_needs_equal_widths():
    with pytest.raises(ValueError, match="equal widths"):
        identity(8, 5)


def test_linear_begins_as_the_identity_for_widths_that_are_near_alone():
    near, far = linear(9, 10).weight, linear(5, 10).weight
    assert torch.equal(near, torch.eye(10, 9))
    assert not torch.equal(far, torch.eye(10, 5))
    assert far.std().item() == pytest.approx((2 / 15) ** 0.5, rel=0.3)  # Xavier


@settings(max_examples=20, deadline=None)
@given(student=WIDTH, teacher=WIDTH)
def test_orthogonal_begins_orthonormal_in_the_orientation_that_the_widths_allow(student, teacher):
    weight = orthogonal(student, teacher).weight
    gram = weight.T @ weight if teacher >= student else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(min(student, teacher)), atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(narrow=WIDTH, more=WIDTH, seed=st.integers(0, 99))
def test_truncation_is_a_selection_that_its_transpose_undoes(narrow, more, seed):
    """The same channels back: nothing is lost on the way through the wider side."""
    wide = narrow + more
    keep = torch.randperm(wide, generator=torch.Generator().manual_seed(seed))[:narrow].tolist()
    x = rows(4, narrow)
    assert torch.equal(Truncate(wide, narrow, keep=keep)(Truncate(narrow, wide, keep=keep)(x)), x)
    assert not list(Truncate(narrow, wide, keep=keep).parameters())


@pytest.mark.parametrize("keep", [[0], [0, 0], [0, 5]])
def test_channels_that_cannot_be_kept_are_refused(keep):
    with pytest.raises(ValueError, match="2 different channels from 0 to 4"):
        Truncate(2, 5, keep=keep)


def test_a_narrower_copy_of_the_teacher_has_no_loss_on_the_channels_that_it_kept():
    teacher = rows(6, 8)
    keep = [1, 4, 6]
    student = teacher[:, keep]
    difference = Truncate(3, 8, keep=keep)(student) - teacher
    assert not difference[:, keep].any()
    assert torch.equal(Truncate(8, 3, keep=keep)(teacher), student)


def test_the_maps_of_an_ensemble_begin_differently():
    first, second, _ = ensemble(4, 6).parameters()
    assert not torch.equal(first, second)


def test_pca_of_a_wider_student_gives_all_of_the_teacher_back_from_its_first_channels():
    teacher = rows(40, 4) @ rows(4, 4, 1)
    module = observed(PCA(6, 4), rows(40, 6, 2), teacher)
    # not the default driver, whose result depends on what was in its memory before (pytorch issue 187411)
    coordinates = torch.linalg.lstsq(module.map.weight.detach(), (teacher - teacher.mean(0)).T, driver="gelsd").solution.T
    torch.testing.assert_close(module(coordinates).detach(), teacher)
    assert not module.map.weight[:, 4:].any()


def test_pca_does_not_depend_on_the_sign_that_the_solver_gave():
    teacher = rows(40, 5) @ rows(5, 5, 1)
    weight = observed(PCA(3, 5), rows(40, 3), teacher).map.weight
    largest = weight.gather(0, weight.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_least_squares_explains_a_linear_teacher_exactly_and_frozen_it_does_not_train():
    student = rows(50, 4)
    teacher = student @ rows(4, 6, 1) + rows(1, 6, 2)
    module = observed(LeastSquares(4, 6, ridge=0.0, frozen=True), student, teacher)
    torch.testing.assert_close(module(student), teacher)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in LeastSquares(4, 6).parameters())


def test_least_squares_refuses_directions_that_nothing_says_anything_of():
    flat = rows(50, 4)
    flat[:, 1] = flat[:, 0]
    with pytest.raises(ValueError, match="do not vary in every direction"):
        observed(LeastSquares(4, 6, ridge=0.0), flat * 0.0, rows(50, 6))
    observed(LeastSquares(4, 6), flat, rows(50, 6))  # the ridge settles it
    with pytest.raises(ValueError, match="saw 1 rows"):
        observed(PCA(2, 3), rows(1, 2), rows(1, 3))


@pytest.mark.parametrize("projector", ["pca", "least_squares", "least_squares(frozen=true)"])
def test_a_calibrated_projector_lowers_the_first_loss_of_the_driver(projector):
    """Against a linear map at its random start, with the same student, teacher and batch."""
    batch = [tiny.collate(tiny.documents(8, shortest=10, longest=20))]
    losses = []
    for name in ("linear", projector):
        student, teacher = tiny.model(seed=1, hidden_size=16), tiny.model(seed=2)
        driver = tiny.driver(student, teacher, f"mse:projector={name}")
        calibrate(driver, batch)
        losses.append(tiny.accumulate(driver, student, batch)[0].item())
        driver.detach()
    assert losses[1] < losses[0]


def test_a_text_that_is_too_short_is_said_by_the_term():
    student, teacher = tiny.model(seed=1, hidden_size=16), tiny.model(seed=2)
    driver = tiny.driver(student, teacher, "mse:projector=pca")
    with pytest.raises(DistilyError, match=r"objective mse: .*saw 1 rows"):
        calibrate(driver, [tiny.collate([{"input_ids": [5, 6], "labels": [-100, 6]}])])
    driver.detach()
