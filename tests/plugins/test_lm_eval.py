"""Evaluator ``lm_eval``: numbers against plain torch, errors, and nothing left behind."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

import datasets
import numpy
from distily_lm_eval import LMEval, distily_evaluators
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from distily.errors import DistilyError
from distily.evaluation import EvaluationContext, measure
from distily.schema import mistakes, options

ROWS = [
    ("Which animal barks?", ["a dog", "a very old and quiet cat", "fish"], 0),
    ("What is frozen water?", ["steam from a kettle", "ice", "sand"], 1),
    ("Where does the sun rise?", ["west", "north", "east, as everyone on earth knows"], 2),
    ("What do plants need?", ["light", "a hat", "a long holiday at the sea"], 0),
    ("Which one is a metal?", ["wood", "wool", "iron"], 2),
    ("What falls from clouds?", ["stones, now and then", "rain", "coins"], 1),
]
WORDS = ["the cat sat on the mat", "rain falls from a cloud", "ice is cold", "a dog can bark"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and no padding token."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        tie_word_embeddings=True,
        attention_dropout=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def context(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> EvaluationContext:
    output = tmp_path / "output"
    output.mkdir()
    return EvaluationContext(tokenizer, lambda *_: {}, False, 3, str(output))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    rows = [
        {
            "id": str(number),
            "question": question,
            "choices": {"text": choices, "label": ["A", "B", "C"]},
            "answerKey": "ABC"[answer],
        }
        for number, (question, choices, answer) in enumerate(ROWS)
    ]
    return write(tmp_path / "arc.jsonl", rows)


@pytest.fixture
def lambada(tmp_path: Path) -> Path:
    return write(tmp_path / "lambada.jsonl", [{"text": text} for text in WORDS])


def log_likelihood(model: Any, tokenizer: Any, text: str, continuation: str) -> float:
    """The independent number: one sequence, one forward pass, the sum over the continuation."""
    before, after = tokenizer.encode(text), tokenizer.encode(continuation)
    tokens = torch.tensor([before + after])
    with torch.no_grad():
        scores = model(tokens).logits.log_softmax(-1)[0, len(before) - 1 : -1]
    return float(scores.gather(1, tokens[0, len(before) :, None]).sum())


def test_accuracy_is_that_of_plain_torch(model, tokenizer, context, arc):
    model.eval()
    hits, normalised_hits = [], []
    for question, choices, answer in ROWS:
        prompt = f"Question: {question}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, prompt, f" {choice}") for choice in choices]
        by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        hits.append(scores.index(max(scores)) == answer)
        normalised_hits.append(by_length.index(max(by_length)) == answer)
    assert 0 < sum(hits) < len(ROWS), "the model is to be right at times, or the test says little"
    numbers = LMEval(tasks=[f"arc_easy@{arc}"]).evaluate(model, context)
    mean = sum(hits) / len(hits)
    stderr = (mean * (1 - mean) / (len(hits) - 1)) ** 0.5
    assert numbers == pytest.approx(
        {
            "arc_easy_acc": mean,
            "arc_easy_acc_stderr": stderr,
            "arc_easy_acc_norm": sum(normalised_hits) / len(hits),
            "arc_easy_acc_norm_stderr": numbers["arc_easy_acc_norm_stderr"],
        }
    )


def test_perplexity_is_that_of_plain_torch_on_the_first_rows(model, tokenizer, context, lambada):
    model.eval()
    parts = [text.rpartition(" ") for text in WORDS[:3]]
    scores = [log_likelihood(model, tokenizer, head, f" {last}") for head, _, last in parts]
    expected = float(numpy.exp(-numpy.mean(scores)))
    numbers = LMEval(tasks=[f"lambada_openai@{lambada}"], limit=3).evaluate(model, context)
    assert numbers["lambada_openai_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert numbers["lambada_openai_perplexity_stderr"] > 0
    single = LMEval(tasks=[f"lambada_openai@{lambada}"], limit=1).evaluate(model, context)
    assert set(single) == {"lambada_openai_perplexity", "lambada_openai_acc"}


def prompts(evaluator: LMEval) -> list[tuple[str, str]]:
    """(question, prompt) of the requests of the last evaluation."""
    assert evaluator._loaded is not None
    (task,) = evaluator._loaded["tasks"].values()
    return [(request.doc["question"], request.args[0]) for request in task.instances]


def test_shots_come_from_the_other_rows_of_the_file(model, context, arc):
    evaluator = LMEval(tasks=[f"arc_easy@{arc}"], shots=len(ROWS) - 1)
    first = evaluator.evaluate(model, context)
    for question, prompt in prompts(evaluator):
        assert prompt.count("Question: ") == len(ROWS)
        assert prompt.count(question) == 1
        assert prompt.endswith(f"Question: {question}\nAnswer:")
    assert evaluator.evaluate(model, context) == first, "a second evaluation takes the same shots"


def test_the_seed_picks_the_shots(model, context, arc):
    evaluators = [LMEval(tasks=[f"arc_easy@{arc}"], shots=2, seed=seed) for seed in (1, 2)]
    for evaluator in evaluators:
        evaluator.evaluate(model, context)
    assert prompts(evaluators[0]) != prompts(evaluators[1])


def test_shots_from_a_second_file(model, context, arc, tmp_path):
    example = {
        "id": "x",
        "question": "What is up?",
        "choices": {"text": ["the sky", "the sea"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    examples = write(tmp_path / "examples.jsonl", [example])
    evaluator = LMEval(tasks=[f"arc_easy@{arc}@{examples}"], shots=1, limit=2)
    evaluator.evaluate(model, context)
    for _, prompt in prompts(evaluator):
        assert prompt.startswith("Question: What is up?\nAnswer: the sky\n\nQuestion: ")


def test_a_path_may_contain_an_at_sign(model, context, arc, tmp_path):
    folder = tmp_path / "me@home"
    folder.mkdir()
    moved = arc.rename(folder / "arc.jsonl")
    assert LMEval(tasks=[f"arc_easy@{moved}"]).evaluate(model, context)


def test_other_formats_and_a_yaml_file(model, context, arc, lambada, tmp_path):
    parquet, zipped = tmp_path / "arc.parquet", tmp_path / "lambada.jsonl.gz"
    datasets.Dataset.from_list([json.loads(line) for line in arc.open()]).to_parquet(parquet)
    zipped.write_bytes(gzip.compress(lambada.read_bytes()))
    (tmp_path / "mine.yaml").write_text(
        f"""
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {lambada}}}, cache_dir: {tmp_path / "cache"}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    tasks = [f"arc_easy@{parquet}", f"lambada_openai@{zipped}", str(tmp_path / "mine.yaml")]
    numbers = LMEval(tasks=tasks).evaluate(model, context)
    assert numbers["mine_acc"] == numbers["lambada_openai_acc"]
    same = LMEval(tasks=[f"arc_easy@{arc}"]).evaluate(model, context)
    assert numbers["arc_easy_acc"] == same["arc_easy_acc"]


