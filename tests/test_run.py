"""A whole run from the outside: files, card, record, report, control, ternary export, evaluators, Python and shell."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import distily
from distily.cli import main
from distily.config import read_file, resolve

SMALL = {
    "student": {"config": {"num_hidden_layers": 2, "intermediate_size": 64}},
    "data": {"max_length": 64, "samples": 60, "eval_samples": 6},
    "train": {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2, "save_steps": 3, "learning_rate": 3e-3},
    "loggers": [],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """One run with a control, a feature term with a projector, and an evaluation in the middle."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = {
        **SMALL,
        "student": {"config": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}},
        "objectives": ["forward_kl:weight=0.8", "cosine:projector=orthogonal,weight=0.3"],
        "control": {"learning_rates": [1e-3, 3e-3]},
        "output_dir": str(folder),
    }
    config["train"] = {**SMALL["train"], "eval_strategy": "steps", "eval_steps": 3}
    return distily.distill(config, say=lambda line: None), folder


def test_the_run_folder_holds_what_it_should(finished):
    record, folder = finished
    names = {entry.name for entry in folder.iterdir()}
    assert names == {
        "config.yaml",
        "provenance.json",
        "metrics.jsonl",
        "record.json",
        "checkpoint-3",
        "checkpoint-6",
        "control",
        "student",
        "report",
    }
    assert {entry.name for entry in (folder / "report").iterdir()} == {
        "report.html",
        "loss.png",
        "loss.svg",
        "comparison.png",
        "comparison.svg",
    }
    assert not list(folder.rglob("*.partial"))
    assert len({file.stat().st_mode for file in (folder / "student").iterdir()}) == 1, "all of the student is as readable"


