"""Two questions asked of the real models before training: does the driver see their logits, and can they read packed rows?"""

from __future__ import annotations

from typing import Any

import torch

from distily.batch import model_inputs, supervise
from distily.errors import DistilyError
from distily.loss.heads import OutputHead, select

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest relative difference by dtype of the weights; half precisions: 5e-2."""


@torch.no_grad()
def check_native_logits(role: str, model: Any, batch: dict[str, Any]) -> float:
    """The largest difference between the model's own logits and the driver's on one batch, over the largest logit.

    Raises ``DistilyError`` that names the model's class where they differ: its forward does something to the logits that
    the driver does not know, and a loss on other logits would be silently wrong.
    """
    inputs, index = model_inputs(batch), supervise(batch).index
    training = model.training
    model.eval()
    head = OutputHead(model)
    try:
        native = select(model(**inputs, use_cache=False).logits, index).float()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
            raise
        reason = " ".join(str(error).split())[:240]
        allowed = "allowed: a model whose parts fit together"
        raise DistilyError(f"{role}: {type(model).__name__} cannot read a batch ({reason}); {allowed}.") from error
    hidden = select(head.last_hidden_states(model, inputs), index)
    driven = head.logits(hidden).float()
    model.train(training)
    difference = float((native - driven).abs().max() / native.abs().max().clamp(min=1e-12))
    dtype = next(model.parameters()).dtype
    if not difference <= TOLERANCE.get(dtype, 5e-2):
        raise DistilyError(
            f"{role}: {type(model).__name__} changes its logits in a way that is not supported (relative difference "
            f"{difference:.2g} to its own forward); allowed: a linear head, scaled or soft-capped."
        )
    return difference


@torch.no_grad()
def check_packing(role: str, model: Any, vocabulary: int) -> None:
    """Two documents in one row must give the logits that each gives alone. Raises ``DistilyError`` where they do not."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, vocabulary, (1, length), generator=generator).to(device) for length in (9, 7))
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None].to(device)
    training = model.training
    model.eval()
    try:
        packed = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    except TypeError:
        packed = None
    alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in (first, second)], 1)
    model.train(training)
    tolerance = 1e-3 if alone.dtype == torch.float32 else 5e-2
    if packed is None or not (packed - alone).abs().max() <= tolerance * alone.abs().max():
        raise DistilyError(
            f"data.packing: {type(model).__name__} ({role}) lets packed documents see each other, or cannot read position_ids; "
            "allowed: false for this model."
        )
