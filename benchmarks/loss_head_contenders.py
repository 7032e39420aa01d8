"""Who takes part in the loss-head benchmark: Distily, plain PyTorch, and the peers from PyPI, each as its own documentation uses it.

A contender turns a problem into a function that computes the mean loss; the benchmark calls ``backward`` on the result.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from loss_head_problem import Problem
from torch import Tensor, nn
from torch.nn import functional

from distily.loss.chunks import ChunkWalk, Piece, chunked_loss
from distily.loss.driver import default_chunk_rows
from distily.loss.fused import forms_of
from distily.loss.heads import OutputHead
from distily.loss.terms import build_terms
from distily.plugins import load
from distily.spec import parse_component
from distily.teachers import DenseLogits

Loss = Callable[[], Tensor]
PEERS = ("liger-kernel", "trl", "torchtune")


@dataclass(frozen=True)
class Contender:
    """``objective``: names of the truth, joined by " + ". ``crossed``: its value is above the KL's by the teacher's entropy.

    ``strongest``: of its library the fastest or the one of least memory on an H200.
    """

    name: str
    objective: str
    flags: str
    prepare: Callable[[Problem], Loss]
    strongest: bool = False
    crossed: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}, {self.objective}"


def contenders() -> tuple[list[Contender], dict[str, str]]:
    """All of them, and remarks by library: who is absent for what reason, what of it is loaded."""
    found, remarks = distily() + pytorch(), {"DistillKit": "absent: not on PyPI."}
    for name, library in (("liger-kernel", liger), ("trl", trl), ("torchtune", torchtune)):
        try:
            own, remark = library(f"{name} {version(name)}")
        except (ImportError, RuntimeError, OSError) as error:  # libraries of kernels also raise without a GPU
            remarks[name] = f"absent: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            continue
        found += own
        if remark:
            remarks[name] = remark
    return found, remarks


# Distily: what its driver does with the last hidden states of a step.


class Bare(nn.Module):
    """A model of nothing but a head."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.lm_head.weight = weight
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def distily() -> list[Contender]:
    sums = ("forward_kl + cross_entropy", "forward_kl + jsd + reverse_kl")
    names = ("forward_kl", "jsd", "reverse_kl", *sums)
    kernels = [Contender("distily", name, "as distily train: fused kernels on a GPU", walked(name), True) for name in names]
    plain = [
        Contender("distily, plain PyTorch", name, "distily train with its kernels off", walked(name, True))
        for name in ("forward_kl", "jsd")
    ]
    return kernels + plain


def walked(objective: str, plain: bool = False) -> Callable[[Problem], Loss]:
    plugins = load([EntryPoint(name, f"distily_{name}", "distily") for name in ("divergences", "labels")])
    components = [parse_component(name, "objectives") for name in objective.split(" + ")]

    def prepare(problem: Problem) -> Loss:
        terms = build_terms(components, plugins, None, problem.teacher)
        head, teacher_head = OutputHead(Bare(problem.head)), OutputHead(Bare(problem.teacher_head))
        source = DenseLogits(teacher_head, problem.teacher, problem.vocabulary)
        items = torch.tensor(problem.tokens, device=problem.student.device)
        step = default_chunk_rows(problem.vocabulary, problem.student.device.type)
        fused = forms_of(list(terms.values())) if problem.student.is_cuda and not plain else None
        if isinstance(fused, str):
            raise RuntimeError(f"no kernel: {fused}")

        def loss() -> Tensor:
            starts = range(0, problem.tokens if fused is None else 0, step)
            walk = ChunkWalk(
                head=head,
                source=source,
                pieces=[Piece(slice(start, min(start + step, problem.tokens)), list(terms.values()), 1.0) for start in starts],
                fused=fused,
                inputs={"labels": problem.labels},
                weights={term.key: 1.0 for term in terms.values()},
                items=items,
                vocabulary=problem.vocabulary,
                compute_dtype=torch.bfloat16,
            )
            with torch.autocast(problem.student.device.type, enabled=False):
                return chunked_loss(walk, problem.student)[0]

        return loss

    return prepare


