"""Teacher and student: load, shape, initialise, freeze."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from torch import nn

from distily.config import StudentConfig, TeacherConfig
from distily.embeddings import copy_outside_blocks, transfer_embeddings
from distily.errors import DistilyError, nearest, unknown, wrong
from distily.layers import spread
from distily.loss.features import decoder_blocks
from distily.schema import Between, Option, conforms, describe, mistakes
from distily.sources import DEMO

MACHINE = (torch.OutOfMemoryError, torch.AcceleratorError)
REFUSALS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, ImportError, RuntimeError, AssertionError)
"""What transformers raises for values that fit no model, unless it is one of ``MACHINE``."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


Positive = Annotated[int, Between(1)]
COUNTS = {
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "vocab_size",
}  # fmt: skip
FIXED = ("_name_or_path", "architectures", "dtype", "model_type", "quantization_config", "torch_dtype", "transformers_version")
"""What a student takes from its own class and settings, never from ``student.config``."""


def locate(model: str, key: str) -> str:
    """The path or hub id that a name stands for. Raises ``DistilyError`` for a path that is no model folder."""
    if model == "demo":
        return str(DEMO / "teacher")
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DistilyError(f"{key}: folder {model!r} holds no config.json; allowed: a Hugging Face model folder or hub id.")
        return str(path)
    if path.exists() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        problem = "is a file" if path.exists() else "does not exist"
        raise DistilyError(f"{key}: {model!r} {problem}; allowed: a Hugging Face model folder or hub id.")
    return model


