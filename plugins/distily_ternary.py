"""Ternary (1.58-bit) students: trained with weights in {-s, 0, s}, exported as packed BitNet files.

One matrix W of shape (out, in) and one token x of shape (in,), with the arithmetic in fp32:

    s = max(mean|W|, 1e-5)            T = clip(round(W * (1/s)), -1, 1)        one s per matrix
    a = 127 / max(absmax(x), 1e-5)    q = clip(round(x * a), -128, 127)        one a per token
    y = (T q) / (a * (1/s)) + bias

Rounding has no useful gradient: both are straight-through, dL/dW := dL/d(sT), dL/dx := dL/d(q/a).
Warm-up replaces W by W + lam (sT - W) and x by x + lam (q/a - x), with lam rising from 0 to 1.

That is the forward of transformers' own ``BitLinear``, operation for operation. T and q are small
integers, so T q is exact in fp32 in whatever order it is summed: a reloaded fp32 export gives the
very logits of the training forward.

Source: Ma et al. 2024, "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits" (BitNet
b1.58), arXiv:2402.17764. Warm-up: Hugging Face, "Fine-tuning LLMs to 1.58bit", 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from distily.errors import DistilyError, unknown
from distily.hookspecs import hookimpl
from distily.quantization import Quantizer
from distily.schema import Between

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST = 1e-5
"""Floor of mean|W| and of absmax(x), as in transformers: a row of zeros must not divide by 0."""

ROWS_PER_BYTE = 4
OBJECTIVES = "distily_objectives."
"""Modules of the loss (projectors) that travel with the student but are no part of it."""


def _wide(tensor: Tensor) -> Tensor:
    """Detached, in fp32 or better: a scale computed in bf16 would be off by up to 0.4 %."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def weight_scale(weight: Tensor) -> Tensor:
    """``1/s`` of a matrix (out, in), shape (1,): the number that the packed file stores."""
    return 1.0 / _wide(weight).abs().mean().clamp(min=SMALLEST).reshape(1)


def token_scale(inputs: Tensor) -> Tensor:
    """``a`` of each token: (..., in) to (..., 1)."""
    return 127.0 / _wide(inputs).abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST)


class _Codes(torch.autograd.Function):
    """Integer codes of ``latent * scale``; the gradient is that of the product without rounding.

    Not ``u + (round(u) - u).detach()``: a compiler that fuses its multiplication and addition makes
    codes that are almost integers.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(scale)
        # Codes up to 128 are exact in every floating dtype, so the product T q may run in bf16.
        return (latent.to(scale.dtype) * scale).round().clamp(low, high).to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (scale,) = ctx.saved_tensors
        return (grads[0] * scale).to(grads[0].dtype), None, None, None


_codes: Callable[[Tensor, Tensor, int, int], Tensor] = _Codes.apply


def ternary_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """``T``: the shape and dtype of ``weight``, values -1, 0 and 1, straight-through."""
    return _codes(weight, scale, -1, 1)


def token_codes(inputs: Tensor, scale: Tensor) -> Tensor:
    """``q``: the shape and dtype of ``inputs``, integers from -128 to 127, straight-through."""
    return _codes(inputs, scale, -128, 127)


def _blend(latent: Tensor, quantised: Tensor, lam: float) -> Tensor:
    """``latent + lam (quantised - latent)`` with the gradient of ``latent``."""
    return latent + lam * (quantised - latent).detach().to(latent.dtype)


class TernaryLinear(nn.Linear):
    """``nn.Linear`` whose latent weight (out, in), under the plain key ``weight``, acts as ternary.

    ``lam`` is a plain number: it is copied by ``deepcopy``, stays out of the state dict, costs no
    device synchronisation, and is set again from the step before each step of a resumed run.
    It is 1 until told otherwise: a student that is loaded to be evaluated or exported is ternary.
    """

    lam: float = 1.0

    @classmethod
    def of(cls, linear: nn.Linear) -> TernaryLinear:
        """A ternary layer with the same Parameter objects: optimizers and ties keep pointing."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``, in the dtype that ``nn.Linear`` would return."""
        by_weight, by_token = weight_scale(self.weight), token_scale(inputs)
        weight, tokens = ternary_codes(self.weight, by_weight), token_codes(inputs, by_token)
        if self.lam < 1.0:
            weight = _blend(self.weight, weight / by_weight, self.lam)
            tokens = _blend(inputs, tokens / by_token, self.lam)
            return nn.functional.linear(tokens, weight, self.bias)
        products = nn.functional.linear(tokens, weight)
        outputs = products / (by_weight * by_token)
        outputs = outputs if self.bias is None else outputs + self.bias
        return outputs.to(products.dtype)  # under autocast too

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lam={self.lam:g}"


