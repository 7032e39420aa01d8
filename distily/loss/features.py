"""Features by forward hooks on named modules, so that SDPA and flash attention stay.

A place is a tensor with which the model's own forward goes on; a feature is made of the tensors of one or two places.
Letters: B batch, S sequence, H width, L blocks. Blocks count from 1 to L; ``hidden_states`` of block 0 is the input of block 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from distily.errors import DistilyError
from distily.loss.attention import AttentionScores, Receiver, Scoring, make_watchable, watched

Feature = tuple[str, int]
"""(site, block), such as ("hidden_states", 3)."""
Place = tuple[str, int]
"""(name of a tensor in the block, block): a site, ``qkv`` where the three are one, ``query`` or ``key`` as the attention gets them."""

PROJECTIONS = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}
FUSED = ("qkv_proj", "query_key_value", "c_attn")
LAYOUTS = {"gpt2": "parts", "phi3": "parts", "gpt_neox": "heads"}
"""How a fused projection is laid out, by ``model_type``: all of q, then k, then v; or q, k and v of each head side by side."""
OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "wo")


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The model's list of blocks. Raises ``DistilyError`` where no list has ``num_hidden_layers`` entries."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and next(module[0].parameters(), None) is not None:
            return module
    raise DistilyError(f"{type(model).__name__}: no list of {count} blocks was found, so features cannot be captured.")


def body(model: Any) -> nn.Module:
    """The module that holds the blocks: from token ids to the last hidden states."""
    blocks = decoder_blocks(model)
    return next(module for module in model.modules() if any(child is blocks for child in module.children()))


def width(model: Any, feature: Feature) -> int:
    """The last dimension of a feature; for ``attentions``, whose last dimension is the text's, the number of heads."""
    config = model.config.get_text_config()
    site, _ = feature
    heads = int(config.num_attention_heads)
    if site == "attentions":
        return heads
    if site not in PROJECTIONS:
        return int(config.hidden_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    grouped = getattr(config, "num_key_value_heads", None) or heads
    return int(head_dim * (heads if site == "queries" else grouped))


class FeatureCapture:
    """Keeps the tensors that the wanted features are made of, from the forward that runs while it is open.

    Only the first firing of a hook counts: activation checkpointing runs a block again during the backward.
    """

    def __init__(self, model: Any, wanted: Iterable[Feature]) -> None:
        self.model = model
        self.wanted = tuple(sorted(set(wanted)))
        self._open = False
        self._tensors: dict[Place, Tensor] = {}
        self._scoring: dict[int, Scoring] = {}
        self._receivers: dict[nn.Module, Receiver] = {}
        self._undo: list[Callable[[], None]] = []
        self._blocks = decoder_blocks(model) if self.wanted else nn.ModuleList()
        for feature in self.wanted:
            if not self._first(feature) <= feature[1] <= len(self._blocks):
                raise DistilyError(
                    f"{feature[0]}: block {feature[1]} has none; allowed: {self._first(feature)} to {len(self._blocks)}."
                )
        for place in sorted({place for feature in self.wanted for place in self.places(feature)}):
            self._watch(place)

    def places(self, feature: Feature) -> tuple[Place, ...]:
        """The places whose tensors make a feature."""
        site, block = feature
        if site == "attentions":
            return ("query", block), ("key", block)
        if site in PROJECTIONS and _is_fused(self._blocks[block - 1]):
            return (("qkv", block),)
        return (("hidden_states" if site == "logit_lens" else site, block),)

    @contextmanager
    def opened(self) -> Iterator[dict[Place, Tensor]]:
        """Captures while inside, with gradient where the model has one; features are built inside, and released afterwards."""
        self._open = True
        try:
            with watched(self._receivers):
                yield self._tensors
        finally:
            self._open = False
            self._tensors, self._scoring = {}, {}

    def feature(self, feature: Feature, tensors: Mapping[Place, Tensor]) -> Any:
        """A feature of the captured tensors, or of others in their stead (detached ones, say): ``(B, S, H)``, or ``AttentionScores``.

        Raises ``DistilyError`` where the forward did not come by.
        """
        site, block = feature
        places = self.places(feature)
        if missing := [place[0] for place in places if place not in tensors]:
            raise DistilyError(f"{type(self.model).__name__}: no {' and '.join(missing)} of block {block} in this forward.")
        if site == "attentions":
            return AttentionScores(tensors[places[0]], tensors[places[1]], self._scoring[block])
        tensor = tensors[places[0]]
        return self._part(feature, tensor) if places[0][0] == "qkv" else tensor

    def remove(self) -> None:
        """Leaves the model as it was."""
        for undo in self._undo:
            undo()
        self._undo = []

    @staticmethod
    def _first(feature: Feature) -> int:
        """The first block that has such a feature: block 0 is the embedding and has no attention."""
        return 0 if feature[0] in ("hidden_states", "logit_lens") else 1

    def _keep(self, place: Place, value: Any) -> None:
        if self._open and place not in self._tensors:
            self._tensors[place] = value[0] if isinstance(value, tuple) else value

    def _keep_attention(self, block: int, query: Tensor, key: Tensor, scoring: Scoring) -> None:
        self._keep(("query", block), query)
        self._keep(("key", block), key)
        self._scoring.setdefault(block, scoring)

    def _watch(self, place: Place) -> None:
        """Puts the hook of a place on the model."""
        name, block = place
        module = self._blocks[max(block, 1) - 1]
        if name in ("query", "key"):
            if not self._receivers:
                self._undo.append(make_watchable(self.model))
            self._receivers.update(dict.fromkeys(module.modules(), partial(self._keep_attention, block)))
            return
        if block == 0:

            def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                self._keep(place, arguments[0] if arguments else keywords["hidden_states"])

            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            if name != "hidden_states":
                module = self._projection(name, module)
            handle = module.register_forward_hook(lambda _, inputs, output: self._keep(place, output))
        self._undo.append(handle.remove)

    def _projection(self, name: str, block: nn.Module) -> nn.Module:
        """The module whose output a place is."""
        names: Sequence[str] = FUSED if name == "qkv" else (PROJECTIONS.get(name, name),)
        if name == "attention_outputs" and (queries := _path(block, (PROJECTIONS["queries"], *FUSED))):
            block, names = block.get_submodule(queries.rpartition(".")[0]), OUTPUT_PROJECTIONS
        if path := _path(block, names):
            return block.get_submodule(path)
        raise DistilyError(f"{type(self.model).__name__}: no module was found whose output is its {name.replace('_', ' ')}.")

    def _part(self, feature: Feature, output: Tensor) -> Tensor:
        """Queries, keys or values of an output that is all three."""
        site, block = feature
        place = list(PROJECTIONS).index(site)
        sizes = [width(self.model, (name, block)) for name in PROJECTIONS]
        kind = str(self.model.config.get_text_config().model_type)
        layout = LAYOUTS.get(kind)
        if layout is None or sum(sizes) != output.shape[-1]:
            raise DistilyError(
                f"{type(self.model).__name__}: how its blocks lay out queries, keys and values in one projection is not known; "
                f"allowed: models with three projections, and {', '.join(LAYOUTS)}."
            )
        if layout == "heads":
            heads = self.model.config.get_text_config().num_attention_heads
            return output.reshape(*output.shape[:-1], heads, 3, -1)[..., place, :].flatten(-2)
        return output.split(sizes, dim=-1)[place]


def _is_fused(block: nn.Module) -> bool:
    """Whether one module of a block computes queries, keys and values."""
    return not _path(block, tuple(PROJECTIONS.values())) and bool(_path(block, FUSED))


def _path(module: nn.Module, names: Sequence[str]) -> str:
    """The path of a module inside that has one of the names, the first name first; empty where none has."""
    paths = {path.rpartition(".")[2]: path for path, _ in module.named_modules()}
    return next((paths[name] for name in names if name in paths), "")
