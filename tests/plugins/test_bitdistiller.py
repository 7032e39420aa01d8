"""BitDistiller's five losses by configuration, and what its conventions do where they differ from ours.

The reference is written from the formulas of Du et al. 2024 (arXiv:2402.10631) and of its code (train/mytrainer.py and train/train.py
at 0c48be2), on probabilities. Its conventions, all of which a batch and the driver's N can express:

- no temperature; labels mask where they stand, not where they are predicted (``shift_labels`` = ``labels``);
- the sum over the tokens of a sequence, then the mean over sequences (N = the number of sequences);
- ``tlsd`` alone shifts its labels, and is a sum over sequences, with weights that sum to 1 in each (N = tokens of a sequence).

Letters: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from distily_divergences import ConfidenceKL
from distily_labels import token_scaled
from torch import Tensor

B, S, GAMMA = 3, 8, 0.375


# --- the reference: (labels (B, S), student (B, S, V), teacher (B, S, V)) -> () ---


def masked_mean(labels: Tensor, values: Tensor) -> Tensor:
    """The sum over the labelled positions of a sequence, then the mean over sequences."""
    return torch.where(labels != -100, values, 0.0).sum(-1).mean()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def forward(labels: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    return masked_mean(labels, divergence(teacher.softmax(-1), student.softmax(-1)))


def reverse(labels: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    return masked_mean(labels, divergence(student.softmax(-1), teacher.softmax(-1)))


def jsd(labels: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.softmax(-1), teacher.softmax(-1)
    m = 0.5 * t + 0.5 * s
    return masked_mean(labels, 0.5 * divergence(t, m) + 0.5 * divergence(s, m))


def cakld(labels: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    return GAMMA * reverse(labels, student, teacher) + (1 - GAMMA) * forward(labels, student, teacher)


def tlsd(labels: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    s, t, following = student[:, :-1].softmax(-1), teacher[:, :-1].softmax(-1), labels[:, 1:]
    hardness = -t.gather(-1, following.clamp(min=0)[..., None]).squeeze(-1).log()
    hardness = torch.where(following != -100, hardness, 0.0)  # torch's cross-entropy of an ignored label
    weights = (hardness / 10).exp() / (hardness / 10).exp().sum(-1, keepdim=True)
    return -(weights * (t * s.log()).sum(-1)).sum()


FIVE = {
    "forward": (forward, "forward_kl"),
    "reverse": (reverse, "reverse_kl"),
    "jsd": (jsd, "jsd:beta=0.5"),
    "cakld": (cakld, f"confidence_kl:gamma={GAMMA}"),
    "tlsd": (tlsd, "token_scaled:weight_temperature=10"),
}


# --- parity through the driver ---


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    return tuple(tiny.model(seed=seed, dtype=torch.float64) for seed in (1, 2))


def batch(prompt: int) -> dict[str, Tensor]:
    """Sequences without padding whose first ``prompt`` tokens carry no label."""
    tokens = torch.randint(1, tiny.VOCABULARY, (B, S), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(S) < prompt, -100)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def configured(models: tuple, spec: str, inputs: dict[str, Tensor], items: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The driver's loss and its gradient at every parameter of the student."""
    student, teacher = models
    driver = tiny.driver(student, teacher, spec)
    try:
        with driver.step(inputs, items):
            loss = student(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).loss
        return loss.detach(), torch.autograd.grad(loss, list(student.parameters()))
    finally:
        driver.detach()


@pytest.mark.parametrize("name", FIVE)
def test_value_and_gradient_are_those_of_the_published_loss(models, name):
    reference, spec = FIVE[name]
    inputs = batch(prompt=0 if name == "tlsd" else 3)
    student, teacher = (model(input_ids=inputs["input_ids"]).logits for model in models)
    expected = reference(inputs["labels"], student, teacher.detach())
    at_parameters = torch.autograd.grad(expected, list(models[0].parameters()))
    conventions = (inputs, S - 1) if name == "tlsd" else ({**inputs, "shift_labels": inputs["labels"]}, B)
    found, gradients = configured(models, spec, *conventions)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    largest = max(each.abs().max() for each in at_parameters)
    assert max((a - b).abs().max() for a, b in zip(gradients, at_parameters, strict=True)) < 1e-10 * largest