# Plain PyTorch, by whole logits.


def logits(problem: Problem) -> tuple[Tensor, Tensor]:
    """Student's and teacher's, whole: ``(N, V)`` each, in the type that the product gives."""
    with torch.no_grad():
        theirs = functional.linear(problem.teacher, problem.teacher_head)
    return functional.linear(problem.student, problem.head), theirs


def by_kl_div(problem: Problem, objective: str) -> Tensor:
    """The objective by ``kl_div`` in float32."""
    mine, theirs = (each.float().log_softmax(-1) for each in logits(problem))
    if objective == "jsd":
        middle = torch.logaddexp(mine, theirs) - 0.6931471805599453
        first, second = (functional.kl_div(middle, each, reduction="batchmean", log_target=True) for each in (mine, theirs))
        return 0.5 * first + 0.5 * second
    both = (mine, theirs) if objective == "forward_kl" else (theirs, mine)
    return functional.kl_div(*both, reduction="batchmean", log_target=True)


def pytorch() -> list[Contender]:
    def naive(objective: str, compiled: bool) -> Callable[[Problem], Loss]:
        function = torch.compile(by_kl_div, dynamic=False) if compiled else by_kl_div
        return lambda problem: lambda: function(problem, objective)

    names = ("forward_kl", "jsd", "reverse_kl")
    how = "whole logits, float32 log_softmax, F.kl_div(log_target=True)"
    plain = [Contender("naive", name, how, naive(name, False), name == "forward_kl") for name in names]
    return plain + [
        Contender("naive, compiled", name, f"{how}, torch.compile(dynamic=False)", naive(name, True), True) for name in names
    ]


# The peers.


def liger(package: str) -> tuple[list[Contender], str]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers import LigerFusedLinearJSD
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    def fused(beta: float, accumulate: torch.dtype | None) -> Callable[[Problem], Loss]:
        module = LigerFusedLinearJSD(jsd_beta=beta, accum_dtype=accumulate)
        return lambda p: lambda: module(p.student, p.head, p.teacher, p.teacher_head, None)

    def chunked(beta: float, compiled: bool) -> Callable[[Problem], Loss]:
        module = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled, chunk_size=1024
        )
        return lambda p: lambda: module(p.student, p.head, p.teacher, p.teacher_head, p.labels)

    def linear_kl(accumulate: torch.dtype | None) -> Callable[[Problem], Loss]:
        module = LigerFusedLinearKLDivLoss(reduction="batchmean", accum_dtype=accumulate)

        def prepare(p: Problem) -> Loss:
            def loss() -> Tensor:
                with torch.no_grad():
                    target = functional.linear(p.teacher, p.teacher_head).softmax(-1)
                return module(p.student, p.head, target)

            return loss

        return prepare

    def on_logits(p: Problem) -> Loss:
        module = LigerKLDIVLoss(reduction="batchmean", log_target=True)
        return lambda: module(*(each.float().log_softmax(-1) for each in logits(p)))

    found = []
    for name, beta in (("forward_kl", 0.0), ("jsd", 0.5), ("reverse_kl", 1.0)):
        flags = f"{package}: LigerFusedLinearJSD(jsd_beta={beta}"
        found.append(Contender("liger fused JSD", name, f"{flags})", fused(beta, None), True))
        exact = f"{flags}, accum_dtype=torch.float32)"
        found.append(Contender("liger fused JSD, fp32 sums", name, exact, fused(beta, torch.float32)))
        for compiled in (False, True):
            label = "liger chunked, compiled" if compiled else "liger chunked"
            flags = (
                f"{package}: LigerFusedLinearJSDLoss(weight_hard_loss=0, weight_soft_loss=1, beta={beta}, compiled={compiled}, "
            )
            found.append(Contender(label, name, f"{flags}chunk_size=1024)", chunked(beta, compiled), compiled))
    flags = f'{package}: LigerFusedLinearKLDivLoss(reduction="batchmean"'
    after = ") on softmax of the teacher's whole bf16 logits"
    found.append(Contender("liger fused KL", "forward_kl", flags + after, linear_kl(None), True))
    exact = f"{flags}, accum_dtype=torch.float32{after}"
    found.append(Contender("liger fused KL, fp32 sums", "forward_kl", exact, linear_kl(torch.float32)))
    flags = f'{package}: LigerKLDIVLoss(reduction="batchmean", log_target=True) on float32 log_softmax of whole logits'
    return [*found, Contender("liger KL on logits", "forward_kl", flags, on_logits)], ""


