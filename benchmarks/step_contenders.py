"""Who takes part in the step benchmark: Distily as `distily train` would run it, TRL's trainers, and steps composed of the best parts.

A contender opens with a fresh pair of models and gives a function that takes one optimizer step and returns its loss. All of them clip
the gradient's norm to 1 and use the fused AdamW, as the trainers' defaults are.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import EntryPoint, version
from typing import Any

import loss_head_contenders
import torch
import torch._functorch.config as functorch
from loss_head_problem import Problem
from step_problem import Case, tokenizer
from torch import Tensor, nn
from transformers.integrations.liger import apply_liger_kernel

from distily.bare import SETTLING, BareTraining
from distily.config import resolve
from distily.loss.features import decoder_blocks
from distily.plugins import load

Step = Callable[[], Tensor]
RATE, NORM = 3e-4, 1.0
DTYPES = {"bf16": torch.bfloat16, "fp32, autocast": torch.float32}
BETAS = {"forward_kl": 0.0, "jsd": 0.5}


@dataclass(frozen=True)
class Contender:
    """``weights``: the student's, a key of ``DTYPES``; the teacher's are bf16. ``flags``: what was asked for, in its library's words."""

    name: str
    objective: str
    weights: str
    flags: str
    opened: Callable[[Case, torch.device], AbstractContextManager[Step]]
    warm: int = 0
    """Steps that are not timed, if the case has fewer."""

    @property
    def title(self) -> str:
        return f"{self.name}, {self.objective}, {self.weights}"


def contenders() -> tuple[list[Contender], dict[str, str]]:
    """All of them, what is to be compared first, and remarks by library: who is absent for what reason, what was left out."""
    heads, told = loss_head_contenders.contenders()
    by_title = {head.title: head for head in heads}
    remarks = {name: remark for name, remark in told.items() if remark.startswith("absent") and name != "torchtune"}
    remarks["torchtune"] = "its loss heads are in loss_head.md; its recipes are not run here."
    ours = [
        distily("distily", "forward_kl", "bf16"),
        distily("distily", "jsd", "bf16"),
        distily("distily, fp8", "forward_kl", "bf16", precision="fp8"),
        distily("distily", "forward_kl", "fp32, autocast"),
        distily("distily, fp8", "forward_kl", "fp32, autocast", precision="fp8"),
    ]
    found, more = trl()
    parts = [
        composed(by_title[f"{title}, {objective}"], how, weights)
        for title, objective, how, weights in COMPOSED
        if f"{title}, {objective}" in by_title
    ]
    plain = [
        distily("distily, plain loss", "forward_kl", "bf16", kernels=False),
        distily("distily, not compiled", "forward_kl", "bf16", compile=False),
        distily("distily, no graphs", "forward_kl", "bf16", graphs=False),
    ]
    return [*ours, *parts[:3], *found, *parts[3:], *plain], remarks | more


# Distily: the bare step of what `distily train` would run.


def distily(name: str, objective: str, weights: str, **speed: Any) -> Contender:
    plugins = load([EntryPoint(part, f"distily_{part}", "distily") for part in ("divergences", "labels")])
    dtype = {"bf16": "bfloat16", "fp32, autocast": "float32"}[weights]
    speed = {"precision": "bf16", **speed}

    @contextmanager
    def opened(case: Case, device: torch.device) -> Iterator[Step]:
        teacher, student = case.models(DTYPES[weights], device)
        train = {"learning_rate": RATE, "max_grad_norm": NORM, "per_device_train_batch_size": case.rows}
        settings = {"student": {"dtype": dtype}, "speed": speed, "train": train}
        config = resolve({"output_dir": ".", "objectives": [objective], **settings})
        training = BareTraining(config, plugins, student, teacher, case.vocabulary, [case.batch(device)])
        if training.speed.notes:
            raise RuntimeError(" ".join(training.speed.notes))  # something else would be timed under this name
        with training.applied:
            yield training.step
        training.close()

    settings = {"student.dtype": dtype, **{f"speed.{key}": str(value).lower() for key, value in speed.items()}}
    flags = " ".join(f"--set {key}={value}" for key, value in settings.items())
    return Contender(name, objective, weights, f"distily train --objective {objective} {flags}", opened, SETTLING)