def test_generation_names_its_filters(model, context, tmp_path):
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
    file = write(tmp_path / "gsm8k.jsonl", rows)
    numbers = LMEval(tasks=[f"gsm8k@{file}"], shots=1).evaluate(model, context)
    assert set(numbers) == {
        "gsm8k_exact_match_strict_match",
        "gsm8k_exact_match_strict_match_stderr",
        "gsm8k_exact_match_flexible_extract",
        "gsm8k_exact_match_flexible_extract_stderr",
    }


def test_too_small_a_context_or_too_few_rows_is_one_line(model, context, arc, tmp_path):
    file = write(tmp_path / "gsm8k.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}] * 2)
    model.config.max_position_embeddings = 128
    with pytest.raises(DistilyError, match=r"^lm_eval: AssertionError: .*maximum sequence length"):
        LMEval(tasks=[f"gsm8k@{file}"], shots=0).evaluate(model, context)
    with pytest.raises(DistilyError, match=r"^lm_eval: ValueError: [^\n]+$"):
        LMEval(tasks=[f"arc_easy@{arc}"], shots=len(ROWS)).evaluate(model, context)


def test_training_is_undisturbed(model, tokenizer, context, arc, capfd):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    parameters = dict(model.named_parameters())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    environment = dict(os.environ)
    capfd.readouterr()
    LMEval(tasks=[f"arc_easy@{arc}"], shots=1).evaluate(model, context)
    assert capfd.readouterr() == ("", "")
    assert [module.training for module in model.modules()] == modes
    assert random.getstate() == states[0]
    after = numpy.random.get_state()
    assert all(numpy.array_equal(a, b) for a, b in zip(after, states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    assert "tie_weights" not in vars(model)
    assert tokenizer.pad_token is None
    assert dict(os.environ) == environment


def test_parted_embeddings_stay_parted(model, context, arc):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    LMEval(tasks=[f"arc_easy@{arc}"], limit=1).evaluate(model, context)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_no_files_and_no_network(model, context, arc, lambada, tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("network")

    folders = [tmp_path / name for name in ("cwd", "temporary", "cache")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[0])
    monkeypatch.setattr(tempfile, "tempdir", str(folders[1]))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folders[2])
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tasks = [f"arc_easy@{arc}", f"lambada_openai@{lambada}"]
    assert LMEval(tasks=tasks).evaluate(model, context)
    assert [list(folder.iterdir()) for folder in [*folders, Path(context.output_dir)]] == [[]] * 4


def test_construction_checks_files_at_once(tmp_path, arc):
    other = tmp_path / "rows.txt"
    other.touch()
    with pytest.raises(DistilyError) as caught:
        LMEval(tasks=[f"arc_easy@{tmp_path}/none.jsonl", f"piqa@{other}", "none.yaml"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "none.jsonl" in lines[0]
    assert ".parquet, .jsonl" in lines[1]
    assert "none.yaml" in lines[2]
    parquet = tmp_path / "rows.parquet"
    parquet.touch()
    with pytest.raises(DistilyError, match="one format"):
        LMEval(tasks=[f"arc_easy@{arc}@{parquet}"])
    with pytest.raises(DistilyError, match="at least one task"):
        LMEval(tasks=[])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["arc_eazy"], r"'arc_eazy' is unknown; did you mean 'arc_easy'\? Allowed: [^\n]+$"),
        (["mmlu@{arc}"], r"'mmlu' is a group of tasks"),
        (["squadv2@{arc}"], r"data by code of its own"),
        (["arc_easy@{arc}", "arc_easy@{arc}"], r"'arc_easy' is in tasks twice"),
        (["piqa@{arc}"], r"task 'piqa@[^\n]+ could not be loaded: [^\n]*goal[^\n]*$"),
        (["piqa@{broken}"], r"task 'piqa@[^\n]+ could not be loaded: Arrow[^\n]+$"),
    ],
)
def test_prepare_checks_names_and_data(tasks, message, arc, tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_text("no parquet")
    evaluator = LMEval(tasks=[task.format(arc=arc, broken=broken) for task in tasks])
    with pytest.raises(DistilyError, match=message) as caught:
        evaluator.prepare()
    assert caught.value.exit_code == 2


def test_the_schema_of_the_options():
    allowed = options(LMEval)
    assert mistakes("lm_eval", {"tasks": ["arc_easy"], "shots": 0, "limit": 5}, allowed) == []
    bad = {"tasks": "arc_easy", "shots": -1, "limit": 0, "shot": 1}
    assert len(mistakes("lm_eval", bad, allowed)) == 4
    assert len(mistakes("lm_eval", {}, allowed)) == 1


def test_the_hook_and_measure(model, context, arc):
    assert distily_evaluators() == {"lm_eval": LMEval}
    evaluators = {"lm_eval": LMEval(tasks=[f"arc_easy@{arc}"])}
    assert "lm_eval_arc_easy_acc" in measure(evaluators, model, context)
    assert measure(evaluators, model, context, during_training=True) == {}


def test_the_plugin_imports_nothing_heavy():
    code = (
        "import sys; from distily_lm_eval import LMEval; LMEval(tasks=['arc_easy']);"
        "assert not {'lm_eval', 'torch', 'datasets'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.data
def test_three_slices_with_a_trained_model(tmp_path):
    if "DISTILY_DATA" not in os.environ:
        pytest.skip("DISTILY_DATA is not set")
    data = Path(os.environ["DISTILY_DATA"])
    folder = data / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = EvaluationContext(tokenizer, lambda *_: {}, False, 8, str(tmp_path))
    tasks = [
        f"arc_easy@{data}/eval/ai2_arc/ARC-Easy_test.parquet",
        f"piqa@{data}/eval/piqa/validation.parquet",
        f"lambada_openai@{data}/eval/lambada_openai/test.parquet",
    ]
    numbers = LMEval(tasks=tasks, shots=0, limit=20).evaluate(model, context)
    known = {"arc_easy_acc": 0.15, "piqa_acc": 0.4, "piqa_acc_norm": 0.5, "lambada_openai_acc": 0.0}
    assert {name: numbers[name] for name in known} == pytest.approx(known, abs=0.051)
    assert numbers["lambada_openai_perplexity"] == pytest.approx(8.844e6, rel=0.01)
    assert list(tmp_path.iterdir()) == []
