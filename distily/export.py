"""The student as other programs load it: a Hugging Face folder, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distily.files import whole_folder, write_text
from distily.loss.driver import ATTACHED


def export_student(student: Any, tokenizer: Any, quantizer: Any | None, folder: Path, extra: dict[str, str]) -> None:
    """Weights (safetensors), configuration, generation configuration and tokenizer under ``folder``, and the texts ``extra``.

    A quantizer converts the weights and writes its entry into the configuration. Nothing of the objectives is in it.
    """
    with whole_folder(folder) as partial:
        student.config.use_cache = True
        if quantizer is None:
            state = {key: value for key, value in student.state_dict().items() if not key.startswith(f"{ATTACHED}.")}
            student.save_pretrained(partial, state_dict=state)
        else:
            _save_quantized(student, quantizer, partial)
        tokenizer.save_pretrained(partial)
        for name, text in extra.items():
            write_text(partial / name, text)
        for weights in partial.glob("*.safetensors"):  # safetensors keeps them from other users; a student is to be shared
            weights.chmod((partial / "config.json").stat().st_mode)


def _save_quantized(student: Any, quantizer: Any, partial: Path) -> None:
    from safetensors.torch import save_file

    state, entry = quantizer.convert(student)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items() if not key.startswith(f"{ATTACHED}.")}
    save_file(tensors, str(partial / "model.safetensors"), metadata={"format": "pt"})
    config = {**student.config.to_dict(), "architectures": [type(student).__name__], "quantization_config": entry}
    config["dtype"] = str(student.dtype).removeprefix("torch.")
    write_text(partial / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    if student.generation_config is not None:
        student.generation_config.save_pretrained(partial)


def weights_size(folder: Path) -> int:
    """Bytes of the weights in an exported folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