# Steps composed of parts: transformers' models, their blocks compiled one by one, and a loss head of the loss-head benchmark.

HOW = {
    "compiled": "blocks compiled by Module.compile(), sdpa_kernel with cuDNN first",
    "reduce-overhead": "both models' bodies compiled whole, Module.compile(mode='reduce-overhead'), sdpa_kernel with cuDNN first",
    "eager": "eager",
}
COMPOSED = (
    # loss head, objective, how the models run, student's weights
    ("liger fused KL", "forward_kl", "compiled", "bf16"),
    ("trl chunked", "forward_kl", "compiled", "bf16"),
    ("liger fused JSD", "forward_kl", "compiled", "bf16"),
    ("naive, compiled", "forward_kl", "compiled", "bf16"),
    ("liger fused KL", "forward_kl", "reduce-overhead", "bf16"),
    ("naive, compiled", "forward_kl", "reduce-overhead", "bf16"),
    ("liger chunked, compiled", "forward_kl", "compiled", "bf16"),
    ("trl chunked", "forward_kl", "compiled", "fp32, autocast"),
    ("trl chunked", "jsd", "compiled", "bf16"),
    ("liger fused JSD", "jsd", "compiled", "bf16"),
    ("naive", "forward_kl", "eager", "bf16"),
)


def composed(head: loss_head_contenders.Contender, how: str, weights: str) -> Contender:
    """Compiled ones also get the attention kernel that is fastest on Hopper first, as Distily does."""

    @contextmanager
    def opened(case: Case, device: torch.device) -> Iterator[Step]:
        teacher, student = case.models(DTYPES[weights], device)
        ids = case.batch(device)["input_ids"]
        optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0, fused=True)
        problem = Problem(None, student.lm_head.weight, None, teacher.lm_head.weight, ids[:, 1:].flatten())  # type: ignore[arg-type]
        loss_of = head.prepare(problem)
        for block in [*decoder_blocks(student), *decoder_blocks(teacher)] if how == "compiled" else []:
            block.compile()
        for model in [student, teacher] if how == "reduce-overhead" else []:
            model.model.compile(mode="reduce-overhead")
        mixed = torch.autocast(device.type, torch.bfloat16) if weights != "bf16" else nullcontext()

        def hidden(model: Any) -> Tensor:
            return model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)

        def step() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            with mixed:
                with torch.no_grad():
                    problem.teacher = hidden(teacher)
                problem.student = hidden(student)
                loss = loss_of()
            loss.backward()
            problem.student = problem.teacher = None  # type: ignore[assignment]
            nn.utils.clip_grad_norm_(student.parameters(), NORM)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        with attention(device) if how != "eager" else nullcontext():
            yield step

    return Contender(f"{how} + {head.name}", head.objective, weights, f"{HOW[how]}; {head.flags}", opened)


