"""Entropic optimal transport between the set of a student's rows and that of the teacher's: predictions, or hidden states."""

from __future__ import annotations

from distily import hookimpl
from distily_sinkhorn.hidden import hidden_sinkhorn
from distily_sinkhorn.logits import sinkhorn


@hookimpl
def distily_objectives() -> dict[str, object]:
    return {"sinkhorn": sinkhorn, "hidden_sinkhorn": hidden_sinkhorn}
