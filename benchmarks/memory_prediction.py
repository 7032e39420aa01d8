"""Predicted against measured peak memory of training, on a GPU.

    python benchmarks/memory_prediction.py --out benchmarks/results/memory_prediction.md

Each case predicts from models on the meta device, then trains the same models (random weights, synthetic tokens) for a few steps
with ``DistillationTrainer`` and reads ``torch.cuda.max_memory_allocated``. No downloads.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, TrainingArguments

from distily.data import Collator
from distily.loss.driver import Driver
from distily.loss.terms import build_terms
from distily.plugins import Plugins, load
from distily.prediction import MemoryPrediction, predict_memory
from distily.spec import parse_component
from distily.teachers import LocalTeacher
from distily.trainer import DistillationTrainer

STEPS = 4
PLUGINS = ("divergences", "features", "labels", "layer_mappers", "normalizers", "projectors")
PHASES = ("forward", "backward", "optimizer step")


@dataclass(frozen=True)
class Case:
    """One training. The teacher's weights are bf16; a student with float32 weights trains under bf16 autocast."""

    name: str
    teacher: Callable[[], Any]
    student: Callable[[], Any]
    rows: int
    length: int
    objectives: tuple[str, ...] = ("forward_kl",)
    student_dtype: torch.dtype = torch.float32
    data: str = "padded"
    train: dict[str, Any] = field(default_factory=dict)


def llama(width: int, layers: int, heads: int, groups: int, inner: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        vocab_size=32_000,
    )


def qwen(width: int, layers: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=2,
        intermediate_size=4 * width,
        vocab_size=151_936,
        tie_word_embeddings=True,
    )


def gpt2(width: int, layers: int) -> GPT2Config:
    return GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, n_positions=1024)


CASES = [
    Case(
        "Llama 0.3B to 0.15B, V 32,000, fp32 student under bf16 autocast, padded",
        lambda: llama(1024, 20, 16, 4, 2816),
        lambda: llama(768, 14, 12, 12, 2048),
        rows=8,
        length=512,
        objectives=("forward_kl", "cross_entropy:weight=0.5"),
    ),
    Case(
        "GPT-2 medium to small, V 50,257, bf16 student, gradient checkpointing, full rows",
        lambda: gpt2(1024, 24),
        lambda: gpt2(768, 12),
        rows=16,
        length=1024,
        student_dtype=torch.bfloat16,
        data="full",
        train={"gradient_checkpointing": True},
    ),
    Case(
        "Qwen2-like, V 151,936, cosine of hidden states with a linear projector, packed",
        lambda: qwen(768, 12),
        lambda: qwen(384, 6),
        rows=4,
        length=2048,
        objectives=("forward_kl", "cosine:mapper=last_k(k=2),projector=linear,weight=0.5"),
        data="packed",
    ),
    Case(
        "GPT-2 small to half, V 50,257, fp32 student under bf16 autocast, dropout, foreach AdamW, 2 micro-batches, padded",
        lambda: gpt2(768, 12),
        lambda: gpt2(768, 6),
        rows=8,
        length=1024,
        train={"optim": "adamw_torch", "gradient_accumulation_steps": 2},
    ),
]


class Watched(DistillationTrainer):
    """Keeps the highest memory of each phase."""

    peaks: dict[str, int]

    def note(self, phase: str) -> None:
        self.peaks[phase] = max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        self.note("between")
        loss = super().compute_loss(*arguments, **keywords)
        self.note("forward")
        return loss

    def training_step(self, *arguments: Any, **keywords: Any) -> Any:
        loss = super().training_step(*arguments, **keywords)
        self.note("backward")
        return loss