@contextmanager
def attention(device: torch.device) -> Iterator[None]:
    """cuDNN's attention kernel before PyTorch's others, on a GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    others = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    first = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others], set_priority=True) if device.type == "cuda" else nullcontext()
    with first, functorch.patch(enable_autograd_cache=False):  # a stored graph might hold another kernel
        yield


# TRL: the trainers' own training_step. What a training loop does around it is done here: clipping, the optimizer, zeroing.


def trl() -> tuple[list[Contender], dict[str, str]]:
    try:
        import trl.experimental.gkd
        import trl.trainer.distillation_trainer  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return [], {"trl": f"absent: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
    package = f"trl {version('trl')}"
    found = []
    for objective, liger in (("forward_kl", False), ("forward_kl", True), ("jsd", False)):
        name = "trl DistillationTrainer" + (", Liger layers" if liger else "")
        options = {"beta": BETAS[objective], "gradient_checkpointing": False, "bf16": False, "use_liger_kernel": liger}
        found.append(Contender(name, objective, "bf16", flags_of(package, "DistillationConfig", options), distillation(options)))
    for weights in DTYPES:
        options = {"beta": 0.0, "lmbda": 0.0, "gradient_checkpointing": False, "bf16": weights != "bf16"}
        own = Contender("trl GKDTrainer", "forward_kl", weights, flags_of(package, "GKDConfig", options), gkd(options, weights))
        found.append(own)
    return found, {
        "trl DistillationTrainer": "it writes its own completions; here it is given them (_prepare_inputs returns the batch). With "
        "float32 weights on one GPU its loss runs outside autocast, in float32 (bf16=True changes nothing there), so it is left out."
    }


def flags_of(package: str, kind: str, options: dict[str, Any]) -> str:
    return f"{package}: {kind}({', '.join(f'{key}={value}' for key, value in options.items())})"


def distillation(options: dict[str, Any]) -> Callable[[Case, torch.device], AbstractContextManager[Step]]:
    def make(student: Any, teacher: Any, folder: str, case: Case) -> Any:
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        class Given(DistillationTrainer):
            def _prepare_inputs(self, inputs: Any) -> Any:
                return inputs

        arguments = DistillationConfig(folder, **common(case), **options)
        prompts = Dataset.from_dict({"prompt": ["a"] * case.rows})
        trainer = Given(student, teacher, arguments, train_dataset=prompts, processing_class=tokenizer())
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    def inputs(ids: Tensor) -> dict[str, Any]:
        prompt, completion = ids[:, :1], ids[:, 1:]
        masks = {"prompt_mask": torch.ones_like(prompt), "completion_mask": torch.ones_like(completion)}
        items = torch.tensor(float(completion.numel()), device=ids.device)
        return {"prompt_ids": prompt, "completion_ids": completion, **masks, "num_items_in_batch": items}

    return lambda case, device: trained(make, inputs, case, device, "bf16", options.get("use_liger_kernel", False))


def gkd(options: dict[str, Any], weights: str) -> Callable[[Case, torch.device], AbstractContextManager[Step]]:
    def make(student: Any, teacher: Any, folder: str, case: Case) -> Any:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        arguments = GKDConfig(folder, **common(case), **options)
        chats = Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]] * case.rows})
        return GKDTrainer(
            student, teacher, arguments, data_collator=lambda rows: rows, train_dataset=chats, processing_class=tokenizer()
        )

    def inputs(ids: Tensor) -> dict[str, Any]:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    return lambda case, device: trained(make, inputs, case, device, weights)


def common(case: Case) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": case.rows,
        "learning_rate": RATE,
        "report_to": [],
        "max_steps": 1,
        "save_strategy": "no",
    }


@contextmanager
def trained(
    make: Callable[..., Any],
    inputs: Callable[[Tensor], dict[str, Any]],
    case: Case,
    device: torch.device,
    weights: str,
    liger: bool = False,
) -> Iterator[Step]:
    """A trainer's ``training_step`` with the rest of a step around it, as ``train`` prepares model and optimizer."""
    teacher, student = case.models(DTYPES[weights], device)
    home = sys.modules[type(student).__module__]
    before = dict(vars(home))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(student, teacher, folder, case)
        if liger:
            apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
        model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
        ids = case.batch(device)["input_ids"]
        items = torch.tensor(ids.shape[0] * (ids.shape[1] - 1), device=device)

        def step() -> Tensor:
            loss = trainer.training_step(model, inputs(ids), items)
            trainer.accelerator.clip_grad_norm_(model.parameters(), NORM)
            optimizer.step()
            model.zero_grad()
            return loss.detach()

        try:
            yield step
        finally:
            vars(home).update(before)  # Liger also puts its rotary embedding into the module of all models of the class
            trainer.accelerator.free_memory()
