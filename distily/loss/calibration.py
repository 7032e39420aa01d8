"""Measures the constants of calibrated components on training text, before training.

Letters: n rows, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from distily.batch import model_inputs, pick
from distily.errors import DistilyError
from distily.loss.driver import Driver
from distily.loss.feature_terms import FeatureRows
from distily.loss.step import Step
from distily.loss.terms import READ_SITES, Term
from distily.products import upcast
from distily.state import Calibrated


def calibrate(driver: Driver, batches: Iterable[Mapping[str, Any]]) -> None:
    """Shows rows of ``batches`` to every calibrated component of an attached driver until each has seen enough, in a forward of its
    student as it stands, and lets each conclude. ``batches`` are read only where there is such a component.

    Raises ``DistilyError`` where the text is too short for one.
    """
    observer = _Observer(driver)
    if not observer.seen:
        return
    student = driver.student
    was_training = student.training
    student.eval()
    for batch in batches:
        if observer.is_done:
            break
        with torch.no_grad(), driver.step(batch, observer=observer):
            student(**model_inputs(batch), use_cache=False)
    student.train(was_training)
    for module in observer.seen:
        try:
            module.conclude()
        except ValueError as error:
            raise DistilyError(f"objective {observer.owners[module]}: {type(module).__name__}: {error}") from error


class _Observer:
    """Hands rows to the calibrated components of a driver's terms, and counts them."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        owners = {module: term.key for term in driver.terms for module in term.modules() if isinstance(module, Calibrated)}
        self.owners: dict[Calibrated, str] = owners
        self.seen = dict.fromkeys(owners, 0)

    @property
    def is_done(self) -> bool:
        return all(count >= module.calibration_rows for module, count in self.seen.items())

    def _show(self, module: Any, term: Term, student: Tensor, teacher: Tensor, inputs: Mapping[str, Any]) -> None:
        if module not in self.seen or self.seen[module] >= module.calibration_rows:
            return
        is_objective = any(module is objective for objective in term.objectives)
        scale = term.temperature if is_objective else 1.0
        given = {name: inputs[name] for name in term.description.inputs} if is_objective else {}
        module.observe(upcast(student) / scale, upcast(teacher) / scale, **given)
        self.seen[module] += student.shape[0]

    def logits(self, step: Step, rows: Tensor) -> None:
        """Shows the logits of all supervised rows ``(N, H)``, in chunks."""
        head, source = self.driver.head, step.signals.logits if step.signals else None
        terms = [term for term in self.driver.terms if term.on_logits and isinstance(term.objectives[0], Calibrated)]
        if not terms or head is None or source is None:
            return
        for start in range(0, rows.shape[0], self.driver.chunk_rows):
            chunk = slice(start, start + self.driver.chunk_rows)
            student, teacher = head.logits(rows[chunk], self.driver.vocabulary), source.chunk(chunk)
            for term in terms:
                self._show(term.objectives[0], term, student, teacher, pick(step.inputs, chunk))

    def features(self, rows: FeatureRows) -> None:
        """Shows what the terms on features read."""
        for term in self.driver.terms:
            if term.on_logits or not any(module in self.seen for module in term.modules()):
                continue
            if term.site in READ_SITES:
                for pair in range(len(term.pairs)):
                    for index, _, student, teacher in rows.chunks(term, pair):
                        for module in term.observers(pair):
                            self._show(module, term, student(index), teacher(index), pick(rows.inputs, index))
                continue
            for pair, (student_rows, teacher_rows) in enumerate(zip(*rows.whole(term), strict=True)):
                for module in term.observers(pair):
                    self._show(module, term, student_rows, teacher_rows, rows.inputs)
