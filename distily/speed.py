"""What a training step is computed with: chosen from the configuration and the machine, said, put on the models, taken off again.

    speed = choose(config)
    with speed.applied(student, teacher):
        ...  # training steps

Nothing here changes what is computed beyond rounding. Inside, both models run so; ``Applied.paused`` gives the plain ones back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config as functorch
import torch.utils._triton as triton
from torch import Tensor, nn
from transformers import masking_utils

from distily import precision
from distily.compilation import Compiled
from distily.config import RunConfig
from distily.errors import DistilyError, wrong
from distily.graphs import Graphs
from distily.loss.features import body, decoder_blocks
from distily.loss.readouts import final_norm

BACKEND = "inductor"
SHAPES = 16
"""Lengths that batches may have on a GPU: cuDNN's attention plans each anew, 0.1 to 0.5 s of the host on an H200."""
SHORTEST = 64
RIGHT_PADDED = "sdpa_right_padded"
"""Name under which transformers knows SDPA without a mask for the padding."""
WIDE = "Speed, teacher: float32 weights, which compute in bf16, but its logits in float32; teacher.dtype=bfloat16 is faster."
"""Said of a teacher whose checkpoint is so."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Speed:
    """The choices. ``notes`` has a line for each that could not be had, with the reason."""

    precision: str
    """Of the matrix products: float32, fp16, bf16; or fp8 or int8 in the blocks' linear layers (fp8 also in the teacher's logits, where
    kernels form them) and bf16 elsewhere."""
    autocast: bool
    """Whether float32 weights are computed with in 16 bits."""
    compiled: bool
    """Whether decoder blocks are compiled, one by one, and the norm after them."""
    attention: str | None
    """The kernel that SDPA tries first; None: PyTorch's own order."""
    on_gpu: bool
    graphs: bool | None = False
    """Whether the models' bodies are replayed as CUDA graphs; None: where the device waits for the host."""
    notes: tuple[str, ...] = ()
    loss: str | None = None
    """How the logit terms are computed, known after a first step on a GPU."""

    def widths(self, longest: int) -> tuple[int, ...]:
        """The lengths that a batch is padded to; on a CPU any."""
        if not self.on_gpu:
            return ()
        step = -(-longest // SHAPES // SHORTEST) * SHORTEST or SHORTEST
        return (*range(step, longest, step), longest)

    def described(self, optimizer: str) -> dict[str, str]:
        """Each choice in words; on a CPU there are fewer."""
        products = self.precision
        if self.precision in precision.UNITS:
            logits = " and in teacher's logits that kernels form" if self.precision == "fp8" else ""
            products += f" in the blocks' linear layers{logits}, bf16 elsewhere"
        if self.autocast:
            products += ", over float32 weights by autocast"
        if self.precision == "float32" and self.on_gpu:
            products += " (train.tf32=true allows less)"
        words = {
            "precision": products,
            "compile": "decoder blocks, one by one, and the norm after them" if self.compiled else "nothing",
            "optimizer": optimizer,
        }
        if self.on_gpu:
            order = f"{self.attention}'s kernel first where it can" if self.attention else "PyTorch's own order of kernels"
            words["attention"] = f"in SDPA {order}"
            words["graphs"] = {
                None: "student and teacher as CUDA graphs, if the device is seen to wait for the host",
                True: "student and teacher as CUDA graphs",
                False: "none",
            }[self.graphs]
            words |= {"loss": self.loss} if self.loss else {}
            words["data"] = "pinned, copied without waiting, padded to few lengths"
        return words

    def lines(self, optimizer: str) -> list[str]:
        """``described`` and the notes, a line each, for the screen."""
        return [f"Speed, {key}: {value}." for key, value in self.described(optimizer).items()] + list(self.notes)

    def applied(self, student: Any, teacher: Any | None = None, say: Say = print) -> Applied:
        """A context in which ``student`` and ``teacher`` run so. Enter it when hooks are on the models."""
        return Applied(self, student, teacher, say)


def choose(config: RunConfig) -> Speed:
    """What the configuration asks for, as far as this machine has it.

    Raises ``DistilyError`` for settings that contradict each other.
    """
    on_gpu = torch.cuda.is_available() and not config.train.get("use_cpu")
    notes: list[str] = []
    chosen = _precision(config, on_gpu, notes)
    compiled = on_gpu if config.speed.compile is None else config.speed.compile
    if compiled and on_gpu and not triton.has_triton():
        notes.append("speed.compile: Triton is missing, so nothing is compiled.")
        compiled = False
    attention = config.speed.attention if config.speed.attention != "auto" else None
    if attention is None and on_gpu and torch.cuda.get_device_capability()[0] == 9:
        attention = "cudnn"  # 1.5 to 1.9 times as fast as flash there; said to be slower on Ampere and Blackwell
    if attention and not on_gpu:
        notes.append(f"speed.attention: {attention} is a kernel for GPUs; PyTorch's own order instead.")
        attention = None
    wide = config.student.dtype in ("float32", "auto")
    graphs = _graphs(config, on_gpu, notes)
    return Speed(chosen, wide and chosen not in ("float32", "fp16"), compiled, attention, on_gpu, graphs, tuple(notes))


def _graphs(config: RunConfig, on_gpu: bool, notes: list[str]) -> bool | None:
    wanted = config.speed.graphs
    refusals = {
        "they need a GPU": not on_gpu,
        "what a quantizer's schedule changes would be left out": config.quantizer is not None,
        "they are for one process": int(os.environ.get("WORLD_SIZE", "1")) > 1,
        "activations are checkpointed": any(config.train.get(f"{kind}_checkpointing") for kind in ("gradient", "activation")),
    }
    reason = next((reason for reason, holds in refusals.items() if holds), None)
    if reason is None or wanted is False:
        return wanted
    if on_gpu or wanted:
        notes.append(f"speed.graphs: no CUDA graphs, {reason}.")
    return False


def _precision(config: RunConfig, on_gpu: bool, notes: list[str]) -> str:
    wanted, wide = config.speed.precision, config.student.dtype in ("float32", "auto")
    halves = {name: config.train[name] for name in ("bf16", "fp16") if name in config.train}
    if wanted != "auto" and halves:
        raise DistilyError(
            f"train.{next(iter(halves))}: speed.precision, which is set to {wanted!r}, decides it; allowed: one of them."
        )
    if wanted == "float32" and not wide:
        raise DistilyError(wrong("speed.precision", wanted, f"auto, bf16, fp8 or int8 with student.dtype {config.student.dtype}"))
    if wanted == "auto":
        if halves.get("fp16"):
            return "fp16"
        wanted = "bf16" if not wide or halves.get("bf16", on_gpu) else "float32"
    found = wanted
    for candidate in {"fp8": ("fp8", "int8"), "int8": ("int8",)}.get(wanted, ()):
        reason = precision.refusal(candidate) if on_gpu else "it needs a GPU"
        if reason is None:
            break
        found = "int8" if candidate == "fp8" else "bf16" if on_gpu or not wide else "float32"
        notes.append(f"speed.precision: {candidate} cannot be had, {reason}; {found} instead.")
    if found != "float32" and wide and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        notes.append(f"speed.precision: {torch.cuda.get_device_name()} has no bf16; float32 instead (train.fp16=true is faster).")
        return "float32"
    return found


class Applied:
    """A ``Speed`` on two models while it is entered; may be entered again."""

    def __init__(self, speed: Speed, student: Any, teacher: Any | None, say: Say) -> None:
        self.speed, self.say = speed, say
        self.models = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
        self._modules = CompiledModules(say)
        self._graphs = Graphs(speed.graphs, say)
        self._told: set[str] = set()
        self._stack: ExitStack | None = None

    def __enter__(self) -> Applied:
        with ExitStack() as stack:
            for role, model in self.models.items():
                self._apply(role, model, stack)
            if self.speed.on_gpu and hasattr(masking_utils, "find_packed_sequence_indices"):
                stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", _packed_sequences))
            if self.speed.attention is not None:
                stack.enter_context(_kernels(self.speed.attention))
                # a stored graph is found again without regard to the attention kernel in it
                stack.enter_context(functorch.patch(enable_autograd_cache=False))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._stack is not None
        self._stack.close()
        self._stack = None

    @property
    def settled(self) -> bool:
        """Whether further steps like those that were taken run as the last one did."""
        return self._graphs.settled

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the models are the plain ones: for evaluation, whose many shapes would each be compiled."""
        if self._stack is None:
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _apply(self, role: str, model: Any, stack: ExitStack) -> None:
        if self.speed.precision in precision.UNITS:
            layers = precision.eligible(model)
            stack.callback(precision.lower(layers, self.speed.precision, backward=role == "student"))
            self._tell(f"Speed, {self.speed.precision}: {len(layers)} linear layers of the {role}.")
        name = model.config.get_text_config()._attn_implementation
        if self.speed.on_gpu and name == "sdpa":
            _register()
            model.set_attn_implementation(RIGHT_PADDED)
            stack.callback(model.set_attn_implementation, name)
        halved = self.speed.precision not in ("float32", "fp16") and next(model.parameters()).dtype == torch.float32
        if role == "teacher" and halved:
            if self.speed.on_gpu:
                self._tell(WIDE)
            model.forward = MethodType(_autocasting, model)
            stack.callback(delattr, model, "forward")
        if self.speed.compiled and self._compilable(role, model):
            for module in (*decoder_blocks(model), *_norm(model)):
                module.forward = MethodType(self._modules, module)
                stack.callback(delattr, module, "forward")
            limit = 8 + 4 * len(decoder_blocks(model))  # blocks with hooks inside have graphs of their own
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=limit, skip_nnmodule_hook_guards=False))
        for whole in _body(model) if self.speed.graphs is not False else []:
            whole.forward = MethodType(self._graphs, whole)
            stack.callback(delattr, whole, "forward")
            stack.callback(self._graphs.forget)

    def _compilable(self, role: str, model: Any) -> bool:
        if getattr(model, "is_quantized", False):
            self._tell(f"Speed, compile: not the {role}, whose weights are quantised.")
            return False
        return True

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self.say(line)


class CompiledModules:
    """Runs modules compiled: one function for each class of them, whose graph all of a class share.

    Stands in as ``forward`` on an instance, as a bound method, so hooks on the module and checkpointing stay around it, a deep copy runs
    its own weights, and names in the state dict stay. The first length is compiled as it is, the second one for all others.
    """

    def __init__(self, say: Say) -> None:
        self.say = say
        self.functions: dict[type, Compiled] = {}

    def __call__(self, module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        kind = type(module)
        if kind not in self.functions:
            self.functions[kind] = Compiled(kind.forward, backend=BACKEND)
        function = self.functions[kind]
        was = function.refused
        outputs = function(module, *arguments, **keywords)
        if function.refused != was:
            self.say(f"Speed, compile: {kind.__name__} is not compiled, since that failed: {function.refused}")
        return outputs


def _body(model: Any) -> list[nn.Module]:
    """From token ids to last hidden states, if that can be told and the head, which computes the loss, is outside."""
    try:
        whole = body(model)
    except DistilyError:
        return []
    return [] if any(part is model.get_output_embeddings() for part in whole.modules()) else [whole]


def _norm(model: Any) -> list[nn.Module]:
    """The norm after the blocks, if it can be told and is not one kernel already, by itself or by Liger."""
    try:
        norm = final_norm(model)
    except DistilyError:
        return []
    return [] if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) or "forward" in vars(norm) else [norm]


def _kernels(first: str) -> Any:
    """SDPA with one kernel before the others."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    return sdpa_kernel(list({first: backends[first], **backends}.values()), set_priority=True)


def _register() -> None:
    """SDPA for rows that are padded on the right: a causal model's tokens do not see the padding behind them, so no mask is for it.

    With one, transformers would ask the device whether anything is masked, in each forward, and fused kernels would be out.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
        plain = options.get("allow_is_causal_skip", False)  # not where some tokens may see those behind them
        return sdpa_mask(*arguments, attention_mask=None if plain else attention_mask, **options)

    AttentionInterface.register(RIGHT_PADDED, sdpa_attention_forward)
    AttentionMaskInterface.register(RIGHT_PADDED, mask)


def _packed_sequences(position_ids: Tensor) -> Tensor:
    """Which document of its row each token is in, by positions (B, S) that start anew. transformers' own asks the device, in each
    forward, whether there is more than one; the collator knows, and gives no positions where there is not.
    """
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def _autocasting(model: Any, *arguments: Any, **keywords: Any) -> Any:
    """The forward of a model with float32 weights under autocast to bf16."""
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
        return type(model).forward(model, *arguments, **keywords)
