"""Layer mappers: what holds for all depths, what is refused, and the learned ones inside a driver. Definitions: ``tests/oracles``."""

from __future__ import annotations

import doctest

import distily_layer_mappers
import distily_learned_mappers
import pytest
import tiny
import torch
from distily_layer_mappers import (
    all_blocks,
    index,
    last_k,
    penultimate_k,
    random_blocks,
    reverse,
    segment_end,
    uniform,
    uniform_and_last,
    uniform_consecutive,
    uniform_ends,
)
from distily_learned_mappers import AttentionPooling, RandomInOrder, Transport
from hypothesis import given, settings
from hypothesis import strategies as st

from distily.errors import DistilyError
from distily.layers import layer_pairs

DEPTH = st.integers(1, 40)
EVERYWHERE = (uniform, last_k, penultimate_k, uniform_ends, uniform_and_last, reverse, random_blocks)


@pytest.mark.parametrize("module", [distily_layer_mappers, distily_learned_mappers], ids=lambda module: module.__name__)
def test_the_examples_are_true(module):
    assert doctest.testmod(module).failed == 0


@settings(max_examples=30, deadline=None)
@given(student=DEPTH, teacher=DEPTH)
def test_mappers_name_blocks_that_exist(student, teacher):
    for mapper in EVERYWHERE:
        pairs = layer_pairs("it", mapper, student, teacher)
        assert all(1 <= s <= student and 1 <= t <= teacher for s, t in pairs)


@settings(max_examples=30, deadline=None)
@given(student=DEPTH, teacher=DEPTH)
def test_rules_for_every_block_are_monotone_end_at_the_last_block_and_are_the_identity_for_equal_depths(student, teacher):
    for mapper in (uniform, uniform_ends):
        pairs = mapper(student, teacher)
        assert [i for i, _ in pairs] == list(range(1, student + 1))
        assert pairs == sorted(pairs)
        assert pairs[-1][1] == teacher or student == 1
        assert mapper(student, student) == all_blocks(student, student)
    assert sorted(j for _, j in reverse(student, teacher)) == [j for _, j in uniform(student, teacher)]
    assert len(uniform_and_last(student, teacher)) == 2 * student - sum(j == teacher for _, j in uniform(student, teacher))


@settings(max_examples=30, deadline=None)
@given(depths=st.tuples(DEPTH, DEPTH).map(sorted))
def test_groups_of_blocks_cover_the_teacher_once_and_leave_no_student_block_out(depths):
    student, teacher = depths
    pairs = uniform_consecutive(student, teacher)
    assert [j for _, j in pairs] == list(range(1, teacher + 1))
    assert {i for i, _ in pairs} == set(range(1, student + 1))
    if teacher % student == 0:  # the groups of Udagawa et al. 2023
        size = teacher // student
        assert pairs == [(i, j) for i in range(1, student + 1) for j in range((i - 1) * size + 1, i * size + 1)]


@settings(max_examples=20, deadline=None)
@given(depths=st.tuples(DEPTH, DEPTH).map(sorted))
def test_segments_of_copied_blocks_are_the_identity_where_every_block_was_copied(depths):
    student, teacher = depths
    assert segment_end(student, student) == all_blocks(student, student)
    ends = [j for _, j in segment_end(student, teacher)]
    assert ends == sorted(ends)
    assert ends[-1] == teacher


def test_a_model_of_few_blocks_gives_its_first_one_as_the_penultimate():
    assert penultimate_k(1, 6) == [(1, 5)]
    assert penultimate_k(6, 1) == [(5, 1)]
    assert penultimate_k(2, 2) == [(1, 1)]


