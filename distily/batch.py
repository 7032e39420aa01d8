"""What is supervised in a batch: the shift and the mask, once.

Letters: B batch, S sequence, N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Supervision:
    """The supervised tokens of a batch, in the order of the flattened ``(B, S)``; those of one document lie together."""

    index: Tensor
    """(N,) positions whose logits are scored against the next token."""
    labels: Tensor
    """(N,) the next token."""
    input_ids: Tensor
    """(N,) the token at the position."""
    sequence_ids: Tensor
    """(N,) the document, counted within the batch."""
    lengths: Sequence[int]
    """Supervised tokens of each document, on the host."""


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that goes to a model's forward."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def moved(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on ``device``; what the host needs stays there."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def supervise(batch: Mapping[str, Any]) -> Supervision:
    """The supervision of a batch. Distily's collator supplies ``supervised`` and ``lengths``; without them they are worked out
    from ``labels``, each row one document, which costs a synchronisation on a GPU.
    """
    labels = batch["shift_labels"] if "shift_labels" in batch else shift(batch["labels"])
    if "supervised" in batch:
        index, lengths = batch["supervised"], batch["lengths"]
    else:
        index, lengths = count(labels)
        index = index.to(labels.device)
    documents = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long), output_size=sum(lengths)
    )
    return Supervision(
        index,
        labels.reshape(-1)[index],
        batch["input_ids"].reshape(-1)[index],
        documents.to(index.device, non_blocking=True),
        lengths,
    )


def row_seeds(supervision: Supervision, seed: int) -> Tensor:
    """A number for each supervised token from the seed, its document so far and nothing else, int64 ``(N,)``.

    So a token draws the same numbers wherever its document lies in the batch.
    """
    steps = torch.arange(supervision.labels.numel(), device=supervision.labels.device)
    starts = torch.tensor([0, *supervision.lengths], dtype=torch.long).cumsum(0)[:-1].to(steps.device, non_blocking=True)
    places = steps - starts[supervision.sequence_ids]
    mixed = (supervision.labels + 1) * _ODD[0] + (supervision.input_ids + 1) * _ODD[1] + (places + 1) * _ODD[2]
    sums = ((mixed ^ (mixed >> 29)) * _ODD[3]).cumsum(0)
    before = torch.nn.functional.pad(sums, (1, 0))[starts[supervision.sequence_ids]]
    return sums - before + torch.full_like(sums, seed) * _ODD[4]


_ODD = (-7046029254386353131, -4417276706812531889, 1609587929392839161, -2960836687740460243, 7776592185894410173)
"""Odd 64-bit constants, with which wrapping products scatter."""


def pick(inputs: Mapping[str, Any], rows: slice | Tensor) -> dict[str, Any]:
    """The objectives' inputs at some rows; what is not a tensor of rows stays as it is."""
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def shift(labels: Tensor) -> Tensor:
    """``labels`` (B, S) moved one to the left: entry i is the token after position i, the last is ignored."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def count(shift_labels: Tensor) -> tuple[Tensor, list[int]]:
    """Flat positions of the supervised tokens, and how many there are in each row."""
    supervised = shift_labels != IGNORE_INDEX
    return supervised.reshape(-1).nonzero().squeeze(-1), supervised.sum(-1).tolist()
