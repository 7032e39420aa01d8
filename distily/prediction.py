"""Predicted peak memory of a training, from the shapes of the models alone: one training step on tensors without data.

The step is the training's own (``Driver``, ``LocalTeacher``, terms, optimizer class), run under PyTorch's fake tensors while
every storage is counted from its first to its last use. So the architecture, frozen and tied weights, gradient checkpointing and
the copies that autocast makes come out as they are. What cannot run without a GPU is put in by hand, and this is assumed:

- Tensors are counted, for a GPU in blocks of 512 bytes: ``torch.cuda.max_memory_allocated`` is what is predicted. Not counted are
  the CUDA context, the allocator's cache and its fragmentation; CUDA graphs, for which a run decides while it trains and which keep
  activations through the whole step; the copies of a teacher's weights in fp8; on a CPU, whatever else belongs to the size of the process.
- Fake tensors lie on the CPU: a PyTorch without CUDA has no autograd for others. For a GPU, attention (SDPA) gets the memory of
  the fused kernels, dropout keeps a mask of bytes, autocast widens what it widens there, cuBLAS has a workspace in two threads.
- The step is a later one, the optimizer's state exists. Gradients are None before the forward, unless they accumulate.
- All rows are full. ``padded``: there is a mask ``(B, 1, S, S)`` all the same, as there is when one row is shorter.
- Optimizers from elsewhere than PyTorch and transformers cannot run here: ``STATE_BYTES`` for each trained parameter.
- One process. Distributed training adds buckets as large as the gradients (DDP), or divides (FSDP2). Evaluation is left out.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from distily.batch import model_inputs
from distily.loss.blocks import bytes_held
from distily.loss.chunks import Piece
from distily.loss.driver import Driver, default_chunk_rows, local_teacher
from distily.loss.fused import FusedTerms, fuse
from distily.loss.meetings import combination
from distily.loss.step import Step
from distily.loss.terms import Builder, Term, build_terms
from distily.spec import Component
from distily.teachers import LogitSource

PARTS = ("teacher", "student", "gradients", "optimizer", "activations", "loss", "workspace")
BLOCK, CUBLAS_WORKSPACE = 512, 32 * 2**20
STATE_BYTES = {"paged": 0, "4bit": 1, "8bit": 2, "lion": 4}
"""Bytes of optimizer state for a parameter by what the optimizer's name contains; otherwise 8, two values of float32."""
ASKED = 100_000
"""Values of tensors that host code gets before the answers alternate, so that every loop ends."""
WIDENED = {"pow", "__pow__", "rsqrt", "exp", "expm1", "log", "log1p", "reciprocal", "layer_norm", "norm", "softplus"}
"""Functions that autocast runs in float32 on CUDA and not on a CPU."""


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes at the moment of the highest memory; the parts add up to ``peak``.

    ``student`` and ``teacher`` are weights, the student's with those of the terms. ``gradients``: what the backward made and
    still holds, for weights and for activations. ``activations``: the forwards', with autocast's copies of weights. ``loss``: a
    chunk's logits, the objectives' own tensors, the head's gradient until the backward takes it. ``moment``: the phase of the
    peak; ``phases`` has the highest memory of each: forward, loss (within the forward), backward, optimizer step.
    """

    teacher: int
    student: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    workspace: int
    peak: int
    moment: str
    phases: Mapping[str, int]
    device_type: str

    def __str__(self) -> str:
        what = "GPU memory" if self.device_type == "cuda" else "memory of tensors"
        parts = ", ".join(f"{name} {_size(getattr(self, name))}" for name in PARTS if getattr(self, name) >= 2**17)
        return f"predicted peak {what}: {_size(self.peak)} in the {self.moment} ({parts})"


def predict_memory(
    *, student: Any, teacher: Any, objectives: Sequence[Component], builder: Builder, vocabulary: int, rows: int, length: int,
    arguments: Any, chunk_rows: int | None = None, mixed_precision: bool = False, padded: bool = True, packed: bool = False,
    device_type: str = "cuda", seed: int = 0, combiner: Component | None = None, kernels: bool = True,
) -> MemoryPrediction:  # fmt: skip
    """The peak of a training step with ``rows`` sequences of ``length`` tokens in each micro-batch.

    ``student`` and ``teacher`` may lie on the meta device, in the dtypes of the training; they stay as they are. ``arguments``
    are the ``TrainingArguments``, ``builder`` the plugins. ``packed``: batches carry ``position_ids`` instead of a mask. ``kernels``:
    whether a GPU computes the terms that the fused kernels know by them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    on_gpu = device_type == "cuda"
    memory = _Memory(BLOCK if on_gpu else 1, answer=not (padded or packed))
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        terms: Any = build_terms(objectives, builder, student, teacher, seed)
        met = combination(combiner, builder)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # transformers takes fake tensors for tracing and would always build a mask; now it asks, and ``memory`` answers
        stack.enter_context(mock.patch("transformers.masking_utils.is_tracing", return_value=False, create=True))
        stack.enter_context(memory)
        stack.enter_context(_LikeCuda() if on_gpu else nullcontext())
        memory.add("workspace", 2 * CUBLAS_WORKSPACE if on_gpu else 0)
        with memory.phase("teacher"):
            teacher = _without_data(teacher)
        with memory.phase("student"):
            student, terms = _without_data(student), _without_data(terms)
        rows_at_a_time = chunk_rows or default_chunk_rows(vocabulary, device_type)
        driver = _CountedDriver(
            terms, local_teacher(teacher, terms, vocabulary), vocabulary, rows_at_a_time, seed, combination=met
        )
        driver.memory, driver.kernels, driver.given_rows = memory, kernels and on_gpu, chunk_rows
        driver.loss.to = lambda _: driver.loss  # type: ignore[method-assign, assignment]  # it is where the student is
        driver.attach(student)
        _simulate(driver, _batch(rows, length, packed), arguments, mixed_precision, on_gpu)
    parts = {name: memory.at_peak[name] for name in PARTS}
    return MemoryPrediction(**parts, peak=memory.peak, moment=memory.moment, phases=dict(memory.phases), device_type=device_type)


