"""Documents, tokens, packing and batches. The same data prepared twice adds nothing to the disk.

Letters: B batch, S sequence, N supervised tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distily.batch import IGNORE_INDEX, count, shift
from distily.config import DataConfig
from distily.errors import DistilyError, wrong
from distily.sources import load_documents
from distily.tokenization import fingerprint, text_format, tokenizer_function


@dataclass(frozen=True)
class DataReport:
    """What became of the documents; goes to the provenance and to the screen."""

    documents: int
    sequences: int
    tokens: int
    supervised: int
    truncated: int
    tokens_cut: int
    dropped: int
    rows: int
    fingerprint: str

    def __str__(self) -> str:
        text = f"{self.sequences:,} sequences, {self.tokens:,} tokens ({self.supervised:,} supervised)"
        if self.truncated:
            text += f"; {self.truncated:,} truncated, {self.tokens_cut:,} tokens cut"
        if self.dropped:
            text += f"; {self.dropped:,} without a supervised token dropped"
        return text if self.rows == self.sequences else f"{text}; packed into {self.rows:,} rows"


@dataclass(frozen=True)
class PreparedData:
    """Training and held-out sequences, ready for a trainer."""

    train: Any
    heldout: Any
    collator: Collator
    heldout_collator: Collator
    report: dict[str, DataReport] = field(default_factory=dict)


def cache_folder() -> Path:
    """Where prepared data lies: ``DISTILY_CACHE``, or ``distily`` under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DISTILY_CACHE") or Path(base) / "distily")


def prepare(config: DataConfig, tokenizer: Any, max_length: int, seed: int, widths: Sequence[int] = ()) -> PreparedData:
    """Loads, tokenises and (if asked) packs both splits. ``widths``: the lengths that a training batch may be padded to."""
    train_documents, heldout_documents = _splits(config, seed)
    heldout, heldout_report = sequences(heldout_documents, config, tokenizer, max_length)
    heldout_collator = collator_for(tokenizer)
    if config.streaming:
        train = _stream(train_documents, config, tokenizer, max_length)
        collator = collator_for(tokenizer, widths=widths)
        return PreparedData(train, heldout, collator, heldout_collator, {"heldout": heldout_report})
    train_sequences, report = sequences(train_documents, config, tokenizer, max_length)
    if config.packing:
        train = PackedSequences(train_sequences, max_length)
        report = replace(report, rows=len(train))
    else:
        train = train_sequences
    collator = collator_for(tokenizer, config.packing, widths)
    return PreparedData(train, heldout, collator, heldout_collator, {"train": report, "heldout": heldout_report})


def _splits(config: DataConfig, seed: int) -> tuple[Any, Any]:
    """Training and held-out documents; drawn by the seed where one data set serves both."""
    source = (config.dataset, config.subset)
    documents = load_documents(*source, config.split, config.streaming)
    eval_split = config.eval_split or ("heldout" if config.dataset == "demo" and config.eval_dataset is None else None)
    if config.eval_dataset is not None or eval_split is not None:
        other = (config.eval_dataset, None) if config.eval_dataset else source
        if (*other, eval_split or "train") == (*source, config.split):
            raise DistilyError(wrong("data.eval_split", eval_split, "other documents than those of the training split"))
        heldout = load_documents(*other, eval_split or "train", False, key="data.eval_dataset")
    elif config.streaming:
        raise DistilyError("data.streaming: it needs held-out data of its own; name data.eval_dataset or data.eval_split.")
    else:
        if config.eval_size > 1 and config.eval_size % 1:
            raise DistilyError(wrong("data.eval_size", config.eval_size, "a share below 1, or a whole number of documents"))
        size = config.eval_size if config.eval_size >= 1 else max(1, round(config.eval_size * len(documents)))
        if size >= len(documents):
            raise DistilyError(
                f"data.eval_size: {config.eval_size:g} leaves nothing of {len(documents)} documents to train on; "
                "allowed: less, or held-out data of its own as data.eval_dataset."
            )
        order = _order(len(documents), seed)
        heldout, documents = documents.select(order[: int(size)]), documents.select(order[int(size) :])
    if config.streaming:
        return documents if config.samples is None else documents.take(config.samples), draw(heldout, config.eval_samples, seed)
    return draw(documents, config.samples, seed), draw(heldout, config.eval_samples, seed)


