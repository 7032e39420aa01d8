"""Toy models of eight architectures and batches of random documents, built from configuration; arithmetic only."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import multiprocessing

from distily.data import Collator
from distily.loss.driver import Driver, local_teacher
from distily.loss.terms import build_terms
from distily.plugins import Plugins, load
from distily.spec import parse_component

VOCABULARY = 97
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
SHAPES = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                            "attn_pdrop": 0.0, "vocab_size": VOCABULARY}),
    "llama": ("LlamaConfig", {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}),
    "phi3": ("Phi3Config", {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "resid_pdrop": 0.0}),
    "gemma2": ("Gemma2Config", {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8,
                                "final_logit_softcapping": 3.0, "sliding_window": 16}),
    "opt": ("OPTConfig", {**COMMON, "ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXConfig", {**COMMON, "intermediate_size": 48}),
}  # fmt: skip


def model(
    architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object
) -> transformers.PreTrainedModel:
    """A random model of an architecture; weights large enough that logits differ between tokens."""
    name, values = SHAPES[architecture]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**values, **overrides})
    built = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return built.eval()


def documents(count: int = 8, seed: int = 0, shortest: int = 4, longest: int = 14, prompt: int = 2) -> list[dict[str, list[int]]]:
    """Ragged random documents; the first ``prompt`` tokens of each carry no label."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        result.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return result


_plugins: list[Plugins] = []


def plugins() -> Plugins:
    if not _plugins:
        _plugins.append(load())
    return _plugins[0]


def driver(
    student: object,
    teacher: object | None,
    *specs: str,
    chunk_rows: int = 5,
    vocabulary: int = VOCABULARY,
    float8: bool = False,
    **options: object,
) -> Driver:
    """A driver for objective specs, attached to the student."""
    components = [parse_component(spec, "objectives") for spec in specs]
    terms = build_terms(components, plugins(), student, teacher, seed=0)
    built = Driver(terms, local_teacher(teacher, terms, vocabulary, float8), vocabulary, chunk_rows, **options)
    built.attach(student)
    return built


def items(batches: list[dict]) -> int:
    """Supervised tokens of an accumulated batch."""
    return sum(int((batch["shift_labels"] != -100).sum()) for batch in batches)


def accumulate(
    built: Driver, network: object, batches: list[dict], progress: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step over micro-batches."""
    network.zero_grad()
    total, count = 0.0, items(batches)
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        with built.step(batch, count, progress, 3):
            loss = network(**inputs, use_cache=False).loss
        loss.backward()
        total = total + loss.detach()
    return total, {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def collate(rows: list, packed: bool = False) -> dict:
    return Collator(0, packed)(rows)


def distance(first: object, second: object) -> float:
    """The largest absolute difference over the largest absolute value, over a number or a set of gradients."""
    if isinstance(first, dict):
        assert set(first) == set(second), sorted(set(first) ^ set(second))
        largest = max(float(value.abs().max()) for value in second.values())
        return max(float((first[name] - second[name]).abs().max()) for name in first) / largest
    return abs(float(first) - float(second)) / abs(float(second))


def allocated(call: object, folder: Path) -> int:
    """The most bytes that a call takes of a CPU's memory over what was there, by PyTorch's profiler, which sees every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes)))


def of_two_ranks(step: Callable[..., object], cases: Mapping[str, tuple], folder: Path) -> dict[str, Any]:
    """What ``step(rank, world, *case)`` gives on the first of two processes, by case; they start once."""
    result = folder / "found.pickle"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, (2, step, cases, port, result), nprocs=2)
    return pickle.loads(result.read_bytes())


def _rank(rank: int, world: int, step: Callable[..., object], cases: Mapping[str, tuple], port: int, result: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    found = {name: step(rank, world, *case) for name, case in cases.items()}
    if rank == 0:
        result.write_bytes(pickle.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
