"""Students: shaped from the teacher, initialised from its blocks or at random, copied, frozen, tied."""

from __future__ import annotations

import pytest
import tiny
import torch

from distily.config import StudentConfig
from distily.errors import DistilyError
from distily.loss.features import decoder_blocks
from distily.models import build_student, check_tokenizers, spread, student_config

ARCHITECTURES = list(tiny.SHAPES)


def teacher(architecture: str = "llama", **overrides: object):
    return tiny.model(architecture, seed=3, **overrides)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shallower_student_of_every_architecture_starts_from_teacher_blocks(architecture):
    big = teacher(architecture, **{"n_layer" if architecture == "gpt2" else "num_hidden_layers": 5})
    student = build_student(StudentConfig(config={"num_hidden_layers": 3}), big, seed=0)
    assert len(decoder_blocks(student)) == 3
    for mine, number in zip(decoder_blocks(student), (1, 3, 5), strict=True):
        theirs = decoder_blocks(big)[number - 1].state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.state_dict().items())
    assert torch.equal(student.get_input_embeddings().weight, big.get_input_embeddings().weight)
    student(input_ids=torch.tensor([[1, 2, 3]]))


def test_ties_are_kept():
    big = teacher("qwen2")
    student = build_student(StudentConfig(config={"num_hidden_layers": 1}), big, seed=0)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_lists_by_layer_are_derived_anew(architecture):
    config = student_config(teacher(architecture).config, {"num_hidden_layers": 1})
    assert len(config.layer_types) == 1


def test_the_same_seed_builds_the_same_student_and_another_one_another():
    wanted = StudentConfig(config={"hidden_size": 16}, initialize="random")
    first, again, other = (build_student(wanted, teacher(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_chosen_blocks_copied_modules_and_frozen_ones():
    big = teacher(num_hidden_layers=4)
    wanted = StudentConfig(config={"num_hidden_layers": 2}, layers=[4, 2], freeze=["model.embed_tokens"])
    student = build_student(wanted, big, seed=0)
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, big.model.layers[3].mlp.up_proj.weight)
    assert not student.model.embed_tokens.weight.requires_grad
    narrow = StudentConfig(config={"num_hidden_layers": 2, "intermediate_size": 16}, copy=["model.embed_tokens", "lm_head"])
    student = build_student(narrow, big, seed=0)
    assert torch.equal(student.lm_head.weight, big.lm_head.weight)


def test_another_width_starts_at_random_unless_blocks_are_asked_for():
    build_student(StudentConfig(config={"hidden_size": 16}), teacher(), seed=0)
    with pytest.raises(DistilyError, match="teacher_layers needs equal shapes"):
        build_student(StudentConfig(config={"hidden_size": 16}, initialize="teacher_layers"), teacher(), seed=0)


def test_spread_keeps_the_first_and_the_last_block():
    assert spread(6, 12) == [1, 3, 5, 8, 10, 12]
    assert spread(1, 12) == [1]
    assert spread(3, 3) == [1, 2, 3]


def test_tokenizers_that_differ_in_one_token_are_refused_by_that_token():
    class Tokenizer:
        def __init__(self, vocabulary):
            self.vocabulary = vocabulary

        def get_vocab(self):
            return self.vocabulary

    check_tokenizers(Tokenizer({"a": 0, "b": 1}), Tokenizer({"b": 1, "a": 0}))
    with pytest.raises(DistilyError, match="'b' is absent there and 1 here"):
        check_tokenizers(Tokenizer({"a": 0, "b": 1}), Tokenizer({"a": 0, "c": 1}))
