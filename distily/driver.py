"""The driver: one place that owns shift, mask, vocabulary, temperature, precision, chunking and normalisation of the loss.

While a step is open, the student's own forward computes the loss: the output embedding hands its input to the driver, which walks
the supervised tokens in chunks and returns zeros in place of logits; a hook on the outermost student adds the feature terms and
returns the loss as an output of that forward. So whatever wraps the student (DDP, FSDP2, checkpointing) sees one ordinary model.

Letters: B batch, S sequence, N supervised tokens (of the global, accumulated batch where the loss is divided), V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from distily.batch import Supervision, model_inputs, pick, supervise
from distily.chunks import ChunkWalk, Piece, chunked_loss
from distily.errors import DistilyError
from distily.features import Feature, FeatureCapture
from distily.heads import OutputHead, nothing, select
from distily.teachers import LocalTeacher, Teacher, TeacherSignals
from distily.terms import Term

ATTACHED = "distily_objectives"
"""Name under which the terms' parameters live on the student while it trains."""

_steps: WeakKeyDictionary[nn.Module, Step] = WeakKeyDictionary()


class Step:
    """One open micro-batch: its supervision, the teacher's signals, and what the loss came to.

    ``loss`` is Σ weight · term ÷ N with gradient; ``values`` holds each term's own Σ ÷ N, detached;
    ``gradients`` each logit term's gradient at the selected last hidden states ``(n, H)`` when it was asked for.
    """

    def __init__(
        self,
        driver: Driver,
        supervision: Supervision,
        signals: TeacherSignals | None,
        features: Mapping[Feature, Tensor],
        items: Tensor,
        progress: float,
        seed: int,
    ) -> None:
        self.driver = driver
        self.supervision = supervision
        self.signals = signals
        self.features = features
        self.items = items
        self.progress = progress
        self.seed = seed
        self.loss: Tensor | None = None
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.head_fired = False

    @property
    def inputs(self) -> dict[str, Any]:
        """What objectives may ask for by name."""
        supervision = self.supervision
        return {
            "labels": supervision.labels,
            "input_ids": supervision.input_ids,
            "sequence_ids": supervision.sequence_ids,
            "progress": self.progress,
        }

    def add(self, loss: Tensor) -> None:
        self.loss = loss if self.loss is None else self.loss + loss


