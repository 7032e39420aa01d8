"""One frozen RunConfig: defaults, then the file, then the flags. Knows no plugin and loads neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from distily.errors import DistilyError, unknown, wrong
from distily.schema import Between, conforms, describe
from distily.spec import Component, parse_component, read_yaml

Positive = Annotated[int, Between(1)]
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen model whose outputs are the target."""

    model: str = "demo"
    """Hub id, folder, or ``demo`` for the pair that comes with the package."""
    dtype: DType = "auto"
    """Type of the weights; ``auto``: as stored on a GPU, float32 on a CPU."""
    attention: str | None = None
    """Attention implementation by its transformers name; null: transformers' own choice."""
    quantization: dict[str, Any] | None = None
    """Options of ``transformers.BitsAndBytesConfig``, such as {load_in_4bit: true}."""


@dataclass(frozen=True)
class StudentConfig:
    """The model that is trained: a checkpoint, or the teacher's configuration with overrides."""

    model: str | None = None
    """Hub id or folder to start from; null: build from the teacher's configuration."""
    config: dict[str, Any] = field(default_factory=dict)
    """Overrides of the teacher's configuration, such as {num_hidden_layers: 6}."""
    initialize: Literal["teacher_layers", "random"] | None = None
    """Start from copied teacher blocks or at random; null: teacher blocks where the shapes allow it."""
    layers: list[Positive] | None = None
    """Teacher blocks (1 = first) to copy, one for each student block; null: spread evenly, first and last kept."""
    embeddings: Literal["copy", "pca", "random"] | None = None
    """Outside the blocks: the teacher's embedding and head, both reduced to the student's width by principal components (``pca``), or
    random; null: copied where the shapes allow it, unless ``initialize`` is random."""
    copy: list[str] = field(default_factory=list)
    """Further modules to copy from the teacher by name, such as lm_head."""
    freeze: list[str] = field(default_factory=list)
    """Modules that are not trained, by name, such as model.embed_tokens."""
    dtype: DType = "float32"
    """Type of the trained weights; what is computed with them is ``speed.precision``."""
    attention: str | None = None
    """Attention implementation by its transformers name; null: transformers' own choice."""


@dataclass(frozen=True)
class DataConfig:
    """Text in, supervised tokens out."""

    dataset: str = "demo"
    """Hub id, a file or folder (text, JSON lines, Parquet, Arrow), or ``demo`` for the text that comes with the package."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split to train on."""
    eval_dataset: str | None = None
    """Held-out data set; null: ``eval_split`` of the same data set, or a part of the training documents."""
    eval_split: str | None = None
    """Split to measure on; null: ``eval_size`` documents are held out of the training split."""
    eval_size: Annotated[float, Between(0, excluding=(0,))] = 0.05
    """Documents to hold out: a share below 1, or a number."""
    samples: Positive | None = None
    """Training documents to use, drawn by the seed; null: all. Required meaning for streaming: the first ones."""
    eval_samples: Positive | None = None
    """Held-out documents to use; null: all of them."""
    column: str | None = None
    """Column with the text; null: ``messages``, ``prompt`` and ``completion``, or ``text``, whichever is there."""
    max_length: Positive = 512
    """Tokens a sequence may have; lowered to what both models can read."""
    long_documents: Literal["split", "truncate"] | None = None
    """Plain text longer than ``max_length``: cut into pieces or truncated; null: split. Prompts and chats are truncated."""
    append_eos: bool = True
    """End every plain-text document with the end-of-sequence token."""
    packing: bool = False
    """Several documents in one row, which do not see each other."""
    streaming: bool = False
    """Read a data set that is too large to store while training; needs ``train.max_steps`` and ``eval_dataset``/``eval_split``."""


@dataclass(frozen=True)
class LossConfig:
    """How the loss is computed; no setting here changes its value beyond rounding."""

    chunk_rows: Positive | None = None
    """Supervised tokens whose logits exist at a time; null: from the vocabulary, about 64 MiB of float32 logits."""


@dataclass(frozen=True)
class SpeedConfig:
    """What a training step is computed with. Without these keys a run chooses, and says what."""

    precision: Literal["auto", "float32", "bf16", "fp8", "int8"] = "auto"
    """Arithmetic of matrix products: bf16, or 8 bits in the blocks' linear layers and bf16 elsewhere (fp8 also in teacher's logits that
    kernels form); auto: bf16 on a GPU, float32 on a CPU."""
    compile: bool | None = None
    """Compile the decoder blocks of student and teacher, one by one; null: on a GPU."""
    graphs: bool | None = None
    """Replay the bodies of student and teacher as CUDA graphs; null: on one GPU, where it is seen to wait for the host."""
    kernels: bool = True
    """Let fused kernels compute the logit terms that they know, on a GPU."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"
    """Kernel that SDPA tries first; auto: cuDNN's on Hopper, PyTorch's own order elsewhere."""


@dataclass(frozen=True)
class ControlConfig:
    """The same student trained on labels alone, from the same initial weights, batches and steps."""

    learning_rates: list[Annotated[float, Between(0, excluding=(0,))]] = field(default_factory=list)
    """Rates to try, the best by held-out perplexity is reported; empty: the rate of the distilled student."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run is asked to do."""

    output_dir: str
    """Folder of the run."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objectives: tuple[Component, ...] = (Component("forward_kl"),)
    """Terms of the loss, summed with their weights."""
    combiner: Component | None = None
    """How terms are combined where they meet, such as gradient_weighted; null: the weighted sum."""
    quantizer: Component | None = None
    """Trains the student quantised, such as ternary."""
    evaluators: tuple[Component, ...] = (Component("perplexity"), Component("agreement"))
    """Measured before and after training, on teacher, student and control."""
    loggers: tuple[Component, ...] = (Component("progress"),)
    """Where metrics go besides metrics.jsonl."""
    control: ControlConfig | None = None
    """Train a labels-only control: true, or {learning_rates: [...]}."""
    loss: LossConfig = field(default_factory=LossConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """What a training step is computed with."""
    train: dict[str, Any] = field(default_factory=dict)
    """Any field of ``transformers.TrainingArguments``."""
    seed: Annotated[int, Between(0, 2**32 - 1)] = 42
    """Seed of initialisation, data order and sampling."""
    push_to_hub: str | None = None
    """Hub repository to upload the student to, as owner/name; null: nothing leaves the machine."""
    trust_remote_code: bool = False
    """Run model code that comes with a checkpoint."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``resolve`` reads back; without hub settings."""
        values = _plain(self)
        values.pop("push_to_hub")
        return values


REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SHORTHANDS = {"teacher": "model", "student": "model", "data": "dataset"}
"""Sections that may be given as one text, and the key that the text stands for."""


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return {"name": value.name, **_plain(dict(value.options))}
    if dataclasses.is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``upper`` over ``lower``: mappings are merged key by key, everything else is replaced."""
    merged = dict(lower)
    for key, value in upper.items():
        if isinstance(merged.get(key), Mapping) and isinstance(value, Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def expand(values: Mapping[str, Any]) -> dict[str, Any]:
    """Shorthands written out: ``teacher: gpt2`` is ``teacher: {model: gpt2}``, ``control: true`` is ``control: {}``."""
    expanded = dict(values)
    for section, key in SHORTHANDS.items():
        if isinstance(expanded.get(section), str):
            expanded[section] = {key: expanded[section]}
    if isinstance(expanded.get("control"), bool):
        expanded["control"] = {} if expanded["control"] else None
    return expanded


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ``DistilyError`` where the file is missing or is no mapping."""
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DistilyError(f"configuration {str(path)!r} cannot be read: {reason}.") from error
    except yaml.YAMLError as error:
        place = " ".join(str(error).split())
        raise DistilyError(f"configuration {str(path)!r} is not valid YAML: {place}") from error
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise DistilyError(f"configuration {str(path)!r} must be a mapping of keys, not {type(values).__name__}.")
    return dict(values)


def assign(settings: Sequence[str], option: str) -> dict[str, Any]:
    """``["a.b=1", …]`` as nested mappings; values are YAML. ``option`` is the flag, named in errors."""
    result: dict[str, Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path or "" in path.split("."):
            raise DistilyError(f"{option}: {setting!r} is not allowed; allowed: KEY=VALUE, such as data.max_length=512.")
        try:
            value: Any = read_yaml(text)
        except yaml.YAMLError as error:
            raise DistilyError(f"{option}: the value of {path!r} is not valid YAML: {text!r}.") from error
        for key in reversed(path.split(".")):
            value = {key: value}
        result = merge(result, value)
    return result


def resolve(values: Mapping[str, Any]) -> RunConfig:
    """A checked RunConfig. Raises one ``DistilyError`` with a line for each mistake."""
    mistakes: list[str] = []
    config = _build(RunConfig, expand(values), "", mistakes)
    if config is not None and config.push_to_hub is not None and not REPOSITORY.fullmatch(config.push_to_hub):
        mistakes.append(wrong("push_to_hub", config.push_to_hub, "owner/name"))
    if mistakes:
        raise DistilyError("\n".join(mistakes))
    assert isinstance(config, RunConfig)
    return config


def _build(cls: type, values: Mapping[str, Any], prefix: str, mistakes: list[str]) -> Any:
    """An instance of the dataclass ``cls`` from ``values``; problems are added to ``mistakes``."""
    hints = typing.get_type_hints(cls, include_extras=True)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            mistakes.append(unknown("key", f"{prefix}{key}", [f"{prefix}{name}" for name in hints]))
            continue
        arguments[key] = _field(f"{prefix}{key}", value, hints[key], mistakes)
    for entry in dataclasses.fields(cls):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in arguments:
            mistakes.append(f"{prefix}{entry.name} is missing; it takes {describe(hints[entry.name])}.")
    return None if mistakes else cls(**arguments)


def _field(key: str, value: Any, hint: Any, mistakes: list[str]) -> Any:
    choices = [choice for choice in (typing.get_args(hint) or (hint,)) if choice is not type(None)]
    target = choices[0] if choices else hint
    optional = type(None) in typing.get_args(hint)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(target) and target is not Component:
        if not isinstance(value, Mapping):
            mistakes.append(wrong(key, value, "a mapping of keys"))
            return None
        return _build(typing.cast(type, target), value, f"{key}.", mistakes)
    if target is Component:
        many = typing.get_origin(hint) is tuple
        entries = value if many and isinstance(value, (list, tuple)) else [value]
        built = [_component(key, entry, mistakes) for entry in entries]
        return tuple(built) if many else built[0]
    if not conforms(value, hint):
        mistakes.append(wrong(key, value, describe(hint)))
    elif value == "":
        mistakes.append(wrong(key, value, f"{describe(hint)}, not an empty one"))
    return value


def _component(key: str, value: Any, mistakes: list[str]) -> Component:
    try:
        return parse_component(value, key)
    except DistilyError as error:
        mistakes.append(str(error))
        return Component("")
