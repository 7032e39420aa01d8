"""The target that moves: its ends, its gradient, and a schedule that depends on nothing but the global batches."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch
from distily_targets import AdaptiveTarget


def rows(seed: int, n: int = 6, v: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, v, generator=generator, dtype=torch.float64) * 2.0)


def gradient(value: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), student)[0]


def step(objective: AdaptiveTarget, losses: list[float], progress: float) -> float:
    """An optimizer step whose rows had these values, as the driver ends it; the share after it."""
    objective.pending.copy_(torch.tensor([sum(losses), len(losses)]))
    objective.advance(progress)
    objective.pending.zero_()
    return objective.share.item()


def test_the_ends_are_no_loss_at_all_and_forward_kl():
    student, teacher = rows(0)
    student.requires_grad_()
    nothing = AdaptiveTarget(start=0.0)(student, teacher)
    assert nothing.abs().max() < 1e-12
    assert gradient(nothing, student).abs().max() < 1e-12
    expected = scipy.stats.entropy(teacher.softmax(-1).numpy(), student.softmax(-1).detach().numpy(), axis=-1)
    torch.testing.assert_close(AdaptiveTarget(start=1.0)(student, teacher).detach(), torch.from_numpy(expected))


def test_the_gradient_holds_the_students_part_of_the_target_constant():
    """s − p_k. Through the target it would be another, which the description says by ``surrogate_gradient``."""
    student, teacher = rows(1)
    student.requires_grad_()
    target = (0.6 * student + 0.4 * teacher).softmax(-1)
    found = gradient(AdaptiveTarget(start=0.4)(student, teacher), student)
    torch.testing.assert_close(found, student.softmax(-1) - target)
    through = gradient((target * (target.log() - student.log_softmax(-1))).sum(-1), student)
    assert (through - found).abs().max() > 0.1
    assert AdaptiveTarget.description.surrogate_gradient


def test_a_token_that_the_teacher_rules_out_is_ruled_out_in_the_target():
    student, teacher = rows(2)
    teacher[:, -1] = -math.inf
    student.requires_grad_()
    for start in (0.0, 0.4, 1.0):
        value = AdaptiveTarget(start=start)(student, teacher)
        torch.testing.assert_close(gradient(value, student)[:, -1], student.softmax(-1)[:, -1].detach())


class TestSchedule:
    def test_the_first_step_only_notes_the_loss(self):
        objective = AdaptiveTarget(rate=0.5)
        assert step(objective, [2.0], 0.0) == 0.4
        assert step(objective, [2.0], 0.0) == pytest.approx(0.4 + 0.5 * 0.5 * 0.6)  # no change of the loss: sigmoid(0) = ½

    def test_it_runs_ahead_of_the_line_the_more_the_faster_the_loss_falls(self):
        shares = []
        for factor in (1.0, 0.5):
            objective = AdaptiveTarget(rate=0.01, decay=0.5)
            shares.append([step(objective, [factor**n], 0.0) for n in range(20)][-1])
        assert 0.4 < shares[0] < shares[1] < 1.0

    def test_it_never_falls_and_is_at_the_end_when_training_ends(self):
        objective, generator = AdaptiveTarget(rate=0.02), torch.Generator().manual_seed(0)
        losses = torch.rand(100, generator=generator) + 0.1
        shares = [step(objective, [loss.item()], n / 99) for n, loss in enumerate(losses)]
        assert all(later >= earlier for earlier, later in itertools.pairwise(shares))
        assert shares[-1] == 1.0

    def test_at_the_published_rate_a_short_run_is_the_straight_line(self):
        objective = AdaptiveTarget()
        shares = [step(objective, [1.0 / (1 + n)], n / 1000) for n in range(1000)]
        assert max(abs(share - (0.4 + 0.6 * n / 1000)) for n, share in enumerate(shares)) < 1e-6

    def test_the_authors_code_feeds_it_the_soft_cross_entropy(self):
        """A fall of the KL from 1 to 0.5 over a teacher's entropy of 2 nats: half of the loss here, a sixth there. The published
        rate makes nothing of it: the shares differ by 4e-8.
        """
        shares = {}
        for name, entropy in (("paper", 0.0), ("code", 2.0)):
            objective = AdaptiveTarget()
            step(objective, [1.0 + entropy], 0.0)
            step(objective, [0.5 + entropy], 0.0)
            shares[name] = (objective.momentum.item(), objective.share.item())
        assert shares["paper"][0] == pytest.approx(0.01 * 1 / 2)
        assert shares["code"][0] == pytest.approx(0.01 * 1 / 6)
        assert 0 < shares["paper"][1] - shares["code"][1] < 1e-6

    def test_a_step_without_supervised_tokens_moves_nothing(self):
        objective = AdaptiveTarget(rate=0.5)
        step(objective, [2.0], 0.0)
        before = {name: value.clone() for name, value in objective.state_dict().items()}
        step(objective, [], 0.9)
        assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


class TestPending:
    def test_chunks_of_any_size_add_up_to_the_same(self):
        student, teacher = rows(3)
        student.requires_grad_()
        pending = []
        for size in (1, 4, 6):
            objective = AdaptiveTarget()
            for start in range(0, 6, size):
                objective(student[start : start + size], teacher[start : start + size])
            pending.append(objective.pending.clone())
        torch.testing.assert_close(pending[0], pending[1])
        torch.testing.assert_close(pending[0], pending[2])
        assert pending[0][1] == 6

    def test_it_counts_only_where_gradients_are_wanted(self):
        objective = AdaptiveTarget()
        with torch.no_grad():
            objective(*rows(4))
        assert not objective.pending.any()

    def test_a_forward_that_checkpointing_repeats_does_not_change_the_mean(self):
        shares = []
        for repeats in (1, 2):
            objective = AdaptiveTarget(rate=0.5, decay=0.5)
            for seed in (5, 6):
                student, teacher = rows(seed)
                for _ in range(repeats):
                    objective(student.requires_grad_(), teacher)
                objective.advance(0.0)
                objective.pending.zero_()
            shares.append(objective.share.item())
        assert shares[0] == pytest.approx(shares[1], abs=1e-15)
        assert shares[0] != 0.4

    def test_a_checkpoint_carries_the_schedule_and_nothing_that_is_pending(self):
        whole, first, second = (AdaptiveTarget(rate=0.05) for _ in range(3))
        losses = [3.0, 2.0, 2.5, 1.0, 0.7]
        expected = [step(whole, [loss], 0.0) for loss in losses]
        for loss in losses[:3]:
            step(first, [loss], 0.0)
        assert sorted(first.state_dict()) == ["momentum", "previous", "share"]
        second.load_state_dict(first.state_dict())
        assert [step(second, [loss], 0.0) for loss in losses[3:]] == expected[3:]


def test_a_target_that_would_move_away_from_the_teacher_is_refused():
    with pytest.raises(ValueError, match="above end"):
        AdaptiveTarget(start=0.9, end=0.5)