def pack(codes: Tensor) -> Tensor:
    """``T`` (out, in) as bytes (out/4, in): the rows in four bands, two bits for each band.

    ``byte[r, c] = u[r, c] | u[r + out/4, c] << 2 | u[r + out/2, c] << 4 | u[r + 3 out/4, c] << 6``
    with ``u = T + 1``.
    """
    first, second, third, fourth = (codes + 1).to(torch.uint8).chunk(ROWS_PER_BYTE)
    return first | second << 2 | third << 4 | fourth << 6


def is_ternary(weight: Tensor) -> bool:
    """Whether every row holds only -s, 0 and s, with zeros: absmean would shrink such a scale.

    By rows, so that a matrix with several scales is noticed too. Without zeros absmean is right.
    """
    sizes = weight.detach().abs()
    zeros = sizes == 0
    repeated = zeros | (sizes == sizes.amax(dim=1, keepdim=True))
    return bool(repeated.all() and zeros.any() and not zeros.all())


def _linears(student: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` of the student proper, by name."""
    return {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(OBJECTIVES)
    }


def _convertible(student: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers that transformers' BitNet loader converts in this model, by name.

    Its own functions decide (output head, tied modules, kept in fp32), so writer and loader agree.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    in_fp32 = list(student._keep_in_fp32_modules or ())
    kept = HfQuantizer.get_modules_to_not_convert(student, keep_in_fp32_modules=in_fp32)
    layers = _linears(student).items()
    return {name: layer for name, layer in layers if should_convert_module(name, kept)}


def _expert_parameters(student: nn.Module) -> list[str]:
    """Names of parameters with three dimensions that are no convolution: experts in one tensor."""
    return [
        f"{name}.{key}"
        for name, module in student.named_modules()
        if not isinstance(module, nn.Conv1d) and not f"{name}.".startswith(OBJECTIVES)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


class Ternary(Quantizer):
    """BitNet b1.58: weights in {-s, 0, s}, activations in 8 bits, trained straight-through.

    Options:
        warmup: share of the training steps over which lam rises linearly from 0 to 1; 0 trains
            ternary from the first step. The last step is always at 1.
        skip: further linear layers to keep in full precision, by the end of their names
            (``o_proj``, ``layers.0.mlp.down_proj``). The output head and tied modules always stay.

    For models built from ``nn.Linear``: Llama, Qwen2, Qwen3, Phi-3 and the like. A fused matrix
    (Phi-3 ``qkv_proj``, ``gate_up_proj``) has one scale.
    """

    aliases = ("bitnet", "bitlinear")

    def __init__(self, *, warmup: Annotated[float, Between(0, 1)] = 0.1, skip: tuple[str, ...] = ()) -> None:
        self.warmup = warmup
        self.skip = tuple(skip)

    def prepare(self, student: PreTrainedModel) -> PreTrainedModel:
        """Replace the linear layers by ``TernaryLinear``, in place; parameters and keys stay."""
        for name, linear in self._chosen(student).items():
            student.set_submodule(name, TernaryLinear.of(linear))
        return student

    def _chosen(self, student: PreTrainedModel) -> dict[str, nn.Linear]:
        """The layers to replace, or a ``DistilyError`` that says why this model is no student."""
        model = type(student).__name__
        if experts := _expert_parameters(student):
            raise DistilyError(
                f"ternary: {model} is not supported: {experts[0]} holds the experts of a layer in"
                " one tensor, which the packed format cannot hold."
            )
        layers = _convertible(student)
        names = list(layers)
        for suffix in self.skip:
            skipped = [name for name in names if f".{name}".endswith(f".{suffix}")]
            if not skipped:
                ends = {name.rpartition(".")[2] for name in names}
                raise DistilyError(unknown("quantizer ternary: skip", suffix, ends))
            for name in skipped:
                layers.pop(name, None)
        if not layers:
            raise DistilyError(
                f"ternary: {model} has no layer to make ternary: no nn.Linear is left besides the"
                " output head and the skipped layers (GPT-2 is built from Conv1D)."
            )
        sizes = {name: layer.out_features for name, layer in layers.items()}
        if odd := [f"{name} ({size})" for name, size in sizes.items() if size % ROWS_PER_BYTE]:
            raise DistilyError(
                f"ternary: {model}: the packed format needs a number of outputs that is a multiple"
                f" of {ROWS_PER_BYTE}; these are not: {', '.join(odd)}. Name them in skip."
            )
        return layers

    def on_progress(self, student: PreTrainedModel, step: int, max_steps: int) -> None:
        """Set ``lam`` for step ``step``, counted from 0. It is constant after warm-up."""
        # Not beyond the last step, or a run with warmup 1 would end without having been ternary.
        steps = min(self.warmup * max_steps, max_steps - 1)
        lam = step / steps if step < steps else 1.0
        for module in student.modules():
            if isinstance(module, TernaryLinear):
                module.lam = lam

    def convert(self, student: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The packed tensors and the ``quantization_config`` of transformers' ``bitlinear``.

        A ternary layer becomes ``weight`` (uint8, out/4 x in), ``weight_scale`` (fp32, ``1/s``) and
        ``bias``. Tied weights are left out; all other tensors are the student's own, not copies.
        """
        tied = set(student.all_tied_weights_keys)
        tensors = {
            key: tensor.detach()
            for key, tensor in student.state_dict().items()
            if key not in tied and not key.startswith(OBJECTIVES)
        }
        layers = _linears(student)
        ternary = {name: lay for name, lay in layers.items() if isinstance(lay, TernaryLinear)}
        if not ternary:
            raise DistilyError("ternary: the student has no ternary layer; prepare it first.")
        for name, layer in ternary.items():
            tensors |= _packed(name, layer)
        return tensors, {
            "quant_method": "bitnet",
            "linear_class": "bitlinear",
            "quantization_mode": "offline",
            # A list replaces the loader's own choice, so it names every linear layer that stays.
            "modules_to_not_convert": [name for name in layers if name not in ternary],
        }


@torch.no_grad()
def _packed(name: str, layer: TernaryLinear) -> dict[str, Tensor]:
    """The tensors of one layer, from the scale and the codes that its forward uses."""
    if layer.lam < 1.0:
        raise DistilyError(
            f"ternary: the student is still in warm-up ({name}: lam {layer.lam:g}, not 1), so a"
            " ternary export would be another model; train longer or lower warmup."
        )
    if is_ternary(layer.weight):
        raise DistilyError(
            f"ternary: {name}.weight is already ternary; its scale would be estimated again and"
            " come out too small. Start from the trained checkpoint, not from an export."
        )
    scale = weight_scale(layer.weight)
    if not torch.isfinite(scale).all():
        raise DistilyError(f"ternary: {name}.weight is not finite; the run diverged.")
    packed = pack(ternary_codes(layer.weight, scale))
    return {f"{name}.weight": packed, f"{name}.weight_scale": scale.float()}


@hookimpl
def distily_quantizers() -> dict[str, type[Quantizer]]:
    """The quantizers of this plugin."""
    return {"ternary": Ternary}