@pytest.mark.parametrize(
    ("mapper", "depths", "message"),
    [
        (all_blocks, (3, 4), "equal depth"),
        (lambda s, t: last_k(s, t, k=5), (4, 6), "only 4 blocks can be paired"),
        (lambda s, t: penultimate_k(s, t, k=4), (4, 6), "only 3 blocks can be paired"),
        (lambda s, t: index(s, t, pairs=[[5, 1]]), (4, 6), "block 5 of the student does not exist"),
        (lambda s, t: index(s, t, pairs=[[1]]), (4, 6), "must be a list"),
        (uniform_consecutive, (6, 4), "at least as deep"),
        (lambda s, t: segment_end(s, t, layers=[1, 1]), (2, 6), "2 rising blocks of the teacher, from 1 to 6"),
        (lambda s, t: segment_end(s, t, layers=[1, 7]), (2, 6), "rising blocks"),
        (lambda s, t: segment_end(s, t, layers=[1, 3, 5]), (2, 6), "rising blocks"),
        (lambda s, t: RandomInOrder(s, t).pairs, (6, 4), "at least as deep"),
        (lambda s, t: [], (4, 6), "gave no pairs"),
    ],
)
def test_pairs_that_cannot_be_are_refused(mapper, depths, message):
    with pytest.raises(DistilyError, match=message):
        layer_pairs("it", mapper, *depths)


def test_repeats_count_once_and_negative_blocks_are_from_the_end():
    assert layer_pairs("it", lambda s, t: index(s, t, pairs=[[-1, -1], [4, 6], [0, 0]]), 4, 6) == [(4, 6), (0, 0)]


def features(*shape: int) -> list[torch.Tensor]:
    return list(torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def test_attention_to_one_teacher_block_is_that_block():
    mapping = AttentionPooling(2, 1)
    student, teacher = features(2, 5, 4), features(1, 5, 4) * 2
    for (mine, theirs), own in zip(mapping.matches(student, teacher, torch.zeros(5)), student, strict=True):
        torch.testing.assert_close(mine, own)
        torch.testing.assert_close(theirs, teacher[0])


def test_attention_goes_to_the_likest_block_alone_as_the_temperature_falls_and_to_all_alike_as_it_rises():
    student, teacher = features(1, 6, 8) * 3, features(3, 6, 8)
    likeness = [(student[0].mean(0) @ each.mean(0)).item() for each in teacher]
    (_, cold), *_ = AttentionPooling(1, 3, temperature=1e-4).matches(student, teacher, torch.zeros(6))
    torch.testing.assert_close(cold, teacher[likeness.index(max(likeness))])
    (_, hot), *_ = AttentionPooling(1, 3, temperature=1e6).matches(student, teacher, torch.zeros(6))
    torch.testing.assert_close(hot, torch.stack(teacher).mean(0), atol=1e-5, rtol=0)


def test_transport_costs_no_more_than_any_one_to_one_mapping():
    mapping, costs = Transport(5, 5), torch.rand(25, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mapping.shares(costs, 0.0)
    mapping.advance(0.0)
    spent = (mapping.shares(costs, 0.1) * costs).sum()
    orders = [torch.randperm(5, generator=torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert all(spent <= costs.reshape(5, 5)[torch.arange(5), order].mean() + 1e-12 for order in orders)


def test_transport_keeps_its_plan_through_a_step_without_values_and_through_an_overflow():
    mapping = Transport(2, 3)
    for values in (torch.zeros(6), torch.full((6,), torch.inf)):
        before = mapping.plan.clone()
        mapping.shares(values, 0.0)
        mapping.advance(0.0)
        assert torch.equal(mapping.plan, before)


@pytest.mark.parametrize("mapper", ["attention_pooling", "transport", "random_in_order(draws=2)", "uniform_consecutive"])
def test_a_learned_mapping_trains_and_does_not_see_how_the_batch_was_divided(mapper):
    losses = []
    for sizes in ((6,), (1, 3, 2)):
        student = tiny.model(seed=1, dtype=torch.float64)
        teacher = tiny.model(seed=2, dtype=torch.float64, num_hidden_layers=4, hidden_size=16)
        driver = tiny.driver(student, teacher, f"mse:mapper={mapper},normalizer=rms")
        driver.loss.double()
        documents, values = tiny.documents(6), []
        for progress in (0.1, 0.6):
            parts = [documents[sum(sizes[:place]) : sum(sizes[: place + 1])] for place in range(len(sizes))]
            loss, gradients = tiny.accumulate(driver, student, [tiny.collate(part) for part in parts], progress)
            driver.advance(progress)
            values.append(loss)
        assert all(value.isfinite().all() for value in gradients.values())
        losses.append(torch.stack(values))
        driver.detach()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    assert losses[0][0] != losses[0][1] or mapper in ("attention_pooling", "uniform_consecutive")
