"""What all tests share: no network, a cache of their own, a tiny model and text, markers that skip, a count of the skips."""

from __future__ import annotations

import os

os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})  # read at import
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny and tests run side by side: threads would wait for each other

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined: without a GPU it runs as Python, and slowly

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

DATA = "DISTILY_DATA"
LONG = (
    "test_kill", "test_disk_full", "test_readme", "test_sparse_kernels", "test_run", "test_every_objective_trains", "test_bad_input",
    "test_oracles", "test_invariance", "test_kernels", "test_meetings", "test_speed", "test_trainer", "test_prediction", "test_data",
)  # fmt: skip
"""Files that take longest; they are begun first, so that workers end together (``--no-loadscope-reorder``)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    reasons = {}
    if not os.environ.get(DATA):
        reasons["data"] = f"data: {DATA} is not set"
    if not torch.cuda.is_available():
        reasons["gpu"] = "gpu: there is no CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    without_data = sum(f"data: {DATA}" in reason for reason in skipped)
    if without_data:
        terminalreporter.write_line(f"{without_data} tests of real models and texts were skipped: {DATA} is not set.")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """DISTILY_CACHE and the cache of ``datasets``, in the session's temporary folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILY_CACHE", str(folder / "distily"))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        if "datasets" in sys.modules:  # it read the variable already
            patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        yield folder


@pytest.fixture
def runner() -> CliRunner:
    """Runs the command line in this process."""
    return CliRunner()


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 short documents as JSON lines."""
    path = tmp_path_factory.mktemp("text") / "tiny.jsonl"
    texts = [f"Return the value of item {number} and go on with number {number * 7}." for number in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 blocks and width 32 with the demo's tokenizer of 1024 tokens, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distily.sources import DEMO

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=256, num_key_value_heads=2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "teacher" / file, folder / file)
    return folder
