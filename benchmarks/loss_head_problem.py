"""What the loss-head benchmark computes on: sizes of real models, inputs whose logits look like a language model's, and the truth.

Letters: N tokens, Hs and Ht the widths of student and teacher, V vocabulary.
The truth is float32 without TF32, written out here; nothing of Distily takes part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SPREAD = 2.5
"""Standard deviation of the logits over the vocabulary."""
SHARED = 0.8
"""Share of the logits' variance that student and teacher have in common."""
LIKELY = (10.0, 20.0)
"""Range, over the rows, of what the likely token's logit lies above the mean: probabilities from below 0.01 to above 0.99."""
ROWS = 1024


@dataclass(frozen=True)
class Case:
    """Sizes of a pair of models; ``tokens``: the numbers of tokens that are measured by default."""

    student: int
    teacher: int
    vocabulary: int
    tokens: tuple[int, ...]
    like: str

    @property
    def title(self) -> str:
        return f"Hs {self.student:,}, Ht {self.teacher:,}, V {self.vocabulary:,} ({self.like})"

    def operations(self, tokens: int) -> int:
        """Floating-point operations of the four products: two logits, two gradients."""
        return 2 * tokens * self.vocabulary * (self.teacher + 3 * self.student)


CASES = {
    "A": Case(2048, 4096, 128256, (8192, 16384), "like Llama 3"),
    "B": Case(1024, 2048, 151936, (8192, 16384), "like Qwen3"),
    "C": Case(768, 1024, 50257, (8192, 16384), "like GPT-2"),
    "D": Case(1536, 3584, 152064, (8192,), "like Qwen2.5, not tuned on"),
    "E": Case(2304, 3584, 256000, (8192,), "like Gemma 2, not tuned on"),
    "tiny": Case(48, 80, 1003, (96,), "a check that needs no GPU"),
}


@dataclass
class Problem:
    """Last hidden states and heads; ``student`` and ``head`` want a gradient."""

    student: Tensor
    """(N, Hs)"""
    head: nn.Parameter
    """(V, Hs)"""
    teacher: Tensor
    """(N, Ht)"""
    teacher_head: nn.Parameter
    """(V, Ht)"""
    labels: Tensor
    """(N,)"""

    @property
    def vocabulary(self) -> int:
        return self.head.shape[0]

    @property
    def tokens(self) -> int:
        return self.student.shape[0]


def draw(case: Case, tokens: int, seed: int, device: torch.device, master: bool) -> Problem:
    """Fresh random inputs, exact in bf16. ``master``: the student's head in float32, of the same numbers.

    Logits are normal, correlated between the two models, and each row has a token that both find likely, by its own amount: the label.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    shared = min(case.student, case.teacher) // 4
    meanings, contexts = normal(case.vocabulary, shared), normal(tokens, shared)
    labels = torch.randint(case.vocabulary, (tokens,), generator=generator, device=device)
    likely = LIKELY[0] + (LIKELY[1] - LIKELY[0]) * torch.rand(tokens, generator=generator, device=device)

    def side(width: int, above: Tensor) -> tuple[Tensor, Tensor]:
        own = normal(case.vocabulary, width - shared) * ((1 - SHARED) / (width - shared)) ** 0.5
        head = SPREAD * torch.cat([meanings * (SHARED / shared) ** 0.5, own], 1)
        hidden = torch.cat([contexts, normal(tokens, width - shared)], 1)
        hidden += above[:, None] * head[labels] / SPREAD**2
        return hidden.bfloat16(), head.bfloat16()

    teacher, teacher_head = side(case.teacher, likely)
    student, head = side(case.student, likely + normal(tokens))
    head = nn.Parameter(head.float() if master else head)
    return Problem(student.requires_grad_(), head, teacher, nn.Parameter(teacher_head, requires_grad=False), labels)


@dataclass
class Truth:
    """Of one objective, as means over the tokens: value, gradients ``(N, Hs)`` and ``(V, Hs)`` in float32."""

    value: float
    at_student: Tensor
    at_head: Tensor


def values(log_s: Tensor, log_t: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The objectives of log-distributions ``(n, V)``, summed over the rows: ``()`` each."""
    s, t = log_s.exp(), log_t.exp()
    log_m = torch.logaddexp(log_s, log_t) - math.log(2.0)
    return {
        "forward_kl": (t * (log_t - log_s)).sum(),
        "reverse_kl": (s * (log_s - log_t)).sum(),
        "jsd": 0.5 * (t * (log_t - log_m)).sum() + 0.5 * (s * (log_s - log_m)).sum(),
        "cross_entropy": -log_s.gather(1, labels[:, None]).sum(),
    }


def truth(problem: Problem) -> tuple[dict[str, Truth], dict[str, float]]:
    """Every objective's value and gradients, and what the inputs are like: spread of the logits, entropy of the teacher in nats."""
    torch.set_float32_matmul_precision("highest")
    head, teacher_head = problem.head.detach().float(), problem.teacher_head.detach().float()
    names = ("forward_kl", "reverse_kl", "jsd", "cross_entropy")
    shape = problem.student.shape
    found = {name: Truth(0.0, head.new_zeros(shape), torch.zeros_like(head)) for name in names}
    seen = dict.fromkeys(("logit spread", "teacher entropy", "teacher top"), 0.0)
    for start in range(0, problem.tokens, ROWS):
        rows = slice(start, start + ROWS)
        hidden = problem.student.detach()[rows].float()
        logits = (hidden @ head.T).requires_grad_()
        log_t = (problem.teacher[rows].float() @ teacher_head.T).log_softmax(-1)
        sums = values(logits.log_softmax(-1), log_t, problem.labels[rows])
        for name, value in sums.items():
            (gradient,) = torch.autograd.grad(value / problem.tokens, logits, retain_graph=name != names[-1])
            found[name].value += value.item() / problem.tokens
            found[name].at_student[rows] = gradient @ head
            found[name].at_head += gradient.T @ hidden
        share = len(hidden) / problem.tokens
        seen["logit spread"] += logits.std(-1).mean().item() * share
        seen["teacher entropy"] += -(log_t.exp() * log_t).sum(-1).mean().item() * share
        seen["teacher top"] += log_t.amax(-1).exp().mean().item() * share
    return found, {**seen, **{name: each.value for name, each in found.items()}}


def error(found: Tensor | None, expected: Tensor) -> float:
    """‖found − expected‖ ÷ ‖expected‖; not a number where nothing was found."""
    if found is None:
        return float("nan")
    distance = torch.linalg.vector_norm(found.float() - expected, dtype=torch.float64)
    return (distance / torch.linalg.vector_norm(expected, dtype=torch.float64)).item()
