"""Documents to batches: sources, splits, cache, collator and packing. What a test expects is worked out in plain Python."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from distily.batch import IGNORE_INDEX, supervise
from distily.config import DataConfig
from distily.data import Collator, PackedSequences, PreparedData, cache_folder, collator_for, prepare
from distily.errors import DistilyError
from distily.models import load_tokenizer

TEXTS = [f"Document {number} returns the value {number * 7}." for number in range(24)]


@cache
def tokenizer() -> Any:
    return load_tokenizer("demo", "teacher.model")


def prepared(dataset: Path | str, using: Any = None, max_length: int = 64, seed: int = 0, **options: Any) -> PreparedData:
    return prepare(DataConfig(dataset=str(dataset), max_length=max_length, **options), using or tokenizer(), max_length, seed)


def texts(sequences: Any) -> list[str]:
    return [tokenizer().decode(row["input_ids"], skip_special_tokens=True) for row in sequences]


def rows() -> list[dict[str, str]]:
    return [{"text": text} for text in TEXTS]


def lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in rows())


# ---------------------------------------------------------------------------- sources


def write_text_folder(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        path = folder / "texts" / str(number % 2) / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "texts"


def write_lines(folder: Path) -> Path:
    path = folder / "lines.jsonl"
    path.write_text(lines(), encoding="utf-8")
    return path


def write_compressed(folder: Path) -> Path:
    path = folder / "lines.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.write(lines())
    return path


def write_line_folder(folder: Path) -> Path:
    (folder / "parts").mkdir()
    for part in range(3):
        content = "".join(lines().splitlines(keepends=True)[part * 8 : part * 8 + 8])
        if part == 1:
            with gzip.open(folder / "parts" / "1.jsonl.gz", "wt", encoding="utf-8") as stream:
                stream.write(content)
        else:
            (folder / "parts" / f"{part}.jsonl").write_text(content, encoding="utf-8")
    return folder / "parts"


def write_parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(rows()).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def write_arrow(folder: Path) -> Path:
    datasets.Dataset.from_list(rows()).save_to_disk(folder / "saved")
    return folder / "saved"


def write_arrow_file(folder: Path) -> Path:
    return next(write_arrow(folder).glob("*.arrow"))


def write_splits(folder: Path) -> Path:
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows())).save_to_disk(folder / "splits")
    return folder / "splits"


SOURCES: list[Callable[[Path], Path]] = [
    write_text_folder, write_lines, write_compressed, write_line_folder, write_parquet, write_arrow, write_arrow_file,
    write_splits,
]  # fmt: skip


@pytest.mark.parametrize("write", SOURCES)
def test_every_source_gives_its_documents(write: Callable[[Path], Path], tmp_path: Path) -> None:
    data = prepared(write(tmp_path), eval_size=4)
    assert sorted(texts(data.train) + texts(data.heldout)) == sorted(TEXTS)
    assert len(data.heldout) == 4
    report = data.report["train"]
    ids = [tokenizer()(text)["input_ids"] for text in texts(data.train)]
    assert (report.documents, report.sequences, report.rows) == (20, 20, 20)
    assert report.tokens == sum(map(len, ids)) + 20
    assert report.supervised == report.tokens - 20
    assert (report.truncated, report.tokens_cut, report.dropped) == (0, 0, 0)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    for name in ("train.txt", "heldout.md"):
        (tmp_path / name).write_text("One paragraph.\n\nAnd another.\n", encoding="utf-8")
    data = prepared(tmp_path / "train.txt", eval_dataset=str(tmp_path / "heldout.md"))
    assert texts(data.train) == texts(data.heldout) == ["One paragraph.\n\nAnd another.\n"]


def test_streaming_gives_the_same_sequences(tmp_path: Path) -> None:
    path = write_lines(tmp_path)
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"text": "Else"}) + "\n", encoding="utf-8")
    options: dict[str, Any] = {"eval_dataset": str(tmp_path / "heldout.jsonl"), "max_length": 6}
    stored, streamed = prepared(path, **options), prepared(path, streaming=True, **options)
    columns = ("input_ids", "labels")
    assert [[row[name] for name in columns] for row in streamed.train] == [
        [row[name] for name in columns] for row in stored.train
    ]
    assert len(list(prepared(path, streaming=True, **{**options, "max_length": 64}, samples=5).train)) == 5
    assert texts(streamed.heldout) == ["Else"]
    with pytest.raises(DistilyError, match=r"data\.packing"):
        prepared(path, streaming=True, packing=True, **options)
    with pytest.raises(DistilyError, match=r"data\.streaming"):
        prepared(path, streaming=True)


# ----------------------------------------------------------------------------- splits


def test_samples_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = write_lines(tmp_path)
    first, again, other = (prepared(path, seed=seed, samples=6, eval_samples=2) for seed in (1, 1, 2))
    assert texts(first.train) == texts(again.train)
    assert texts(first.heldout) == texts(again.heldout)
    assert texts(first.train) != texts(other.train)
    assert len(first.train) == 6
    assert len(first.heldout) == 1  # a twentieth of 24 documents


@given(st.integers(0, 2**32 - 1), st.one_of(st.floats(0.01, 0.9), st.integers(1, 23).map(float)))
@settings(deadline=None, max_examples=20)
def test_held_out_and_training_documents_are_disjoint(seed: int, size: float) -> None:
    from distily.data import _splits

    path = cache_folder().parent / "disjoint.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines(), encoding="utf-8")
    train, heldout = _splits(DataConfig(dataset=str(path), eval_size=size), seed)
    assert set(train["text"]).isdisjoint(heldout["text"])
    assert sorted([*train["text"], *heldout["text"]]) == sorted(TEXTS)
    assert len(heldout) == (size if size >= 1 else max(1, round(size * len(TEXTS))))


def test_the_demos_held_out_text_is_not_trained_on() -> None:
    from distily.sources import load_documents

    train, heldout = (load_documents("demo", None, split, False) for split in ("train", "heldout"))
    assert set(train["text"]).isdisjoint(heldout["text"])
    assert texts(prepared("demo", samples=2, eval_samples=2, max_length=4096).heldout)[0] in set(heldout["text"])


# ------------------------------------------------------------------------- the report


def test_what_was_cut_and_dropped_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    documents = ["a b c d e f g h i j", "", "short"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    long, short = (len(tokenizer()(text)["input_ids"]) + 1 for text in ("a b c d e f g h i j", "short"))
    (tmp_path / "heldout").mkdir()
    heldout = str(write_lines(tmp_path / "heldout"))
    data = prepared(path, max_length=4, long_documents="truncate", eval_dataset=heldout)
    report = data.report["train"]
    assert (report.documents, report.sequences, report.dropped) == (3, 2, 1)
    assert (report.truncated, report.tokens_cut) == (1 + (short > 4), long - 4 + max(0, short - 4))
    assert report.tokens == 4 + min(4, short)
    assert report.supervised == report.tokens - 2
    assert "1 without a supervised token dropped" in str(report)
    assert f"{report.tokens_cut:,} tokens cut" in str(report)
    assert len(data.train) == 2

    split = prepared(path, max_length=long - 1, eval_dataset=heldout).report["train"]  # the end token is left alone: dropped
    assert (split.sequences, split.dropped, split.tokens) == (2, 2, long - 1 + short)


# ------------------------------------------------------------------------------ cache


PREPARE = """
import sys
from distily.config import DataConfig
from distily.data import prepare
from distily.models import load_tokenizer
tokenizer = load_tokenizer("demo", "teacher.model")
for path in sys.argv[1:]:
    for options in ({"eval_size": 3}, {"samples": 7, "eval_samples": 2, "packing": True}):
        data = prepare(DataConfig(dataset=path, max_length=16, **options), tokenizer, 16, 3)
        print(path, len(data.train), *(report.fingerprint for report in data.report.values()))
