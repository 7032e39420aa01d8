"""``attention_kl`` and ``attention_mse``: masks, heads and the peers that go wrong. Their oracles: ``tests/oracles/relations.py``."""

from __future__ import annotations

import doctest
from collections.abc import Callable

import distily_attention
import pytest
import textbrewer
import tiny
import torch
from distily_attention import attention_kl, attention_mse

from distily.loss.features import FeatureCapture

BOTH = pytest.mark.parametrize("objective", [attention_kl, attention_mse])


def scores(queries: int = 6, heads: int = 3, keys: int = 8, seed: int = 0) -> torch.Tensor:
    """Causal scores of the first queries of a text of ``keys`` tokens."""
    values = torch.randn(queries, heads, keys, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    later = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    return values.masked_fill(later[:, None], -torch.inf)


class TestMasks:
    @BOTH
    def test_keys_that_nobody_sees_change_nothing(self, objective: Callable) -> None:
        student, teacher = scores(), scores(seed=1)
        shorter = objective(student[..., :6], teacher[..., :6])
        torch.testing.assert_close(objective(student, teacher), shorter)

    @pytest.mark.parametrize(
        ("objective", "options"),
        [(attention_kl, {}), (attention_kl, {"heads": "mean"}), (attention_kl, {"drop_first_key": True}), (attention_mse, {}),
         (attention_mse, {"heads": "mean"}), (attention_mse, {"of": "probabilities"})],
    )  # fmt: skip
    def test_gradients_stay_finite_and_masked_scores_get_none(self, objective: Callable, options: dict) -> None:
        teacher = scores(seed=1)
        for student in (scores(), teacher.clone()):
            student.requires_grad_()
            values = objective(student, teacher, **options)
            values.sum().backward()
            assert values.isfinite().all()
            assert student.grad.isfinite().all()
            assert student.grad[~teacher.isfinite()].eq(0).all()

    @BOTH
    def test_the_first_token_looks_only_at_itself(self, objective: Callable) -> None:
        student, teacher = scores(1), scores(1, seed=1)
        assert attention_kl(student, teacher).item() == 0
        assert attention_mse(student, teacher, of="probabilities").item() == 0

    def test_kl_forgets_a_constant_that_mse_of_scores_counts(self) -> None:
        teacher = scores()
        assert attention_kl(teacher + 2, teacher).abs().max() < 1e-12
        assert attention_mse(teacher + 2, teacher, of="probabilities").max() < 1e-12
        torch.testing.assert_close(attention_mse(teacher + 2, teacher), torch.full((6,), 4.0, dtype=torch.float64))

    def test_a_shorter_window_of_the_student(self) -> None:
        """What it cannot see makes the divergence infinite, as the docstring says; mse compares what both see."""
        teacher, student = scores(), scores()
        student[4, :, 0] = -torch.inf
        assert attention_kl(student, teacher)[4] == torch.inf
        assert attention_mse(student, teacher).abs().max() == 0


class TestHeads:
    @BOTH
    def test_heads_in_another_order_on_both_sides(self, objective: Callable) -> None:
        student, teacher, order = scores(), scores(seed=1), [2, 0, 1]
        expected = objective(student, teacher)
        torch.testing.assert_close(objective(student[:, order], teacher[:, order]), expected)
        assert not torch.allclose(objective(student[:, order], teacher), expected)

    @BOTH
    def test_unequal_numbers_are_refused_or_averaged(self, objective: Callable) -> None:
        student, teacher = scores(heads=2), scores(heads=4, seed=1)
        with pytest.raises(
            ValueError, match="2 attention heads of the student do not match 4 of the teacher; allowed: heads=mean"
        ):
            objective(student, teacher)
        doubled = student.repeat_interleave(2, 1)
        torch.testing.assert_close(objective(student, teacher, heads="mean"), objective(doubled, teacher, heads="mean"))

    def test_the_mean_is_that_of_the_distributions(self) -> None:
        student, teacher = scores(heads=2), scores(heads=4, seed=1)
        mine, theirs = student.softmax(-1).mean(1), teacher.softmax(-1).mean(1)
        expected = torch.where(theirs > 0, theirs * (theirs / mine).log(), 0.0).sum(-1)
        torch.testing.assert_close(attention_kl(student, teacher, heads="mean"), expected)


class TestFirstKey:
    def test_it_takes_no_part(self) -> None:
        student, teacher = scores(), scores(seed=1)
        other = student.clone()
        other[..., 0] += torch.randn(6, 3, dtype=torch.float64)
        first, second = (attention_kl(each, teacher, drop_first_key=True) for each in (student, other))
        torch.testing.assert_close(first[1:], second[1:])
        torch.testing.assert_close(first[2:], attention_kl(student[2:, :, 1:], teacher[2:, :, 1:]))

    def test_a_query_that_sees_no_other_key_gives_nothing(self) -> None:
        student = scores().requires_grad_()
        value = attention_kl(student, scores(seed=1), drop_first_key=True)[0]
        value.backward()
        assert value == 0
        assert student.grad.eq(0).all()


class TestPeers:
    def test_textbrewer_without_a_mask_drops_negative_scores(self) -> None:
        """Its unmasked branch takes every score ≤ -0.001 for padding, and zeroes it."""
        student, teacher = (torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        theirs = textbrewer.losses.att_mse_loss(student, teacher).item()
        ours = attention_mse(student[0].transpose(0, 1), teacher[0].transpose(0, 1)).mean().item()
        assert (theirs, ours) == pytest.approx((0.8084, 2.2365), abs=1e-3)
        assert ours == pytest.approx((student - teacher).square().mean().item(), rel=1e-6)

    def test_textbrewer_cross_entropy_is_kl_and_the_teachers_entropy(self) -> None:
        student, teacher = (
            torch.randn(1, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
        )
        theirs = textbrewer.losses.att_ce_loss(student, teacher, torch.ones(1, 5, dtype=torch.float64))
        p = teacher.softmax(-1)
        entropy = -(p * p.log()).sum(-1).mean()
        ours = attention_kl(student[0].transpose(0, 1), teacher[0].transpose(0, 1)).mean()
        torch.testing.assert_close(theirs, ours + entropy, rtol=1e-6, atol=1e-6)


class TestThroughTheDriver:
    @pytest.mark.parametrize("packed", [False, True])
    def test_the_loss_is_that_of_eager_attention_weights(self, packed: bool) -> None:
        """Ragged documents with prompts; both models in eager attention, by hand."""
        student, teacher = tiny.model("llama", 1), tiny.model("llama", 2)
        documents = tiny.documents(3)
        driver = tiny.driver(student, teacher, "attention_kl:mapper=last_k", chunk_rows=3)
        rows = [documents[:2], documents[2:]] if packed else documents
        loss, _ = tiny.accumulate(driver, student, [tiny.collate(rows, packed)])
        driver.detach()
        total, count = 0.0, 0
        for document in documents:
            ids = torch.tensor([document["input_ids"]])
            maps = []
            for model in (student, teacher):
                model.set_attn_implementation("eager")
                maps.append(model(ids, output_attentions=True, use_cache=False).attentions[-1][0].double())
            rows = [i for i, label in enumerate(document["labels"][1:]) if label != -100]
            divergence = torch.where(maps[1] > 0, maps[1] * (maps[1] / maps[0]).log(), 0.0).sum(-1).mean(0)
            total, count = total + divergence[rows].sum(), count + len(rows)
        torch.testing.assert_close(loss.double(), total / count, rtol=1e-4, atol=1e-6)

    def test_the_teacher_gets_its_attention_back(self) -> None:
        model = tiny.model("llama")
        capture = FeatureCapture(model, [("attentions", 1)])
        assert model.config._attn_implementation == "distily_sdpa"
        capture.remove()
        assert model.config._attn_implementation == "sdpa"


def test_the_docstrings_examples() -> None:
    assert doctest.testmod(distily_attention) == (0, 3)