class Driver:
    """Computes the weighted sum of ``terms`` for a student, against a teacher that may be None.

    ``vocabulary`` is the tokenizer's real size; padding rows of either head take no part. ``chunk_rows`` bounds the logits that
    exist at a time. ``term_gradients`` also records every logit term's gradient at the last hidden states.
    """

    def __init__(
        self,
        terms: nn.ModuleDict,
        teacher: Teacher | None,
        vocabulary: int,
        chunk_rows: int | None = None,
        seed: int = 0,
        term_gradients: bool = False,
    ) -> None:
        self.terms = terms
        self.teacher = teacher
        self.vocabulary = vocabulary
        self.chunk_rows = chunk_rows or default_chunk_rows(vocabulary)
        self.seed = seed
        self.term_gradients = term_gradients
        self.head: OutputHead | None = None

    @property
    def _all_terms(self) -> list[Term]:
        return [term for term in self.terms.values() if isinstance(term, Term)]

    def weight(self, key: str, progress: float) -> float:
        """The weight of a term at a share of training done."""
        return next(term.weight.at(progress) for term in self._all_terms if term.key == key)

    def attach(self, student: Any) -> None:
        """Puts the driver on the student, before anything wraps it. The terms' parameters become the student's."""
        self.student = student
        self.head = OutputHead(student)
        if self.head.rows < self.vocabulary:
            raise DistilyError(
                f"student: its head has {self.head.rows} rows for a tokenizer of {self.vocabulary} tokens; allowed: at least as many."
            )
        wanted = [feature for term in self._all_terms for feature in term.student_features]
        self.capture = FeatureCapture(student, wanted)
        parameter = next(student.parameters())
        setattr(student, ATTACHED, self.terms.to(parameter.device))
        self._handle = student.register_forward_hook(_finish)

    def detach(self) -> None:
        """Takes everything off the student again, which is then the plain model that it was."""
        self._handle.remove()
        self.capture.remove()
        if hasattr(self.student, ATTACHED):
            delattr(self.student, ATTACHED)

    @contextmanager
    def step(self, batch: Mapping[str, Any], items: Any = None, progress: float = 0.0, global_step: int = 0) -> Iterator[Step]:
        """Opens a micro-batch: inside, one forward of the student (or of what wraps it) with ``step``'s model inputs.

        ``items``: N of the global, accumulated batch; None: of this micro-batch. ``progress``: share of training done.
        """
        assert self.head is not None, "attach(student) first"
        supervision = supervise(batch)
        signals = self.teacher.signals(model_inputs(batch), supervision.index) if self.teacher is not None else None
        count = supervision.index.numel() if items is None else items
        count = torch.as_tensor(count, device=supervision.index.device).clamp(min=1)
        with ExitStack() as stack:
            features = stack.enter_context(self.capture.opened())
            step = Step(self, supervision, signals, features, count, progress, self.seed + global_step)
            stack.enter_context(self.head.redirected(lambda hidden: self._on_head(step, hidden)))
            _steps[self.student] = step
            stack.callback(_steps.pop, self.student, None)
            yield step

    def _on_head(self, step: Step, hidden_states: Tensor) -> Tensor:
        """Called in place of the head's forward: the logit terms, and zeros for the model's own code to go on with."""
        assert self.head is not None
        step.head_fired = True
        terms = [term for term in self._all_terms if term.on_logits]
        if terms:
            rows = select(hidden_states, step.supervision.index)
            with torch.autocast(rows.device.type, enabled=False):
                walk = ChunkWalk(
                    head=self.head,
                    source=step.signals.logits if step.signals else None,
                    pieces=self._pieces(terms, step),
                    inputs=step.inputs,
                    weights={term.key: term.weight.at(step.progress) for term in terms},
                    items=step.items,
                    vocabulary=self.vocabulary,
                    compute_dtype=_compute_dtype(rows),
                    term_gradients=self.term_gradients,
                )
            loss, step.values, step.gradients = chunked_loss(walk, rows)
            step.add(loss)
        return nothing(hidden_states)

    def _pieces(self, terms: Sequence[Term], step: Step) -> list[Piece]:
        """Token terms in chunks; each row-set term once for every sequence, on its sample of rows."""
        count = step.supervision.index.numel()
        token = [term for term in terms if not term.is_row_set]
        pieces = []
        if token:
            pieces = [
                Piece(slice(start, min(start + self.chunk_rows, count)), token, 1.0) for start in range(0, count, self.chunk_rows)
            ]
        for term in terms:
            if term.is_row_set:
                pieces += [Piece(rows, [term], share) for rows, share in self._row_sets(term, step)]
        return pieces

    def _row_sets(self, term: Term, step: Step) -> Iterator[tuple[Tensor, float]]:
        """For each sequence a seeded sample of its supervised rows, and how many tokens each sampled row stands for."""
        offset = 0
        for length in step.supervision.lengths:
            if length:
                size = min(length, term.max_rows)
                generator = torch.Generator().manual_seed(step.seed * 1_000_003 + length)
                chosen = torch.randperm(length, generator=generator)[:size].sort().values + offset
                yield chosen.to(step.supervision.index.device, non_blocking=True), length / size
            offset += length

    def _feature_terms(self, step: Step) -> None:
        """Adds every feature term: its pairs averaged, summed over supervised tokens, divided by N."""
        for term in self._all_terms:
            if term.on_logits:
                continue
            with torch.autocast(step.supervision.index.device.type, enabled=False):
                pairs = torch.stack([self._pair(term, pair, step) for pair in range(len(term.pairs))])
                total = pairs.mean() / step.items
            step.values[term.key] = total.detach()
            step.add(total * term.weight.at(step.progress))

    def _pair(self, term: Term, pair: int, step: Step) -> Tensor:
        index = step.supervision.index
        assert step.signals is not None
        mine = select(step.features[term.student_features[pair]], index)
        theirs = select(step.signals.features[term.teacher_features[pair]], index)
        student, teacher = term.matched(pair, mine, theirs)
        if not term.is_row_set:
            return term.values(student, teacher, step.inputs).sum()
        sets = self._row_sets(term, step)
        parts = [term.values(student[rows], teacher[rows], pick(step.inputs, rows)).sum() * share for rows, share in sets]
        return torch.stack(parts).sum() if parts else student.sum() * 0.0


def local_teacher(model: Any, terms: nn.ModuleDict, vocabulary: int) -> LocalTeacher | None:
    """``model`` as the teacher that captures what the terms need; None where no term needs a teacher."""
    every = [term for term in terms.values() if isinstance(term, Term)]
    if not any(term.description.needs_teacher for term in every):
        return None
    return LocalTeacher(model, vocabulary, [feature for term in every for feature in term.teacher_features])


def _finish(student: nn.Module, arguments: Any, output: Any) -> Any:
    """Forward hook of the outermost student: adds the feature terms and returns the loss as an output."""
    step = _steps.get(student)
    if step is None:
        return output
    if not step.head_fired:
        raise DistilyError(f"{type(student).__name__} did not call its output embedding in this forward.")
    step.driver._feature_terms(step)
    output["loss"] = step.loss
    return output


def default_chunk_rows(vocabulary: int) -> int:
    """Rows whose float32 logits take about 64 MiB, between 64 and 4096."""
    return max(64, min(4096, 2**24 // max(1, vocabulary)))


def _compute_dtype(rows: Tensor) -> torch.dtype:
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
