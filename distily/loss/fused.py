"""The fast path of the chunked loss on a GPU: the products that make logits, one kernel for all terms, the products with their gradient.

Student logits are kept in half precision, counted from the label's logit, where half precision is finest; the kernel writes their
gradient over them, in bfloat16. So a row of the vocabulary costs four bytes, whatever the number of terms.
Letters: N supervised tokens, n rows of a block, H hidden width, V vocabulary, W the width of a row of the buffers, F forms, K terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from distily.forms import Form
from distily.loss.blocks import Blocks, cut
from distily.loss.gradients import Gradients
from distily.loss.heads import OutputHead
from distily.loss.terms import Term
from distily.objectives import uniform
from distily.products import Product, unsuited, width_of
from distily.teachers import LogitSource

MOST_FORMS, MOST_DRAWS = 8, 128


@dataclass(frozen=True)
class FusedTerms:
    """Terms that one kernel computes: their forms, and of each the place of its term."""

    terms: Sequence[Term]
    forms: Sequence[Form]
    owners: Sequence[int]
    temperature: float

    @property
    def names(self) -> list[str]:
        return [form.name for form in self.forms]

    @property
    def needs_teacher(self) -> bool:
        """Whether any of them reads the teacher's logits."""
        return any(term.description.needs_teacher for term in self.terms)

    def teacher_in_words(self, source: LogitSource | None) -> str:
        """What is special about the teacher's logits, as the end of a sentence."""
        product = source.product(slice(0, 0)) if source is not None and self.needs_teacher else None
        if product is None or product.float8 is None:
            return ""
        refused = isinstance(product.float8, str)
        return f", the teacher's logits not in fp8: {product.float8}" if refused else ", the teacher's logits in fp8"

    @property
    def draws(self) -> int:
        """Tokens that are drawn for every row."""
        return sum(int(form.parameters[0]) for form in self.forms if form.name == "sampled")


def fuse(terms: Sequence[Term], head: OutputHead, rows: Tensor, dtype: torch.dtype, apart: bool = False) -> FusedTerms | str:
    """What the kernels compute for ``terms`` on hidden ``rows`` (N, H) in ``dtype``, or why they do not: in words that end a sentence.

    ``apart``: whether somebody needs the gradients of single terms.
    """
    module: Any = head.module
    if not head.is_linear:
        return f"a head of type {type(module).__name__} is no plain linear layer"
    if apart:
        return "gradients meet in a combiner, which asks for those of single terms"
    if dtype == torch.float16:
        return "float16 has no room for the gradients of single logits"
    return unsuited(rows, module.weight, dtype) or forms_of(terms)


def forms_of(terms: Sequence[Term]) -> FusedTerms | str:
    """The terms as forms of one pass, or why they are not."""
    forms: list[Form] = []
    owners: list[int] = []
    for place, term in enumerate(terms):
        own = term.forms()
        if not own:
            return f"the kernels do not know {term.key} with these options"
        forms += own
        owners += [place] * len(own)
    if len(forms) > MOST_FORMS:
        return f"the terms come to {len(forms)} forms, more than {MOST_FORMS}"
    if sum(form.name == "renyi" for form in forms) > 1:
        return "a pass holds one Rényi divergence"
    if sum(form.name == "sampled" for form in forms) > 1:
        return "a pass holds one set of sampled targets"
    placed = zip(forms, owners, strict=True)
    temperatures = {terms[owner].temperature for form, owner in placed if form.name != "cross_entropy"}
    if len(temperatures) > 1:
        return f"the terms have several temperatures ({', '.join(f'{each:g}' for each in sorted(temperatures))})"
    fused = FusedTerms(terms, forms, owners, temperatures.pop() if temperatures else 1.0)
    return fused if fused.draws <= MOST_DRAWS else f"{fused.draws} sampled targets are more than {MOST_DRAWS}"


def fused_rows(
    fused: FusedTerms,
    student: Product,
    teacher: Any,
    inputs: Mapping[str, Any],
    weights: Mapping[str, Any],
    items: Tensor,
    gradients: Gradients | None,
    block_rows: int | None = None,
) -> Tensor:
    """Σ over the rows ÷ N of every fused term, ``(K,)``; their weighted gradient goes to ``gradients``.

    ``teacher`` is a logit source or None. ``inputs``: ``labels`` (N,), and ``row_seeds`` (N,) where a term draws. ``block_rows``: rows
    whose logits exist at a time; None: from shapes and free memory.
    """
    from distily.kernels.rows import rows_pass

    hidden, weight, labels = student.hidden, student.weight, inputs["labels"]
    count, vocabulary = len(hidden), len(weight)
    numbers = uniform(inputs["row_seeds"], fused.draws) if fused.draws else None
    product = _product_of(teacher, count)
    own, once = (None, False) if gradients is None else (gradients.head_dtype, gradients.once)
    blocks = cut(count, weight, None if product is None else product.hidden.shape[1], own, block_rows, narrow=once)
    logits = _Logits(student, teacher, product, labels, blocks, fused)
    factors, coefficients = _coefficients(fused, weights, items, student.scale)
    parameters = torch.tensor([(*form.parameters, 0.0, 0.0)[:2] for form in fused.forms], dtype=torch.float32)
    parameters = parameters.to(hidden.device, non_blocking=True)
    values = torch.empty((len(fused.forms), count), dtype=torch.float32, device=hidden.device)
    for start in range(0, count, blocks.rows):
        stop = min(start + blocks.rows, count)
        block, block_sums = logits.of_student(slice(start, stop))
        for first in range(start, stop, blocks.part):
            at = slice(first, min(first + blocks.part, stop))
            mine, my_sums = (each[at.start - start : at.stop - start] for each in (block, block_sums))
            theirs, their_sums = logits.of_teacher(at)
            pair = (mine, theirs, my_sums, their_sums)
            targets = _targets(fused, pair, coefficients, values[:, at], None if numbers is None else numbers[at], vocabulary)
            rows_pass(
                mine, theirs, None if gradients is None else mine.view(hidden.dtype), my_sums, their_sums, fused.names,
                coefficients, parameters, labels[at], logits.reference[at], values[:, at],
                temperature=fused.temperature, cap=student.softcap, **targets,
            )  # fmt: skip
        if gradients is not None:
            gradients.add(slice(start, stop), logits.gradient(stop - start), hidden[start:stop], weight, few=blocks.few)
    sums = values.sum(1) * factors
    owners = torch.tensor(fused.owners).to(hidden.device, non_blocking=True)
    return sums.new_zeros(len(fused.terms)).index_add(0, owners, sums)


