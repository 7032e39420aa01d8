"""Mutual information of features against truths that are known in closed form."""

from __future__ import annotations

import doctest
import math

import distily_contrastive
import pytest
import torch
from distily_contrastive import MutualInformation, contrast, gaussian_information
from torch import nn

from distily.geometry import reduced


def rows(n: int = 12, *widths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for width in widths]


def gaussian_pair(n: int, dimensions: int, rho: float = 0.9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, noise = rows(n, dimensions, dimensions, seed=seed)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def information(dimensions: int, rho: float = 0.9) -> float:
    return -dimensions / 2 * math.log(1 - rho**2)


def made(student: int, teacher: int, **chosen) -> MutualInformation:
    torch.manual_seed(0)
    return MutualInformation(student, teacher, **chosen).double()


def value(objective: MutualInformation, student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor | None = None) -> float:
    return objective(student, teacher, input_ids=torch.arange(len(student)) if ids is None else ids).mean().item()


class TestInfoNce:
    @pytest.mark.parametrize("temperature", [0.1, 1.0])
    def test_orthonormal_rows_under_identity_heads_have_a_closed_form(self, temperature):
        objective = made(6, 6, dimensions=6, temperature=temperature)
        for head in (objective.student_head, objective.teacher_head):
            nn.init.eye_(head.weight)
        tokens = torch.eye(6, dtype=torch.float64)
        assert value(objective, tokens, tokens) == pytest.approx(math.log(1 + 5 * math.exp(-1 / temperature)), rel=1e-12)

    def test_the_true_critic_gives_the_true_information_until_log_n(self):
        """log p(y|x)/p(y) of normal variables with ρ = 0.9: in one dimension 0.830 nats, in twenty 16.6, of which only log n show."""

        def bound(n: int, dimensions: int) -> float:
            found = []
            for seed in range(4096 // n):
                x, y = gaussian_pair(n, dimensions, seed=seed)
                ratio = y.square()[None] / 2 - (y[None] - 0.9 * x[:, None]).square() / (2 * 0.19) - math.log(0.19) / 2
                found.append(math.log(n) - contrast(ratio.sum(-1)).mean().item())
            return sum(found) / len(found)

        shown = [bound(n, 1) for n in (16, 128, 512)]
        assert shown[0] < min(shown[1:]) - 0.03
        assert shown[1:] == pytest.approx([information(1)] * 2, abs=0.03)
        assert math.log(16) - 0.01 < bound(16, 20) <= math.log(16) < information(20)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_independent_features_show_no_information(self, symmetric):
        """log n − value is below 0 in expectation, whatever the heads."""
        objective = made(5, 4, dimensions=8, symmetric=symmetric)
        shown = [math.log(16) - value(objective, *rows(16, 5, 4, seed=seed)) for seed in range(30)]
        assert sum(shown) / len(shown) < -0.5

    def test_learned_heads_find_most_of_what_there_is(self):
        """Directions alone cannot see the length of a scalar: linear heads on x lose what heads on (x, x², 1) find."""
        shown = {}
        for name, features in {
            "x": lambda x: x,
            "(x, x², 1)": lambda x: torch.cat((x, x.square(), torch.ones_like(x)), 1),
        }.items():
            x, y = gaussian_pair(256, 1)
            width = features(x).shape[1]
            objective = made(width, width, dimensions=16)
            optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
            for step in range(250):
                x, y = gaussian_pair(256, 1, seed=step)
                optimizer.zero_grad()
                objective(features(x), features(y), input_ids=torch.arange(256)).mean().backward()
                optimizer.step()
            x, y = gaussian_pair(1024, 1, seed=9999)
            with torch.no_grad():
                shown[name] = math.log(1024) - value(objective, features(x), features(y))
        assert 0.75 <= shown["(x, x², 1)"] <= information(1) + 0.1
        assert shown["x"] < shown["(x, x², 1)"] - 0.05

    def test_tokens_move_together_or_not_at_all(self):
        objective, (a, b) = made(5, 4), rows(12, 5, 4)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        assert value(objective, a[order], b[order]) == pytest.approx(value(objective, a, b), rel=1e-12)
        assert abs(value(objective, a[order], b) - value(objective, a, b)) > 0.01

    def test_a_token_alone_has_nothing_to_be_mistaken_for(self):
        objective, (a, b) = made(5, 4), rows(1, 5, 4)
        a.requires_grad_()
        result = objective(a, b, input_ids=torch.tensor([7]))
        result.sum().backward()
        assert result.item() == 0
        assert (a.grad == 0).all()

    def test_the_same_token_is_no_negative(self):
        a, b = rows(6, 5, 4)
        same, different = torch.zeros(6, dtype=torch.long), torch.arange(6)
        excluding, plain = made(5, 4, exclude_same_token=True), made(5, 4)
        assert value(excluding, a, b, same) == 0
        assert value(excluding, a, b, different) == value(plain, a, b, different) == value(plain, a, b, same)
        a.requires_grad_()
        excluding(a, b, input_ids=torch.tensor([1, 1, 2, 2, 2, 3])).sum().backward()
        assert a.grad.isfinite().all()

    def test_a_frozen_head_keeps_what_was_drawn(self):
        a, b = rows(6, 5, 4)
        frozen, trained = made(5, 4, teacher_head="frozen"), made(5, 4)
        assert torch.equal(frozen.teacher_head.weight, trained.teacher_head.weight)
        for objective in (frozen, trained):
            objective(a, b, input_ids=torch.arange(6)).sum().backward()
        assert frozen.teacher_head.weight.grad is None
        assert (trained.teacher_head.weight.grad != 0).any()
        assert (frozen.student_head.weight.grad != 0).any()

    def test_torchdistills_crd_cannot_draw_its_negatives(self):
        """Why it is no oracle: it reads an attribute that was never set."""
        from torchdistill.losses.mid_level import CRDLoss

        broken = CRDLoss.__new__(CRDLoss)
        nn.Module.__init__(broken)
        broken.init_prob_alias(torch.ones(8))
        with pytest.raises(AttributeError, match="prob"):
            broken.draw(4)


class TestGaussianInformation:
    def test_an_invertible_map_of_a_side_changes_nothing(self):
        a, b = gaussian_pair(200, 4)
        (turn,) = rows(4, 4, seed=5)
        expected = gaussian_information(a, b, ridge=1e-10)[0].item()
        assert gaussian_information(a @ turn + 3, b, ridge=1e-10)[0].item() == pytest.approx(expected, rel=1e-5)
        assert gaussian_information(a, 100 * b @ turn, ridge=1e-10)[0].item() == pytest.approx(expected, rel=1e-5)

    def test_few_rows_look_like_information(self):
        """Independent features: nothing is there, and 400 rows say so; 20 rows in 2 × 8 dimensions do not."""
        many, few = (-gaussian_information(*rows(n, 8, 8))[0].item() for n in (400, 20))
        assert many < 0.2
        assert few > 2.0

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_tiny_documents_are_finite(self, n):
        a, b = (side.float() for side in rows(n, 5, 4))
        a.requires_grad_()
        result = gaussian_information(a, b)
        result.mean().backward()
        assert result.shape == (n,)
        assert result.isfinite().all()
        assert a.grad.isfinite().all()
        if n == 1:
            assert result.abs().item() < 1e-5
            assert (a.grad == 0).all()

    def test_wide_features_are_reduced_first_each_side_by_its_own_width(self):
        a, b = rows(30, 9, 12)
        torch.testing.assert_close(gaussian_information(a, b, dimensions=3), gaussian_information(reduced(a, 3), reduced(b, 3)))


def test_the_docstrings_examples():
    assert doctest.testmod(distily_contrastive).failed == 0