def _order(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def draw(documents: Any, samples: int | None, seed: int) -> Any:
    """``samples`` documents by the seed; all where there are no more."""
    if samples is None or samples >= len(documents):
        return documents
    return documents.select(_order(len(documents), seed)[:samples])


def sequences(documents: Any, config: DataConfig, tokenizer: Any, max_length: int) -> tuple[Any, DataReport]:
    """Tokenised sequences with at least one supervised token, from the cache where they were made before."""
    import datasets
    import pyarrow.compute as compute

    column = text_format(documents.column_names, config.column)
    settings = {"column": column, "max_length": max_length, "long": config.long_documents, "eos": config.append_eos}
    key = hashlib.sha256(f"{documents._fingerprint} {fingerprint(tokenizer, **settings)}".encode()).hexdigest()[:32]
    folder = cache_folder() / "prepared"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DistilyError(f"DISTILY_CACHE: {str(cache_folder())!r} is not a folder.") from error
    ids = datasets.Sequence(datasets.Value("int32"))
    number = datasets.Value("int32")
    tokenized = documents.map(
        tokenizer_function(tokenizer, column, max_length, config.long_documents, config.append_eos),
        batched=True,
        remove_columns=documents.column_names,
        features=datasets.Features({"input_ids": ids, "labels": ids, "cut": number, "supervised": number}),
        cache_file_name=str(folder / f"{key}.arrow"),
        new_fingerprint=key,
        load_from_cache_file=True,
        desc="Tokenizing",
    )
    table = tokenized.data
    total = {name: compute.sum(table.column(name)).as_py() or 0 for name in ("cut", "supervised")}
    kept = compute.greater(table.column("supervised"), 0)
    tokens = compute.sum(compute.filter(compute.list_value_length(table.column("input_ids")), kept)).as_py() or 0
    kept = kept.to_pylist()
    report = DataReport(
        documents=len(documents),
        sequences=sum(kept),
        tokens=tokens,
        supervised=total["supervised"],
        truncated=compute.sum(compute.greater(table.column("cut"), 0)).as_py() or 0,
        tokens_cut=total["cut"],
        dropped=len(kept) - sum(kept),
        rows=sum(kept),
        fingerprint=key,
    )
    if not report.supervised:
        raise DistilyError(
            f"data.dataset: {config.dataset!r} gave no supervised token; allowed: documents of two tokens or more."
        )
    if report.dropped:
        tokenized = tokenized.select([place for place, keep in enumerate(kept) if keep])
    return tokenized, report


def _stream(documents: Any, config: DataConfig, tokenizer: Any, max_length: int) -> Any:
    if config.packing:
        raise DistilyError("data.packing: not with data.streaming; allowed: one of the two.")
    columns = documents.column_names or list(next(iter(documents)))
    column = text_format(columns, config.column)
    function = tokenizer_function(tokenizer, column, max_length, config.long_documents, config.append_eos)
    sequences = documents.map(function, batched=True, remove_columns=columns)
    return sequences.filter(lambda sequence: sequence["supervised"] > 0)


def collator_for(tokenizer: Any, packed: bool = False, widths: Sequence[int] = ()) -> Collator:
    """A collator that pads with the tokenizer's padding token, or its end token where it has none."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Collator(0 if pad is None else int(pad), packed, tuple(widths))


class PackedSequences(torch.utils.data.Dataset):
    """Whole sequences put together into rows of at most ``max_length`` tokens: first fit, longest first, within windows of 1024.

    An item is the list of the row's sequences. No sequence is cut, and the same sequences give the same rows.
    """

    WINDOW = 1024

    def __init__(self, sequences: Any, max_length: int) -> None:
        import pyarrow.compute as compute

        self.sequences = sequences
        column = sequences.with_format("arrow")[:]["input_ids"]
        lengths = compute.list_value_length(column).to_pylist()
        self.rows: list[list[int]] = []
        for start in range(0, len(lengths), self.WINDOW):
            self.rows += _first_fit(range(start, min(start + self.WINDOW, len(lengths))), lengths, max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> list[dict[str, Any]]:
        return [self.sequences[index] for index in self.rows[place]]


def _first_fit(indices: Sequence[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda place: -lengths[place]):
        place = next((row for row, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            rows.append([index])
            room.append(max_length - lengths[index])
        else:
            rows[place].append(index)
            room[place] -= lengths[index]
    return rows


@dataclass(frozen=True)
class Collator:
    """Sequences to one batch, padded on the right, with the shift done once.

    Gives ``input_ids``, ``labels``, ``shift_labels`` (B, S), ``supervised`` (N,) and ``lengths``; with an ``attention_mask``, or
    ``position_ids`` alone where sequences share a row: they restart at every one, and an all-ones mask would undo that without a word.
    """

    pad_token_id: int
    packed: bool = False
    widths: tuple[int, ...] = ()
    """Lengths that a batch is padded to, in ascending order; none: that of its longest row."""

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        rows: list[list[Mapping[str, Any]]] = list(items) if self.packed else [[item] for item in items]
        longest = max(sum(len(sequence["input_ids"]) for sequence in row) for row in rows)
        size = next((width for width in self.widths if width >= longest), longest)
        shared = any(len(row) > 1 for row in rows)
        columns = [self._row(row, size, shared) for row in rows]
        batch: dict[str, Any] = {name: torch.stack([column[name] for column in columns]) for name in columns[0]}
        batch["supervised"], _ = count(batch["shift_labels"])
        batch["lengths"] = [sum(label != IGNORE_INDEX for label in sequence["labels"][1:]) for row in rows for sequence in row]
        return batch

    def _row(self, row: Sequence[Mapping[str, Any]], size: int, shared: bool) -> dict[str, Tensor]:
        ids = [torch.tensor(sequence["input_ids"], dtype=torch.long) for sequence in row]
        labels = [torch.tensor(sequence["labels"], dtype=torch.long) for sequence in row]
        shifted = [shift(label[None])[0] for label in labels]
        used = sum(len(part) for part in ids)
        padding = size - used
        columns = {
            "input_ids": torch.cat([*ids, torch.full((padding,), self.pad_token_id)]),
            "labels": torch.cat([*labels, torch.full((padding,), IGNORE_INDEX)]),
            "shift_labels": torch.cat([*shifted, torch.full((padding,), IGNORE_INDEX)]),
        }
        if shared:
            columns["position_ids"] = torch.cat([*(torch.arange(len(part)) for part in ids), torch.arange(padding)])
        else:
            columns["attention_mask"] = (torch.arange(size) < used).long()
        return columns