# --- where the conventions differ ---


def test_its_mask_leaves_out_the_first_answer_token_and_scores_what_follows_the_last(models):
    """The logits that predict the first label stand at the last token of the prompt, which has none."""
    inputs = batch(prompt=S - 1)  # one label, the last token
    student, teacher = (model(input_ids=inputs["input_ids"]).logits.detach() for model in models)
    values = divergence(teacher.softmax(-1), student.softmax(-1))
    theirs = forward(inputs["labels"], student, teacher)
    ours, _ = configured(models, "forward_kl", inputs, B)
    torch.testing.assert_close(ours, values[:, S - 2].mean())
    torch.testing.assert_close(theirs, values[:, S - 1].mean())
    assert (theirs.item(), ours.item()) == pytest.approx((0.1990, 0.2015), abs=1e-4)


def test_its_loss_grows_with_the_length_of_a_sequence():
    """Twice as many tokens with the same prediction: twice the loss; the mean over tokens stays."""
    student, teacher = torch.zeros(1, 4, 3, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0]).double().expand(1, 4, 3)
    losses = [forward(torch.zeros(1, n), student[:, :n], teacher[:, :n]).item() for n in (2, 4)]
    assert losses[1] == pytest.approx(2 * losses[0])
    assert losses == pytest.approx([0.2468, 0.4936], abs=1e-3)


def test_its_token_scale_spends_weight_on_padding():
    """Two labelled tokens and six of padding: the padding's label loss is taken as 0, so that it gets 49 % of the weight."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 1, 9, 5, generator=generator, dtype=torch.float64)
    teacher[0, :2, 4] = -10.0
    labels = torch.tensor([[0, 4, 4, *[-100] * 6]])
    padded = tlsd(labels, student, teacher).item()
    kept = tlsd(labels[:, :3], student[:, :3], teacher[:, :3]).item()
    ours = token_scaled(student[0, :2], teacher[0, :2], labels=labels[0, 1:3]).mean().item()
    assert ours == pytest.approx(kept, rel=1e-12)
    hardness = -teacher[0, :2].log_softmax(-1)[:, 4] / 10
    share = 6 / (6 + hardness.exp().sum().item())
    assert (padded, ours, share) == pytest.approx((1.6395, 1.4547, 0.4907), abs=1e-4)


def test_its_coefficient_is_a_sum_over_21_batches_divided_by_20():
    """The loop breaks after step 20 has come and gone. A teacher that is 96 % sure gets γ = 1.008, and forward KL a negative weight;
    ours is the mean, over supervised tokens, of what the paper names or of what the code takes.
    """
    sure = torch.tensor([0.96, 0.03, 0.01], dtype=torch.float64).log().expand(4, 3)
    total = 0.0
    for step in range(100):
        if step > 20:
            break
        total += sure.softmax(-1).amax(-1).mean().item()
    measured = {}
    for gamma in ("max", "label"):
        objective = ConfidenceKL(gamma=gamma)
        objective.observe(sure, sure, labels=torch.tensor([0, 0, 1, 2]))
        objective.conclude()
        measured[gamma] = objective.gamma.item()
    assert total / 20 == pytest.approx(1.008)
    assert measured["max"] == pytest.approx(0.96)
    assert measured["label"] == pytest.approx((0.96 + 0.96 + 0.03 + 0.01) / 4)


def test_its_forward_is_the_divergence_and_not_the_soft_cross_entropy():
    """``F.kl_div`` adds the teacher's entropy: 0 for a student that is its teacher, where soft cross-entropy is 1.0684."""
    teacher = torch.tensor([[[1.0, 1.0, 1.5]]], dtype=torch.float64)
    code = torch.nn.functional.kl_div(teacher.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    soft = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum()
    assert code.abs().item() < 1e-15
    assert forward(torch.zeros(1, 1), teacher, teacher).abs().item() < 1e-15
    assert soft.item() == pytest.approx(1.0684, abs=1e-4)
