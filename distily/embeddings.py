"""What a student takes from the teacher outside the blocks: embeddings, final norm, head.

Student and teacher read one tokenizer, so row i of an embedding is the same token in both.
Letters: V vocabulary, H width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distily.errors import DistilyError, wrong
from distily.loss.features import decoder_blocks


def copy_outside_blocks(student: Any, teacher: Any) -> None:
    """Every parameter outside the blocks that has the same name and shape in the teacher."""
    inside = {id(parameter) for model in (student, teacher) for parameter in decoder_blocks(model).parameters()}
    source = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if id(parameter) not in inside and name in source and source[name].shape == parameter.shape:
                parameter.copy_(source[name])


def transfer_embeddings(student: Any, teacher: Any, how: str) -> None:
    """Embedding and head of the student from the teacher's: ``copy`` or ``pca``, see ``reduce_width``. A tied pair stays tied.

    Raises ``DistilyError`` where the shapes do not allow it.
    """
    pairs = [(model.get_input_embeddings().weight, model.get_output_embeddings().weight) for model in (student, teacher)]
    for (mine, theirs), is_head in zip(zip(*pairs, strict=True), (False, True), strict=True):
        if is_head and mine is pairs[0][0]:
            continue
        fits = mine.shape == theirs.shape if how == "copy" else mine.shape[1] <= theirs.shape[1]
        if not fits:
            allowed = "pca or random" if how == "copy" and mine.shape[1] < theirs.shape[1] else "random"
            shapes = f"{tuple(mine.shape)} in the student and {tuple(theirs.shape)} in the teacher"
            raise DistilyError(
                f"{wrong('student.embeddings', how, allowed)} The {'head' if is_head else 'embedding'} is {shapes}."
            )
        rows = min(len(mine), len(theirs))  # the rest is padding
        with torch.no_grad():
            mine[:rows] = theirs[:rows] if how == "copy" else reduce_width(theirs[:rows], mine[:rows])


def reduce_width(source: Tensor, like: Tensor) -> Tensor:
    """``source`` (V, Ht) in its Hs principal directions, about its mean row, with the root mean square of ``like`` (V, Hs).

    No other Hs directions keep more of the differences between tokens. What every token has in common is lost; at a head it changes no
    probability.
    """
    centred = source.double() - source.double().mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(-1)[:, : like.shape[1]]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    reduced = centred @ (directions * largest.sign())  # the same on every machine
    wanted, found = (values.square().mean().sqrt() for values in (like.double().to(reduced.device), reduced))
    return (reduced * (wanted / found.clamp(min=1e-30))).to(like.device, like.dtype)
