"""Measuring a model that is already there: ``distily evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distily import data, models
from distily.config import DataConfig, RunConfig, TeacherConfig, assign, merge, resolve
from distily.evaluation import EvaluationContext, measure
from distily.heldout import HeldOut
from distily.plugins import load
from distily.sources import load_documents


def evaluate_model(
    model: str, dataset: str, teacher: str | None, evaluators: Sequence[str], settings: Sequence[str]
) -> dict[str, float]:
    """The evaluators' numbers for ``model`` on the documents of ``dataset`` (of the demo: its held-out ones; all, or ``data.samples``).

    Raises ``DistilyError`` for wrong input.
    """
    names = list(evaluators) or ["perplexity", *(["agreement"] if teacher else [])]
    held_out = {"dataset": dataset, "split": "heldout" if dataset == "demo" else "train"}
    config = resolve(merge({"output_dir": ".", "evaluators": names, "data": held_out}, assign(settings, "--set")))
    plugins = load()
    plugins.check(config)
    built = {plugins.find("evaluators", entry.name).name: plugins.build("evaluators", entry) for entry in config.evaluators}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = models.load_tokenizer(model, "MODEL")
    network = _load(model, "MODEL", config, device)
    other = _load(teacher, "--teacher", config, device) if teacher else None
    if teacher:
        models.check_tokenizers(models.load_tokenizer(teacher, "--teacher"), tokenizer)
    length = models.max_length(config.data.max_length, tokenizer, *(entry for entry in (network, other) if entry is not None))
    sequences, collator = _held_out(config.data, tokenizer, length, config.seed)
    heldout = HeldOut(sequences, collator, other, models.vocabulary_size(tokenizer), 8)
    context = EvaluationContext(tokenizer, heldout.token_means, other is not None, 8, ".")
    return measure(built, network, context)


def _load(model: str, key: str, config: RunConfig, device: torch.device) -> Any:
    return models.load_teacher(TeacherConfig(model, dtype=config.teacher.dtype), device, key=key)


def _held_out(config: DataConfig, tokenizer: Any, length: int, seed: int) -> tuple[Any, data.Collator]:
    documents = load_documents(config.dataset, config.subset, config.split, False, "--dataset")
    chosen = data.draw(documents, config.samples, seed)
    sequences, _ = data.sequences(chosen, config, tokenizer, length)
    return sequences, data.collator_for(tokenizer)
