"""Features by forward hooks on named modules, so that SDPA and flash attention stay.

Letters: B batch, S sequence, H hidden width, L blocks. Blocks count from 1; ``hidden_states`` of block 0 is the input of block 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from distily.errors import DistilyError

Feature = tuple[str, int]
"""(site, block), such as ("hidden_states", 3)."""

PROJECTIONS = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}
FUSED = ("qkv_proj", "query_key_value", "c_attn")


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The model's list of blocks. Raises ``DistilyError`` where no list has ``num_hidden_layers`` entries."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and next(module[0].parameters(), None) is not None:
            return module
    raise DistilyError(f"{type(model).__name__}: no list of {count} blocks was found, so features cannot be captured.")


def width(model: Any, feature: Feature) -> int:
    """The last dimension of a feature."""
    config = model.config.get_text_config()
    site, _ = feature
    if site == "hidden_states":
        return int(config.hidden_size)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    grouped = getattr(config, "num_key_value_heads", None) or heads
    return int(head_dim * (heads if site == "queries" else grouped))


class FeatureCapture:
    """Keeps the named features of the forward that runs while it is open; with gradient where the model has one.

    Only the first firing of a hook counts: activation checkpointing runs a block again during the backward.
    """

    def __init__(self, model: Any, wanted: Iterable[Feature]) -> None:
        self.caught: dict[Feature, Tensor] = {}
        self._open = False
        self._handles: list[Any] = []
        blocks = decoder_blocks(model) if (wanted := sorted(set(wanted))) else nn.ModuleList()
        for feature in wanted:
            self._handles.append(self._hook(model, blocks, feature))

    @contextmanager
    def opened(self) -> Iterator[dict[Feature, Tensor]]:
        """Captures while inside; the features are released afterwards."""
        self._open = True
        try:
            yield self.caught
        finally:
            self._open = False
            self.caught = {}

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, feature: Feature, value: Any) -> None:
        if self._open and feature not in self.caught:
            self.caught[feature] = value[0] if isinstance(value, tuple) else value

    def _hook(self, model: Any, blocks: Any, feature: Feature) -> Any:
        site, block = feature
        if site == "hidden_states" and block == 0:

            def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                self._keep(feature, arguments[0] if arguments else keywords["hidden_states"])

            return blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        if block == 0:
            raise DistilyError(f"{site}: block 0 is the embedding and has no attention; allowed: 1 to {len(blocks)}.")
        if site == "hidden_states":
            return blocks[block - 1].register_forward_hook(lambda module, inputs, output: self._keep(feature, output))
        module, part = _projection(model, blocks[block - 1], feature)
        return module.register_forward_hook(lambda module, inputs, output: self._keep(feature, part(output)))


def _projection(model: Any, block: nn.Module, feature: Feature) -> tuple[nn.Module, Any]:
    """The module that computes q, k or v in a block, and how to take the part from its output."""
    named = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
    site = feature[0]
    if PROJECTIONS[site] in named:
        return named[PROJECTIONS[site]], lambda output: output
    fused = next((name for name in FUSED if name in named), None)
    if fused is None:
        raise DistilyError(f"{type(model).__name__}: no query, key and value projections were found for {site!r}.")
    order = list(PROJECTIONS)
    sizes = [width(model, (name, 1)) for name in order]
    if fused == "query_key_value":  # GPT-NeoX keeps q, k and v of one head side by side
        heads = model.config.num_attention_heads

        def interleaved(output: Tensor) -> Tensor:
            split = output.reshape(*output.shape[:-1], heads, 3, -1)
            return split[..., order.index(site), :].flatten(-2)

        return named[fused], interleaved
    return named[fused], lambda output: output.split(sizes, dim=-1)[order.index(site)]
