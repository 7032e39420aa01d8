"""Bad input: one line for a mistake, with the key, the value and what is allowed; exit code 2, no traceback, nothing written."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from distily.cli import main

COMPONENTS = [
    # id, arguments, what the line must contain
    ("key", "--set techer=gpt2", "'techer' is unknown; did you mean 'teacher'?"),
    ("key of the teacher", "--set teacher.modle=gpt2", "'teacher.modle'", "did you mean 'teacher.model'?"),
    ("key of the student", "--set student.confg.hidden_size=32", "'student.confg'", "did you mean 'student.config'?"),
    ("key of the data", "--set data.max_lenght=64", "'data.max_lenght'", "did you mean 'data.max_length'?"),
    ("key of the loss", "--set loss.chunk_row=4", "'loss.chunk_row'", "did you mean 'loss.chunk_rows'?"),
    ("key of the control", "--set control.learning_rate=[1]", "'control.learning_rate'", "'control.learning_rates'?"),
    ("no number", "--set data.max_length=long", "data.max_length: 'long'", "an integer in [1, inf)"),
    ("no whole number", "--set data.samples=1.5", "data.samples: 1.5", "an integer in [1, inf) or null"),
    ("no switch", "--set data.packing=maybe", "data.packing: 'maybe'", "true or false"),
    ("no choice", "--set data.long_documents=cut", "data.long_documents: 'cut'", "'split', 'truncate' or null"),
    ("no list", "--set student.copy=lm_head", "student.copy: 'lm_head'", "a list of a text"),
    ("no section", "--set data=[1]", "data: [1]", "a mapping of keys"),
    ("empty text", "--dataset ''", "data.dataset: ''", "a text"),
    ("empty name of a model", "--teacher ''", "teacher.model: ''", "a text"),
    ("number below its range", "--set data.max_length=0", "data.max_length: 0", "[1, inf)"),
    ("share of nothing", "--set data.eval_size=0", "data.eval_size: 0", "a number in (0, inf)"),
    ("share that is no number", "--set data.eval_size=.nan", "data.eval_size: nan", "(0, inf)"),
    ("negative seed", "--set seed=-1", "seed: -1", "an integer in [0, 4294967295]"),
    ("dtype", "--set student.dtype=int8", "student.dtype: 'int8'", "'bfloat16'"),
    ("rate of the control", "--set control.learning_rates=[0]", "control.learning_rates: [0]", "(0, inf)"),
    ("layer 0", "--set student.layers=[0,1]", "student.layers: [0, 1]", "[1, inf)"),
    ("hub repository", "--push-to-hub 'my model'", "push_to_hub: 'my model'", "owner/name"),
    ("no objective", "--set objectives=[]", "objectives: []", "at least one objective"),
    ("setting without =", "--set data.max_length", "--set: 'data.max_length'", "KEY=VALUE"),
    ("setting without key", "--set =5", "--set: '=5'", "KEY=VALUE"),
    ("setting that is no YAML", "--set data.samples=[1", "--set", "'data.samples' is not valid YAML: '[1'"),
    ("train setting without =", "--train max_steps", "--train: 'max_steps'", "KEY=VALUE"),
    ("student setting without =", "--student-config hidden_size", "--student-config: 'hidden_size'", "KEY=VALUE"),
    ("objective", "--objective forward_kll", "objective 'forward_kll'", "did you mean 'forward_kl'?", "cross_entropy"),
    ("evaluator", "--evaluator perplxity", "evaluator 'perplxity'", "did you mean 'perplexity'?"),
    ("logger", "--logger progres", "logger 'progres'", "did you mean 'progress'?"),
    ("quantizer", "--quantizer ternery", "quantizer 'ternery'", "did you mean 'ternary'?"),
    ("mapper", "--objective 'cosine:mapper=last_q(k=1)'", "objective cosine: layer mapper 'last_q'", "did you mean 'last_k'?"),
    ("projector", "--objective cosine:projector=liner", "objective cosine: projector 'liner'", "did you mean 'linear'?"),
    ("normalizer", "--objective cosine:normalizer=layernrm", "normalizer 'layernrm'", "did you mean 'layernorm'?"),
    ("option of an objective", "--objective jsd:betta=0.1", "objective jsd: option 'betta'", "did you mean 'beta'?"),
    ("option of an evaluator", "--evaluator perplexity:k=1", "evaluator perplexity: option 'k' is unknown"),
    ("option of a quantizer", "--quantizer ternary:warm_up=0.1", "quantizer ternary: option 'warm_up'", "did you mean 'warmup'?"),
    ("option of a mapper", "--objective 'cosine:mapper=last_k(n=1)'", "layer mapper: option 'n' is unknown", "Allowed: k"),
    ("option of a wrong type", "--quantizer ternary:warmup=slow", "quantizer ternary: warmup: 'slow'", "a number in [0, 1]"),
    ("option out of range", "--objective jsd:beta=1.5", "objective jsd: beta: 1.5", "a number in (0, 1)"),
    ("combiner", "--combiner gradient_weihted", "combiner 'gradient_weihted'", "did you mean 'gradient_weighted'?"),
    ("combiner of one term", "--combiner sum", "combiner sum: it needs at least two objectives, and this run has 1"),
    (
        "scope",
        "--objective forward_kl --objective mse --combiner sum:scope=tokens",
        "combiner sum: scope: 'tokens'",
        "'step', 'token', 'micro_batch'",
    ),
    (
        "scope of values",
        "--objective forward_kl --objective mse --combiner ratio:scope=token",
        "combiner ratio: scope: 'token'",
        "allowed: 'step'",
    ),
    (
        "micro-batches of a divided batch",
        "--objective forward_kl --objective mse --combiner pcgrad:scope=micro_batch --train gradient_accumulation_steps=2",
        "combiner pcgrad: scope micro_batch depends on how the batch is divided; allowed: scope=step, or divided=true",
    ),
    (
        "option of a combiner",
        "--objective forward_kl --objective mse --combiner cagrad:radios=0.5",
        "combiner cagrad: option 'radios'",
        "did you mean 'radius'?",
    ),
    (
        "option of a schedule",
        "--objective 'forward_kl:weight=step(start=1,end=0)'",
        "weight step: option 'at_progress' is missing",
    ),
    ("projector of attentions", "--objective attention_kl:projector=linear", "on attentions it has nothing to do"),
    ("side", "--objective mse:normalized=student", "normalized: 'student'", "both, teacher"),
    ("sharing", "--objective mse:projector_for=layer", "projector_for: 'layer'", "pair, block, all"),
    (
        "heads that differ",
        "--objective attention_kl --student-config num_attention_heads=2 --student-config num_key_value_heads=2",
        "objectives: they cannot be computed for this teacher and student:",
        "heads",
    ),
    ("layers of a flow", "--objective flow", "objective flow: it compares how layers follow each other", "last_k(k=2)"),
    ("mapper that is no component", "--objective cosine:mapper=3", "objective cosine: mapper: '3'", "name or name:option=value"),
    ("index without pairs", "--objective cosine:mapper=index", "option 'pairs' is missing", "a list of a list of an integer"),
    ("pairs that are none", "--objective 'cosine:mapper=index(pairs=[1,2])'", "pairs: [1, 2]", "a list of a list"),
    ("lm_eval without tasks", "--evaluator lm_eval", "evaluator lm_eval: option 'tasks' is missing", "a list of a text"),
    ("component without form", "--objective 'forward kl'", "objectives: 'forward kl'", "name:option=value"),
    ("option without value", "--objective forward_kl:temperature", "objectives: 'temperature'", "option=value"),
    ("open bracket", "--objective 'cosine:mapper=last_k(k=2'", "objectives: the brackets in 'mapper=last_k(k=2' do not match"),
    ("closed bracket", "--objective 'cosine:mapper=last_k)'", "objectives: the brackets in", "do not match"),
    ("option twice", "--objective forward_kl:weight=1,weight=2", "objectives: option 'weight' is given twice"),
    (
        "component without name",
        "--set 'objectives=[{weight: 1}]'",
        "objectives: {'weight': 1} has no name",
        "{name: …, option: …}",
    ),
    ("evaluator twice", "--evaluator perplexity --evaluator ppl", "evaluators: 'perplexity' is named twice"),
    ("weight", "--objective forward_kl:weight=heavy", "objective forward_kl: weight: 'heavy'", "linear(start=1,end=0)"),
    ("weight that is no number", "--objective forward_kl:weight=.nan", "objective forward_kl: weight: 'nan'", "a number"),
    (
        "schedule",
        "--objective 'forward_kl:weight=liner(start=1,end=0)'",
        "weight: 'liner:start=1,end=0'",
        "constant, linear, cosine, step, wsd",
    ),
    ("schedule without end", "--objective 'forward_kl:weight=linear(start=1)'", "weight linear: option 'end' is missing"),
    ("schedule beyond the end", "--objective 'forward_kl:weight=linear(start=1,end=0,until=2)'", "until: 2", "[0, 1]"),
    (
        "negative temperature",
        "--objective forward_kl:temperature=-2",
        "objective forward_kl: temperature: -2",
        "a number above 0",
    ),
    ("no temperature", "--objective forward_kl:temperature=.inf", "objective forward_kl: temperature: inf", "a number above 0"),
    ("temperature of labels", "--objective cross_entropy:temperature=2", "objective cross_entropy: it takes no temperature"),
    ("scale of the temperature", "--objective forward_kl:temperature_scale=t3", "temperature_scale: 't3'", "t2, t, none"),
    ("mapper on logits", "--objective forward_kl:mapper=last_k", "objective forward_kl: mapper is for terms on features"),
    ("site", "--objective cosine:on=logits", "objective cosine: on: 'logits'", "hidden_states, queries, keys, values"),
    ("train key", "--train learning_rte=1", "'train.learning_rte'", "did you mean 'train.learning_rate'?"),
    ("train type", "--train learning_rate=fast", "train.learning_rate: 'fast'", "a number"),
    ("train range", "--train per_device_train_batch_size=0", "train.per_device_train_batch_size: 0", "an integer in [1, inf)"),
    ("no steps", "--train max_steps=0", "train.max_steps: 0", "an integer in [1, inf)"),
    ("no accumulation", "--train gradient_accumulation_steps=0", "train.gradient_accumulation_steps: 0", "[1, inf)"),
    ("negative rate", "--train learning_rate=-1", "train.learning_rate: -1", "a number in [0, inf)"),
    ("no checkpoint", "--train save_total_limit=0", "train.save_total_limit: 0", "[1, inf) or null"),
    ("scheduler", "--train lr_scheduler_type=cosin", "train.lr_scheduler_type 'cosin'", "did you mean 'cosine'?"),
    ("optimizer", "--train optim=adamw_trch", "train.optim 'adamw_trch'", "did you mean 'adamw_torch'?"),
    ("strategy", "--train eval_strategy=stepz", "train.eval_strategy 'stepz'", "did you mean 'steps'?"),
    ("two precisions", "--train bf16=true --train fp16=true", "train: transformers refuses it", "fp16 and bf16"),
    ("train.output_dir", "--train output_dir=elsewhere", "train.output_dir is not set here", "output_dir of the run"),
    ("train.report_to", "--train report_to=wandb", "train.report_to is not set here", "loggers"),
    ("train.push_to_hub", "--train push_to_hub=true", "train.push_to_hub is not set here", "push_to_hub of the run"),
    ("train.hub_token", "--train hub_token=secret", "train.hub_token is not set here", "push_to_hub of the run"),
    ("train.label_smoothing", "--train label_smoothing_factor=0.1", "train.label_smoothing_factor is not set here", "objectives"),
    (
        "reentrant",
        "--train 'gradient_checkpointing_kwargs={use_reentrant: true}'",
        "use_reentrant true is not supported",
        "false",
    ),
    ("no file", "$nowhere.yaml", "configuration '$nowhere.yaml' cannot be read: No such file"),
    ("a folder for a file", "$folder", "configuration '$folder' cannot be read: Is a directory"),
    ("no YAML", "$broken_yaml", "configuration '$broken_yaml' is not valid YAML", "line 2"),
    ("no mapping", "$list_yaml", "configuration '$list_yaml' must be a mapping of keys, not list"),
    ("no UTF-8", "$latin_yaml", "configuration '$latin_yaml' cannot be read: it is not UTF-8 text"),
    ("output below a file", "--output-dir $text/run", "output_dir: '$text/run' cannot be made, '$text' is a file"),
    ("output not empty", "--output-dir $run", "output_dir: '$run' is not empty", "a new folder, or --resume"),
    ("resume of something else", "--resume --output-dir $folder", "output_dir: '$folder' holds no config.yaml to resume"),
    ("streaming without steps", "--set data.streaming=true --set data.eval_dataset=demo", "train.max_steps", "data.streaming"),
]
"""Refused before a model is loaded."""

MODELS = [
    ("teacher missing", "--teacher $nowhere", "teacher.model: '$nowhere' does not exist", "model folder or hub id"),
    ("teacher a file", "--teacher $text", "teacher.model: '$text' is a file", "model folder or hub id"),
    ("teacher without configuration", "--teacher $folder", "teacher.model: folder '$folder' holds no config.json"),
    ("teacher's configuration corrupt", "--teacher $bad_config", "teacher.model: '$bad_config' could not be loaded", "JSON"),
    ("teacher of unknown kind", "--teacher $bad_type", "teacher.model: '$bad_type' could not be loaded", "nonesuch"),
    ("teacher without weights", "--teacher $no_weights", "teacher.model: '$no_weights' could not be loaded", "safetensors"),
    ("weights no safetensors", "--teacher $bad_weights", "teacher.model: '$bad_weights' could not be loaded"),
    ("weights cut short", "--teacher $cut_weights", "teacher.model: '$cut_weights' could not be loaded"),
    ("weights incomplete", "--teacher $less_weights", "teacher.model: '$less_weights'", "lacks", "model.norm.weight"),
    ("weights of another shape", "--teacher $other_shape", "teacher.model: '$other_shape' could not be loaded"),
    ("teacher on the hub, offline", "--teacher nobody/nothing", "teacher.model: 'nobody/nothing' could not be loaded"),
    ("attention", "--set teacher.attention=flashy", "teacher.attention: 'flashy'", "sdpa"),
    ("attention not installed", "--set teacher.attention=flash_attention_2", "teacher.attention: 'flash_attention_2'"),
    ("attention of the student", "--set student.attention=flashy", "student.attention: 'flashy'", "sdpa"),
    (
        "quantization",
        "--set 'teacher.quantization={load_in_5bit: true}'",
        "teacher.quantization: option 'load_in_5bit' is unknown; did you mean",
        "load_in_4bit",
    ),
    ("another tokenizer", "--student $stranger", "student.model: its tokenizer is another one", "the same tokenizer"),
    (
        "student twice",
        "--student $tiny --student-config num_hidden_layers=1",
        "student.model: it cannot be combined with",
        "config",
    ),
    (
        "copies into a checkpoint",
        "--student $tiny --set student.copy=[lm_head]",
        "student.model: it cannot be combined with",
        "copy",
    ),
    ("student key", "--student-config hidden_sise=32", "student.config 'hidden_sise'", "did you mean 'hidden_size'?"),
    ("student of another kind", "--student-config model_type=gpt2", "student.config 'model_type' is unknown"),
    (
        "student without layers",
        "--student-config num_hidden_layers=0",
        "student.config.num_hidden_layers: 0",
        "an integer in [1, inf)",
    ),
    ("student of no type", "--student-config hidden_size=wide", "student.config.hidden_size: 'wide'", "an integer in [1, inf)"),
    ("heads do not divide", "--student-config hidden_size=33", "student.config: {'hidden_size': 33}", "heads (4)"),
    (
        "heads do not group",
        "--student-config num_key_value_heads=3",
        "student.config.num_key_value_heads: 3",
        "a divisor of num_attention_heads, 4",
    ),
    ("activation", "--student-config hidden_act=nope", "student.config: it builds no model", "nope"),
    ("small head", "--student-config vocab_size=100", "student: its head has 100 rows, the tokenizer 1024 tokens"),
    ("blocks of other widths", "--student-config hidden_size=16 --set student.initialize=teacher_layers", "needs equal shapes"),
    ("layers out of range", "--set student.layers=[9]", "student.layers: [9]", "1 numbers from 1 to 2"),
    ("layers of a random student", "--set student.layers=[1] --set student.initialize=random", "student.layers", "not random"),
    ("copy", "--set student.copy=[lm_haed]", "student.copy: module 'lm_haed'", "did you mean 'lm_head'?"),
    ("copy of another shape", "--student-config hidden_size=16 --set student.copy=[lm_head]", "lm_head.weight has another shape"),
    ("freeze", "--set student.freeze=[model.embd_tokens]", "student.freeze: module 'model.embd_tokens'", "'model.embed_tokens'?"),
    ("freeze everything", "--set student.freeze=[model,lm_head]", "student.freeze: nothing is left to train"),
    ("k too large", "--objective 'cosine:mapper=last_k(k=3)'", "layer mapper 'last_k': k is 3", "only 1 blocks"),
    (
        "pair beyond the model",
        "--objective 'cosine:mapper=index(pairs=[[1,9]])'",
        "block 9 of the teacher does not exist",
        "-2 to 2",
    ),
    ("unequal depth", "--objective cosine:mapper=all", "layer mapper 'all'", "not 1 and 2 blocks"),
    ("unequal width", "--student-config hidden_size=16 --objective cosine:projector=identity", "projector identity", "16 and 32"),
    ("attention of the embedding", "--objective 'cosine:on=keys,mapper=index(pairs=[[0,0]])'", "keys: block 0", "1 to"),
    ("packing", "--teacher $opt --set data.packing=true", "data.packing: OPTForCausalLM (teacher)", "false for this model"),
    ("ternary GPT-2", "--teacher $gpt2 --quantizer ternary", "GPT2LMHeadModel", "ternary"),
    ("lm_eval file", "--evaluator 'lm_eval:tasks=[arc_easy@$nowhere.parquet]'", "lm_eval: task", "no file '$nowhere.parquet'"),
    ("optimizer not installed", "--train optim=adamw_bnb_8bit", "train: transformers refuses it", "bitsandbytes"),
    ("argument of a schedule", "--train 'lr_scheduler_kwargs={nope: 1}'", "train: transformers refuses it", "nope"),
    ("arguments of an optimizer", "--train optim_args=nope", "train: transformers refuses it"),
    ("no metric", "--train save_strategy=best", "train: transformers refuses it", "metric_for_best_model"),
]
"""Refused when the models are there."""

TEXTS = [
    ("data missing", "--dataset $nowhere.jsonl", "data.dataset: '$nowhere.jsonl' does not exist", ".parquet"),
    (
        "data on the hub, offline",
        "--dataset nobody/nothing",
        "data.dataset: 'nobody/nothing' is no local path",
        "a hub id, a folder",
    ),
    ("empty file", "--dataset $empty", "data.dataset: '$empty' is empty"),
    ("blank file", "--dataset $blank", "data.dataset: '$blank'"),
    ("empty folder", "--dataset $bare", "data.dataset: '$bare' holds no such file in the folder", ".jsonl"),
    ("suffix", "--dataset $word", "data.dataset: '$word' holds .docx", ".jsonl"),
    ("mixed folder", "--dataset $mixed", "data.dataset: '$mixed' holds .jsonl, .txt", "of one format"),
    ("column unknown to us", "--dataset $body", "data.column: the data set has the columns body", "name another text column"),
    ("column unknown to the data", "--set data.column=body", "data.column: 'body' is no column", "allowed: text"),
    ("column of numbers", "--dataset $numbers", "data.column: 'text'", "a column of texts"),
    ("messages of no form", "--dataset $no_chat", "data.dataset", "role and content"),
    ("chat without template", "--dataset $chat", "data.dataset: it holds chat messages", "no chat template"),
    ("nothing supervised", "--dataset $short --set data.append_eos=false", "data.dataset: '$short' gave no supervised token"),
    ("parquet corrupt", "--dataset $bad_parquet", "data.dataset: '$bad_parquet' cannot be read as parquet"),
    ("parquet cut short", "--dataset $cut_parquet", "data.dataset: '$cut_parquet' cannot be read as parquet"),
    ("JSON lines corrupt", "--dataset $bad_jsonl", "data.dataset: '$bad_jsonl' cannot be read as json"),
    ("text not UTF-8", "--dataset $latin", "data.dataset: '$latin' cannot be read as text"),
    ("gzip corrupt", "--dataset $bad_gzip", "data.dataset: '$bad_gzip' cannot be read as json"),
    ("held-out missing", "--set data.eval_dataset=$nowhere.txt", "data.eval_dataset: '$nowhere.txt' does not exist"),
    ("held-out part too large", "--set data.eval_size=400", "data.eval_size: 400 leaves nothing of 40 documents"),
    ("half a document", "--set data.eval_size=1.5", "data.eval_size: 1.5", "a share below 1, or a whole number"),
    ("split of a file", "--set data.split=validation", "data.split: 'validation'", "train"),
    ("held-out split of a file", "--set data.eval_split=validation", "data.eval_split: 'validation'", "data.eval_dataset"),
    ("subset of a file", "--set data.subset=english", "data.subset: 'english'", "null"),
    ("streaming without held-out", "--set data.streaming=true --train max_steps=2", "data.streaming", "data.eval_dataset"),
    (
        "streaming, packed",
        "--set 'data={streaming: true, packing: true, eval_dataset: demo}' --train max_steps=2",
        "data.packing",
    ),
]
"""Refused when the data is there."""

OTHER_COMMANDS = [
    ("command", "trian", "command 'trian' is unknown; did you mean 'train'?"),
    ("command of the plugins", "plugins lst", "command 'lst' is unknown; did you mean 'list'?"),
    ("flag", "train --techer demo", "--techer", "--teacher"),
    ("processes", "train --gpus 0", "--gpus", "0"),
    ("component", "components forward_kll", "component 'forward_kll' is unknown; did you mean 'forward_kl'?"),
    ("resume without folder", "train --resume", "--resume", "--output-dir"),
    ("model to measure", "evaluate $nowhere", "'$nowhere' does not exist", "model folder or hub id"),
    ("key to measure with", "evaluate $tiny --set data.max_lenght=8", "'data.max_lenght'", "did you mean 'data.max_length'?"),
    ("evaluator to measure with", "evaluate $tiny --evaluator perplxity", "'perplxity'", "did you mean 'perplexity'?"),
]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path) -> SimpleNamespace:
    """Good and bad files by name: a tiny pair of models and a text, and everything that is wrong with others."""
    root = tmp_path_factory.mktemp("world")
    made = {"tiny": tiny_llama, "text": tiny_text, "nowhere": root / "nowhere"}
    _write_models(root, made)
    _write_texts(root, made)
    made["broken_yaml"] = _write(root / "broken.yaml", "teacher: demo\ndata: {max_length: 5\n")
    made["list_yaml"] = _write(root / "list.yaml", "- teacher\n- student\n")
    made["latin_yaml"] = _write(root / "latin.yaml", "teacher: café\n".encode("latin-1"))
    made["run"] = _write(root / "run" / "notes.txt", "precious").parent
    return SimpleNamespace(paths={name: str(path) for name, path in made.items()}, **made)


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _write_models(root: Path, made: dict[str, Path]) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    tiny = made["tiny"]

    def like(name: str, **files: str | bytes | None) -> Path:
        folder = made[name] = root / name
        shutil.copytree(tiny, folder)
        for file, content in files.items():
            path = folder / file.replace("_json", ".json").replace("_safetensors", ".safetensors")
            path.unlink() if content is None else _write(path, content)
        return folder

    weights = (tiny / "model.safetensors").read_bytes()
    config = json.loads((tiny / "config.json").read_text())
    like("bad_config", config_json="{broken")
    like("bad_type", config_json=json.dumps({**config, "model_type": "nonesuch"}))
    like("no_weights", model_safetensors=None)
    like("bad_weights", model_safetensors=b"no weights at all" * 9)
    like("cut_weights", model_safetensors=weights[: len(weights) // 2])
    like("other_shape", config_json=json.dumps({**config, "intermediate_size": 40}))
    state = load_file(tiny / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, like("less_weights") / "model.safetensors", metadata={"format": "pt"})
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "value": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(like("stranger") / "tokenizer.json"))

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = OPTConfig(vocab_size=1024, **shape)
    gpt2 = GPT2Config(vocab_size=1024, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    for name, model in {"opt": OPTForCausalLM(opt), "gpt2": GPT2LMHeadModel(gpt2)}.items():
        folder = like(name)
        model.save_pretrained(folder)


def _write_texts(root: Path, made: dict[str, Path]) -> None:
    import pyarrow
    from pyarrow import parquet

    def lines(name: str, *rows: Any) -> None:
        made[name] = _write(root / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    good = made["text"].read_text()
    made["folder"] = _write(root / "folder" / "unrelated.bin", "unrelated").parent
    made["empty"] = _write(root / "empty.jsonl", "")
    made["blank"] = _write(root / "blank.jsonl", "\n\n")
    made["bare"] = root / "bare"
    made["bare"].mkdir()
    made["word"] = _write(root / "word.docx", "text")
    made["mixed"] = _write(root / "mixed" / "a.txt", "text").parent
    _write(root / "mixed" / "b.jsonl", good)
    lines("body", *({"body": f"text {number}"} for number in range(40)))
    lines("numbers", *({"text": number} for number in range(40)))
    lines("no_chat", *({"messages": ["hello", "there"]} for _ in range(40)))
    turns = [{"role": "user", "content": "Return the value."}, {"role": "assistant", "content": "Done."}]
    lines("chat", *({"messages": turns} for _ in range(40)))
    lines("short", *({"text": "a"} for _ in range(40)))
    parquet.write_table(pyarrow.table({"text": ["a text of some words"] * 40}), root / "good.parquet")
    made["bad_parquet"] = _write(root / "bad.parquet", "this is no parquet file")
    made["cut_parquet"] = _write(root / "cut.parquet", (root / "good.parquet").read_bytes()[:-20])
    made["bad_jsonl"] = _write(root / "bad.jsonl", good + '{"text": "cut sho')
    made["latin"] = _write(root / "latin.txt", "café ".encode("latin-1") * 40)
    made["bad_gzip"] = _write(root / "bad.jsonl.gz", gzip.compress(good.encode())[:-30])


def arguments(world: SimpleNamespace, text: str) -> list[str]:
    return [Template(word).safe_substitute(world.paths) for word in shlex.split(text)]


def training(world: SimpleNamespace, text: str = "", output_dir: str = "out") -> list[str]:
    """A training of the tiny pair with a case's arguments; a later flag goes over an earlier one."""
    usual = ["train", "--teacher", world.paths["tiny"], "--dataset", world.paths["text"], "--output-dir", output_dir]
    given = arguments(world, text)
    if "--set data.streaming=true" in text or "--set data={" in text:
        usual[usual.index("--dataset") : usual.index("--dataset") + 2] = []
        given += ["--set", f"data.dataset={world.paths['text']}"]
    return [*usual, *given]


