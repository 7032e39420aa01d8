"""Outside the blocks: copied, reduced to another width, tied, frozen."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import transformers

from distily.config import StudentConfig
from distily.embeddings import reduce_width
from distily.errors import DistilyError
from distily.models import build_student, shape_of_student

TOKENS = torch.tensor([[1, 2, 3, 4]])


def teacher(architecture: str = "llama", **overrides: object):
    return tiny.model(architecture, seed=3, **overrides)


def student(big, **settings: object):
    return build_student(StudentConfig(**settings), big, seed=0)


def ends(model) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("architecture", tiny.SHAPES)
def test_a_student_of_the_teachers_shape_is_the_teacher_bit_for_bit(architecture):
    big = teacher(architecture)
    copied = student(big, config={"use_cache": False})
    with torch.no_grad():
        assert torch.equal(copied.eval()(TOKENS).logits, big(TOKENS).logits)


def test_where_only_the_blocks_differ_the_rest_is_copied():
    big = teacher()
    narrow = student(big, config={"intermediate_size": 16})
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ends(narrow), ends(big), strict=True))
    assert torch.equal(narrow.model.norm.weight, big.model.norm.weight)
    at_random = student(big, config={"intermediate_size": 16}, embeddings="random")
    assert not torch.equal(ends(at_random)[0], ends(big)[0])
    copied_alone = student(big, initialize="random", config={"num_hidden_layers": 1}, embeddings="copy")
    assert torch.equal(ends(copied_alone)[0], ends(big)[0])
    assert not torch.equal(copied_alone.model.layers[0].mlp.up_proj.weight, big.model.layers[0].mlp.up_proj.weight)


def test_pca_keeps_all_that_a_width_can_keep_at_the_size_of_the_students_own_start():
    """Eckart-Young: distances between tokens, up to one factor, are those of the best approximation, here by numpy's SVD."""
    big = teacher()
    fresh = student(big, config={"hidden_size": 16}, embeddings="random")
    reduced = student(big, config={"hidden_size": 16}, embeddings="pca")
    for mine, start, theirs in zip(ends(reduced), ends(fresh), ends(big), strict=True):
        centred = theirs.detach().double().numpy()
        centred = centred - centred.mean(0)
        left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
        best = (left[:, :16] * sizes[:16]) @ (left[:, :16] * sizes[:16]).T
        gram = (mine @ mine.T).detach().double().numpy()
        np.testing.assert_allclose(gram / np.trace(gram), best / np.trace(best), atol=1e-7)
        assert mine.square().mean().item() == pytest.approx(start.square().mean().item(), rel=1e-5)


def test_at_full_width_pca_only_turns_the_embedding():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    centred = source - source.mean(0)
    torch.testing.assert_close(torch.cdist(reduce_width(source, centred), source.new_zeros(1, 8)), centred.norm(dim=1)[:, None])


def test_pca_keeps_ties_and_leaves_padding_rows_alone():
    big = teacher("qwen2")
    reduced = student(big, config={"hidden_size": 16, "vocab_size": 104}, embeddings="pca")
    embedding, head = ends(reduced)
    assert embedding is head
    start = ends(student(big, config={"hidden_size": 16, "vocab_size": 104}, embeddings="random"))[0]
    assert torch.equal(embedding[97:], start[97:])
    assert not torch.equal(embedding[:97], start[:97])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"hidden_size": 16}, "embeddings": "copy"}, "allowed: pca or random. The embedding is \\(97, 16\\)"),
        ({"config": {"hidden_size": 64}, "embeddings": "pca"}, "'pca' is not allowed; allowed: random"),
        ({"model": "demo", "embeddings": "copy"}, "cannot be combined"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(DistilyError, match=message):
        student(teacher(), **settings)


def test_one_of_a_tied_pair_cannot_be_frozen_alone():
    big = teacher("qwen2")
    for freeze in (["model.embed_tokens"], ["lm_head"], ["model"]):
        with pytest.raises(DistilyError, match="shares a weight"):
            student(big, config={"num_hidden_layers": 1}, freeze=freeze)
        with pytest.raises(DistilyError, match="shares a weight"):
            shape_of_student(StudentConfig(config={"num_hidden_layers": 1}, freeze=freeze), big)
    both = student(big, config={"num_hidden_layers": 1}, freeze=["model.embed_tokens", "lm_head"])
    assert not any(weight.requires_grad for weight in ends(both))
    untied = student(big, config={"num_hidden_layers": 1, "tie_word_embeddings": False}, freeze=["model.embed_tokens"])
    assert [weight.requires_grad for weight in ends(untied)] == [False, True]


def test_what_is_frozen_is_in_no_optimizer_and_stays_as_it_was(tmp_path):
    big = teacher("qwen2")
    frozen = student(big, config={"num_hidden_layers": 1}, freeze=["model.embed_tokens", "lm_head", "model.norm"])
    before = {name: parameter.clone() for name, parameter in frozen.named_parameters()}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], weight_decay=0.1)
    optimizer = transformers.Trainer(frozen, arguments).create_optimizer()
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    driver = tiny.driver(frozen, big, "forward_kl")
    for _ in range(3):
        tiny.accumulate(driver, frozen, [tiny.collate(tiny.documents())])
        optimizer.step()
    driver.detach()
    for name, parameter in frozen.named_parameters():
        is_frozen = name.startswith(("model.embed_tokens", "lm_head", "model.norm"))
        assert torch.equal(parameter, before[name]) is is_frozen
        assert (id(parameter) not in trained) is is_frozen
    frozen.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert ends(again)[0] is ends(again)[1]
    assert torch.equal(ends(again)[0], ends(big)[0])