"""


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(entry.relative_to(folder)): entry.read_bytes() if entry.is_file() else None for entry in sorted(folder.rglob("*"))
    }


@pytest.mark.slow
def test_preparing_again_in_a_new_process_adds_no_byte(tmp_path: Path) -> None:
    for name in ("sources", "cache"):
        (tmp_path / name).mkdir()
    cached = tmp_path / "cache"
    paths = ["demo", *(str(write(tmp_path / "sources")) for write in SOURCES if write is not write_arrow_file)]
    environment = {**os.environ, "DISTILY_CACHE": str(cached / "distily"), "HF_DATASETS_CACHE": str(cached / "datasets")}

    def run() -> str:
        command = [sys.executable, "-c", PREPARE, *paths]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    first = run()
    before = contents(cached)
    again = run()
    assert first == again
    assert contents(cached) == before
    named = {word for line in first.splitlines() for word in line.split()[2:]}
    assert {f"distily/prepared/{key}.arrow" for key in named} == {name for name in before if name.startswith("distily/prepared/")}


def test_two_tokenizers_never_share_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILY_CACHE", str(tmp_path / "cache"))
    path = write_lines(tmp_path)
    other = load_tokenizer("demo", "teacher.model")
    other.add_tokens(["Document"])
    mine, theirs = prepared(path), prepared(path, other)
    assert {report.fingerprint for report in mine.report.values()}.isdisjoint(
        report.fingerprint for report in theirs.report.values()
    )
    assert len(list((tmp_path / "cache" / "prepared").iterdir())) == 4
    assert max(max(row["input_ids"]) for row in theirs.train) == len(tokenizer())
    assert max(max(row["input_ids"]) for row in prepared(path).train) < len(tokenizer())


def test_settings_have_entries_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILY_CACHE", str(tmp_path / "cache"))
    path = write_lines(tmp_path)
    for options in ({}, {"max_length": 7}, {"append_eos": False}, {"max_length": 7, "long_documents": "truncate"}, {"seed": 1}):
        prepared(path, **options)
    assert len(list((tmp_path / "cache" / "prepared").iterdir())) == 10


def test_a_changed_file_is_prepared_anew(tmp_path: Path) -> None:
    path = write_lines(tmp_path)
    assert sorted(texts(prepared(path, eval_size=1).train))[0].startswith("Document")
    path.write_text(lines().replace("Document", "Rdcument"), encoding="utf-8")  # as long as it was
    assert sorted(texts(prepared(path, eval_size=1).train))[0].startswith("Rdcument")


def test_a_cache_that_is_a_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("DISTILY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DistilyError, match="DISTILY_CACHE"):
        prepared(write_lines(tmp_path))


# --------------------------------------------------------------------------- collator


def make_sequence(ids: list[int], masked: list[bool]) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": [IGNORE_INDEX if mask else token for token, mask in zip(ids, masked, strict=True)]}


sequence = st.integers(1, 9).flatmap(
    lambda size: st.builds(
        make_sequence,
        st.lists(st.integers(0, 50), min_size=size, max_size=size),
        st.lists(st.booleans(), min_size=size, max_size=size),
    )
)
packed_rows = st.lists(st.lists(sequence, min_size=1, max_size=4), min_size=1, max_size=4)


def naive(rows: list[list[dict[str, list[int]]]], pad: int) -> dict[str, Any]:
    """Token by token: what is read at each place, what is to be predicted there, and where in its document it is."""
    size = max(sum(len(entry["input_ids"]) for entry in row) for row in rows)
    ids, targets, positions, used, flat, lengths = [], [], [], [], [], []
    for number, row in enumerate(rows):
        line: list[tuple[int, int, int, int]] = []
        for entry in row:
            count = 0
            for place, token in enumerate(entry["input_ids"]):
                following = entry["labels"][place + 1] if place + 1 < len(entry["labels"]) else IGNORE_INDEX
                if following != IGNORE_INDEX:
                    flat.append(number * size + len(line))
                    count += 1
                line.append((token, following, place, 1))
            lengths.append(count)
        line += [(pad, IGNORE_INDEX, place, 0) for place in range(size - len(line))]
        for target, column in zip((ids, targets, positions, used), zip(*line, strict=True), strict=True):
            target.append(list(column))
    return {"ids": ids, "targets": targets, "positions": positions, "used": used, "flat": flat, "lengths": lengths}


@given(packed_rows, st.booleans())
@settings(deadline=None)
def test_the_collator_agrees_with_a_loop(rows: list[list[dict[str, list[int]]]], packed: bool) -> None:
    rows = rows if packed else [[row[0]] for row in rows]
    batch = Collator(7, packed)(rows if packed else [row[0] for row in rows])
    expected = naive(rows, 7)
    assert batch["input_ids"].tolist() == expected["ids"]
    assert batch["shift_labels"].tolist() == expected["targets"]
    assert batch["supervised"].tolist() == expected["flat"]
    assert list(batch["lengths"]) == expected["lengths"]
    if any(len(row) > 1 for row in rows):
        assert "attention_mask" not in batch  # all ones would undo the positions
        assert batch["position_ids"].tolist() == expected["positions"]
    else:
        assert "position_ids" not in batch
        assert batch["attention_mask"].tolist() == expected["used"]

    supervision = supervise(batch)
    targets = [target for row in expected["targets"] for target in row if target != IGNORE_INDEX]
    assert supervision.labels.tolist() == targets
    assert supervision.input_ids.tolist() == [
        token for line, row in zip(expected["ids"], expected["targets"], strict=True)
        for token, target in zip(line, row, strict=True) if target != IGNORE_INDEX
    ]  # fmt: skip
    assert supervision.sequence_ids.tolist() == [place for place, length in enumerate(expected["lengths"]) for _ in range(length)]


@given(packed_rows)
@settings(deadline=None)
def test_no_label_crosses_a_document_border(rows: list[list[dict[str, list[int]]]]) -> None:
    batch = Collator(0, packed=True)(rows)
    positions = batch["position_ids"] if "position_ids" in batch else batch["attention_mask"].cumsum(-1) - 1
    starts = torch.nn.functional.pad(positions[:, 1:] == 0, (0, 1), value=True)
    assert (batch["shift_labels"][starts] == IGNORE_INDEX).all()
    inside = ~starts & (batch["shift_labels"] != IGNORE_INDEX)
    following = torch.nn.functional.pad(batch["input_ids"][:, 1:], (0, 1))
    assert torch.equal(batch["shift_labels"][inside], following[inside])


def test_a_batch_of_another_collator_is_supervised_alike() -> None:
    rows = [make_sequence([3, 4, 5], [True, False, False]), make_sequence([6, 7], [False, False])]
    batch = collator_for(tokenizer())(rows)
    full, bare = supervise(batch), supervise({"input_ids": batch["input_ids"], "labels": batch["labels"]})
    assert torch.equal(full.index, bare.index)
    assert torch.equal(full.labels, bare.labels)
    assert list(full.lengths) == list(bare.lengths)


@pytest.mark.parametrize(("pad", "eos", "expected"), [(5, 9, 5), (None, 9, 9), (None, None, 0), (0, 9, 0)])
def test_padding_falls_back_to_the_end_token(pad: int | None, eos: int | None, expected: int) -> None:
    assert collator_for(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)).pad_token_id == expected


@given(st.lists(packed_rows, min_size=1, max_size=3), st.booleans())
@settings(deadline=None, max_examples=30)
def test_transformers_counts_the_same_tokens(micro_batches: list[list[list[dict[str, list[int]]]]], packed: bool) -> None:
    """``num_items_in_batch`` of an accumulated batch is what our loss is divided by."""
    batches = [Collator(0, packed)(rows if packed else [row[0] for row in rows]) for rows in micro_batches]
    taken, items = hf_trainer().get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    assert len(taken) == len(batches)
    assert int(items) == sum(batch["supervised"].numel() for batch in batches) == sum(sum(batch["lengths"]) for batch in batches)


@cache
def hf_trainer() -> Trainer:
    arguments = TrainingArguments(output_dir=str(cache_folder()), use_cpu=True, report_to=[])
    trainer = Trainer(torch.nn.Linear(1, 1), arguments)
    trainer.model_accepts_loss_kwargs = True
    return trainer


# ---------------------------------------------------------------------------- packing


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(12, 30))
@settings(deadline=None, max_examples=50)
def test_packing_keeps_every_sequence_whole_and_once(lengths: list[int], max_length: int) -> None:
    rows = [{"input_ids": [number] * length, "labels": [number] * length} for number, length in enumerate(lengths)]
    stored = datasets.Dataset.from_list(rows)
    packed = PackedSequences(stored, max_length)
    items = [packed[place] for place in range(len(packed))]
    assert all(sum(len(entry["input_ids"]) for entry in item) <= max_length for item in items)
    assert sorted(index for row in packed.rows for index in row) == list(range(len(lengths)))
    found = sorted((entry for item in items for entry in item), key=lambda entry: entry["input_ids"][0])
    assert found == rows
    assert PackedSequences(stored, max_length).rows == packed.rows
    fullest = [sum(lengths[index] for index in row) for row in packed.rows]
    assert all(first + second > max_length for first, second in pairwise(fullest))  # no two rows fit into one


def test_packing_knows_windows_and_dropped_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedSequences, "WINDOW", 5)
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *TEXTS[:9], ""]), encoding="utf-8")
    (tmp_path / "heldout").mkdir()
    data = prepared(path, packing=True, eval_dataset=str(write_lines(tmp_path / "heldout")))
    packed = [entry for place in range(len(data.train)) for entry in data.train[place]]
    assert sorted(texts(packed)) == sorted(TEXTS[:9])
    assert all(len({index // 5 for index in row}) == 1 for row in data.train.rows)
    assert data.report["train"].rows == len(data.train) < data.report["train"].sequences == 9
    assert "packed into" in str(data.report["train"])
    assert data.collator.packed
    assert not data.heldout_collator.packed
    assert "attention_mask" not in data.collator([data.train[0]])