def trl(package: str) -> tuple[list[Contender], str]:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def chunked(beta: float) -> Callable[[Problem], Loss]:
        apply = ChunkedDivergenceFunction.apply
        return lambda p: lambda: apply(p.student, p.head, None, p.teacher, p.teacher_head, None, beta)[0].mean()

    def on_logits(beta: float) -> Callable[[Problem], Loss]:
        return lambda p: lambda: GKDTrainer.generalized_jsd_loss(*logits(p), beta=beta)

    found = []
    for name, beta in (("forward_kl", 0.0), ("jsd", 0.5), ("reverse_kl", 1.0)):
        flags = f"{package}: ChunkedDivergenceFunction(beta={beta}), as DistillationTrainer calls it"
        found.append(Contender("trl chunked", name, flags, chunked(beta), True))
        flags = f"{package}: GKDTrainer.generalized_jsd_loss(beta={beta}) on whole logits"
        found.append(Contender("trl on logits", name, flags, on_logits(beta)))
    return found, ""


def torchtune(package: str) -> tuple[list[Contender], str]:
    losses, remark = torchtune_losses()

    def whole(kind: Any) -> Callable[[Problem], Loss]:
        return lambda p: lambda: kind()(*logits(p), p.labels)

    def chunked(kind: Any, part: str, compiled: bool) -> Callable[[Problem], Loss]:
        module = kind(num_output_chunks=8)
        if compiled:
            setattr(module, part, torch.compile(getattr(module, part)))

        def prepare(p: Problem) -> Loss:
            def loss() -> Tensor:
                with torch.no_grad():
                    theirs = [functional.linear(each, p.teacher_head) for each in p.teacher[None].chunk(8, 1)]
                mine = [functional.linear(each, p.head) for each in p.student[None].chunk(8, 1)]
                return module(mine, theirs, p.labels[None])

            return loss

        return prepare

    found = []
    for name, kind, part in (("forward_kl", "ForwardKL", "fkl_loss"), ("reverse_kl", "ReverseKL", "rkl_loss")):
        crossed = name == "forward_kl"
        flags, kinds = f"{package}: {kind}Loss() on whole logits", (getattr(losses, f"{kind}Loss"),)
        found.append(Contender("torchtune", name, flags, whole(*kinds), crossed=crossed))
        kinds = (getattr(losses, f"{kind}WithChunkedOutputLoss"), part)
        flags = f"{package}: {kind}WithChunkedOutputLoss(num_output_chunks=8)"
        found.append(Contender("torchtune chunked", name, flags, chunked(*kinds, False), crossed=crossed))
        flags += f", {part} compiled as compile_loss does"
        found.append(Contender("torchtune chunked, compiled", name, flags, chunked(*kinds, True), True, crossed))
    return found, remark


def torchtune_losses() -> tuple[ModuleType, str]:
    """torchtune's module of distillation losses; its one file alone where the package asks for more than is installed."""
    try:
        from torchtune.modules.loss import kd_losses
    except ImportError as error:
        found = importlib.util.find_spec("torchtune")
        if found is None or not found.submodule_search_locations:
            raise
        path = Path(found.submodule_search_locations[0]) / "modules/loss/kd_losses.py"
        alone = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
        assert alone is not None
        assert alone.loader is not None
        module = importlib.util.module_from_spec(alone)
        sys.modules[alone.name] = module
        alone.loader.exec_module(module)
        reason = (str(error).strip().splitlines() or [""])[0]
        return module, f"of its package only modules/loss/kd_losses.py is loaded, since the whole does not import here: {reason}"
    return kd_losses, ""
