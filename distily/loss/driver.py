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

from distily.batch import model_inputs, supervise
from distily.errors import DistilyError, RunError
from distily.loss.chunks import ChunkWalk, Piece, chunked_loss
from distily.loss.feature_terms import FeatureRows, row_sets
from distily.loss.features import FeatureCapture, Place
from distily.loss.fused import FusedTerms, fuse
from distily.loss.heads import OutputHead, nothing, select
from distily.loss.meetings import Combination, FeatureGradients, Meeting, ValueMeeting, advance
from distily.loss.readouts import Readout
from distily.loss.step import Step
from distily.loss.terms import Term
from distily.products import upcast
from distily.teachers import LocalTeacher, LogitSource, Teacher

ATTACHED = "distily_objectives"
"""Name under which the terms' parameters and the combiner's state live on the student while it trains."""

_steps: WeakKeyDictionary[nn.Module, Step] = WeakKeyDictionary()


class Loss(nn.Module):
    """What of the loss has parameters or state: the terms, and the meetings of a combiner by place."""

    def __init__(self, terms: nn.ModuleDict) -> None:
        super().__init__()
        self.terms = terms
        self.meetings = nn.ModuleDict()


class Driver:
    """Computes the weighted sum of ``terms`` for a student, against a teacher that may be None.

    ``vocabulary`` is the tokenizer's real size; padding rows of either head take no part. ``chunk_rows`` bounds the logits that
    exist at a time. ``term_gradients`` also records every logit term's gradient at the last hidden states. ``combination``: the
    combiner of the run; without one the weighted sum is differentiated as it is. ``kernels``: on a GPU, let the fused kernels compute the
    terms that they know.
    """

    def __init__(
        self,
        terms: nn.ModuleDict,
        teacher: Teacher | None,
        vocabulary: int,
        chunk_rows: int | None = None,
        seed: int = 0,
        term_gradients: bool = False,
        combination: Combination | None = None,
        kernels: bool = True,
    ) -> None:
        self.terms: list[Term] = [term for term in terms.values() if isinstance(term, Term)]
        self.loss = Loss(terms)
        self.teacher = teacher
        self.vocabulary = vocabulary
        self.chunk_rows = chunk_rows or default_chunk_rows(vocabulary)
        self.block_rows, self.kernels = chunk_rows, kernels
        self._path: str | None = None
        self.seed, self.term_gradients, self.combination = seed, term_gradients, combination
        self.head: OutputHead | None = None
        self._waiting: list[FeatureGradients] = []

    @property
    def path(self) -> str | None:
        """In words, how the last step on a GPU computed its token terms, and why."""
        refused = [f"; {term.key} is not compiled: {term.refused}" for term in self.terms if term.refused]
        return self._path and self._path + "".join(refused)

    @property
    def meetings(self) -> dict[str, Meeting]:
        """Where gradients meet, by place."""
        return {name: each for name, each in self.loss.meetings.items() if isinstance(each, Meeting)}

    @property
    def _value_meeting(self) -> ValueMeeting | None:
        return next((each for each in self.loss.meetings.values() if isinstance(each, ValueMeeting)), None)

    def weight(self, key: str, progress: float) -> Any:
        """The weight of a term at a share of training done, with the coefficient of a combiner of values."""
        place, term = next((place, term) for place, term in enumerate(self.terms) if term.key == key)
        weight = term.schedule.at(progress)
        return weight if self._value_meeting is None else weight * self._value_meeting.current[place]

    def attach(self, student: Any) -> None:
        """Puts the driver on the student, before anything wraps it. The terms' parameters become the student's."""
        assert not hasattr(student, ATTACHED), "a driver is attached to this student already"
        self.student = student
        self.head = OutputHead(student)
        if self.head.rows < self.vocabulary:
            raise DistilyError(
                f"student: its head has {self.head.rows} rows for a tokenizer of {self.vocabulary} tokens; allowed: at least as many."
            )
        self.capture = FeatureCapture(student, [feature for term in self.terms for feature in term.student_features])
        lenses = any(term.site == "logit_lens" for term in self.terms)
        self._readout = Readout(student, self.head, self.vocabulary) if lenses else None
        self._meet()
        parameter = next(student.parameters())
        self.chunk_rows = self.block_rows or default_chunk_rows(self.vocabulary, parameter.device.type)
        if self.kernels and parameter.is_cuda:
            for term in self.terms:
                if term.on_logits and not term.is_row_set:
                    term.compile_functions()
        loss = self.loss.double() if parameter.dtype == torch.float64 else self.loss
        setattr(student, ATTACHED, loss.to(parameter.device))
        self._handle = student.register_forward_hook(_finish)

    def _meet(self) -> None:
        """A meeting wherever terms meet: one for values, or one at the last hidden states and one at every captured tensor."""
        if self.combination is None or self.loss.meetings:
            return
        logits = sum(term.on_logits for term in self.terms)
        if len(self.terms) < 2 or not logits:
            raise DistilyError("combiner: it needs at least two objectives, one of them on logits, which is the primary one.")
        if self.combination.measures == "values":
            self.loss.meetings["run"] = ValueMeeting(self.combination, len(self.terms))
            return
        if logits > 1:
            self.loss.meetings["logits"] = Meeting(self.combination, logits)
        for feature in self.capture.wanted:
            for place in self.capture.places(feature):
                self.loss.meetings[_name(place)] = Meeting(self.combination, 2)

    def detach(self) -> None:
        """Takes everything off the student again, which is then the plain model that it was."""
        self._handle.remove()
        self.capture.remove()
        if hasattr(self.student, ATTACHED):
            delattr(self.student, ATTACHED)

    def close(self) -> None:
        """Leaves student and teacher as they were."""
        self.detach()
        if self.teacher is not None:
            self.teacher.close()

    @contextmanager
    def step(
        self, batch: Mapping[str, Any], items: Any = None, progress: float = 0.0, global_step: int = 0, observer: Any = None
    ) -> Iterator[Step]:
        """Opens a micro-batch: inside, one forward of the student (or of what wraps it) with ``step``'s model inputs.

        ``items``: N of the global, accumulated batch; None: of this micro-batch. ``progress``: share of training done.
        """
        assert self.head is not None, "attach(student) first"
        supervision = supervise(batch)
        signals = self.teacher.signals(model_inputs(batch), supervision.index) if self.teacher is not None else None
        count = supervision.index.numel() if items is None else items
        count = torch.as_tensor(count, device=supervision.index.device).clamp(min=1)
        with ExitStack() as stack:
            tensors = stack.enter_context(self.capture.opened())
            step = Step(self, supervision, signals, tensors, count, progress, self.seed + global_step, observer)
            stack.enter_context(self.head.redirected(lambda hidden: self._on_head(step, hidden)))
            _steps[self.student] = step
            stack.callback(_steps.pop, self.student, None)
            yield step

    def advance(self, progress: float) -> None:
        """After an optimizer step: moves whatever adapts (combiners, transported layers, adaptive targets) by the whole batch.

        Raises ``RunError`` where a feature's gradient never met the one from above.
        """
        if any(gradients.waiting for gradients in self._waiting):
            raise RunError(f"{type(self.student).__name__}: the backward did not come by a captured feature.")
        self._waiting = []
        advance(self.loss, progress)

    def measurements(self) -> dict[str, float]:
        """What the meetings saw last: cosines, norms, coefficients and removed shares, by place."""
        meetings = [(name, each) for name, each in self.loss.meetings.items() if isinstance(each, (Meeting, ValueMeeting))]
        return {f"combiner_{place}_{name}": float(value) for place, each in meetings for name, value in each.log.items()}

    def _on_head(self, step: Step, hidden_states: Tensor) -> Tensor:
        """Called in place of the head's forward: the logit terms, and zeros for the model's own code to go on with."""
        assert self.head is not None
        step.head_fired = True
        rows = select(hidden_states, step.supervision.index)
        terms = [term for term in self.terms if term.on_logits]
        step.rows = rows
        if step.observer is not None:
            step.observer.logits(step, rows)
        elif terms:
            dtype = _compute_dtype(rows)
            with torch.autocast(rows.device.type, enabled=False):
                meeting = self.meetings.get("logits")
                active = [term for term in terms if self._is_active(term, step)]
                source = step.signals.logits if step.signals else None
                fused = self._fused(active, rows, source, dtype)
                walk = ChunkWalk(
                    head=self.head,
                    source=source,
                    pieces=self._pieces([term for term in active if fused is None or term.is_row_set], step),
                    fused=fused,
                    block_rows=self.block_rows,
                    inputs=step.inputs,
                    weights={term.key: self.weight(term.key, step.progress) for term in terms},
                    items=step.items,
                    vocabulary=self.vocabulary,
                    compute_dtype=dtype,
                    term_gradients=self.term_gradients,
                    meeting=meeting if torch.is_grad_enabled() else None,
                )
                loss, values, step.gradients = chunked_loss(walk, rows)
            step.logit_loss = loss.detach()
            if walk.meeting is not None:
                walk.meeting.observe([values[key] * weight for key, weight in walk.weights.items()])
            step.values.update({term.key: values[term.key] for term in terms if self._is_active(term, step)})
            step.add(loss)
        return nothing(hidden_states)

    def _is_active(self, term: Term, step: Step) -> bool:
        """A term whose weight is 0 now is not computed, unless a combiner reads its value."""
        return self._value_meeting is not None or term.schedule.at(step.progress) != 0.0

    def _fused(self, terms: Sequence[Term], rows: Tensor, source: LogitSource | None, dtype: torch.dtype) -> FusedTerms | None:
        """The token terms for the kernels; None where plain PyTorch computes them."""
        assert self.head is not None
        token = [term for term in terms if not term.is_row_set]
        if not rows.is_cuda or not token:
            return None
        fused: FusedTerms | str = "speed.kernels is false"
        if self.kernels:
            fused = fuse(token, self.head, rows, dtype, apart=self.term_gradients or bool(self.meetings))
        if isinstance(fused, str):
            self._path = f"plain PyTorch, a chunk of logits at a time: {fused}"
            return None
        self._path = f"fused kernels{fused.teacher_in_words(source)}"
        return fused

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
                pieces += [Piece(rows, [term], share) for rows, share in row_sets(step.supervision, term.max_rows, step.seed)]
        return pieces

    def rows(self, step: Step, tensors: Mapping[Place, Tensor]) -> FeatureRows:
        """The features of a step, the student's made of ``tensors``."""
        assert step.signals is not None
        student = {feature: self.capture.feature(feature, tensors) for feature in self.capture.wanted}
        readouts = (self._readout, self.teacher.readout if self.teacher is not None else None)
        return FeatureRows(step.supervision, step.inputs, student, step.signals.features, readouts, self.chunk_rows, step.seed)

    def _on_features(self, step: Step) -> None:
        """Adds every feature term: its matches by their shares, summed over supervised tokens, divided by N."""
        if step.observer is not None:
            if self.capture.wanted:
                step.observer.features(self.rows(step, step.tensors))
            return
        terms = [term for term in self.terms if not term.on_logits and self._is_active(term, step)]
        if not terms:
            return
        places = {place for term in terms for place in self._places(term)}
        hooked = [place for place in places if step.tensors[place].requires_grad] if self.meetings else []  # not in frozen parts
        leaves = {place: step.tensors[place].detach().requires_grad_() for place in hooked}
        rows = self.rows(step, {**step.tensors, **leaves})
        weighted = []
        for term in terms:
            with torch.autocast(step.supervision.index.device.type, enabled=False):
                values = rows.values(term) / step.items
                value = (values * term.mapping.shares(values.detach(), step.progress)).sum()
            step.values[term.key] = value.detach()
            weighted.append(value * self.weight(term.key, step.progress))
        total = torch.stack(weighted).sum()
        if leaves:
            named = {_name(place): (step.tensors[place], leaf) for place, leaf in leaves.items()}
            parameters = list({id(p): p for term in terms for p in term.parameters() if p.requires_grad}.values())
            total = step.feature_gradients.add(total, named, parameters)
            self._waiting.append(step.feature_gradients)
            for place in leaves:
                here = [value for term, value in zip(terms, weighted, strict=True) if place in self._places(term)]
                self.meetings[_name(place)].observe([step.logit_loss, torch.stack(here).sum()])
        step.add(total)

    def _places(self, term: Term) -> set[Place]:
        return {place for feature in term.student_features for place in self.capture.places(feature)}

    def finish(self, step: Step) -> None:
        """The rest of the loss once the student's forward is over; no trained parameter is left without a gradient."""
        self._on_features(step)
        values = self._value_meeting
        if values is not None and torch.is_grad_enabled():
            zero = torch.zeros((), device=values.pending.device)
            values.pending += torch.stack([step.values.get(term.key, zero).double() for term in self.terms])
        is_empty = not step.supervision.index.numel()
        idle = [term for term in self.terms if is_empty or not self._is_active(term, step)]
        for parameter in (each for term in idle for each in term.parameters() if each.requires_grad):
            step.add(parameter.sum() * 0.0)
        if step.loss is None:
            assert step.rows is not None
            step.loss = upcast(step.rows.sum()) * 0.0


