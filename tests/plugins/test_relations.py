"""``self_relation``: limits, invariances and the losses of the papers that it rebuilds. Its oracles: ``tests/oracles/relations.py``."""

from __future__ import annotations

import doctest

import distily_relations
import pytest
import torch
from distily_relations import self_relation
from hypothesis import given, settings
from hypothesis import strategies as st


def states(tokens: int = 7, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(states(width, width, seed))[0]


class TestInvariances:
    @settings(max_examples=10, deadline=None)
    @given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]), st.sampled_from(["none", "l2"]))
    def test_a_rotation_within_a_relation_head_changes_nothing(self, seed: int, heads: int, normalize: str) -> None:
        student, teacher = states(seed=seed), states(width=24, seed=seed + 1)
        rotation = torch.block_diag(*(orthogonal(12 // heads, seed + head) for head in range(heads)))
        chosen = {"relation_heads": heads, "normalize": normalize}
        expected = self_relation(student, teacher, **chosen)
        torch.testing.assert_close(self_relation(student @ rotation, teacher, **chosen), expected)
        assert (expected >= 0).all()

    def test_across_relation_heads_it_does(self) -> None:
        student, teacher = states(), states(seed=1)
        rotated = student @ orthogonal(12, 3)
        assert not torch.allclose(*(self_relation(each, teacher, relation_heads=3) for each in (student, rotated)))

    def test_tokens_in_another_order_have_their_values_in_that_order(self) -> None:
        student, teacher, order = states(), states(width=24, seed=1), torch.tensor([4, 0, 6, 2, 1, 5, 3])
        expected = self_relation(student, teacher)[order]
        torch.testing.assert_close(self_relation(student[order], teacher[order]), expected)
        moved = self_relation(student[order], teacher[order], causal=True)
        assert not torch.allclose(moved, self_relation(student, teacher, causal=True)[order])

    def test_lengths_count_only_without_l2(self) -> None:
        student, teacher, lengths = states(), states(seed=1), torch.linspace(0.5, 3, 7, dtype=torch.float64)[:, None]
        for normalize, same in (("l2", True), ("none", False)):
            values = [
                self_relation(each, teacher, relation_heads=1, normalize=normalize) for each in (student, student * lengths)
            ]
            assert torch.allclose(*values) == same


class TestLimits:
    def test_one_token_has_no_relation(self) -> None:
        assert self_relation(states(1), states(1, 24, 1)).eq(0).all()

    @pytest.mark.parametrize("normalize", ["none", "l2"])
    def test_a_high_temperature_makes_all_relations_uniform(self, normalize: str) -> None:
        """The value falls as 1/T², and its T² multiple reaches half the variance of the scores' difference."""
        student, teacher = states(), states(seed=1)
        low, high = (self_relation(student, teacher, normalize=normalize, temperature=t).mean() for t in (1e3, 1e4))
        assert high < 1e-4
        assert low / high == pytest.approx(100, rel=0.05)

    def test_causal_looks_back_only(self) -> None:
        student, teacher = states(), states(seed=1)
        changed = student.clone()
        changed[4:] += 1
        before, after = (self_relation(each, teacher, causal=True) for each in (student, changed))
        assert before[0] == 0
        torch.testing.assert_close(after[:4], before[:4])
        assert not torch.isclose(after[4:], before[4:]).any()
        student.requires_grad_()
        self_relation(student, teacher, causal=True).sum().backward()
        assert student.grad.isfinite().all()

    def test_bitdistill_is_minilm_v2_on_unit_vectors_with_the_temperature_in_place_of_the_width(self) -> None:
        """softmax(cos/τ): the scale 1/√D of unit vectors is undone by a temperature of τ/√D."""
        student, teacher, heads, tau = states(), states(width=24, seed=1), 3, 0.1
        unit = [torch.nn.functional.normalize(each.unflatten(-1, (heads, -1)), dim=-1) for each in (student, teacher)]
        relations = [torch.einsum("iad,jad->aij", each, each).div(tau).softmax(-1) for each in unit]
        expected = (relations[1] * (relations[1] / relations[0]).log()).sum(-1).mean(0)
        got = self_relation(student, teacher, relation_heads=heads, normalize="l2", temperature=tau)
        torch.testing.assert_close(got, expected)
        same_width = self_relation(unit[0].flatten(1), unit[0].flip(0).flatten(1), relation_heads=heads, temperature=tau / 2)
        torch.testing.assert_close(
            same_width, self_relation(student, student.flip(0), relation_heads=heads, normalize="l2", temperature=tau)
        )

    def test_all_gradients_are_finite_where_states_are_equal_or_nothing(self) -> None:
        for student in (states(), torch.zeros(7, 12, dtype=torch.float64)):
            for normalize in ("none", "l2"):
                leaf = student.clone().requires_grad_()
                values = self_relation(leaf, student, normalize=normalize)
                values.mean().backward()
                assert values.abs().max() < 1e-12
                assert leaf.grad.abs().max() < 1e-12


class TestOptions:
    @pytest.mark.parametrize(
        ("widths", "heads"), [((768, 768), 48), ((768, 1024), 32), ((256, 1024), 32), ((32, 16), 2), ((7, 9), 1), ((12, 12), 1)]
    )
    def test_the_default_number_of_heads(self, widths: tuple[int, int], heads: int) -> None:
        student, teacher = (states(3, width, width) for width in widths)
        torch.testing.assert_close(self_relation(student, teacher), self_relation(student, teacher, relation_heads=heads))

    def test_heads_that_do_not_divide_the_widths_are_named(self) -> None:
        with pytest.raises(ValueError, match="5 relation heads do not divide the widths 12 and 18; allowed: 1, 2, 3, 6"):
            self_relation(states(), states(width=18), relation_heads=5)

    def test_needs_no_projector(self) -> None:
        assert not self_relation.description.equal_widths
        assert self_relation.description.temperature_scale is None

    def test_the_docstrings_example(self) -> None:
        assert doctest.testmod(distily_relations) == (0, 2)
