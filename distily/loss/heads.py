"""The output embedding of a causal language model, and what the model does to its result; read without forming whole logits.

Letters: B batch, S sequence, N supervised tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from distily.errors import DistilyError
from distily.products import Product, upcast

Receiver = Callable[[Tensor], Tensor]
_receivers: WeakKeyDictionary[nn.Module, Receiver] = WeakKeyDictionary()


def _forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """Stands in for ``forward`` of an output embedding: while a receiver is set, the receiver gets the input."""
    receiver = _receivers.get(module)
    return type(module).forward(module, hidden_states) if receiver is None else receiver(hidden_states)


class OutputHead:
    """The output embedding of ``model`` with the soft-capping or scale that its class applies afterwards.

    Raises ``DistilyError`` where the model has no output embedding or another library replaced its ``forward``.
    """

    def __init__(self, model: Any) -> None:
        module = model.get_output_embeddings()
        if module is None:
            raise DistilyError(f"{type(model).__name__} has no output embeddings; allowed: causal language models.")
        replaced = module.__dict__.get("forward")
        if replaced is not None and getattr(replaced, "__func__", None) is not _forward:
            raise DistilyError(f"{type(model).__name__}: another library (offloading?) replaced the forward of its head.")
        # a bound method, not a closure: a deep copy of the model gets a head of its own that acts natively
        module.forward = MethodType(_forward, module)
        config = model.config.get_text_config()
        self.module: nn.Module = module
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale: float = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    @property
    def rows(self) -> int:
        """Rows of the head: the vocabulary size with its padding."""
        weight = getattr(self.module, "weight", None)
        return int(getattr(self.module, "out_features", 0) or (weight.shape[0] if weight is not None else 0))

    @property
    def is_linear(self) -> bool:
        """Whether the head computes exactly ``x Wᵀ + b`` with weights that autograd sees."""
        return isinstance(self.module, nn.Linear) and type(self.module).forward is nn.Linear.forward

    def product(self, hidden: Tensor, vocabulary: int, dtype: torch.dtype) -> Product | None:
        """The logits of rows ``hidden`` (N, H) before ``dtype`` forms them, cut to ``vocabulary``; None if the head is not linear."""
        if not self.is_linear:
            return None
        head: Any = self.module
        return self.product_of(hidden, head.weight, head.bias, vocabulary, dtype)

    def product_of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocabulary: int, dtype: torch.dtype) -> Product:
        """The product of given parts, without gradient, and what the model's class does to its result."""
        weight, bias = weight.detach()[:vocabulary].to(dtype), None if bias is None else bias.detach()[:vocabulary].to(dtype)
        return Product(hidden.detach().to(dtype), weight, bias, self.scale, self.softcap)

    def finish(self, raw: Tensor) -> Tensor:
        """What the model's class does to the head's output: scale, then soft-capping. ``(n, V) -> (n, V)``."""
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap is not None:
            raw = torch.tanh(raw / self.softcap) * self.softcap
        return raw

    def logits(self, hidden: Tensor, vocabulary: int | None = None) -> Tensor:
        """Logits of rows ``(n, H) -> (n, V)`` in float32 (float64 stays), cut to ``vocabulary``."""
        raw = type(self.module).forward(self.module, hidden)
        return self.finish(upcast(raw[..., :vocabulary]))

    def frozen_logits(self, hidden: Tensor, vocabulary: int | None = None) -> Tensor:
        """``logits``, but no gradient reaches the head's own parameters; also while its input is redirected."""
        if self.is_linear:
            head: Any = self.module
            weight, bias = (None if each is None else each.detach()[:vocabulary] for each in (head.weight, head.bias))
            return self.finish(upcast(nn.functional.linear(hidden.to(head.weight.dtype), weight, bias)))  # type: ignore[arg-type]
        frozen = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        receiver = _receivers.pop(self.module, None)
        try:
            raw: Tensor = torch.func.functional_call(self.module, frozen, (hidden,))
        finally:
            if receiver is not None:
                _receivers[self.module] = receiver
        return self.finish(upcast(raw[..., :vocabulary]))

    @contextmanager
    def redirected(self, receiver: Receiver) -> Iterator[None]:
        """Inside, the head's input goes to ``receiver``, whose result stands for the logits."""
        _receivers[self.module] = receiver
        try:
            yield
        finally:
            _receivers.pop(self.module, None)

    def last_hidden_states(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The input of the head, ``(B, S, H)``: a forward of the body alone, whatever the model's class."""
        caught: list[Tensor] = []

        def receive(hidden_states: Tensor) -> Tensor:
            caught.append(hidden_states)
            return nothing(hidden_states)

        with self.redirected(receive):
            model(**inputs, use_cache=False)
        if len(caught) != 1:
            raise DistilyError(f"{type(model).__name__} called its output embedding {len(caught)} times in a forward, not once.")
        return caught[0]


def nothing(hidden_states: Tensor) -> Tensor:
    """Zeros ``(B, S, 1)`` in place of logits: harmless under soft-capping and scaling."""
    return hidden_states.new_zeros((*hidden_states.shape[:-1], 1))


def select(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (N,) of ``values`` (B, S, H), flattened: ``(N, H)``. What is not selected takes part in nothing."""
    return values.reshape(-1, values.shape[-1]).index_select(0, index)
