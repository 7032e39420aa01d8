"""Squared Hellinger distance, Hellinger 1909, doi:10.1515/crll.1909.136.210."""

from distily import hookimpl
from distily.objectives import token_objective


@token_objective(source="Hellinger 1909")
def hellinger(student, teacher):
    """One minus the overlap √t·√s of the next-token distributions, in [0, 1]: (N, V), (N, V) -> (N,)."""
    return 1 - ((student.log_softmax(-1) + teacher.log_softmax(-1)) / 2).exp().sum(-1)


@hookimpl
def distily_objectives():
    return {"hellinger": hellinger}
