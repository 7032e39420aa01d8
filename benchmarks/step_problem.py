"""What the step benchmark trains: two Llama models with random weights, one batch of random tokens, and the operations of a step.

The paper's count: multiplications and additions of the matrix products and of causal attention; the backward has twice the forward's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from distily.bare import random_batches
from distily.benchmark import Stopwatch, synchronize
from distily.data import Collator
from distily.sources import DEMO

LEAST_OPERATIONS = 3e11
"""Of the products that are timed together."""
SPREAD = 0.05
"""Standard deviation of the random weights: a teacher sure enough of its tokens that the loss is not nearly 0."""


@dataclass(frozen=True)
class Case:
    """Sizes of teacher and student, which differ in ``blocks``, and of the batch."""

    hidden: int
    inner: int
    heads: int
    groups: int
    width: int
    vocabulary: int
    teacher: int
    student: int
    rows: int
    length: int
    like: str
    warm: int = 2
    """Steps before the timed ones; a small model's are more, for what is decided by how they go."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def forward(self, blocks: int) -> int:
        """Operations of a model's forward; the last token of a row has no label, so no logits."""
        projections = self.hidden * self.width * 2 * (self.heads + self.groups)
        products = 2 * self.tokens * blocks * (projections + 3 * self.hidden * self.inner)
        attention = 2 * self.rows * self.length**2 * blocks * self.heads * self.width
        head = 2 * self.rows * (self.length - 1) * self.hidden * self.vocabulary
        return products + attention + head

    @property
    def operations(self) -> dict[str, int]:
        """The teacher's forward, the student's forward and backward."""
        student = self.forward(self.student)
        return {"teacher": self.forward(self.teacher), "student": student, "backward": 2 * student}

    def config(self, blocks: int) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.width,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(8192, self.length),
            tie_word_embeddings=True,
            initializer_range=SPREAD,
            use_cache=False,
        )

    def models(self, weights: torch.dtype, device: torch.device) -> tuple[Any, Any]:
        """Teacher in bf16 and student in ``weights``; the same ones each time."""
        teacher, student = (self._model(blocks, seed, device) for seed, blocks in enumerate((self.teacher, self.student)))
        return teacher.to(torch.bfloat16).eval().requires_grad_(False), student.to(weights).train()

    def _model(self, blocks: int, seed: int, device: torch.device) -> Any:
        torch.manual_seed(seed)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(self.config(blocks), dtype=torch.float32)

    def batch(self, device: torch.device) -> Mapping[str, Any]:
        """All rows full; every token but the first of a row is a label."""
        return next(random_batches(self.vocabulary, self.rows, self.length, 1, Collator(0), device))


CASES = {
    "llama": Case(
        2048, 8192, 32, 8, 64, 128256, 16, 8, 8, 2048, "teacher 1.24B like Llama-3.2-1B, student 0.75B with half its blocks"
    ),
    "small": Case(
        576, 1536, 9, 3, 64, 49152, 30, 15, 8, 512, "teacher 135M like SmolLM2-135M, student 81M with half its blocks", warm=12
    ),
    "tiny": Case(64, 128, 4, 2, 16, 1024, 2, 1, 2, 32, "a check that needs no GPU"),
}


def tokenizer() -> Any:
    """Some tokenizer, for trainers that ask for one: no text is read."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "teacher")


def rate_of_products(case: Case, device: torch.device, repeats: int = 20) -> float:
    """The ceiling on this machine: operations a second of the largest product of a block in bf16, the best of its three."""
    shapes = (
        (case.tokens, case.hidden, case.inner),
        (case.tokens, case.inner, case.hidden),
        (case.hidden, case.tokens, case.inner),
    )
    best = 0.0
    for rows, inner, columns in shapes:
        first, second = (torch.randn(size, device=device, dtype=torch.bfloat16) for size in ((rows, inner), (inner, columns)))
        operations = 2 * rows * inner * columns
        several = min(50, math.ceil(LEAST_OPERATIONS / operations))  # a short product would be timed with its start
        watch = Stopwatch(device)
        for _ in range(3 + repeats):
            watch.mark("products")
            for _ in range(several):
                first @ second
            watch.mark("products, done")
        synchronize(device)
        times = sorted(watch.between("products", "products, done")[3:])
        best = max(best, 1e3 * several * operations / times[len(times) // 2])
    return best
