"""Held-out tokens, walked in chunks: the means that evaluators report, on the same tokens for every model.

Letters: N supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distily.batch import model_inputs, moved, supervise
from distily.evaluation import TokenFunction
from distily.loss.driver import default_chunk_rows
from distily.loss.heads import OutputHead, select


class HeldOut:
    """The held-out sequences, those of like length together, and the means of functions over their supervised tokens."""

    def __init__(
        self, sequences: Any, collator: Any, teacher: Any | None, vocabulary: int, batch_size: int, autocast: bool = False
    ) -> None:
        order = sorted(range(len(sequences)), key=[len(ids) for ids in sequences["input_ids"]].__getitem__)
        self.loader = DataLoader(sequences.select(order), batch_size=batch_size, shuffle=False, collate_fn=collator)
        self.teacher = teacher
        self.vocabulary = vocabulary
        self.autocast = autocast

    @torch.no_grad()
    def token_means(self, model: Any, functions: Mapping[str, TokenFunction], against_teacher: bool) -> dict[str, float]:
        """The mean of every function over all held-out supervised tokens, summed in float64."""
        device = next(model.parameters()).device
        models = [model, self.teacher] if against_teacher and self.teacher is not None else [model]
        heads = [OutputHead(entry) for entry in models]
        sums = torch.zeros(len(functions), dtype=torch.float64, device=device)
        tokens = 0
        for batch in self.loader:
            placed = moved(batch, device)
            supervision = supervise(placed)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                hidden = [
                    select(head.last_hidden_states(entry, model_inputs(placed)), supervision.index)
                    for head, entry in zip(heads, models, strict=True)
                ]
            tokens += supervision.index.numel()
            for rows in torch.arange(supervision.index.numel(), device=device).split(
                default_chunk_rows(self.vocabulary, device.type)
            ):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                    logits: list[Tensor | None] = [
                        head.logits(states[rows], self.vocabulary) for head, states in zip(heads, hidden, strict=True)
                    ]
                student, teacher = logits if len(logits) == 2 else (logits[0], None)
                labels = supervision.labels[rows]
                sums += torch.stack([function(student, teacher, labels).double().sum() for function in functions.values()])
        return dict(zip(functions, (sums / max(1, tokens)).tolist(), strict=True))
