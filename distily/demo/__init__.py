"""The demo pair: a small trained teacher and its text come with the package, so that everything can be tried without a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distily.record import RunRecord

PROMPT = "Return the"


def run_demo(output_dir: str) -> tuple[RunRecord, dict[str, str]]:
    """Runs ``demo.yaml`` into ``output_dir``, which is made anew if an earlier demo filled it.

    Returns the record, and how teacher and student continue a prompt.
    """
    from distily.config import read_file, resolve
    from distily.run import distill

    folder = Path(output_dir)
    if (folder / "record.json").is_file():
        shutil.rmtree(folder)
    record = distill(resolve({**read_file(Path(__file__).with_name("demo.yaml")), "output_dir": output_dir}))
    teacher = str(Path(__file__).with_name("teacher"))
    return record, {"Teacher": continuation(teacher), "Student": continuation(str(record.student_dir))}


def continuation(model: str, prompt: str = PROMPT, tokens: int = 48) -> str:
    """The greedy continuation of ``prompt`` by an exported model, on one line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    encoded = tokenizer(prompt, return_tensors="pt")
    ids = network.generate(
        encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=tokens, do_sample=False,
        repetition_penalty=1.2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