def test_the_student_is_a_plain_hugging_face_folder_without_a_trace_of_the_objectives(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record, folder = finished
    student, loading = AutoModelForCausalLM.from_pretrained(folder / "student", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert student.num_parameters() == record.student_parameters
    assert AutoTokenizer.from_pretrained(folder / "student").get_vocab()
    assert not [name for name in load_file(folder / "student" / "model.safetensors") if "distily" in name]
    assert [name for name in load_file(folder / "checkpoint-6" / "model.safetensors") if "distily_objectives" in name]


def test_reported_perplexity_is_that_of_the_exported_student_by_plain_code(finished):
    """Recomputed from the exported folder with nothing of Distily's but the held-out documents' ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distily.data import prepare

    record, folder = finished
    config = resolve(read_file(folder / "config.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    student = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for sequence in prepare(config.data, tokenizer, 64, config.seed).heldout:
            ids = torch.tensor([sequence["input_ids"]])
            logits = student(input_ids=ids).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            tokens += ids.shape[1] - 1
    assert math.isclose(record.metrics["student"]["perplexity"], math.exp(total / tokens), rel_tol=1e-4)


def test_metrics_hold_every_term_raw_and_weighted_time_speed_and_memory(finished):
    _, folder = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [2, 4, 6]
    for row in steps:
        assert math.isclose(row["term_forward_kl_weighted"], 0.8 * row["term_forward_kl"], rel_tol=1e-5)
        assert math.isclose(row["loss"], row["term_forward_kl_weighted"] + row["term_cosine_weighted"], rel_tol=1e-4)
        assert {"learning_rate", "train_seconds", "tokens_per_second", "train_memory_now", "train_memory_peak"} <= set(row)
    evaluations = [row for row in rows if "eval_perplexity" in row]
    assert [row["step"] for row in evaluations] == [3, 6]
    assert {"eval_seconds", "eval_memory_peak", "train_memory_peak", "eval_agreement_kl"} <= set(evaluations[0])


def test_the_control_starts_where_the_student_starts_and_every_rate_is_recorded(finished):
    record, folder = finished
    assert [entry["learning_rate"] for entry in record.control] == [1e-3, 3e-3]
    best = min(entry["metrics"]["perplexity_nats"] for entry in record.control)
    assert record.metrics["control"]["perplexity_nats"] == best
    assert math.isclose(record.gain, best - record.metrics["student"]["perplexity_nats"])
    first = json.loads((folder / "control" / "1" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["term_cross_entropy"] == first["loss"]
    assert not list((folder / "control").rglob("checkpoint-*"))


def test_the_card_is_read_back_and_claims_no_fine_tune(finished):
    from huggingface_hub import ModelCard

    record, folder = finished
    card = ModelCard.load(folder / "student" / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert {"distily", "distillation"} <= set(data["tags"])
    assert "base_model" not in data
    assert data["teacher"] == "distily-demo"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == pytest.approx(record.metrics["student"])
    for text in ("Control: labels only", "Student before training", "Did it help?", distily.__version__, "config.yaml"):
        assert text in card.text


def test_a_student_that_started_from_a_hub_checkpoint_names_it_as_base_model():
    from distily.card import model_card
    from distily.record import RunRecord

    config = resolve({"output_dir": "x", "teacher": "big/teacher", "student": "small/student", "data": "some/text"}).to_dict()
    record = RunRecord("x", config, 10, 5, metrics={"student": {"perplexity": 2.0}})
    provenance = {"versions": {"distily": "0"}, "commit": None, "machine": {"cores": 2}}
    header = yaml.safe_load(model_card(record, provenance).split("---")[1])
    assert header["base_model"] == "small/student"
    assert header["datasets"] == ["some/text"]


def test_config_yaml_runs_again_and_gives_the_same_weights(finished, tmp_path):
    _, folder = finished
    again = distily.distill(
        {**read_file(folder / "config.yaml"), "control": None, "output_dir": str(tmp_path / "again")}, say=lambda line: None
    )
    first, second = (load_file(place / "model.safetensors") for place in (folder / "student", again.student_dir))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_provenance_names_versions_commit_machine_and_data_and_no_secret(finished, monkeypatch, tmp_path, runner):
    _, folder = finished
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["versions"]["distily"] == distily.__version__
    assert {"torch", "transformers"} <= set(provenance["versions"])
    assert provenance["data"]["train"]["supervised"] > 0
    assert "push_to_hub" not in (folder / "config.yaml").read_text()


def test_a_complete_run_is_not_repeated(finished):
    record, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    distily.distill(resolve(read_file(folder / "config.yaml")), resume=True, say=lambda line: None)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_site_in_one_run_with_a_combiner_and_calibrated_parts(tmp_path):
    """Logits, draws, a logit lens, attention scores, relations, whitened states, a learned objective; the student is plain again."""
    terms = [
        "forward_kl",
        "sampled_targets:samples=8,weight=0.2",
        "jsd:on=logit_lens,mapper=last_k(k=1),weight=0.1",
        "attention_kl:mapper=last_k(k=1),heads=mean,weight=0.1",
        "self_relation:on=values,weight=0.1",
        "smooth_l1:mapper=last_k(k=2),projector=least_squares,normalizer=whiten,weight=0.1",
        "mse:mapper=attention_pooling,projector=linear,weight=0.01",
        "mutual_information:mapper=last_k(k=1),dimensions=8,weight=0.1",
    ]
    folder = tmp_path / "run"
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = {
        **SMALL,
        "student": {"config": shape},
        "objectives": terms,
        "combiner": "gradient_weighted",
        "evaluators": ["perplexity"],
        "output_dir": str(folder),
    }
    record = distily.distill(config, say=lambda line: None)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    names = [term.partition(":")[0] for term in terms]
    assert all(math.isfinite(last[f"term_{name}"]) for name in names)
    places = {name.removeprefix("combiner_").rsplit("_cosine_1")[0] for name in last if name.endswith("_cosine_1")}
    assert {"logits", "hidden_states_1", "hidden_states_2", "values_1", "query_2", "key_2"} <= places
    assert all(math.isfinite(value) for name, value in last.items() if name.startswith("combiner_"))
    assert "Combined where they meet by `gradient_weighted`." in (folder / "student" / "README.md").read_text()
    assert not [name for name in load_file(folder / "student" / "model.safetensors") if "distily" in name]
    assert record.metrics["student"]["perplexity"] < record.metrics["untrained"]["perplexity"]


@pytest.mark.parametrize(
    "objective",
    ["sinkhorn:max_rows=8", "cosine:projector=linear", "mse:normalizer=layernorm,mapper=uniform,projector=orthogonal"],
)
def test_sinkhorn_cosine_and_mse_train_across_widths_and_vocabulary_paddings(objective, tmp_path):
    """A student of another width whose head is padded from 1,024 to 1,088 rows; its own loss falls."""
    config = {
        **SMALL,
        "student": {
            "config": {
                "num_hidden_layers": 1,
                "hidden_size": 64,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": 1088,
            }
        },
        "data": {"max_length": 32, "samples": 20, "eval_samples": 2},
        "objectives": [objective],
        "evaluators": ["perplexity"],
        "train": {"max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 3, "learning_rate": 1e-2},
        "output_dir": str(tmp_path / "run"),
    }
    record = distily.distill(config, say=lambda line: None)
    losses = [row["loss"] for row in map(json.loads, (record.folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert losses[-1] < losses[0]


def test_a_ternary_student_is_trained_exported_and_reloaded_with_the_perplexity_of_its_training(tmp_path):
    from transformers import AutoModelForCausalLM

    from distily.measurement import evaluate_model

    config = {**SMALL, "quantizer": "ternary:warmup=0.5", "evaluators": ["perplexity"], "output_dir": str(tmp_path / "run")}
    record = distily.distill(config, say=lambda line: None)
    with torch.compiler.set_stance("force_eager"):
        student, loading = AutoModelForCausalLM.from_pretrained(record.student_dir, output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert {type(layer).__name__ for layer in student.model.layers[0].mlp.children()} >= {"BitLinear"}
        packed = load_file(record.student_dir / "model.safetensors")
        assert packed["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
        settings = ["data.max_length=64"]
        exported = evaluate_model(str(record.student_dir), _heldout(config, tmp_path), None, ["perplexity"], settings)
    assert math.isclose(exported["perplexity"], record.metrics["student"]["perplexity"], rel_tol=1e-3)


def _heldout(config: dict, folder: Path) -> str:
    """The run's held-out documents as a file."""
    from distily.data import _splits

    _, documents = _splits(resolve({**config, "output_dir": "x"}).data, 42)
    path = folder / "heldout.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents["text"]))
    return str(path)


def test_packing_trains_and_gives_the_same_loss_as_the_same_documents_unpacked(tmp_path):
    config = {**SMALL, "data": {**SMALL["data"], "packing": True, "max_length": 128}, "output_dir": str(tmp_path / "run")}
    record = distily.distill(config, say=lambda line: None)
    provenance = json.loads((record.folder / "provenance.json").read_text())
    assert provenance["data"]["train"]["rows"] < provenance["data"]["train"]["sequences"]


def test_tensorboard_receives_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    config = {**SMALL, "loggers": ["tensorboard"], "evaluators": ["perplexity"], "output_dir": str(tmp_path / "run")}
    record = distily.distill(config, say=lambda line: None)
    assert list(record.folder.rglob("events.out.tfevents*"))


def test_the_command_line_ends_with_what_was_reached_and_where(runner, tmp_path):
    arguments = ["train", "--train", "max_steps=2", "--set", "data.samples=20", "--set", "data.eval_samples=3", "--no-control"]
    result = runner.invoke(main, [*arguments, "--objective", "forward_kl", "--output-dir", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    for text in (
        "perplexity",
        "Student before training",
        "% of the teacher's",
        "does not show whether the teacher helped",
        str(tmp_path / "run"),
    ):
        assert text in result.output


def test_dry_run_prints_configuration_sizes_tokens_and_memory_and_writes_no_run(runner, tmp_path):
    result = runner.invoke(main, ["train", "--dry-run", "--set", "data.samples=20", "--output-dir", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    for text in ("objectives:", "2,853,312 parameters", "861,120 parameters", "tokens", "peak memory"):
        assert text in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.data
def test_lm_eval_runs_three_shared_slices_before_and_after(tmp_path):
    data = Path(os.environ["DISTILY_DATA"]) / "eval"
    slices = {
        "arc_easy": "ai2_arc/ARC-Easy_test.parquet",
        "piqa": "piqa/validation.parquet",
        "winogrande": "winogrande/winogrande_xl_validation.parquet",
    }
    tasks = ",".join(f"{task}@{data / file}" for task, file in slices.items())
    config = {
        **SMALL,
        "evaluators": ["perplexity", f"lm_eval:tasks=[{tasks}],limit=4,shots=0"],
        "output_dir": str(tmp_path / "run"),
    }
    record = distily.distill(config, say=lambda line: None)
    for model in ("teacher", "untrained", "student"):
        assert {f"lm_eval_{task}_acc" for task in slices} <= set(record.metrics[model])


@pytest.mark.data
def test_a_real_teachers_perplexity_is_that_of_plain_transformers():
    """stories260K on 40 whole stories, start token first and nothing appended; all 849 give 4.454 (benchmarks/results)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distily.data import draw
    from distily.measurement import evaluate_model
    from distily.sources import load_documents

    data = Path(os.environ["DISTILY_DATA"])
    stories, model = str(data / "text" / "tinystories" / "valid_head_stories.parquet"), str(data / "models" / "stories260K")
    settings = ["data.max_length=512", "data.long_documents=truncate", "data.append_eos=false", "data.samples=40"]
    measured = evaluate_model(model, stories, None, ["perplexity"], settings)
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, tokens = 0.0, 0
    for text in draw(load_documents(stories, None, "train", False), 40, 42)["text"]:
        ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
        with torch.no_grad():
            total += float(network(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert measured["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
