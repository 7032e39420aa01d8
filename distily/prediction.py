"""Predicted peak memory of a training, from the shapes of the models alone: one training step on tensors without data.

The step is the training's own (``Driver``, ``LocalTeacher``, the terms, the optimizer's class), run under PyTorch's fake tensors while
every storage is counted from its first to its last use. So any architecture, frozen weights, tied weights, gradient checkpointing and
the copies that autocast makes come out as they are; what cannot be run without a GPU is put in by hand:

- Tensors are counted, in a GPU's blocks of 512 bytes; the context, the allocator's cache and fragmentation are not. What is predicted
  is ``torch.cuda.max_memory_allocated``, on a CPU the memory of tensors (not the size of the process).
- Fake tensors live on the CPU, since a PyTorch without CUDA has no autograd for others. For a GPU, ``scaled_dot_product_attention``
  takes the memory of the fused kernels, dropout keeps a mask of bytes, and autocast widens what it widens on CUDA.
- A GPU also holds the workspace of cuBLAS, ``CUBLAS_WORKSPACE`` for each of the two threads that call it.
- The step is a later one: the optimizer's state exists. Gradients are freed before the forward (set to None), unless they accumulate.
- All rows are full. ``padded`` says whether there is a mask of ``(B, 1, S, S)`` all the same, as there is if one row is shorter.
- Optimizers from other libraries than PyTorch and transformers cannot run here: ``STATE_BYTES`` for each trained parameter.
- One process. Distributed training adds buckets as large as the gradients (DDP), or divides (FSDP2).

Letters: B batch, S sequence, N supervised tokens, H heads, D width of a head.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from distily.batch import model_inputs
from distily.chunks import Piece
from distily.driver import Driver, Step
from distily.teachers import LocalTeacher
from distily.terms import Builder, Term, build_terms
from distily.spec import Component

PARTS = ("teacher", "student", "gradients", "optimizer", "activations", "loss", "workspace")
BLOCK = 512
CUBLAS_WORKSPACE = 32 * 2**20
STATE_BYTES = {"paged": 0, "4bit": 1, "8bit": 2, "lion": 4, "sgd": 4}
"""Bytes of optimizer state for a parameter, by what the optimizer's name contains; otherwise two values of float32."""
PIECES = 2
"""Chunks of a loss that are walked: each frees what it took, so further ones change nothing."""
WIDENED = frozenset("pow __pow__ __rpow__ rsqrt exp expm1 log log1p reciprocal layer_norm norm softplus cosine_similarity".split())
"""Functions that autocast runs in float32 on CUDA and not on a CPU."""


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes at the moment of the highest memory; the parts add up to ``peak``.

    ``student`` and ``teacher`` are weights. ``gradients`` is what the backward made and still holds: gradients of weights and of
    activations. ``activations`` come from the forwards, with autocast's copies of weights. ``loss`` is the chunked loss: logits, the
    objectives' own tensors, and the head's gradient until the backward takes it. ``moment`` is the phase of the peak.
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
    device_type: str

    def __str__(self) -> str:
        what = "GPU memory" if self.device_type == "cuda" else "memory of tensors"
        parts = ", ".join(f"{name} {_size(getattr(self, name))}" for name in PARTS if getattr(self, name))
        return f"predicted peak {what}: {_size(self.peak)} ({parts}), in the {self.moment}"


