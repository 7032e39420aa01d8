"""``train:`` of the configuration as ``transformers.TrainingArguments``: its fields, our defaults, what a run must decide itself."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from transformers import TrainingArguments

from distily.config import RunConfig
from distily.errors import DistilyError, unknown, wrong
from distily.schema import Between, conforms, describe
from distily.speed import Speed

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "num_train_epochs": 1,
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,  # it would ask the device for the loss after every micro-batch, to hide that it is NaN
}
OURS = {
    "output_dir": "output_dir of the run",
    "overwrite_output_dir": "output_dir of the run",
    "resume_from_checkpoint": "--resume",
    "report_to": "loggers",
    "seed": "seed of the run",
    "push_to_hub": "push_to_hub of the run",
    "remove_unused_columns": "the collator",
    "label_names": "the collator",
    "load_best_model_at_end": "nothing; the last weights are exported",
    "do_train": "the command",
    "do_eval": "evaluators",
    "do_predict": "evaluators",
    "disable_tqdm": "loggers",
    "label_smoothing_factor": "objectives",
    "save_only_model": "--resume; checkpoints hold all that an exact one needs",
    "local_rank": "--gpus or torchrun",
    "torch_compile": "speed.compile",
    "torch_compile_backend": "speed.compile",
    "torch_compile_mode": "speed.compile",
}
Positive, Count = Annotated[int, Between(1)], Annotated[int, Between(0)]
AboveZero, Rate = Annotated[float, Between(0, excluding=(0,))], Annotated[float, Between(0)]
Share = Annotated[float, Between(0, 1, excluding=(1,))]
NARROWER: dict[str, Any] = {
    "per_device_train_batch_size": Positive,
    "per_device_eval_batch_size": Positive,
    "gradient_accumulation_steps": Positive,
    "num_train_epochs": AboveZero,
    "max_steps": Positive | Literal[-1],
    "learning_rate": Rate,
    "weight_decay": Rate,
    "max_grad_norm": Rate,
    "adam_beta1": Share,
    "adam_beta2": Share,
    "adam_epsilon": Rate,
    "logging_steps": AboveZero,
    "eval_steps": AboveZero | None,
    "save_steps": AboveZero,
    "save_total_limit": Positive | None,
    "dataloader_num_workers": Count,
    "data_seed": Annotated[int, Between(0, 2**32 - 1)] | None,
    "accelerator_config": dict | None,
}
"""What transformers would refuse only in the middle of a run, or not at all."""


def check_train(train: Mapping[str, Any]) -> None:
    """Keys, types and owners of ``train:``. Raises ``DistilyError`` with a line for each mistake."""
    fields = {entry.name for entry in dataclasses.fields(TrainingArguments) if entry.init}
    hints = {**typing.get_type_hints(TrainingArguments), **NARROWER}
    lines = []
    for key, value in train.items():
        if key in OURS or key.startswith("hub_"):
            lines.append(f"train.{key} is not set here; it is decided by {OURS.get(key, 'push_to_hub of the run')}.")
        elif key not in fields:
            close = unknown("key", f"train.{key}", [f"train.{name}" for name in fields]).split(" Allowed")[0]
            lines.append(f"{close} Allowed: the fields of transformers.TrainingArguments.")
        elif isinstance(value, str) and (choices := _choices(hints[key])) and value not in choices:
            lines.append(unknown(f"train.{key}", value, choices))
        elif not _accepts(hints[key], value):
            lines.append(wrong(f"train.{key}", value, describe(hints[key])))
    if lines:
        raise DistilyError("\n".join(lines))


def _accepts(hint: Any, value: Any) -> bool:
    choices = _choices(hint)
    return conforms(value, hint) or value in choices or (value is False and "no" in choices)


def _choices(hint: Any) -> list[Any]:
    """The values of the enumerations in a hint."""
    choices = [choice for choice in (typing.get_args(hint) or (hint,)) if hasattr(choice, "__members__")]
    return [member.value for choice in choices for member in choice]


def training_arguments(
    config: RunConfig, folder: Path, *, speed: Speed, report_to: Sequence[str] = (), **overrides: Any
) -> TrainingArguments:
    """The arguments of a training in ``folder``. Raises ``DistilyError`` for values that transformers refuses."""
    import torch

    check_train(config.train)
    chosen = {**DEFAULTS, **config.train, **overrides}
    # a mapping from a YAML 1.1 reader has false for a bare no
    chosen |= {key: "no" for key, value in chosen.items() if value is False and key.endswith("_strategy")}
    old, new = "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"
    checkpointing = dict(chosen.pop(new, None) or chosen.pop(old, None) or {})
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    if checkpointing.get("use_reentrant"):
        raise DistilyError(
            f"train.{old}: use_reentrant true is not supported, features would lose their gradient; allowed: false."
        )
    if speed.autocast:
        chosen["bf16"] = True
    if chosen.get("use_liger_kernel"):
        chosen["liger_kernel_config"] = _liger_layers(chosen.get("liger_kernel_config") or {})
    accelerator = {"dispatch_batches": False, "non_blocking": speed.on_gpu, **(chosen.get("accelerator_config") or {})}
    chosen.pop("save_total_limit")  # rotation must come after sealing, so it is not transformers' to do
    try:
        return TrainingArguments(
            **{
                **chosen,
                "output_dir": str(folder),
                "seed": config.seed,
                "report_to": list(report_to),
                "remove_unused_columns": False,
                "label_names": ["labels"],
                "disable_tqdm": True,
                "accelerator_config": accelerator,
                new if new in known else old: {**checkpointing, "use_reentrant": False},
                "use_cpu": chosen.get("use_cpu", not torch.cuda.is_available()),
                "dataloader_pin_memory": chosen.get("dataloader_pin_memory", torch.cuda.is_available()),
            }
        )
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DistilyError(f"train: transformers refuses it: {reason}") from error


def _liger_layers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Liger's options with its own losses off. Raises ``DistilyError`` where one of them is asked for, or Liger is missing."""
    losses = ("cross_entropy", "fused_linear_cross_entropy")
    for name in losses:
        if given.get(name):
            raise DistilyError(
                f"train.liger_kernel_config: {name} true is not supported, the objectives are the loss; allowed: false."
            )
    if find_spec("liger_kernel") is None:
        raise DistilyError("train.use_liger_kernel: liger-kernel is not installed; pip install 'distily[gpu]'.")
    return {**given, **dict.fromkeys(losses, False)}


def optimizer(config: RunConfig) -> str:
    """The optimizer by its transformers name, with transformers' default."""
    default = next(entry.default for entry in dataclasses.fields(TrainingArguments) if entry.name == "optim")
    name = config.train.get("optim", default)
    return str(getattr(name, "value", name))


def kept_checkpoints(config: RunConfig) -> int:
    """Checkpoints that a run keeps."""
    keep = {**DEFAULTS, **config.train}["save_total_limit"]
    return max(1, int(keep)) if keep is not None else 10**9
