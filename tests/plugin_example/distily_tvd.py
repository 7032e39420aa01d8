"""Total variation distance, Wen et al. 2023, arXiv:2307.15190."""

from distily import hookimpl
from distily.objectives import token_objective


@token_objective(temperature_scale="t")
def tvd(student, teacher):
    """Half the L1 distance between the next-token distributions, in [0, 1]: (N, V), (N, V) -> (N,)."""
    return (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2


@hookimpl
def distily_objectives():
    return {"tvd": tvd}