def predict_memory(
    *,
    student: Any,
    teacher: Any,
    objectives: Sequence[Component],
    builder: Builder,
    vocabulary: int,
    rows: int,
    length: int,
    arguments: Any,
    chunk_rows: int | None = None,
    mixed_precision: bool = False,
    padded: bool = True,
    packed: bool = False,
    device_type: str = "cuda",
    seed: int = 0,
) -> MemoryPrediction:
    """The peak of a training step with ``rows`` sequences of ``length`` tokens in each micro-batch.

    ``student`` and ``teacher`` may lie on the meta device, in the dtypes of the training; they are not changed. ``arguments`` are the
    ``TrainingArguments``; ``builder`` the plugins. ``packed``: batches carry ``position_ids`` instead of a mask.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    memory = _Memory(BLOCK if device_type == "cuda" else 1, answer=not (padded or packed))
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        terms = build_terms(objectives, builder, student, teacher, seed)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_untraced())
        stack.enter_context(memory)
        if device_type == "cuda":
            stack.enter_context(_LikeCuda())
            memory.add("workspace", 2 * CUBLAS_WORKSPACE)
        with memory.phase("teacher"):
            teacher = _without_data(teacher)
        with memory.phase("student"):
            student, terms = _without_data(student), _without_data(terms)
        needed = any(term.description.needs_teacher for term in terms.values())
        wanted = [feature for term in terms.values() for feature in term.teacher_features]
        source = LocalTeacher(teacher, vocabulary, wanted) if needed else None
        driver = _CountedDriver(terms, source, vocabulary, chunk_rows, seed)
        driver.memory = memory
        driver.attach(student)
        _simulate(driver, student, _batch(rows, length, packed), arguments, mixed_precision, device_type, memory)
    parts = {name: memory.at_peak[name] for name in PARTS}
    return MemoryPrediction(**parts, peak=sum(parts.values()), moment=memory.moment, device_type=device_type)


def _simulate(
    driver: Driver, student: Any, batch: Mapping[str, Any], arguments: Any, mixed_precision: bool, device_type: str, memory: _Memory
) -> None:
    """The optimizer's state, then one whole step of training, as ``DistillationTrainer`` does it."""
    student.train()
    if arguments.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if mixed_precision:
        dtype = torch.float16 if arguments.fp16 else torch.bfloat16
        student.forward = torch.autocast("cpu", dtype)(student.forward)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    step = _optimizer_step(trained, student, arguments, device_type, memory)
    with memory.phase("gradients"):
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    with memory.phase("optimizer"):
        step()
    if arguments.gradient_accumulation_steps == 1:
        student.zero_grad()
    memory.start()
    loss = _forward(driver, student, batch, memory)
    with memory.phase("gradients", "backward"):
        torch.autograd.backward(loss)  # the method would switch the function mode off
    del loss
    with memory.phase("gradients", "optimizer step"):
        if arguments.max_grad_norm:
            nn.utils.clip_grad_norm_(trained, arguments.max_grad_norm, foreach=False)
        step()


def _forward(driver: Driver, student: Any, batch: Mapping[str, Any], memory: _Memory) -> Tensor:
    """What lives only as long as the loss is computed goes with this frame."""
    with memory.phase("activations", "forward"), driver.step(batch):
        loss: Tensor = student(**model_inputs(batch), use_cache=False)["loss"]
    return loss


def _optimizer_step(trained: list[Tensor], student: Any, arguments: Any, device_type: str, memory: _Memory) -> Any:
    """A call that does what the optimizer's step does to memory; the first makes the state."""
    from transformers import Trainer

    name = str(getattr(arguments.optim, "value", arguments.optim))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, student)
    except (ImportError, ValueError, RuntimeError):
        kind, options = None, {}
    if kind is not None and kind.__module__.split(".")[0] in ("torch", "transformers"):
        if device_type == "cuda" and "adamw" in name and not options.get("fused"):
            options["foreach"] = True  # PyTorch's choice on a GPU
        return kind(trained, **options).step
    each = next((size for part, size in STATE_BYTES.items() if part in name), 8)
    memory.add("optimizer", each * sum(parameter.numel() for parameter in trained))
    return lambda: None


def _batch(rows: int, length: int, packed: bool) -> dict[str, Any]:
    """A batch as Distily's collator makes it, every row full."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch: dict[str, Any] = {name: ids.clone() for name in ("input_ids", "labels", "shift_labels")}
    batch["supervised"] = torch.zeros(rows * (length - 1), dtype=torch.long)
    batch["lengths"] = [length - 1] * rows
    batch["position_ids" if packed else "attention_mask"] = ids
    return batch


def _without_data(module: Any) -> Any:
    """A copy of ``module`` with its shapes, dtypes and ties, whose tensors hold no data."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


@contextmanager
def _untraced() -> Iterator[None]:
    """transformers takes fake tensors for tracing and then always builds a mask; here its questions are answered instead."""
    from transformers import masking_utils

    if not hasattr(masking_utils, "is_tracing"):
        yield
        return
    with mock.patch.object(masking_utils, "is_tracing", lambda *tensors: False):
        yield