def local_teacher(model: Any, terms: nn.ModuleDict, vocabulary: int, float8: bool = False) -> LocalTeacher | None:
    """``model`` as the teacher that captures what the terms need; None where no term needs a teacher. ``float8``: see ``LocalTeacher``."""
    every = [term for term in terms.values() if isinstance(term, Term)]
    if not any(term.description.needs_teacher for term in every):
        return None
    lens = any(term.site == "logit_lens" for term in every)
    return LocalTeacher(model, vocabulary, [feature for term in every for feature in term.teacher_features], lens, float8)


def _finish(student: nn.Module, arguments: Any, output: Any) -> Any:
    """Forward hook of the outermost student: adds the feature terms and returns the loss as an output."""
    step = _steps.get(student)
    if step is None:
        return output
    if not step.head_fired:
        raise DistilyError(f"{type(student).__name__} did not call its output embedding in this forward.")
    step.driver.finish(step)
    output["loss"] = step.loss
    return output


def _name(place: Place) -> str:
    return f"{place[0]}_{place[1]}"


def default_chunk_rows(vocabulary: int, device_type: str = "cpu") -> int:
    """Rows whose float32 logits take about 64 MiB, or 256 on a GPU, whose products want many rows; between 64 and 4096."""
    return max(64, min(4096, (2**26 if device_type == "cuda" else 2**24) // max(1, vocabulary)))


def _compute_dtype(rows: Tensor) -> torch.dtype:
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
