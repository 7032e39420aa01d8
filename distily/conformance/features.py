"""The checks of the conformance kit for what stands between the features of two models: layer mappers, projectors, normalizers.

Letters: N rows, H width, P pairs of layers, M matches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distily.conformance.objectives import Subject, close, require
from distily.errors import DistilyError
from distily.mappings import LayerMapping, layer_mapping
from distily.state import Adaptive, Calibrated

DEPTHS = ((1, 1), (2, 2), (2, 6), (6, 12), (12, 12), (6, 4))
WIDTHS = ((8, 8), (6, 8), (8, 6))
DOCUMENTS = (0, 0, 0, 2, 2)
"""Of the rows of a mapping; a document without a supervised token leaves a gap."""
CALIBRATION_ROWS = 64


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_mappers(subject: Subject) -> Iterator[str]:
    """Pairs that exist, the same every time; shares that sum to 1; documents that do not see each other."""
    yield "pairs"
    mappings: list[LayerMapping] = []
    for depths in DEPTHS:
        mapper = subject.make()
        try:
            pairs, again = (_pairs(mapper(*depths)) for _ in range(2))
        except ValueError:  # it refuses these depths
            continue
        whole = all(len(pair) == 2 and {type(block) for block in pair} == {int} for pair in pairs)
        require(whole, f"{pairs} are not pairs of integers")
        require(pairs == again, f"the pairs for depths {depths} are not the same twice")
        try:
            mappings.append(layer_mapping(subject.entry.name, mapper, *depths))
        except DistilyError as error:  # options may name blocks that small models lack
            require(subject.options, str(error))
    require(mappings, "it refused every depth")
    yield from _mapping(max(mappings[:3], key=lambda mapping: len(mapping.pairs)))


def _pairs(made: Any) -> list[Any]:
    return made.pairs if isinstance(made, LayerMapping) else list(made)


def _mapping(mapping: LayerMapping) -> Iterator[str]:
    yield "matches"
    count, ids = len(mapping.pairs), torch.tensor(DOCUMENTS)
    student = list(_random(count, len(DOCUMENTS), 8).requires_grad_())
    teacher = list(_random(count, len(DOCUMENTS), 8, seed=1))
    matches = mapping.matches(student, teacher, ids)
    shapes = {tuple(side.shape) for match in matches for side in match}
    require(shapes == {(len(DOCUMENTS), 8)}, f"rows ({len(DOCUMENTS)}, 8) became {sorted(shapes)}")
    require(all(mine.requires_grad for mine, _ in matches), "it cuts the student's gradient off")
    first = ids == 0
    expected = _rows(matches, first)
    alone = mapping.matches([side[first] for side in student], [side[first] for side in teacher], ids[first])
    close(_rows(alone, slice(None)), expected, 1e-9, "a document alone gave another match")
    changed = [[side.where(first[:, None], -side) for side in sides] for sides in (student, teacher)]
    close(
        _rows(mapping.matches(changed[0], changed[1], ids), first),
        expected,
        1e-9,
        "a document's match depends on another document",
    )
    yield "shares"
    values = torch.rand(len(matches), generator=torch.Generator().manual_seed(2)) + 0.1
    for progress in (0.0, 0.5, 1.0):
        _check_shares(mapping, values, progress)
    if isinstance(mapping, Adaptive):
        yield "steps"
        moved = _moved(mapping, lambda module, part: module.shares(part, 0.5), values, [values * 0.25, values * 0.75])
        _check_shares(moved, values, 0.5)
    yield "no host synchronisation"
    placed = mapping.to("meta")
    placed.matches([side.to("meta") for side in student], [side.to("meta") for side in teacher], ids.to("meta"))
    placed.shares(values.to("meta"), 0.5)


def _rows(matches: Sequence[tuple[Tensor, Tensor]], rows: Any) -> Tensor:
    """Some rows of both sides of all matches."""
    return torch.stack([side[rows] for match in matches for side in match])


def _check_shares(mapping: LayerMapping, values: Tensor, progress: float) -> None:
    shares = mapping.shares(values, progress)
    require(shares.shape == values.shape, f"{len(values)} matches got shares of shape {tuple(shares.shape)}")
    require(shares.dtype == values.dtype and not shares.requires_grad, f"shares are {shares.dtype}, or have a gradient")
    require((shares >= 0).all(), f"a share is negative: {shares.tolist()}")
    close(shares.sum(), values.new_ones(()), 1e-6, "the shares do not sum to 1")


def _moved(module: Any, run: Callable[[Any, Any], Any], batch: Any, parts: Sequence[Any]) -> Any:
    """A copy after two optimizer steps, in each of which ``run`` saw the batch, or its parts in turn: the state must be the same, and
    must not move without gradients.
    """
    states = []
    for micro_batches in ([batch], parts):
        moved = copy.deepcopy(module)
        for _ in range(2):
            moved.pending.zero_()
            with torch.no_grad():
                run(moved, batch)
            require(not moved.pending.any(), "an evaluation was added to pending")
            for each in micro_batches:
                run(moved, each)
            moved.advance(0.5)
        states.append(moved)
    for name, value in states[0].state_dict().items():
        close(states[1].state_dict()[name], value, 1e-9, f"in two micro-batches, {name} became another one")
    require("pending" not in states[0].state_dict(), "pending is saved in checkpoints; persistent=False keeps it out")
    return states[0]


def _measured(module: Any, student_width: int, teacher_width: int) -> Any:
    """The module in float64, calibrated where it is to be, then loaded from the state of itself as a resumed run does it."""
    module = module.double()
    if isinstance(module, Calibrated):
        fresh = copy.deepcopy(module)
        for seed in (3, 5):
            sides = (_random(CALIBRATION_ROWS, student_width, seed=seed), _random(CALIBRATION_ROWS, teacher_width, seed=seed + 1))
            module.observe(*(side.float() for side in sides))
        module.conclude()
        fresh.load_state_dict(module.state_dict())
        return fresh
    return module


def projectors(subject: Subject) -> Iterator[str]:
    """Features of one width become features of the other, row by row, with gradients for the student and all that trains."""
    yield "projection"
    worked = 0
    for widths in WIDTHS:
        make = subject.make()
        try:
            module = make(*widths)
        except ValueError:  # it refuses these widths
            continue
        require(isinstance(module, nn.Module), f"it made {type(module).__name__}, not a module")
        module, features = _measured(module, *widths), _random(2, 3, widths[0]).requires_grad_()
        projected = module(features)
        require(projected.shape == (2, 3, widths[1]), f"widths {widths}: (2, 3, {widths[0]}) became {tuple(projected.shape)}")
        close(module(features[1:, 1:2]), projected[1:, 1:2], 1e-9, "a row's projection depends on other rows")
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(projected.square().sum(), [features, *trained], allow_unused=True)
        require(all(each is not None and each.isfinite().all() for each in gradients), "a gradient is missing or not finite")
        module.to("meta")(features.to("meta"))
        worked += 1
    require(worked, "it refused all widths")


def normalizers(subject: Subject) -> Iterator[str]:
    """Rows stay rows of their width and type, by themselves, with the student's gradient."""
    yield "normalization"
    made = subject.make()
    is_class = isinstance(subject.entry.factory, type)
    rows = (_random(6, 8), _random(6, 8, seed=1))
    module = _measured(made(8), 8, 8) if is_class else None
    if isinstance(module, Adaptive):
        yield "steps"
        parts = [(rows[0][:2], rows[1][:2]), (rows[0][2:], rows[1][2:])]
        module = _moved(module, lambda each, part: each(*part), rows, parts)
    rows[0][0] = 0.0
    for dtype in (torch.float64, torch.float32):
        normalize = module.to(dtype) if module is not None else lambda mine, theirs: (made(mine), made(theirs))
        _check_rows(normalize, [side.to(dtype) for side in rows])
    yield "no host synchronisation"
    if module is not None:
        normalize = module.to("meta")
    normalize(*(torch.empty(6, 8, device="meta") for _ in rows))


def _check_rows(normalize: Callable[..., Any], rows: list[Tensor]) -> None:
    kept = [side.clone() for side in rows]
    result = normalize(*rows)
    require(isinstance(result, tuple) and len(result) == 2, f"it gave {type(result).__name__}, not both sides")
    for side, before, after in zip(rows, kept, result, strict=True):
        require(after.shape == before.shape, f"{tuple(before.shape)} became {tuple(after.shape)}")
        require(after.dtype == before.dtype, f"{before.dtype} became {after.dtype}")
        require(after.isfinite().all(), "a value is not finite; one row was 0")
        require(torch.equal(side, before), "it changed its argument in place")
    for alone, whole in zip(normalize(*(side[1:2] for side in rows)), result, strict=True):
        close(alone, whole[1:2], 1e-6, "a row depends on other rows")
    require(normalize(rows[0].clone().requires_grad_(), rows[1])[0].requires_grad, "it cuts the gradient off")
