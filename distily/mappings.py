"""Layer mappings: what a layer mapper returns that learns, mixes or weighs layers while training; plain pairs become one, too.

Letters: P pairs, M matches, N rows, H width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from distily.errors import DistilyError
from distily.layers import LayerMapper, LayerPair, layer_pairs


class LayerMapping(nn.Module):
    """Pairs of blocks, what is compared with what, and how much each comparison counts. Its parameters train with the student.

    One whose shares move is also ``distily.state.Adaptive``. ``projector_for``: each pair has its own projector, or each student
    ``block``.
    """

    projector_for: str = "pair"

    def __init__(self, pairs: Iterable[LayerPair]) -> None:
        super().__init__()
        self.pairs = list(pairs)

    def matches(self, student: Sequence[Tensor], teacher: Sequence[Tensor], sequence_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is compared: projected and normalised features of the pairs, P times ``(N, H)``, to M times ``(N, H), (N, H)``.

        Rows must stay independent of other documents: ``sequence_ids`` (N,) says which document a row is of.
        """
        return list(zip(student, teacher, strict=True))

    def shares(self, values: Tensor, progress: float) -> Tensor:
        """How much each match counts, ``(M,)``, summing to 1, without gradient.

        ``values`` (M,) are what the micro-batch adds to the matches' means over the global batch, detached: they may be summed up.
        """
        return values.new_full(values.shape, 1.0 / values.numel())


def layer_mapping(name: str, mapper: LayerMapper, student_layers: int, teacher_layers: int) -> LayerMapping:
    """The mapper's ``LayerMapping`` for two models, its pairs checked as by ``layer_pairs``."""
    try:
        made = mapper(student_layers, teacher_layers)
    except ValueError as error:
        raise DistilyError(f"layer mapper {name!r}: {error}.") from error
    mapping = made if isinstance(made, LayerMapping) else LayerMapping(made)
    mapping.pairs = layer_pairs(name, lambda *depths: mapping.pairs, student_layers, teacher_layers)
    return mapping
