"""A training without a trainer: what a step costs by itself.

Letters: B rows of a batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.liger import apply_liger_kernel

from distily.arguments import training_arguments
from distily.assembly import attached_driver
from distily.batch import model_inputs, moved
from distily.config import RunConfig
from distily.data import Collator
from distily.errors import DistilyError
from distily.plugins import Plugins
from distily.speed import Say, choose

SETTLING = 24
"""Steps in which a step may decide how it runs."""

Batch = Mapping[str, Any]


class BareTraining:
    """A training without a trainer: driver, optimizer and speed as a run of ``config`` has them, and one step's batches over and over.

    ``batches``: the micro-batches of a step, on the device of the models. ``text``: batches that calibrated components see before. Inside
    ``with training.applied`` the models run as the speed says. ``close`` takes driver and gradients off again; what stays is the student
    trained, with Liger's layers if it was to have them. Float16 goes without a loss scaler.
    """

    def __init__(
        self,
        config: RunConfig,
        plugins: Plugins,
        student: Any,
        teacher: Any,
        vocabulary: int,
        batches: Sequence[Batch],
        text: Iterable[Batch] = (),
        say: Say = print,
    ) -> None:
        self.speed = speed = choose(config)
        arguments = training_arguments(config, Path(config.output_dir), speed=speed)
        _prepare(student, arguments)
        self.driver = attached_driver(config, plugins, student.train(), teacher, vocabulary, text, speed)
        self.student, self.teacher = student, None if self.driver.teacher is None else teacher
        self.batches = batches
        self.device = batches[0]["input_ids"].device
        self.items = torch.tensor(sum(len(batch["supervised"]) for batch in batches), device=self.device)
        self.optimizer = _optimizer(arguments, student)
        self.clip = arguments.max_grad_norm
        self.half = torch.float16 if speed.precision == "fp16" else torch.bfloat16
        self.mixed = speed.autocast or speed.precision == "fp16"
        self.applied = speed.applied(student, self.teacher, say)

    def step(self) -> Tensor:
        """One optimizer step, with the calls that ``DistillationTrainer`` and transformers make in one: its loss ``()``."""
        losses = []
        for batch in self.batches:
            with self.driver.step(batch, self.items), torch.autocast(self.device.type, self.half, enabled=self.mixed):
                loss = self.student(**model_inputs(batch), use_cache=False)["loss"]
            loss.backward()
            losses.append(loss.detach())
        if self.clip:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.driver.advance(0.0)
        return torch.stack(losses).sum()

    def settle(self) -> None:
        """Steps in which it is decided how a step runs, such as by CUDA graphs, if they have not been."""
        for _ in range(SETTLING):
            if not self.applied.settled:
                self.step()

    def close(self) -> None:
        """Takes the driver off both models and the gradients off the student."""
        self.optimizer.zero_grad()
        self.driver.close()


def _prepare(student: Any, arguments: Any) -> None:
    """What transformers' trainer does to a model before the first step, if it is asked to: Liger's layers, checkpointing."""
    if arguments.use_liger_kernel:
        apply_liger_kernel(student, arguments.liger_kernel_config)
    kind = "activation" if hasattr(arguments, "activation_checkpointing") else "gradient"  # its name until v6
    if getattr(arguments, f"{kind}_checkpointing"):
        given = dict(getattr(arguments, f"{kind}_checkpointing_kwargs") or {})
        apart = {name: given.pop(name) for name in ("every_n_layers", "offload") if name in given}
        getattr(student, f"{kind}_checkpointing_enable")(given, **apart)


def _optimizer(arguments: Any, student: Any) -> torch.optim.Optimizer:
    """The run's optimizer, with all weights in one group. Raises ``DistilyError`` where transformers makes none of it."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, student)
        made: torch.optim.Optimizer = kind([{"params": trained, "weight_decay": arguments.weight_decay}], **options)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise DistilyError(f"train.optim: transformers refuses it: {' '.join(str(error).split())[:300]}") from error
    return made


def random_batches(
    vocabulary: int, rows: int, length: int, count: int, collator: Collator, device: torch.device, seed: int = 0
) -> Iterator[Batch]:
    """``count`` batches (B, S) as the collator makes them, of random tokens; every row is full and one document."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        drawn = torch.randint(vocabulary, (rows, length), generator=generator).tolist()
        documents: list[Any] = [{"input_ids": ids, "labels": ids} for ids in drawn]
        batch = collator([[document] for document in documents] if collator.packed else documents)
        yield moved(batch, device)