def _targets(
    fused: FusedTerms, pair: Sequence[Any], coefficients: Tensor, values: Tensor, numbers: Tensor | None, vocabulary: int
) -> dict[str, Any]:
    """What a pass needs besides for sparse forms, the chosen and the drawn tokens. ``pair``: logits of both sides, and their sums."""
    from distily.kernels.targets import draws, supports

    student, teacher, student_sums, teacher_sums = pair
    common: dict[str, Any] = {"temperature": fused.temperature, "vocabulary": vocabulary}
    result: dict[str, Any] = {}
    if any(form.name.startswith("top_") for form in fused.forms):
        result["supports"] = supports(student, teacher, student_sums, teacher_sums, fused.forms, coefficients, values, **common)
    if numbers is not None:
        result["drawn"] = draws(student, teacher, teacher_sums, numbers, **common)
    return result


def _product_of(source: Any, count: int) -> Product | None:
    """The product behind a logit source, all its rows; None where it has none that the kernels can form."""
    product: Product | None = None if source is None else source.product(slice(0, count))
    return None if product is None or product.unsuited() is not None else product


class _Logits:
    """The buffers of a block: all of the student's rows, and a part of the teacher's; both counted from the label's logit."""

    def __init__(
        self, student: Product, source: Any, teacher: Product | None, labels: Tensor, blocks: Blocks, fused: FusedTerms
    ) -> None:
        from distily.kernels.products import label_logits

        self.student, self.source, self.teacher = student, source, teacher
        self.temperature = fused.temperature
        self.hard = self.temperature != 1.0 and "cross_entropy" in fused.names
        self.reference = label_logits(student, labels)
        self._teacher_reference = self.reference if teacher is None else label_logits(teacher, labels)
        width = width_of(len(student.weight))
        self._student = torch.empty((blocks.rows, width), dtype=torch.float16, device=labels.device)
        self._teacher = self._student.new_empty((0 if teacher is None else blocks.part, width))

    def of_student(self, at: slice) -> tuple[Tensor, Tensor]:
        """Logits of a block's rows, and the parts of their sums."""
        from distily.kernels.products import relative_logits

        out = self._student[: at.stop - at.start]
        return out, relative_logits(self.student.rows(at), self.reference[at], out, self.temperature, self.hard)

    def of_teacher(self, at: slice) -> tuple[Tensor | None, Tensor | None]:
        """The same of the teacher. One whose head does not suit the kernel gives its logits itself."""
        from distily.kernels.products import relative_logits

        if self.teacher is not None:
            out = self._teacher[: at.stop - at.start]
            return out, relative_logits(self.teacher.rows(at), self._teacher_reference[at], out, self.temperature)
        if self.source is None:
            return None, None
        dense: Tensor = self.source.chunk(at).float()
        return dense, _sums(dense, self.temperature)

    def gradient(self, rows: int) -> Tensor:
        """What the terms wrote over the student's logits: ``(n, W)``, 0 beyond V."""
        return self._student.view(self.student.hidden.dtype)[:rows]


def _sums(logits: Tensor, temperature: float) -> Tensor:
    """What ``relative_logits`` gives beside logits, for given ones: ``(n, V) -> (n, B, 2)``."""
    from distily.kernels.products import BLOCK_VOCABULARY, HALF_LIMIT

    blocks = pad(logits, (0, -logits.shape[1] % BLOCK_VOCABULARY), value=-math.inf).unflatten(1, (-1, BLOCK_VOCABULARY))
    top = blocks.amax(-1).clamp(min=-HALF_LIMIT.value)  # a number also where there is no mass
    return torch.stack([top, (blocks - top[..., None]).div_(temperature).exp_().sum(-1)], -1)


def _coefficients(fused: FusedTerms, weights: Mapping[str, Any], items: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What a form's value is multiplied by, and its gradient with the ``scale`` of the student's logits: ``(F,)`` each, on the device and
    without waiting for it.
    """
    factors = torch.ones(len(fused.forms), dtype=torch.float32, device=items.device)
    coefficients = torch.empty_like(factors)
    for place, (form, owner) in enumerate(zip(fused.forms, fused.owners, strict=True)):
        term = fused.terms[owner]
        factors[place].mul_(form.factor).mul_(term.factor)
        own = 1.0 if form.name == "cross_entropy" else fused.temperature
        torch.mul(factors[place], weights[term.key], out=coefficients[place]).mul_(scale / own)
    return factors.div_(items), coefficients.div_(items)