def _simulate(driver: _CountedDriver, batch: Mapping[str, Any], arguments: Any, mixed_precision: bool, on_gpu: bool) -> None:
    """The optimizer's state, then one whole step of training, as ``DistillationTrainer`` does it."""
    memory, student = driver.memory, driver.student.train()
    kind = "activation" if hasattr(arguments, "activation_checkpointing") else "gradient"  # its name until v6
    if getattr(arguments, f"{kind}_checkpointing"):
        again = _LikeCuda if on_gpu else nullcontext  # function modes are off during a backward
        own = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": lambda: (nullcontext(), again())}
        given = dict(getattr(arguments, f"{kind}_checkpointing_kwargs") or {})
        apart = {name: given.pop(name) for name in ("every_n_layers",) if name in given}
        given.pop("offload", None)  # counted as if it stayed
        getattr(student, f"{kind}_checkpointing_enable")({**given, **own}, **apart)
    if mixed_precision:
        student.forward = torch.autocast("cpu", torch.float16 if arguments.fp16 else torch.bfloat16)(student.forward)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    with memory.phase("gradients"):
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    with memory.phase("optimizer"):
        step = _optimizer_step(trained, student, arguments, on_gpu, memory)
        step()
    if arguments.gradient_accumulation_steps == 1:
        student.zero_grad()
    memory.start()
    loss = _forward(driver, batch)
    with memory.phase("gradients", "backward"):
        loss.backward()
    del loss
    with memory.phase("gradients", "optimizer step"):
        if arguments.max_grad_norm:
            nn.utils.clip_grad_norm_(trained, arguments.max_grad_norm, foreach=False)
        step()


def _forward(driver: _CountedDriver, batch: Mapping[str, Any]) -> Tensor:
    """What lives only as long as the loss is computed goes with this frame."""
    with driver.memory.phase("activations", "forward"), driver.step(batch):
        loss: Tensor = driver.student(**model_inputs(batch), use_cache=False)["loss"]
    return loss


def _optimizer_step(trained: list[Tensor], student: Any, arguments: Any, on_gpu: bool, memory: _Memory) -> Any:
    """A call that does to memory what the optimizer's step does; the first one makes the state."""
    from transformers import Trainer

    name = str(getattr(arguments.optim, "value", arguments.optim))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, student)
    except (ImportError, ValueError, RuntimeError):
        kind, options = None, {}
    if kind is not None and kind.__module__.split(".")[0] in ("torch", "transformers"):
        if on_gpu and "adamw" in name and not options.get("fused"):
            options["foreach"] = True  # PyTorch's choice on a GPU
        return kind(trained, **options).step
    each = next((size for part, size in STATE_BYTES.items() if part in name), 8)
    memory.add("optimizer", each * sum(parameter.numel() for parameter in trained))
    return lambda: None


def _batch(rows: int, length: int, packed: bool) -> dict[str, Any]:
    """A batch as Distily's collator makes it, every row full."""
    names = ("input_ids", "labels", "shift_labels", "position_ids" if packed else "attention_mask")
    batch: dict[str, Any] = {name: torch.zeros(rows, length, dtype=torch.long) for name in names}
    return batch | {"supervised": torch.zeros(rows * (length - 1), dtype=torch.long), "lengths": [length - 1] * rows}