class _CountedDriver(Driver):
    """The driver, with its memory under its own name and few of its many equal chunks."""

    memory: _Memory

    def _on_head(self, step: Step, hidden_states: Tensor) -> Tensor:
        with self.memory.phase("loss", "loss"):
            return super()._on_head(step, hidden_states)

    def _feature_terms(self, step: Step) -> None:
        with self.memory.phase("loss", "loss"):
            super()._feature_terms(step)

    def _pieces(self, terms: Sequence[Term], step: Step) -> list[Piece]:
        kept: Counter[int] = Counter()
        pieces = []
        for piece in super()._pieces(terms, step):
            kept[id(piece.terms[0])] += 1
            if kept[id(piece.terms[0])] <= PIECES:
                pieces.append(piece)
        return pieces


class _Memory(TorchDispatchMode):
    """Counts the bytes of living storages, by the part of the training in which they were made, and keeps them at the peak."""

    def __init__(self, block: int, answer: bool) -> None:
        super().__init__()
        self.block, self.answer, self.asked = block, answer, 0
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.total = self.peak = 0
        self.part = self.current = self.moment = ""
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._value(args[0])
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _value(self, tensor: Tensor) -> Any:
        """Host code asks for a value that does not exist. In the end both answers come in turn, so that every loop ends."""
        self.asked += 1
        value = self.answer if self.asked < 1000 else self.asked % 2
        return bool(value) if tensor.dtype == torch.bool else int(value) if not tensor.is_floating_point() else float(value)

    @contextmanager
    def phase(self, part: str, moment: str = "") -> Iterator[None]:
        """What is made inside counts for ``part``."""
        before = self.part, self.current
        self.part, self.current = part, moment
        try:
            yield
        finally:
            self.part, self.current = before

    def add(self, part: str, size: int) -> None:
        """Counts bytes of no tensor (or, negative, the end of one's)."""
        self.now[part] += size
        self.total += size
        if self.total > self.peak:
            self.start()

    def start(self) -> None:
        """The peak is what there is now."""
        self.peak, self.at_peak, self.moment = self.total, self.now.copy(), self.current

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            size = -(-storage.nbytes() // self.block) * self.block
            self.known.add(storage._cdata)
            weakref.finalize(storage, self._forget, storage._cdata, self.part, size).atexit = False
            self.add(self.part, size)
        return tensor

    def _forget(self, key: int, part: str, size: int) -> None:
        self.known.discard(key)
        self.add(part, -size)


class _LikeCuda(TorchFunctionMode):
    """Gives functions on the CPU's fake tensors the memory that they take on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        if name == "dropout" and func is nn.functional.dropout:
            return _dropout(*args, **kwargs)
        if name in WIDENED and torch.is_autocast_enabled("cpu"):
            args = tree_map_only(Tensor, lambda value: value.float() if value.dtype in (torch.bfloat16, torch.float16) else value, args)
        return func(*args, **kwargs)


def _dropout(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(values, p, True)[0] if training and p > 0 else values


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **rest: Any
) -> Tensor:
    """Fused attention in the dtype that autocast asks for. A mask becomes a bias of that dtype, kept for the backward of this layer."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (part.to(torch.get_autocast_dtype("cpu")) for part in (query, key, value))
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
    return _FusedAttention.apply(query, key, value, attn_mask)


class _FusedAttention(torch.autograd.Function):
    """Flash or memory-efficient attention: (B, H, S, D) without the scores; the output lies as (B, S, H, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        heads = (*query.shape[:-1], value.shape[-1])
        output = query.new_empty(heads[0], heads[2], heads[1], heads[3]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, bias, query.new_empty(heads[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, output, _, normalizer = ctx.saved_tensors
        kept = [torch.empty_like(normalizer)]
        if query.dtype != torch.float32:
            kept.append(torch.empty_like(query, dtype=torch.float32))  # the query's gradient adds up in float32
        if key.shape[1] != query.shape[1]:  # grouped heads: gradients of every query head first
            kept += [query.new_empty(*query.shape[:2], *part.shape[2:]) for part in (key, value)]
        return *(torch.empty_like(part) for part in (query, key, value)), None


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
