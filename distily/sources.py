"""Where text comes from: a hub id, local files (text, JSON lines, Parquet, Arrow), or the text that comes with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distily.errors import DistilyError, wrong

DEMO = Path(__file__).parent / "demo"
BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FORMS = "a hub id, a folder, or a file ending in " + ", ".join([*BUILDERS, ".gz of a text or JSON file"])


def load_documents(dataset: str, subset: str | None, split: str, streaming: bool, key: str = "data.dataset") -> Any:
    """The documents of one split as a ``datasets.Dataset`` (``IterableDataset`` when streaming).

    Raises ``DistilyError`` for a path that does not exist, a format that is not known, an empty file or a hub that has no such set.
    """
    path = Path(dataset).expanduser()
    section = "data.eval_split" if key == "data.eval_dataset" else "data.split"
    if dataset == "demo" or path.exists():
        known = ("train", "heldout") if dataset == "demo" else ("train",)
        saved = path.is_dir() and _is_saved(path)
        if split not in known and not saved:
            allowed = f"{' or '.join(known)}, or held-out files of their own by data.eval_dataset"
            raise DistilyError(wrong(section, split, allowed))
        if subset is not None:
            raise DistilyError(wrong("data.subset", subset, "null for files; only a hub data set has subsets"))
    if dataset == "demo":
        dataset, split = str(DEMO / "text" / ("heldout.jsonl.gz" if split == "heldout" else "train.jsonl.gz")), "train"
    path = Path(dataset).expanduser()
    if path.exists():
        return _local(path, split, streaming, key)
    if path.is_absolute() or dataset.startswith((".", "~")) or _suffix(path) in BUILDERS or dataset.count("/") > 1:
        raise DistilyError(f"{key}: {dataset!r} does not exist; allowed: {FORMS}.")
    return _hub(dataset, subset, split, streaming, key)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of datasets made the folder."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _local(path: Path, split: str, streaming: bool, key: str) -> Any:
    import datasets

    if path.is_dir() and _is_saved(path):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise DistilyError(wrong(f"{key} {str(path)!r}: split", split, ", ".join(saved)))
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if _suffix(entry) in BUILDERS)
    kinds = {BUILDERS.get(_suffix(entry)) for entry in files}
    if len(kinds) != 1 or None in kinds:
        found = ", ".join(sorted({_suffix(entry) or entry.name for entry in files})) or "no such file in the folder"
        raise DistilyError(f"{key}: {str(path)!r} holds {found}; allowed: {FORMS}, of one format.")
    if not any(entry.stat().st_size for entry in files):
        raise DistilyError(f"{key}: {str(path)!r} is empty.")
    return _load(str(kinds.pop()), files, streaming, key, path)


def _load(builder: str, files: Sequence[Path], streaming: bool, key: str, path: Path) -> Any:
    import datasets

    options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
    try:
        return datasets.load_dataset(
            builder, data_files={"train": [str(entry) for entry in files]}, split="train", streaming=streaming, **options
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, EOFError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise
        reason = " ".join(str(cause).split())[:200]
        raise DistilyError(f"{key}: {str(path)!r} cannot be read as {builder}: {reason}") from error


def _hub(dataset: str, subset: str | None, split: str, streaming: bool, key: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(dataset, subset, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises a dozen unrelated classes for "not there"
        reason = " ".join(str(error).split())[:200]
        raise DistilyError(
            f"{key}: {dataset!r} is no local path and could not be loaded from the hub ({reason}); allowed: {FORMS}."
        ) from error