def lines_of(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("distily: ")]


def check_refused(world: SimpleNamespace, result: Result, fragments: tuple[str, ...], where: Path, count: int = 1) -> None:
    print(result.stderr)
    assert result.exit_code == 2, f"exit code {result.exit_code}: {result.stderr}"
    assert "Traceback" not in result.stderr
    assert not result.stdout, "what is wrong belongs on stderr"
    lines = lines_of(result)
    assert len(lines) == count, lines
    for fragment in fragments:
        fragment = Template(fragment).safe_substitute(world.paths)
        assert any(fragment in line for line in lines), f"{fragment!r} is not in {lines}"
    assert [entry.name for entry in where.iterdir()] == [], "something was written"


def cases(table: list[tuple[str, ...]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("text", "fragments"), [pytest.param(text, fragments, id=name) for name, text, *fragments in table]
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, to see what a refused command leaves there."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@cases([*COMPONENTS, *MODELS, *TEXTS])
def test_configuration(text: str, fragments: tuple[str, ...], world: SimpleNamespace, runner: CliRunner, here: Path) -> None:
    check_refused(world, runner.invoke(main, training(world, text)), fragments, here)


@cases(OTHER_COMMANDS)
def test_command(text: str, fragments: tuple[str, ...], world: SimpleNamespace, runner: CliRunner, here: Path) -> None:
    check_refused(world, runner.invoke(main, arguments(world, text)), fragments, here)


def test_every_mistake_has_a_line(world: SimpleNamespace, runner: CliRunner, here: Path) -> None:
    """All that is wrong in one part is told at once."""
    text = "--set data.max_lenght=8 --set techer=demo --set student.dtype=int8"
    check_refused(world, runner.invoke(main, training(world, text)), ("max_lenght", "techer", "int8"), here, count=3)
    text = "--objective forward_kll --objective jsd:beta=2 --evaluator perplxity --quantizer ternary:warm_up=1"
    fragments = ("forward_kll", "beta", "perplxity", "warm_up")
    check_refused(world, runner.invoke(main, training(world, text)), fragments, here, count=4)
    text = "--train learning_rte=1 --train max_steps=soon --train seed=1"
    check_refused(world, runner.invoke(main, training(world, text)), ("learning_rte", "max_steps", "train.seed"), here, count=3)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("--set data.max_lenght=64", ("did you mean 'data.max_length'?",)),
        ("--objective forward_kll", ("did you mean 'forward_kl'?",)),
        ("--teacher $cut_weights", ("teacher.model: '$cut_weights' could not be loaded",)),
    ],
)
def test_as_a_process(text: str, fragments: tuple[str, ...], world: SimpleNamespace, here: Path) -> None:
    """The same from outside: the exit code, and nothing on stderr but the line."""
    command = [sys.executable, "-m", "distily", *training(world, text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 2
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("distily: ")
    for fragment in fragments:
        assert Template(fragment).safe_substitute(world.paths) in line
    assert not list(here.iterdir())


def test_debug_shows_the_traceback(world: SimpleNamespace, runner: CliRunner, here: Path) -> None:
    result = runner.invoke(main, ["--debug", *training(world, "--set techer=demo")])
    assert "'techer' is unknown" in str(result.exception)


def test_too_little_disk(world: SimpleNamespace, runner: CliRunner, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1000, used=0, free=1000))
    result = runner.invoke(main, training(world))
    check_refused(world, result, ("output_dir: 'out' has 0.00 GiB free", "the run needs about", "a larger disk"), here)


def test_changed_configuration(world: SimpleNamespace, runner: CliRunner, here: Path) -> None:
    """A run is not gone on with under other settings; its folder stays as it is."""
    from distily.config import resolve

    values = {"teacher": world.paths["tiny"], "data": world.paths["text"], "output_dir": "run", "seed": 1}
    import yaml

    made = _write(here / "run" / "config.yaml", yaml.safe_dump(resolve(values).to_dict()))
    before = made.read_bytes()
    result = runner.invoke(main, training(world, "--resume --set seed=2 --set data.max_length=64", "run"))
    assert result.exit_code == 2
    (line,) = lines_of(result)
    assert "--resume: the run was started with another data.max_length, seed" in line
    assert [(entry.name, entry.read_bytes()) for entry in made.parent.iterdir()] == [("config.yaml", before)]


@pytest.mark.parametrize("content", ["- a list\n", "seed: [\n"], ids=["list", "no YAML"])
def test_corrupt_configuration_of_a_run(content: str, world: SimpleNamespace, runner: CliRunner, here: Path) -> None:
    _write(here / "run" / "config.yaml", content)
    result = runner.invoke(main, training(world, "--resume", "run"))
    assert result.exit_code == 2
    (line,) = lines_of(result)
    assert "run/config.yaml" in line
    assert [entry.name for entry in (here / "run").iterdir()] == ["config.yaml"]


def test_logger_that_is_not_installed(
    world: SimpleNamespace, runner: CliRunner, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    check_refused(world, runner.invoke(main, training(world, "--logger wandb")), ("logger wandb", "is not installed"), here)


def install(site: Path, name: str, module: str) -> None:
    """A package ``name`` with one plugin of this source, as pip would leave it, without pip."""
    _write(site / f"{name}.py", module)
    _write(site / f"{name}-1.0.dist-info" / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    _write(site / f"{name}-1.0.dist-info" / "entry_points.txt", f"[distily]\n{name} = {name}\n")


OFFERING = """
from distily import hookimpl
from distily.evaluation import Evaluator

class Extra(Evaluator):
    def evaluate(self, model, context):
        return {"extra": 1.0}

@hookimpl
def distily_evaluators():
    return {"extra": Extra}
"""


@pytest.mark.parametrize(
    ("module", "fragments"),
    [
        ("import no_such_package\n", ("Plugin broken_one is broken: ModuleNotFoundError: No module named 'no_such_package'",)),
        ("def broken(:\n", ("Plugin broken_one is broken: SyntaxError",)),
        (OFFERING.replace("_evaluators", "_evaluator"), ("hook 'distily_evaluator' is unknown", "'distily_evaluators'?")),
        (OFFERING.replace('{"extra": Extra}', "[Extra]"), ("hook distily_evaluators must return {name: factory}, not list",)),
    ],
    ids=["import", "syntax", "hook", "offer"],
)
def test_broken_plugin(
    module: str,
    fragments: tuple[str, ...],
    world: SimpleNamespace,
    runner: CliRunner,
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a broken plugin would have offered is unknown, and the line says which plugin is broken and why."""
    install(tmp_path / "site", "broken_one", module)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "broken_one", raising=False)
    result = runner.invoke(main, training(world, "--evaluator extra"))
    check_refused(world, result, ("evaluator 'extra' is unknown", *fragments), here)


def test_two_plugins_with_one_name(
    world: SimpleNamespace, runner: CliRunner, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first_one", "second_one"):
        install(tmp_path / "site", name, OFFERING)
    monkeypatch.syspath_prepend(tmp_path / "site")
    result = runner.invoke(main, training(world, "--evaluator extra"))
    told = "evaluator 'extra' is offered by first_one (extra) and second_one (extra)"
    check_refused(world, result, (told, "DISTILY_PLUGINS"), here)
