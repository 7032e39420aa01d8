"""The model card: written from the RunRecord alone, read back by ``huggingface_hub``.

``base_model`` names a checkpoint only where the student started from one (``student.model``). The hub reads ``base_model`` without a
relation that it knows as a fine-tune, and it knows none for distillation; so the teacher of a student with a shape of its own stands
in ``teacher`` and in the text, never in ``base_model``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from distily.record import RunRecord

ORDER = ("teacher", "untrained", "control", "student")
TITLES = {"teacher": "Teacher", "untrained": "Student before training", "control": "Control: labels only", "student": "Student"}


def shown_metrics(record: RunRecord) -> list[str]:
    """Names of the metrics that any model has, in the order of their first appearance."""
    names: dict[str, None] = {}
    for model in ORDER:
        names.update(dict.fromkeys(record.metrics.get(model, {})))
    return [name for name in names if not name.endswith("_stderr")]


def metrics_table(record: RunRecord) -> str:
    """A Markdown table: one row a model, one column a metric."""
    names = shown_metrics(record)
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for model in ORDER:
        if model in record.metrics:
            values = (f"{record.metrics[model][name]:.4g}" if name in record.metrics[model] else "–" for name in names)
            lines.append(f"| {TITLES[model]} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def verdict(record: RunRecord) -> str:
    """One honest sentence: did distilling help over labels alone, and how far is the teacher?"""
    if record.gain is None:
        return "No labels-only control was trained, so this run does not show whether the teacher helped."
    rates = len(record.control)
    tried = f"the best of {rates} learning rates" if rates > 1 else "one learning rate"
    if record.gain > 0:
        text = f"Distilling gained {record.gain:.4f} nats a token over the same student trained on labels alone ({tried})."
    else:
        text = f"Distilling did not help: labels alone were better by {-record.gain:.4f} nats a token ({tried})."
    gap = record.gap_to_teacher
    if gap is not None:
        text += (
            f" The student is {gap:.4f} nats a token behind the teacher."
            if gap > 0
            else " The student is not behind the teacher."
        )
    return text + " One seed; differences between seeds were not measured."


def model_card(record: RunRecord, provenance: dict[str, Any]) -> str:
    """The whole README.md of the student."""
    config = record.config
    teacher, data = _public(config["teacher"]["model"]), _public(config["data"]["dataset"])
    student = config["student"]["model"]
    name = f"{Path(teacher).name}-distilled"
    objectives = "\n".join(f"- `{_spec(objective)}`" for objective in config["objectives"])
    if config.get("combiner"):
        objectives += f"\n\nCombined where they meet by `{_spec(config['combiner'])}`."
    shape = ", ".join(f"{key} = {value}" for key, value in (config["student"]["config"] or {}).items())
    origin = (
        f"the checkpoint `{_public(student)}`" if student else f"the teacher's configuration{f' with {shape}' if shape else ''}"
    )
    version = provenance["versions"]["distily"]
    return f"""---
{_metadata(record, name, teacher, data)}
---

# {name}

A student of `{teacher}`, distilled with Distily {version}.
It has {record.student_parameters:,} parameters, the teacher {record.teacher_parameters:,}
({record.student_parameters / max(1, record.teacher_parameters):.1%}). It was built from {origin}.

## Did it help?

{verdict(record)}

{metrics_table(record)}

Held-out tokens: `{data}`, the same for every row. Perplexity is per token of the teacher's tokenizer, `nats` its logarithm;
`agreement kl` is KL(teacher‖model) in nats and `agreement top1` the share of tokens where both put the same token first.

## Method

{objectives}

{record.steps:,} optimizer steps on {record.supervised_tokens:,} supervised tokens of `{data}`, {record.train_seconds:,.0f} seconds on
{_hardware(provenance)}.

## Reproduce

```
pip install distily=={version}   # commit {provenance.get("commit") or "unknown"}
distily train config.yaml --output-dir runs/again
```

`config.yaml` is beside this card. Versions: {", ".join(f"{key} {value}" for key, value in provenance["versions"].items())}.
"""


def _metadata(record: RunRecord, name: str, teacher: str, data: str) -> str:
    """The YAML header, by ``huggingface_hub``."""
    from huggingface_hub import EvalResult, ModelCardData

    student, quantizer = record.config["student"]["model"], record.config.get("quantizer")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data,
            dataset_name=f"{data} (held out)",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in record.metrics.get("student", {}).items()
        if math.isfinite(value)
    ]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distily", "distillation", "knowledge-distillation", *([quantizer["name"]] if quantizer else [])],
        datasets=[data] if _is_hub_id(data) else None,
        base_model=student if student and _is_hub_id(student) else None,
        model_name=name,
        eval_results=results,
        teacher=teacher,
    )
    return str(metadata.to_yaml())


def _hardware(provenance: dict[str, Any]) -> str:
    machine = provenance["machine"]
    return ", ".join(machine["gpus"]) if machine.get("gpus") else f"{machine['cores']} CPU cores"


def _public(name: str) -> str:
    """A hub id as it is; of a local path only the last part, for a card is read elsewhere."""
    if name == "demo":
        return "distily-demo"
    return name if _is_hub_id(name) else Path(name).name


def _is_hub_id(name: str) -> bool:
    path = Path(name).expanduser()
    return name != "distily-demo" and not path.exists() and not path.is_absolute() and name.count("/") <= 1 and not path.suffix


def _spec(objective: dict[str, Any]) -> str:
    from distily.spec import parse_component

    return str(parse_component(objective, "objectives"))
