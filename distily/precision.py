"""8-bit arithmetic: linear layers of the decoder blocks whose products run in fp8 or int8, over the weights that training goes on with.

A layer *becomes* its 8-bit twin in place and stays the object that it is. So hooks, ties and optimizers keep pointing, the state dict
is that of the plain model, and a layer becomes plain again. The output head and the embeddings are never touched; a teacher's logits
the kernels of the loss form in fp8 from a copy of its head, see ``LocalTeacher``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from distily.loss.features import decoder_blocks
from distily.products import EIGHT_BIT_MULTIPLE, Float8Rows

UNITS = {"fp8": (8, 9), "int8": (8, 0)}
"""The CUDA compute capability from which on there are units for it."""


def refusal(precision: str) -> str | None:
    """Why this machine cannot compute ``fp8`` or ``int8``; None where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    needed, found = UNITS[precision], torch.cuda.get_device_capability()
    if found < needed:
        return f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}, not {needed[0]}.{needed[1]}"
    if find_spec("torchao") is None:
        return "torchao is not installed (pip install 'distily[gpu]')"
    return None


def eligible(model: Any) -> list[nn.Linear]:
    """The plain linear layers inside the blocks whose dimensions are multiples of 16."""
    layers = [layer for block in decoder_blocks(model) for layer in block.modules() if type(layer) is nn.Linear]
    return [layer for layer in layers if not any(size % EIGHT_BIT_MULTIPLE for size in layer.weight.shape)]


def lower(layers: Sequence[nn.Linear], precision: str, backward: bool = True) -> Callable[[], None]:
    """Lets ``layers`` compute in ``precision``, in the ``backward`` too if there is one; returns what makes them plain again."""
    added = {}
    for layer in layers:
        twin = _TWINS[precision, backward](layer)
        added[layer] = {name: value for name, value in vars(twin).items() if name not in vars(layer)}
        vars(layer).update(added[layer])
        layer.__class__ = type(twin)

    def undo() -> None:
        for layer, names in added.items():
            for name in names:
                delattr(layer, name)
            layer.__class__ = nn.Linear

    return undo


class FrozenFloat8(nn.Linear):
    """A teacher's layer: its weight in fp8 once, with a scale for each row; its inputs in each forward, for each token. No backward."""

    low: Tensor
    low_scale: Tensor

    @classmethod
    def of(cls, layer: nn.Linear) -> FrozenFloat8:
        """The twin of a layer."""
        twin = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        weight = Float8Rows.of(layer.weight.detach())
        twin.low, twin.low_scale = weight.values, weight.scale.T.contiguous()
        return twin

    def forward(self, inputs: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``, in the dtype that ``nn.Linear`` would return."""
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        rows = Float8Rows.of(inputs.reshape(-1, self.in_features))
        products = torch._scaled_mm(
            rows.values,
            self.low.T,
            scale_a=rows.scale,
            scale_b=self.low_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        outputs = products.to(dtype).reshape(*inputs.shape[:-1], self.out_features)
        return outputs if self.bias is None else outputs + self.bias.to(dtype)


def _fp8(layer: nn.Linear) -> nn.Linear:
    """The forward scaled by token and by row of the weight, which joins the kernels before it; both backward products by matrix, so
    that one cast serves two layouts.
    """
    from torchao.float8 import CastConfig, Float8LinearConfig, ScalingGranularity, convert_to_float8_training

    by_row, by_matrix = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE), CastConfig()
    config = Float8LinearConfig(
        cast_config_input=by_row,
        cast_config_weight=by_row,
        cast_config_grad_output=by_matrix,
        cast_config_weight_for_grad_input=CastConfig(),
        cast_config_input_for_grad_weight=CastConfig(),
        pad_inner_dim=True,  # the number of tokens, where it is no multiple of 16
    )
    return convert_to_float8_training(layer, config=config)


def _int8(layer: nn.Linear) -> nn.Linear:
    """Both operands of each of the three products in 8-bit integers, scaled by the largest value of each row or column."""
    kind, config = _int8_linear()
    return kind(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta", config=config)


@cache
def _int8_linear() -> tuple[Any, Any]:
    # the layer, since torchao 0.18 does not reach int8 by its other way, a weight of a tensor subclass: that computes as before
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig, Int8MixedPrecisionTrainingLinear

    class Int8Linear(Int8MixedPrecisionTrainingLinear):
        """torchao's layer under autocast: its weight follows the type of the input, so the input follows autocast."""

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            kind = input.device.type
            values = input.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else input
            return super().forward(values).to(values.dtype)  # a bias may be wider

    return Int8Linear, Int8MixedPrecisionTrainingConfig()


_TWINS: dict[tuple[str, bool], Callable[[nn.Linear], nn.Linear]] = {
    ("fp8", True): _fp8,
    ("fp8", False): FrozenFloat8.of,
    ("int8", True): _int8,
    ("int8", False): _int8,
}
"""The twin for a precision and whether there is a backward."""
