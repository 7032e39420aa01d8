"""Relations between tokens: what each forgets, degenerate documents, and peers that are wrong."""

from __future__ import annotations

import doctest
import math

import distily_similarity
import pytest
import torch
from distily_similarity import (
    correlation_congruence,
    gram_token,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)

EVERY = [
    gram_token,
    similarity_preserving,
    correlation_congruence,
    probabilistic_transfer,
    relational_distance,
    relational_angle,
]


def rows(n: int, *widths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for width in widths]


def value(objective, student: torch.Tensor, teacher: torch.Tensor, **chosen) -> float:
    return objective(student, teacher, **chosen).mean().item()


def gradient(objective, student: torch.Tensor, teacher: torch.Tensor, **chosen) -> torch.Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(objective(student, teacher, **chosen).mean(), student)[0]


MOVES = {
    "rotation": lambda a: a @ torch.linalg.qr(rows(4, 4, seed=7)[0]).Q,
    "scale": lambda a: 100 * a,
    "row scale": lambda a: torch.arange(1.0, len(a) + 1)[:, None] * a,
    "shift": lambda a: a + torch.arange(4),
    "order": lambda a: a.flip(0),
}
FORGETS = {
    gram_token: {"rotation"},
    similarity_preserving: {"rotation", "scale"},
    correlation_congruence: {"rotation", "scale", "row scale"},
    probabilistic_transfer: {"rotation", "scale", "row scale"},
    relational_distance: {"rotation", "scale", "shift"},
    relational_angle: {"rotation", "scale", "shift"},
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("objective", EVERY)
def test_a_moved_student_is_the_same_or_not(objective, move):
    a, b = rows(12, 4, 5)
    change = abs(value(objective, MOVES[move](a), b) / value(objective, a, b) - 1)
    if move in FORGETS[objective]:
        assert change < 1e-9
    else:
        assert change > 1e-3


@pytest.mark.parametrize("objective", EVERY)
def test_one_row_says_nothing_but_its_length(objective):
    a, b = rows(1, 4, 5)
    if objective is gram_token:
        assert value(objective, a, b) == pytest.approx(((a**2).mean() - (b**2).mean()).item() ** 2)
    else:
        assert value(objective, a, b) == pytest.approx(0, abs=1e-15)
        assert gradient(objective, a, b).abs().max() < 1e-15


@pytest.mark.parametrize("objective", [probabilistic_transfer, relational_distance, relational_angle])
def test_two_rows_are_one_pair(objective):
    assert value(objective, *rows(2, 4, 5)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("objective", EVERY)
@pytest.mark.parametrize("kind", ["repeated", "zero", "opposite"])
def test_degenerate_rows_have_a_finite_gradient(objective, kind):
    """Repeated tokens lie at distance 0, where a root has a pole; opposite ones have nearness 0, where a logarithm has."""
    a, b = (side.float() for side in rows(6, 4, 4))
    a[1:3] = {"repeated": a[0], "zero": torch.zeros(4), "opposite": -a[0]}[kind]
    for student, teacher in ((a, b), (b, a), (a, a), (a[:3], a[:3])):
        assert objective(student, teacher).isfinite().all()
        assert gradient(objective, student, teacher).isfinite().all()


def test_distances_of_close_rows_far_from_the_origin_are_exact_in_float32():
    """Differences do not cancel where products would: ‖x‖² + ‖y‖² − 2⟨x, y⟩ of float32 rows around 1000."""
    a, b = rows(8, 16, 16)
    near, expected = (1000 + a).float(), value(relational_distance, (1000 + a).float().double(), b)
    assert value(relational_distance, near, b.float()) == pytest.approx(expected, rel=1e-4)
    squares = near.square().sum(1)
    cancelled = (squares[:, None] + squares - 2 * near @ near.T).clamp(min=0).sqrt()
    assert (cancelled - torch.cdist(near.double(), near.double())).abs().max() > 0.1


class TestPeersThatAreWrong:
    def test_torchdistills_similarity_preserving_divides_by_the_wrong_norm(self):
        """It passes 1 as the norm's order where the paper divides by the length of a row."""
        from torchdistill.losses.mid_level import SPKDLoss

        a, b = rows(4, 3, 5)
        peer = SPKDLoss("x", "x", "batchmean").compute_spkd_loss(b, a).item() / 4**2
        by_sums, by_lengths = (
            sum(((a[i] @ a.T) / norm(a[i] @ a.T) - (b[i] @ b.T) / norm(b[i] @ b.T)).square().sum() for i in range(4)).item() / 16
            for norm in (lambda row: row.abs().sum(), lambda row: row.square().sum().sqrt())
        )
        assert peer == pytest.approx(by_sums)
        assert value(similarity_preserving, a, b) == pytest.approx(by_lengths)
        assert [round(peer, 4), round(by_lengths, 4)] == [0.1, 0.2804]

    def test_textbrewers_masked_gram_divides_by_the_length_of_the_text(self):
        """A mask that hides nothing changes its value: 5 tokens of width 3."""
        from textbrewer.losses import mmd_loss

        a, b = rows(5, 3, 3)
        sides = [a[None]] * 2, [b[None]] * 2
        plain, masked = mmd_loss(*sides).item(), mmd_loss(*sides, torch.ones(1, 5)).item()
        assert value(gram_token, a, b) == pytest.approx(plain)
        assert masked == pytest.approx(plain * (3 / 5) ** 2)

    def test_torchdistills_correlation_congruence_is_a_norm_and_not_its_square(self):
        from torchdistill.losses.mid_level import CCKDLoss

        a, b = (side / side.norm(dim=1, keepdim=True) for side in rows(5, 3, 4))
        peer = CCKDLoss("x", "x", {"type": "bilinear"}, "batchmean")({"x": {"output": a}}, {"x": {"output": b}}).item()
        ours = value(correlation_congruence, a, b, kernel="bilinear")
        assert ours == pytest.approx((a @ a.T - b @ b.T).square().sum().item() / 25)
        assert peer == pytest.approx(math.sqrt(ours * 25) / 25)

    def test_torchdistills_transfer_divides_by_the_rows_twice(self):
        """Its value of a document that is repeated is halved; a mean of the rows' KL divergences hardly moves."""
        from torchdistill.losses.mid_level import PKTLoss

        peer = PKTLoss("x", "output", "x", "output").cosine_similarity_loss
        a, b = rows(20, 4, 5)
        twice = [side.repeat(2, 1) for side in (a, b)]
        assert peer(*twice).item() == pytest.approx(peer(a, b).item() / 2, rel=1e-3)
        assert value(probabilistic_transfer, *twice, diagonal=True) == pytest.approx(
            value(probabilistic_transfer, a, b, diagonal=True), rel=1e-3
        )


def test_the_docstrings_examples():
    assert doctest.testmod(distily_similarity).failed == 0