def _without_data(module: Any) -> Any:
    """A copy of ``module`` with its shapes, dtypes and ties, whose tensors hold no data."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


class _CountedDriver(Driver):
    """The driver, with its memory under its own name; of many equal chunks, each of which frees what it took, it walks one."""

    memory: _Memory
    given_rows: int | None
    by_kernels = False

    def _fused(self, terms: Sequence[Term], rows: Tensor, source: LogitSource | None, dtype: torch.dtype) -> None:
        """Counts what the kernels would hold, which cannot run here, nor in the walk's place."""
        head: Any = self.head
        token = [term for term in terms if not term.is_row_set]
        apart = self.term_gradients or bool(self.meetings)
        self.by_kernels = self.kernels and bool(token) and isinstance(fuse(token, head, rows, dtype, apart), FusedTerms)
        if self.by_kernels:
            size = bytes_held(rows, head.module.weight, dtype, self.given_rows)
            self.memory.add("loss", size)
            self.memory.add("loss", -size)

    def _on_head(self, step: Step, hidden_states: Tensor) -> Tensor:
        with self.memory.phase("loss", "loss"):
            return super()._on_head(step, hidden_states)

    def _on_features(self, step: Step) -> None:
        with self.memory.phase("loss", "loss"):
            super()._on_features(step)

    def _pieces(self, terms: Sequence[Term], step: Step) -> list[Piece]:
        first: dict[int, Piece] = {}
        for piece in super()._pieces([term for term in terms if term.is_row_set or not self.by_kernels], step):
            first.setdefault(id(piece.terms[0]), piece)
        return list(first.values())


class _Memory(TorchDispatchMode):
    """Counts the bytes of living storages, by the part of the training in which they were made, and keeps them at the peak."""

    def __init__(self, block: int, answer: bool) -> None:
        super().__init__()
        self.block, self.answer, self.asked = block, answer, 0
        self.now, self.at_peak, self.phases = Counter[str](), Counter[str](), Counter[str]()
        self.total = self.peak = 0
        self.part, self.current, self.moment = "activations", "", ""
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._value(args[0].dtype)
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _value(self, dtype: torch.dtype) -> Any:
        """Host code asks for a value that does not exist: yes or no is ``answer``, a number 1."""
        self.asked += 1
        value = self.asked % 2 if self.asked > ASKED else self.answer if dtype == torch.bool else 1
        return float(value) if dtype.is_floating_point else bool(value) if dtype == torch.bool else int(value)

    @contextmanager
    def phase(self, part: str, moment: str = "") -> Iterator[None]:
        """What is made inside counts for ``part``."""
        before = self.part, self.current
        self.part, self.current = part, moment
        try:
            yield
        finally:
            self.part, self.current = before

    def start(self) -> None:
        """Forgets the peak so far."""
        self.peak = 0
        self.phases.clear()

    def add(self, part: str, size: int) -> None:
        """Counts bytes for ``part``, or takes them away."""
        self.now[part] += size
        self.total += size
        if self.current:
            self.phases[self.current] = max(self.phases[self.current], self.total)
        if self.total > self.peak:
            self.peak, self.at_peak, self.moment = self.total, self.now.copy(), self.current

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            size = -(-storage.nbytes() // self.block) * self.block
            self.known.add(storage._cdata)
            weakref.finalize(storage, self._forget, storage._cdata, self.part, size).atexit = False
            self.add(self.part, size)

    def _forget(self, key: int, part: str, size: int) -> None:
        self.known.discard(key)
        self.add(part, -size)


class _LikeCuda(TorchFunctionMode):
    """Gives functions on the CPU's fake tensors the memory that they take on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is nn.functional.dropout:
            return _dropout(*args, **kwargs)
        if name in WIDENED and torch.is_autocast_enabled("cpu"):
            half = torch.get_autocast_dtype("cpu")
            args = tree_map_only(Tensor, lambda value: value.float() if value.dtype == half else value, args)
        return func(*args, **kwargs)


def _dropout(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(values, p, True)[0] if training and p > 0 else values


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Any:
    """Fused attention in the dtype that autocast asks for. A mask becomes a bias of that dtype, which this layer keeps."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (part.to(torch.get_autocast_dtype("cpu")) for part in (query, key, value))
    if attn_mask is not None and attn_mask.dtype != query.dtype:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    return _FusedAttention.apply(query, key, value, attn_mask)


class _FusedAttention(torch.autograd.Function):
    """Flash or memory-efficient attention, ``(B, H, S, D)`` without the scores; the output lies as ``(B, S, H, D)``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        normalizer = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, bias, normalizer)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        query, key, value, *_, normalizer = ctx.saved_tensors
        kept = [torch.empty_like(normalizer)]
        if query.dtype != torch.float32:  # the query's gradient adds up in float32
            kept.append(torch.empty_like(query, dtype=torch.float32))
        if key.shape[1] != query.shape[1]:  # grouped heads: first a gradient for every query head
            kept += [query.new_empty(*query.shape[:2], *part.shape[2:]) for part in (key, value)]
        return *(torch.empty_like(part) for part in (query, key, value)), None


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