def sequences(case: Case, vocabulary: int) -> list[Any]:
    """Enough items for the steps. Padded: the first row of each batch is full, the others shorter; packed: about four a row."""
    generator = random.Random(0)

    def document(length: int) -> dict[str, list[int]]:
        ids = [generator.randrange(vocabulary) for _ in range(length)]
        return {"input_ids": ids, "labels": ids}

    count = case.rows * STEPS * case.train.get("gradient_accumulation_steps", 1)
    if case.data == "packed":
        return [[document(case.length // 4) for _ in range(4)] for _ in range(count)]
    short = case.length - 1 if case.data == "padded" else case.length
    return [document(case.length if index % 2 == 0 else short) for index in range(count)]


def build(config: Any, dtype: torch.dtype, device: str) -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def predict(case: Case, arguments: TrainingArguments, plugins: Plugins, device: str) -> MemoryPrediction:
    student, teacher = build(case.student(), case.student_dtype, "meta"), build(case.teacher(), torch.bfloat16, "meta")
    return predict_memory(
        student=student,
        teacher=teacher,
        objectives=[parse_component(entry, "objectives") for entry in case.objectives],
        builder=plugins,
        vocabulary=student.config.vocab_size,
        rows=case.rows,
        length=case.length,
        arguments=arguments,
        mixed_precision=case.student_dtype == torch.float32,
        padded=case.data == "padded",
        packed=case.data == "packed",
        device_type=device,
    )


def train(case: Case, arguments: TrainingArguments, plugins: Plugins) -> dict[str, int]:
    """The highest memory of each phase, measured."""
    torch.manual_seed(0)
    student, teacher = build(case.student(), case.student_dtype, "cuda"), build(case.teacher(), torch.bfloat16, "cuda").eval()
    vocabulary = student.config.vocab_size
    terms = build_terms([parse_component(entry, "objectives") for entry in case.objectives], plugins, student, teacher)
    wanted = [feature for term in terms.values() for feature in term.teacher_features]
    driver = Driver(terms, LocalTeacher(teacher, vocabulary, wanted), vocabulary)
    driver.attach(student)
    items = sequences(case, vocabulary)
    collator = Collator(0, packed=case.data == "packed")
    trainer = Watched(driver, {}, None, model=student, args=arguments, train_dataset=items, data_collator=collator)
    trainer.peaks = {}
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    trainer.note("optimizer step")
    trainer.peaks["optimizer step"] = max(trainer.peaks["optimizer step"], trainer.peaks.pop("between"))
    trainer.peaks["left"] = torch.cuda.memory_allocated()
    driver.detach()
    return trainer.peaks


def settings(case: Case, folder: str, on_cpu: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=case.rows,
        bf16=case.student_dtype == torch.float32,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=on_cpu,
        **case.train,
    )


def figure(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--predict-only", action="store_true", help="No GPU: print the predictions.")
    chosen = parser.parse_args()
    plugins = load([EntryPoint(name, f"distily_{name}", "distily") for name in PLUGINS])
    heads = [f"{phase}: predicted / measured" for phase in PHASES]
    lines = [f"| case | predicted MiB | measured MiB | ratio | {' | '.join(heads)} |"]
    lines.append("|---|---|---|---|" + "---|" * len(PHASES))
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            arguments = settings(case, folder, chosen.predict_only)
            began = time.perf_counter()
            predicted = predict(case, arguments, plugins, "cuda")
            print(f"{case.name}: {predicted} [{time.perf_counter() - began:.1f} s]", flush=True)
            if chosen.predict_only:
                continue
            measured = train(case, arguments, plugins)
        gc.collect()
        torch.cuda.empty_cache()
        peak = max(measured[phase] for phase in PHASES)
        expected = {**predicted.phases, "forward": max(predicted.phases["forward"], predicted.phases["loss"])}
        phases = [f"{figure(expected[phase])} / {figure(measured[phase])}" for phase in PHASES]
        print(f"  measured {figure(peak)} MiB; left after training {figure(measured['left'])}", flush=True)
        cells = [case.name, figure(predicted.peak), figure(peak), f"{predicted.peak / peak:.3f}", *phases]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "accelerate"))
    text = "\n".join([*lines, "", f"{versions}; {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"])
    print(text)
    if chosen.out and not chosen.predict_only:
        chosen.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
