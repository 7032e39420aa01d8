"""Every installed objective, from whatever package, teaches the demo's student: thirty optimizer steps bring its own value down.

Row sets, and what by its documentation is not for use alone, stand beside forward KL, whose weight leaves them in charge.
"""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import math
from typing import Any

import pytest
import tiny
import torch
import transformers

from distily.loss.calibration import calibrate
from distily.loss.driver import Driver, local_teacher
from distily.loss.terms import build_terms
from distily.plugins import Offered
from distily.sources import DEMO
from distily.spec import Component

STEPS, BATCHES, DOCUMENTS, TOKENS = 30, 5, 4, 32
OBJECTIVES = [entry for entries in tiny.plugins().offered("objectives").values() for entry in entries]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """The demo's student as it starts, and its teacher."""
    teacher = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "teacher", dtype=torch.float32)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers, config.intermediate_size = 2, 320
    torch.manual_seed(0)
    student = transformers.AutoModelForCausalLM.from_config(config)
    for path in ("model.embed_tokens", "model.norm"):
        student.get_submodule(path).load_state_dict(teacher.get_submodule(path).state_dict())
    return student, teacher


@pytest.fixture(scope="module")
def batches() -> list[dict]:
    """As many batches as are averaged at both ends, so that the same text is compared."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "teacher")
    with gzip.open(DEMO / "text" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, BATCHES * DOCUMENTS)]
    documents = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(text)["input_ids"][:TOKENS] for text in texts)]
    return [tiny.collate(documents[start : start + DOCUMENTS]) for start in range(0, len(documents), DOCUMENTS)]


def spec(entry: Offered) -> Component:
    """The objective with its defaults; one that compares layers with each other needs two of them."""
    return Component(entry.name, {"mapper": Component("last_k", {"k": 2})} if entry.factory.description.stacked else {})


def is_alone(entry: Offered) -> bool:
    documentation = " ".join((entry.factory.__doc__ or "").split())
    beside = any(words in documentation for words in ("Never alone", "never alone", "beside ``forward_kl``"))
    return entry.factory.description.granularity == "token" and not beside


def remembered(teacher: Any) -> Any:
    """The teacher, asked once for each batch: it says the same every time."""
    answers: dict[int, Any] = {}

    def signals(inputs: dict, index: torch.Tensor) -> Any:
        key = id(inputs["input_ids"])
        if key not in answers:
            answers[key] = type(teacher).signals(teacher, inputs, index)
        return answers[key]

    if teacher is not None:
        teacher.signals = signals
    return teacher


@pytest.mark.parametrize("entry", OBJECTIVES, ids=lambda entry: entry.name)
def test_its_value_falls(entry: Offered, pair: tuple[Any, Any], batches: list[dict]) -> None:
    if missing := [option.name for option in entry.options.values() if option.required]:
        pytest.skip(f"option {missing[0]!r} has no default")
    student, teacher = copy.deepcopy(pair[0]), pair[1]
    components = [spec(entry)] if is_alone(entry) else [Component("forward_kl", {"weight": 1e-3}), spec(entry)]
    terms = build_terms(components, tiny.plugins(), student, teacher)
    vocabulary = student.config.vocab_size
    driver = Driver(terms, remembered(local_teacher(teacher, terms, vocabulary)), vocabulary)
    driver.attach(student)
    calibrate(driver, batches)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    values = []
    for number, batch in enumerate(itertools.islice(itertools.cycle(batches), STEPS)):
        with driver.step(batch, global_step=number) as step:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            loss = student(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        driver.advance(0.0)  # a target that moves with the progress of training stands still here
        values.append(step.values[list(terms)[-1]].item())
    assert all(math.isfinite(value) for value in values)
    assert sum(values[-BATCHES:]) < sum(values[:BATCHES])
