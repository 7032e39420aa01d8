"""B26, the logit lens: norm and head by hand on the models' own hidden states, and the logits themselves at the last block."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor
from torch.func import functional_call

from oracles.case import Case, Check
from oracles.divergences import entropies, scipy_jsd
from oracles.measure import batches, driven

LENS = Case("B26", "jsd", {"entropies": entropies, "scipy": scipy_jsd}, {"beta": 0.5}, term={"on": "logit_lens"})


def read(model: Any, hidden: Tensor) -> Tensor:
    """Logits by the model's norm and head, which get no gradient."""
    for module in (model.model.norm, model.lm_head):
        hidden = functional_call(module, {name: value.detach() for name, value in module.named_parameters()}, (hidden,))
    return hidden


def by_hand() -> tuple[Tensor, dict[str, Tensor]]:
    """Mean value over the supervised tokens of the first of two blocks, and its gradients, without the driver."""
    (batch,), _ = batches()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with driven(LENS, tiny.plugins(), torch.float64) as (_, student, teacher):
        student.zero_grad()
        supervised = batch["shift_labels"] != -100
        hidden = [model(**inputs, output_hidden_states=True).hidden_states[1][supervised] for model in (student, teacher)]
        logits = [read(model, rows) for model, rows in zip((student, teacher), hidden, strict=True)]
        loss = entropies(logits[0], logits[1].detach()).mean()
        loss.backward()
        return loss.detach(), {name: each.grad.clone() for name, each in student.named_parameters() if each.grad is not None}


def through_the_driver(**term: Any) -> tuple[Tensor, dict[str, Tensor]]:
    whole, _ = batches()
    case = Case("B26", "jsd", {}, {"beta": 0.5}, term=term)
    with driven(case, tiny.plugins(), torch.float64) as (driver, student, _):
        return tiny.accumulate(driver, student, whole)


def value_error() -> float:
    return tiny.distance(through_the_driver(on="logit_lens")[0], by_hand()[0])


def gradient_error() -> float:
    """The gradients of what the lens reaches; nothing else has one, the norm and the head included."""
    found, expected = through_the_driver(on="logit_lens")[1], by_hand()[1]
    found = {name: value for name, value in found.items() if value.any()}
    return tiny.distance(found, expected) if found.keys() == expected.keys() else float("inf")


def error_at_the_last_block() -> float:
    last = through_the_driver(on="logit_lens", mapper="last_k")[0]
    return tiny.distance(last, through_the_driver(on="logits")[0])


SPEC = "jsd:on=logit_lens"
CASES = [
    LENS,
    Check("B26", SPEC, "norm and head by hand", "value", value_error, 1e-12),
    Check("B26", SPEC, "norm and head by hand", "gradient", gradient_error, 1e-12, "head and norm get none"),
    Check("B26", f"{SPEC},mapper=last_k", "the same on logits", "value", error_at_the_last_block, 1e-12),
]
