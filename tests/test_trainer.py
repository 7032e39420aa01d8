"""The traps of transformers.Trainer, with the real trainer: what is counted, what is divided, what several ranks average."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import TrainingArguments

from distily.data import Collator
from distily.trainer import DistillationTrainer

ROOT = Path(__file__).parent.parent


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict:
        return self.rows[place]


def losses(
    folder: Path, architecture: str, batch: int, accumulation: int, specs: tuple[str, ...] = ("forward_kl", "cosine:weight=0.5")
) -> list[dict]:
    """The log of four optimizer steps over the same 8 documents in each."""
    student, teacher = tiny.model(architecture, seed=1), tiny.model(architecture, seed=2)
    driver = tiny.driver(student, teacher, *specs)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=4, logging_steps=1,
        learning_rate=1e-3, report_to=[], remove_unused_columns=False, use_cpu=True, save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant", dataloader_pin_memory=False, seed=0, label_names=["labels"], max_grad_norm=0.0,
    )  # fmt: skip
    trainer = DistillationTrainer(
        driver, {}, None, model=student, args=arguments, train_dataset=Rows(tiny.documents(32)), data_collator=Collator(0)
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_batch_times_accumulation_does_not_change_the_trajectory(tmp_path, architecture):
    """GPT-2 counts unshifted labels in transformers' own way of counting, Llama shifted ones: both must give one curve."""
    curves = [losses(tmp_path, architecture, batch, 8 // batch) for batch in (8, 4, 1)]
    for other in curves[1:]:
        for first, second in zip(curves[0], other, strict=True):
            for key in ("loss", "grad_norm", "term_forward_kl", "term_cosine_weighted"):
                assert first[key] == pytest.approx(second[key], rel=2e-4), key


def test_the_logged_loss_is_the_mean_over_supervised_tokens_of_the_weighted_terms(tmp_path):
    """Recomputed densely for the first step, with the trainer's own data order."""
    row = losses(tmp_path, "llama", 8, 1, ("cross_entropy",))[0]
    student = tiny.model("llama", seed=1)
    torch.manual_seed(0)
    order = next(iter(torch.utils.data.BatchSampler(_order(32), 8, False)))
    batch = Collator(0)([tiny.documents(32)[place] for place in order])
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert row["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert row["term_cross_entropy"] == pytest.approx(row["loss"], rel=1e-6)


def _order(size: int) -> list[int]:
    """The order of accelerate's seedable sampler for seed 0, epoch 0."""
    from accelerate.data_loader import SeedableRandomSampler

    return list(SeedableRandomSampler(range(size), data_seed=0))


def test_two_gloo_ranks_give_the_loss_and_the_weights_of_one_process(tmp_path):
    """The whole command under torchrun: equal logged losses and equal exported weights, evaluation and export included."""
    common = ["train", "--objective", "forward_kl", "--objective", "cosine:weight=0.3", "--evaluator", "perplexity",
              "--set", "data.samples=40", "--set", "data.eval_samples=3", "--set", "data.max_length=64",
              "--train", "max_steps=3", "--train", "logging_steps=1", "--train", "use_cpu=true", "--train", "lr_scheduler_type=constant",
              "--train", "warmup_steps=0", "--train", "learning_rate=1e-3"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "distily"]
    runs = {
        "one": [sys.executable, "-m", "distily", *common, "--train", "per_device_train_batch_size=8"],
        "two": [*launch, *common, "--train", "per_device_train_batch_size=4"],
    }
    rows = {}
    for name, command in runs.items():
        result = subprocess.run(
            [*command, "--output-dir", str(tmp_path / name)], capture_output=True, text=True, env=environment, timeout=280
        )
        assert result.returncode == 0, result.stderr[-2000:]
        rows[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    one, two = ([row for row in rows[name] if "loss" in row] for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)
        assert first["term_forward_kl"] == pytest.approx(second["term_forward_kl"], rel=1e-3)
    metrics = [
        json.loads((tmp_path / name / "record.json").read_text())["metrics"]["student"]["perplexity"] for name in ("one", "two")
    ]
    assert metrics[0] == pytest.approx(metrics[1], rel=2e-3)
