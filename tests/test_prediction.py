"""The predicted memory: exact where it can be counted by hand, ordered as it must be, and near what a CPU's allocator reports."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM, TrainingArguments

from distily.data import Collator
from distily.loss.driver import Driver
from distily.loss.terms import build_terms
from distily.prediction import PARTS, STATE_BYTES, predict_memory
from distily.spec import parse_component
from distily.teachers import LocalTeacher

KL = ("forward_kl",)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512}


def arguments(tmp_path, **train):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **train)


def meta(architecture="llama", dtype=torch.float32, **overrides):
    name, values = tiny.SHAPES[architecture]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**values, **overrides}), dtype=dtype)


def predicted(tmp_path, objectives=KL, train=None, student=None, teacher=None, **options):
    student = student if student is not None else meta(**WIDE)
    return predict_memory(
        student=student,
        teacher=teacher if teacher is not None else meta(dtype=torch.bfloat16, **WIDE),
        objectives=[parse_component(entry, "objectives") for entry in objectives],
        builder=tiny.plugins(),
        vocabulary=student.config.vocab_size,
        arguments=arguments(tmp_path, **(train or {})),
        **{"rows": 4, "length": 64, "device_type": "cpu", **options},
    )


def weights(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in {*model.parameters(), *model.buffers()})


def test_weights_and_optimizer_state_are_counted_exactly(tmp_path):
    student, teacher = meta(tie_word_embeddings=True, **WIDE), meta(dtype=torch.bfloat16, **WIDE)
    result = predicted(tmp_path, student=student, teacher=teacher)
    parameters = list(student.parameters())
    assert result.teacher == weights(teacher)
    assert result.student == weights(student)
    assert result.optimizer == sum(8 * parameter.numel() + 4 for parameter in parameters)  # two moments and a counter
    assert result.peak == sum(getattr(result, name) for name in PARTS) == max(result.phases.values())
    assert all(parameter.is_meta for parameter in parameters)
    assert not hasattr(student, "distily_objectives")


def test_a_gpu_counts_blocks_and_a_workspace(tmp_path):
    student = meta(**WIDE)
    result = predicted(tmp_path, student=student, device_type="cuda")
    sizes = [tensor.numel() * tensor.element_size() for tensor in [*student.parameters(), *student.buffers()]]
    assert result.student == sum(-(-size // 512) * 512 for size in sizes)
    assert result.workspace > 0
    assert "GPU memory" in str(result)


@pytest.mark.parametrize(
    ("optimizer", "each"), [("sgd", 0), ("adamw_8bit", STATE_BYTES["8bit"]), ("lion_32bit", 4), ("adamw_torch", 8)]
)
def test_optimizers_differ_by_their_state(tmp_path, optimizer, each):
    student = meta(**WIDE)
    result = predicted(tmp_path, student=student, train={"optim": optimizer})
    assert result.optimizer == pytest.approx(each * student.num_parameters(), rel=0.001, abs=0)


def test_frozen_weights_have_neither_gradients_nor_state(tmp_path):
    student = meta(**WIDE)
    student.model.requires_grad_(False)
    result = predicted(tmp_path, student=student)
    head = student.lm_head.weight.numel()
    assert result.optimizer == 8 * head + 4
    assert result.phases["optimizer step"] < result.teacher + result.student + result.optimizer + 2 * 4 * head


def test_activations_grow_with_the_batch_and_the_length(tmp_path):
    base, more_rows, longer = (predicted(tmp_path, rows=rows, length=length) for rows, length in ((4, 64), (8, 64), (4, 128)))
    assert base.activations < more_rows.activations
    assert base.activations < longer.activations
    assert base.optimizer == more_rows.optimizer == longer.optimizer


def test_fused_attention_keeps_no_scores(tmp_path):
    eager, fused = (
        predicted(tmp_path, student=model, length=1024, rows=2, padded=False, device_type="cuda").activations
        for model in (meta(attn_implementation="eager", **WIDE), meta(**WIDE))
    )
    scores = 2 * 4 * 1024**2 * 4  # rows, heads, S x S, float32
    assert eager - fused > 2.5 * scores  # three blocks


def test_a_padded_batch_costs_a_mask(tmp_path):
    full, padded = (predicted(tmp_path, padded=choice, device_type="cuda", length=512).peak for choice in (False, True))
    packed = predicted(tmp_path, padded=False, packed=True, device_type="cuda", length=512).peak
    assert padded - full >= 4 * 512**2  # rows, S x S of bool
    assert packed > full


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_gradient_checkpointing_lowers_the_peak(tmp_path, device_type):
    shape = {"rows": 16, "device_type": device_type, "mixed_precision": True}
    name = "activation" if hasattr(arguments(tmp_path), "activation_checkpointing") else "gradient"
    plain = predicted(tmp_path, **shape)
    checkpointed = predicted(tmp_path, train={f"{name}_checkpointing": True}, **shape)
    assert checkpointed.activations < 0.6 * plain.activations
    assert checkpointed.peak < plain.peak


def test_accumulated_gradients_are_there_during_the_forward(tmp_path):
    once, twice = (predicted(tmp_path, train={"gradient_accumulation_steps": steps}) for steps in (1, 2))
    gradients = 4 * meta(**WIDE).num_parameters()
    assert twice.phases["forward"] - once.phases["forward"] == gradients


@pytest.mark.parametrize("architecture", list(tiny.SHAPES))
def test_every_architecture_is_predicted_with_features_and_autocast(tmp_path, architecture):
    student = meta(architecture)
    result = predicted(
        tmp_path,
        objectives=("forward_kl", "cosine:projector=linear,weight=0.5"),
        student=student,
        teacher=meta(architecture, torch.bfloat16),
        length=32,
        device_type="cuda",
        mixed_precision=True,
    )
    assert result.activations > 0
    assert result.student > weights(student)  # the projector is the student's while it trains


def test_a_7b_pair_is_predicted_without_its_memory(tmp_path):
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, **heads}
    student = meta(dtype=torch.bfloat16, num_hidden_layers=8, **shape)
    teacher = meta(dtype=torch.bfloat16, num_hidden_layers=32, **shape)
    result = predicted(tmp_path, student=student, teacher=teacher, rows=2, length=1024, device_type="cuda")
    static = 2 * teacher.num_parameters() + 2 * student.num_parameters() + 4 * student.num_parameters()
    assert static < result.peak < 1.6 * static


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_peak_is_what_the_allocator_of_a_cpu_reports(tmp_path, architecture):
    """One step on real tensors; the profiler reads every allocation, also those inside of operators."""
    shape = {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 1024}
    if architecture == "gpt2":
        shape = {"n_embd": 128, "n_layer": 3, "vocab_size": 1024, "n_positions": 64}
    student, teacher = (tiny.model(architecture, seed, **shape) for seed in (0, 1))
    objectives = ("forward_kl", "mse:projector=linear")
    terms = build_terms([parse_component(entry, "objectives") for entry in objectives], tiny.plugins(), student, teacher)
    wanted = [feature for term in terms.values() for feature in term.teacher_features]
    driver = Driver(terms, LocalTeacher(teacher, 1024, wanted), 1024, chunk_rows=256)
    driver.attach(student)
    ids = torch.randint(1, 1024, (8, 64)).tolist()
    batch = Collator(0)([{"input_ids": row, "labels": row} for row in [*ids[:-1], ids[-1][:-3]]])
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def step():
        with driver.step(batch):
            loss = student(**inputs, use_cache=False)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    student.train()
    step()
    peak = tiny.allocated(step, tmp_path)
    driver.detach()
    result = predicted(tmp_path, objectives, student=student, teacher=teacher, rows=8, length=64, chunk_rows=256)
    weighed = result.teacher + result.student + result.optimizer
    assert result.peak - weighed == pytest.approx(peak, rel=0.05)