def _from_pretrained(loader: Any, model: str, key: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(locate(model, key), **options)
    except (*REFUSALS, OSError, SafetensorError) as error:
        if isinstance(error, MACHINE) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise _refused(error, key, f"{key}: {model!r} could not be loaded", options.get("attn_implementation")) from error


def _refused(error: Exception, key: str, what: str, attention: str | None) -> DistilyError:
    """The reason that transformers gave, on one line; one about attention names that key."""
    reason = " ".join(str(error).split())[:240]
    if attention and "ttention" in reason:
        allowed = "eager, sdpa, or another one that is installed"
        return DistilyError(f"{wrong(key.split('.')[0] + '.attention', attention, allowed)} {reason}")
    return DistilyError(f"{what}: {reason}")


def _load_model(model: str, key: str, **options: Any) -> Any:
    """A causal language model. Raises ``DistilyError`` where weights are missing: transformers would draw them at random."""
    from transformers import AutoModelForCausalLM

    loaded, info = _from_pretrained(AutoModelForCausalLM, model, key, output_loading_info=True, **options)
    if info["missing_keys"] and not getattr(loaded, "is_quantized", False):
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise DistilyError(f"{key}: {model!r} lacks {missing}; allowed: a model with all its weights.")
    return loaded


def load_config(model: str, key: str, trust_remote_code: bool = False) -> Any:
    """The model's configuration; no weights."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, model, key, trust_remote_code=trust_remote_code)


def load_tokenizer(model: str, key: str, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, model, key, trust_remote_code=trust_remote_code)


def check_tokenizers(teacher: Any, student: Any) -> None:
    """Raises ``DistilyError`` where two models do not share one tokenizer: token by token losses would compare unlike things."""
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine == theirs:
        return
    token = min(token for token, _ in mine.items() ^ theirs.items())
    raise DistilyError(
        f"student.model: its tokenizer is another one than the teacher's ({len(mine)} against {len(theirs)} tokens; "
        f"{token!r} is {mine.get(token, 'absent')} there and {theirs.get(token, 'absent')} here); allowed: the same tokenizer."
    )


def load_teacher(config: TeacherConfig, device: torch.device, trust_remote_code: bool = False, key: str = "teacher.model") -> Any:
    """The teacher, frozen and in evaluation mode."""
    stored = config.dtype == "auto" and device.type != "cpu"
    options: dict[str, Any] = {"dtype": "auto" if stored else DTYPES.get(config.dtype, torch.float32)}
    if config.attention:
        options["attn_implementation"] = config.attention
    if config.quantization:
        from transformers import BitsAndBytesConfig

        known = {name: Option(name, Any, None) for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"}
        if lines := mistakes("teacher.quantization", config.quantization, known):
            raise DistilyError("\n".join(lines))
        options["quantization_config"] = BitsAndBytesConfig(**config.quantization)
        options["device_map"] = {"": device}
    teacher = _load_model(config.model, key, trust_remote_code=trust_remote_code, **options)
    if not config.quantization:
        teacher = teacher.to(device)
    return teacher.eval().requires_grad_(False)


def student_config(teacher_config: Any, overrides: Mapping[str, Any]) -> Any:
    """The teacher's configuration with ``overrides``. What transformers derives from a changed value is derived anew.

    Raises ``DistilyError`` for a key that the configuration does not have.
    """
    values = teacher_config.to_dict()
    aliases = type(teacher_config).attribute_map
    known = {name: real for name, real in {**{name: name for name in values}, **aliases}.items() if name not in FIXED}
    lines = [unknown("student.config", key, known) for key in overrides if key not in known]
    counts = {*COUNTS, *(aliases[name] for name in COUNTS & set(aliases))}
    lines += [
        wrong(f"student.config.{key}", value, describe(Positive))
        for key, value in overrides.items()
        if key in counts & set(known) and not conforms(value, Positive)
    ]
    if lines:
        raise DistilyError("\n".join(_shorten(line) for line in lines))
    renamed = {known[key]: value for key, value in overrides.items()}
    text = teacher_config.get_text_config()
    depth = text.num_hidden_layers
    if renamed.get(known.get("num_hidden_layers", "num_hidden_layers"), depth) != depth:
        values = {key: value for key, value in values.items() if not (isinstance(value, list) and len(value) == depth)}
    if "head_dim" in values and values["head_dim"] == text.hidden_size // text.num_attention_heads:
        heads = renamed.get("num_attention_heads", text.num_attention_heads)
        values["head_dim"] = renamed.get("hidden_size", text.hidden_size) // heads
    for key in ("architectures", "quantization_config", "_name_or_path", "dtype", "torch_dtype"):
        values.pop(key, None)
    try:
        config = type(teacher_config)(**{**values, **renamed})
    except Exception as error:  # transformers validates configurations with classes of its own
        reason = " ".join(str(error).split())[:240]
        raise DistilyError(f"student.config: {dict(overrides)!r} gives no valid configuration: {reason}") from error
    text = config.get_text_config()
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    if groups and heads % groups:
        raise DistilyError(wrong("student.config.num_key_value_heads", groups, f"a divisor of num_attention_heads, {heads}"))
    return config


def _shorten(line: str) -> str:
    return line if len(line) < 900 else line[:900] + " …"


def shape_of_teacher(config: TeacherConfig, trust_remote_code: bool = False) -> Any:
    """The teacher on the meta device: shapes and dtypes without weights, for predictions."""
    loaded = load_config(config.model, "teacher.model", trust_remote_code)
    stored = getattr(loaded, "dtype", None) if torch.cuda.is_available() and config.dtype == "auto" else None
    return _shape(loaded, stored or DTYPES.get(config.dtype, torch.float32), config.attention, trust_remote_code)


def shape_of_student(config: StudentConfig, teacher: Any, trust_remote_code: bool = False) -> Any:
    """The student on the meta device; ``teacher`` gives the configuration, with or without weights."""
    loaded = (
        load_config(config.model, "student.model", trust_remote_code)
        if config.model is not None
        else student_config(teacher.config, config.config or default_shape(teacher.config))
    )
    student = _shape(loaded, DTYPES.get(config.dtype, torch.float32), config.attention, trust_remote_code)
    return _freeze(student, config)


def _shape(config: Any, dtype: torch.dtype, attention: str | None, trust_remote_code: bool, device: str = "meta") -> Any:
    """A model from a configuration. Raises ``DistilyError`` where it builds none."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    except REFUSALS as error:
        if isinstance(error, MACHINE):
            raise
        raise _refused(error, "student.config", "student.config: it builds no model", attention) from error


def build_student(config: StudentConfig, teacher: Any, seed: int, trust_remote_code: bool = False) -> Any:
    """The student on the CPU, in its dtype, initialised and frozen as asked; the same for the same seed."""
    options: dict[str, Any] = {"attn_implementation": config.attention} if config.attention else {}
    dtype = DTYPES.get(config.dtype, torch.float32)
    if config.model is not None:
        if config.config or config.layers or config.initialize or config.embeddings or config.copy:
            raise DistilyError(
                "student.model: it cannot be combined with student.config, layers, initialize, embeddings or copy."
            )
        student = _load_model(config.model, "student.model", dtype=dtype, trust_remote_code=trust_remote_code, **options)
    else:
        shaped = student_config(teacher.config, config.config or default_shape(teacher.config))
        torch.manual_seed(seed)
        student = _shape(shaped, dtype, config.attention, trust_remote_code, device="cpu")
        student.generation_config = teacher.generation_config
        _initialize(student, teacher, config)
    student.config.use_cache = False
    return _freeze(student, config)


def _freeze(student: Any, config: StudentConfig) -> Any:
    frozen = set()
    for name in config.freeze:
        frozen |= {id(parameter) for parameter in _module(student, name, "student.freeze").requires_grad_(False).parameters()}
    for name, module in student.named_modules():
        is_listed = any(name == listed or name.startswith(f"{listed}.") for listed in config.freeze)
        if not is_listed and any(id(own) in frozen for own in module.parameters(recurse=False)):
            raise DistilyError(
                f"student.freeze: {config.freeze!r} is not allowed: {name} shares a weight with one of them; "
                f"allowed: {name} too, or student.config.tie_word_embeddings=false."
            )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise DistilyError("student.freeze: nothing is left to train.")
    return student


def default_shape(teacher_config: Any) -> dict[str, int]:
    """Half the teacher's depth: what a student is that nobody described."""
    return {"num_hidden_layers": max(1, teacher_config.get_text_config().num_hidden_layers // 2)}


def _initialize(student: Any, teacher: Any, config: StudentConfig) -> None:
    if config.initialize == "random":
        if config.layers:
            raise DistilyError("student.layers: it needs student.initialize teacher_layers, not random.")
    else:
        misfit = _misfit(student, teacher)
        if misfit is None:
            _copy_blocks(student, teacher, config.layers)
        elif config.initialize == "teacher_layers" or config.layers:
            raise DistilyError(f"student.initialize: teacher_layers needs equal shapes, and {misfit}; allowed: random.")
    if config.embeddings in ("copy", "pca"):
        copy_outside_blocks(student, teacher)
        transfer_embeddings(student, teacher, config.embeddings)
    elif config.embeddings is None and config.initialize != "random":
        copy_outside_blocks(student, teacher)
    for name in config.copy:
        source = _module(teacher, name, "student.copy").state_dict()
        target = _module(student, name, "student.copy")
        for key, value in target.state_dict().items():
            if key not in source or source[key].shape != value.shape:
                raise DistilyError(f"student.copy: {name}.{key} has another shape in the teacher; allowed: equal shapes.")
        target.load_state_dict({key: source[key] for key in target.state_dict()})
    student.tie_weights()


def _misfit(student: Any, teacher: Any) -> str | None:
    """Why teacher blocks do not fit into the student, or None."""
    theirs = decoder_blocks(teacher)[0].state_dict()
    for key, value in decoder_blocks(student)[0].state_dict().items():
        if key not in theirs or theirs[key].shape != value.shape:
            found = tuple(theirs[key].shape) if key in theirs else "absent"
            return f"a block's {key} is {tuple(value.shape)} in the student and {found} in the teacher"
    return None


def _copy_blocks(student: Any, teacher: Any, layers: list[int] | None) -> None:
    """Teacher blocks into the student's."""
    mine, theirs = decoder_blocks(student), decoder_blocks(teacher)
    chosen = layers or spread(len(mine), len(theirs))
    if len(chosen) != len(mine) or max(chosen) > len(theirs):
        raise DistilyError(
            f"student.layers: {chosen!r} is not allowed; allowed: {len(mine)} numbers from 1 to {len(theirs)}, one for each block."
        )
    for block, number in zip(mine, chosen, strict=True):
        block.load_state_dict(theirs[number - 1].state_dict())


def _module(model: nn.Module, name: str, key: str) -> nn.Module:
    modules = dict(model.named_modules())
    if name in modules and name:
        return modules[name]
    close = nearest(name, modules)
    guess = f"; did you mean {close!r}?" if close else "."
    raise DistilyError(f"{key}: module {name!r} does not exist{guess} Allowed: names of the model's modules, such as lm_head.")


def vocabulary_size(tokenizer: Any) -> int:
    """The tokenizer's real vocabulary: its largest id and one, without a head's padding."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def max_length(wanted: int, tokenizer: Any, *models: Any) -> int:
    """``wanted``, lowered to what every model and the tokenizer can read."""
    limits = [wanted]
    limits += [
        limit
        for model in models
        if isinstance(limit := getattr(model.config.get_text_config(), "max_position_embeddings", None), int) and limit > 0
    ]
    if tokenizer.model_max_length and tokenizer.model_max_length < 10**9:
        limits.append(int(tokenizer.model_max_length))
    return min(limits)
