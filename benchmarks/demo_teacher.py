"""Make the demo pair: a fixed slice of free text and a small teacher trained on it.

``text`` cuts the slice out of the running interpreter's own standard library
(docstrings, the comments that read as prose, the built-in help topics) and trains
the tokenizer on it; ``train`` trains the teacher on the slice; ``check`` loads what is
shipped, offline and on CPU, and measures it::

    python benchmarks/demo_teacher.py text --out distily/demo
    python benchmarks/demo_teacher.py train --demo distily/demo --out distily/demo/teacher
    python benchmarks/demo_teacher.py check --demo distily/demo

The text depends on the interpreter it is cut from (see ``distily/demo/README.md`` for the
version that was used), so the slice is shipped rather than made on demand. Given that
slice the tokenizer is the same on every run; the teacher depends on seed and hardware.

Whole modules go to the held-out part by a hash of their name, and no paragraph of 60
characters or more occurs twice anywhere. A second part, chosen by the same hash out of the
training file, is kept out of training: it alone decides which checkpoint and which settings
are kept. Seed 0 and the defaults below made the shipped teacher; figures, versions and the
other settings tried are in ``benchmarks/results/demo_teacher.md``.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import importlib
import io
import json
import math
import platform
import random
import re
import sys
import sysconfig
import time
import tokenize
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

EOS = "<|endoftext|>"
VOCABULARY = 1024
CONTEXT = 512
# A number that gave parts of about the wanted size with no module over an
# eighth of the held-out part; chosen by sizes alone, before anything was trained.
SALT = "distily-demo-77"
HELDOUT_PERCENT = 4
VALIDATION_PERCENT = 4
TOPIC_PREFIX = "Python help: "

DOCUMENT_MIN = 300
DOCUMENT_TARGET = 2000
DOCUMENT_MAX = 3000
DOCSTRING_MIN = 60
COMMENT_MIN = 80
DEDUPLICATE_MIN = 60

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "lib-dynload", "test", "tests", "idlelib", "lib2to3"}
    | {"turtledemo", "ensurepip", "pydoc_data"}
)


# --------------------------------------------------------------------------- text


def part_of(module: str) -> str:
    """Which part a module belongs to: ``heldout``, ``validation`` or ``train``.

    A C accelerator and its Python twin (``_decimal``, ``_pydecimal``, ``decimal``) share
    one family name and so always land on the same side.
    """
    family = ".".join(re.sub(r"^_+(py)?", "", piece) for piece in module.split("."))
    digest = hashlib.sha256(f"{SALT}:{family}".encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % 1000
    if bucket < HELDOUT_PERCENT * 10:
        return "heldout"
    if bucket < (HELDOUT_PERCENT + VALIDATION_PERCENT) * 10:
        return "validation"
    return "train"


def clean(text: str) -> str:
    """``text`` without tabs, control characters, trailing blanks and <mail@addresses>."""
    text = re.sub(r"\s*<[^<>\s]+@[^<>\s]+>", "", text)
    text = text.expandtabs(8).replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", "\n")
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def is_prose(text: str) -> bool:
    """Whether a block of comments reads as prose rather than as code, a rule or a notice."""
    if len(text) < COMMENT_MIN or text.count(" ") < 8:
        return False
    if re.search(r"copyright|licen[cs]e|all rights reserved|-\*-", text, re.IGNORECASE):
        return False
    if sum(c.isalpha() or c == " " for c in text) < 0.8 * len(text):
        return False
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return True
    return False


def source_items(module: str, source: str) -> list[str]:
    """The docstrings (under their names) and prose comments of a source, in file order."""
    items: list[tuple[int, str]] = []

    def visit(node: ast.AST, path: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, path)
                continue
            name = f"{path}.{child.name}"
            doc = ast.get_docstring(child) or ""
            if len(doc) >= DOCSTRING_MIN:
                head = name
                if not isinstance(child, ast.ClassDef):
                    head = f"{name}({ast.unparse(child.args)})"
                items.append((child.lineno, f"{head if len(head) <= 100 else name}\n\n{doc}"))
            visit(child, name)

    tree = ast.parse(source)
    doc = ast.get_docstring(tree) or ""
    if len(doc) >= DOCSTRING_MIN:
        items.append((0, doc))
    visit(tree, module)

    block: list[str] = []
    start = (-2, -1)
    for token in [*tokenize.generate_tokens(io.StringIO(source).readline), None]:
        if token is not None:
            own_line = token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
            if token.type == tokenize.COMMENT and not own_line:
                continue
            if own_line and (token.start[0] - len(block), token.start[1]) == start:
                block.append(token.string.lstrip("#").removeprefix(" "))
                continue
            if token.type in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT) and block:
                continue
        if block:
            text = "\n".join(block).strip("\n")
            if is_prose(text):
                items.append((start[0], text))
            block = []
        if token is not None and token.type == tokenize.COMMENT:
            start = token.start
            block = [token.string.lstrip("#").removeprefix(" ")]
    return [text for _, text in sorted(items, key=lambda item: item[0])]


def extension_items(module: str) -> list[str]:
    """The docstrings of a module written in C, under their names."""
    items: list[str] = []

    def visit(owner: Any, path: str, depth: int) -> None:
        for name, value in sorted(vars(owner).items()):
            kinds = (
                type,
                types.BuiltinFunctionType,
                types.MethodDescriptorType,
                types.GetSetDescriptorType,
                types.ClassMethodDescriptorType,
            )
            if not isinstance(value, kinds):
                continue
            doc = getattr(value, "__doc__", None)
            if isinstance(doc, str) and len(doc) >= DOCSTRING_MIN:
                signature = (getattr(value, "__text_signature__", None) or "").replace("$", "")
                items.append(f"{path}.{name}{signature}\n\n{doc}")
            if isinstance(value, type) and depth < 1 and value.__module__ in (module, "builtins"):
                visit(value, f"{path}.{name}", depth + 1)

    loaded = importlib.import_module(module)
    if loaded.__doc__ and len(loaded.__doc__) >= DOCSTRING_MIN:
        items.append(loaded.__doc__)
    visit(loaded, module, 0)
    return items


def modules() -> Iterator[tuple[str, str, list[str]]]:
    """Every module's kind, name and texts, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        if relative.name.startswith("_sysconfigdata") or "config-" in relative.parts[0]:
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        with tokenize.open(path) as handle:
            yield "Python sources", module, source_items(module, handle.read())

    names = set(sys.builtin_module_names)
    names.update(p.name.split(".")[0] for p in (library / "lib-dynload").glob("*.so"))
    for module in sorted(names):
        if "test" in module or module.startswith("xx"):
            continue
        try:
            texts = extension_items(module)
        except ImportError:
            continue
        yield "C modules", module, texts

    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield "help topics", TOPIC_PREFIX + name, [text]


def documents(title: str, texts: Iterable[str]) -> list[str]:
    """Pack a module's texts into documents that each begin with the module's name."""
    blocks: list[str] = []
    for text in texts:
        paragraphs = text.split("\n\n")
        block = ""
        for paragraph in paragraphs:
            if block and len(block) + len(paragraph) > DOCUMENT_TARGET:
                blocks.append(block)
                block = ""
            block = f"{block}\n\n{paragraph}" if block else paragraph
        blocks.append(block)
    result: list[str] = []
    body = ""
    for block in blocks:
        if body and len(body) + len(block) > DOCUMENT_TARGET:
            result.append(body)
            body = ""
        body = f"{body}\n\n{block}" if body else block
    if body:
        if result and len(body) < DOCUMENT_MIN:
            result[-1] += f"\n\n{body}"
        else:
            result.append(body)
    whole = [f"{title}\n\n{body}" for body in result]
    return [text for text in whole if DOCUMENT_MIN <= len(text) <= DOCUMENT_MAX]


def write_lines(path: Path, texts: Iterable[str]) -> None:
    """Write ``{"text": ...}`` lines, gzipped so that equal text gives equal bytes."""
    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write(lines.encode("utf-8"))


def read_lines(path: Path) -> list[str]:
    """The texts of a file that `write_lines` wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line)["text"] for line in handle]


def split_train(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The training file's documents as (train, validation), by their module's name."""
    train: list[str] = []
    validation: list[str] = []
    for text in texts:
        part = part_of(text.split("\n", 1)[0])
        (validation if part == "validation" else train).append(text)
    return train, validation


def make_text(out: Path) -> None:
    """Write the slice and the tokenizer, and print the table of sizes."""
    seen: set[bytes] = set()
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    sizes: dict[tuple[str, str], list[int]] = {}
    for kind, module, raw in modules():
        texts: list[str] = []
        for text in raw:
            kept: list[str] = []
            for paragraph in clean(text).split("\n\n"):
                flat = " ".join(paragraph.split())
                key = hashlib.sha256(flat.lower().encode()).digest()
                if not flat or (len(flat) >= DEDUPLICATE_MIN and key in seen):
                    continue
                seen.add(key)
                kept.append(paragraph.strip("\n"))
            if len("".join(kept)) >= DOCSTRING_MIN:
                texts.append("\n\n".join(kept))
        made = documents(module, texts)
        if not made:
            continue
        part = part_of(module)
        parts["heldout" if part == "heldout" else "train"].extend(made)
        row = sizes.setdefault((part, kind), [0, 0, 0])
        row[0] += 1
        row[1] += len(made)
        row[2] += sum(len(text.encode()) for text in made)
    for name, texts in parts.items():
        write_lines(out / "text" / f"{name}.jsonl.gz", texts)
    # The terms the text is under travel with it.
    terms = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if terms.is_file():
        (out / "text" / "LICENSE.txt").write_bytes(terms.read_bytes())

    print(f"Python {platform.python_version()}\n")
    print("| part | source | modules | documents | bytes |\n|---|---|---:|---:|---:|")
    for (part, kind), row in sorted(sizes.items()):
        print(f"| {part} | {kind} | {row[0]:,} | {row[1]:,} | {row[2]:,} |")
    for part in ("train", "validation", "heldout"):
        total = [sum(r[i] for (p, _), r in sizes.items() if p == part) for i in range(3)]
        print(f"| {part} | all | {total[0]:,} | {total[1]:,} | {total[2]:,} |")
    make_tokenizer(parts["train"], out / "teacher")


def make_tokenizer(texts: list[str], out: Path) -> None:
    """Train the byte-level BPE tokenizer and save it as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(out)
    # The class name every release of transformers knows (5 writes its own, newer one).
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------- teacher


def windows(ids: list[int], eos: int) -> list[tuple[list[int], int]]:
    """Windows over one document and, for each, the first target position it scores.

    The document stands between two end-of-text tokens. Each later window repeats the last
    half window as context and scores only what is new, so every token counts once.
    """
    sequence = [eos, *ids, eos]
    result: list[tuple[list[int], int]] = []
    end = 1
    while end < len(sequence):
        start = max(0, end - CONTEXT // 2) if end > 1 else 0
        window = sequence[start : start + CONTEXT]
        result.append((window, end - start))
        end = start + len(window)
    return result


def score(model: Any, encoded: list[list[int]], eos: int, batch: int = 64) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) and number of tokens over the documents."""
    import torch
    from torch.nn import functional

    device = next(model.parameters()).device
    everything = sorted((w for ids in encoded for w in windows(ids, eos)), key=lambda w: len(w[0]))
    total, count = 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for at in range(0, len(everything), batch):
            rows = everything[at : at + batch]
            width = max(len(window) for window, _ in rows)
            tokens = torch.full((len(rows), width), eos)
            labels = torch.full((len(rows), width), -100)
            for i, (window, first) in enumerate(rows):
                tokens[i, : len(window)] = torch.tensor(window)
                labels[i, first : len(window)] = torch.tensor(window[first:])
            logits = model(input_ids=tokens.to(device)).logits[:, :-1].float()
            target = labels[:, 1:].to(device)
            loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), reduction="sum")
            total += float(loss)
            count += int((target != -100).sum())
    model.train(training)
    return total, count


def plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The token ids of every text, of any length and without end-of-text tokens."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [one.ids for one in encoded]


def report(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, float]:
    """Perplexity per token and bits per byte over ``texts``."""
    encoded = plain_ids(tokenizer, texts)
    nats, tokens = score(model, encoded, tokenizer.eos_token_id)
    size = sum(len(text.encode()) for text in texts)
    return {
        "documents": len(texts),
        "bytes": size,
        "tokens": tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / size,
    }


def add_dropout(model: Any, p: float) -> list[Any]:
    """Dropout on the embeddings and on both branches of every layer, while training."""
    from torch.nn import functional

    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (functional.dropout(output[0], p, module.training), *output[1:])
        return functional.dropout(output, p, module.training)

    layers = model.model.layers
    places = [model.model.embed_tokens, *(m for x in layers for m in (x.self_attn, x.mlp))]
    return [place.register_forward_hook(hook) for place in places]


def train(args: argparse.Namespace) -> None:
    """Train the teacher, keep the best validation checkpoint, measure it, save it."""
    import copy

    import torch
    import transformers
    from torch.nn import functional
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cuda.matmul.allow_tf32 = True

    source = args.demo / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(source)
    eos: int = tokenizer.eos_token_id
    texts, validation = split_train(read_lines(args.demo / "text" / "train.jsonl.gz"))

    def encode(dropout: float) -> list[list[int]]:
        merges = tokenizer.backend_tokenizer.model
        merges.dropout = dropout or None
        encoded = plain_ids(tokenizer, texts)
        merges.dropout = None
        return encoded

    plain = encode(0.0)
    scored = plain_ids(tokenizer, validation)
    train_tokens = sum(len(ids) + 1 for ids in plain)

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
        head_dim=32,
        intermediate_size=args.intermediate,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        attention_dropout=args.dropout,
        initializer_range=0.03,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
        use_cache=True,
    )
    model = LlamaForCausalLM(config).to(device)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_((2 * args.layers) ** -0.5)
    average = copy.deepcopy(model).eval()
    hooks = add_dropout(model, args.dropout)
    parameters = sum(weight.numel() for weight in model.parameters())
    decayed = [w for w in model.parameters() if w.ndim > 1]
    other = [w for w in model.parameters() if w.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": other}],
        lr=args.lr,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=device.type == "cuda",
    )

    def forward(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    step_loss = torch.compile(forward, dynamic=False) if args.compile else forward

    per_step = args.batch * CONTEXT
    epoch_steps = train_tokens // per_step
    steps = args.steps or epoch_steps * args.epochs
    warmup = max(1, min(200, steps // 20))

    def batches() -> Iterator[torch.Tensor]:
        """Token rows, one longer than their inputs, on the device.

        Most are consecutive cuts of the shuffled documents joined by the end-of-text
        token; a share of the batches are shorter rows that each begin a document.
        """
        done = 0
        while True:
            last = done > steps * (1 - args.plain_share)
            encoded = plain if last or not args.bpe_dropout else encode(args.bpe_dropout)
            order = list(range(len(encoded)))
            rng.shuffle(order)
            joined = [eos]
            starts: list[int] = []
            for i in order:
                # Half of the short windows see the end-of-text token before the document.
                starts.append(len(joined) - rng.randrange(2))
                joined.extend(encoded[i])
                joined.append(eos)
            stream = torch.tensor(joined, device=device)
            offset = rng.randrange(CONTEXT)
            cuts = list(range(offset, len(joined) - CONTEXT - 1, CONTEXT))
            rng.shuffle(cuts)
            for at in range(0, len(cuts) - args.batch + 1, args.batch):
                done += 1
                if rng.random() < args.short_share:
                    width = CONTEXT // 4
                    usable = [s for s in starts if s + width < len(joined)]
                    begin = rng.choices(usable, k=args.batch * CONTEXT // width)
                else:
                    width = CONTEXT
                    begin = cuts[at : at + args.batch]
                index = torch.tensor(begin, device=device)[:, None]
                yield stream[index + torch.arange(width + 1, device=device)]

    best = math.inf
    best_step = 0
    best_state: dict[str, torch.Tensor] = {}
    history: list[dict[str, float]] = []
    began = time.perf_counter()
    model.train()
    feed = batches()
    running = torch.zeros((), device=device)
    every = max(1, min(args.evaluate_every, steps))
    for step in range(1, steps + 1):
        rows = next(feed)
        tokens, labels = rows[:, :-1], rows[:, 1:]
        if args.token_dropout:
            noise = torch.randint_like(tokens, VOCABULARY)
            change = torch.rand(tokens.shape, device=device) < args.token_dropout
            tokens = torch.where(change, noise, tokens)
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        factor = min(1.0, step / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        loss = step_loss(tokens.contiguous(), labels.contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        keep = min(args.average, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - keep)
        if step % every == 0 or step == steps:
            nats, count = score(average, scored, eos)
            history.append(
                {
                    "step": step,
                    "train_loss": float(running) / (step - (history[-1]["step"] if history else 0)),
                    "validation_loss": nats / count,
                    "seconds": time.perf_counter() - began,
                }
            )
            running.zero_()
            print(json.dumps({k: round(v, 4) for k, v in history[-1].items()}), flush=True)
            if nats / count < best:
                best, best_step = nats / count, step
                best_state = {k: v.clone() for k, v in average.state_dict().items()}
    seconds = time.perf_counter() - began
    for handle in hooks:
        handle.remove()

    final = LlamaForCausalLM(config)
    final.load_state_dict({k: v.cpu() for k, v in best_state.items()})
    final.tie_weights()
    final = final.to(torch.bfloat16)
    final.config.attention_dropout = 0.0
    final.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
    final.save_pretrained(args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if source.resolve() != args.out.resolve():
            (args.out / name).write_bytes((source / name).read_bytes())

    measured = final.to(device).float()
    heldout = read_lines(args.demo / "text" / "heldout.jsonl.gz")
    summary: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, int | float) and k != "command"},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": parameters,
        "train_documents": len(texts),
        "train_tokens": train_tokens,
        "tokens_seen": steps * per_step,
        "steps": steps,
        "best_step": best_step,
        "seconds": round(seconds, 1),
        "validation": report(measured, tokenizer, validation),
        "heldout": report(measured, tokenizer, heldout),
        "history": history,
    }
    if args.report:
        args.report.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in summary.items() if k != "history"}))


def check(args: argparse.Namespace) -> None:
    """Load the shipped folder offline on CPU, measure it in fp32 and continue a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = args.demo / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    texts = read_lines(args.demo / "text" / "heldout.jsonl.gz")[: args.documents or None]
    print("parameters", sum(weight.numel() for weight in model.parameters()))
    print(json.dumps(report(model, tokenizer, texts)))
    torch.manual_seed(args.seed)
    for prompt in ("Return the", "This method is called when"):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        for sample in (False, True):
            options = {"temperature": 0.7, "top_p": 0.95} if sample else {}
            made = model.generate(
                input_ids=ids["input_ids"],
                attention_mask=ids["attention_mask"],
                max_new_tokens=80,
                do_sample=sample,
                **options,
            )
            print("-----", "sampled" if sample else "greedy")
            print(tokenizer.decode(made[0]))


def main(argv: list[str] | None = None) -> None:
    """Read the command line and run the subcommand."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)

    text = commands.add_parser("text", help="make the text slice and the tokenizer")
    text.add_argument("--out", type=Path, default=Path("distily/demo"))

    teacher = commands.add_parser("train", help="train the teacher on the slice")
    teacher.add_argument("--demo", type=Path, default=Path("distily/demo"))
    teacher.add_argument("--out", type=Path, default=Path("distily/demo/teacher"))
    teacher.add_argument("--report", type=Path, help="write figures and history here (JSON)")
    teacher.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    teacher.add_argument("--seed", type=int, default=0)
    teacher.add_argument("--hidden", type=int, default=192)
    teacher.add_argument("--layers", type=int, default=6)
    teacher.add_argument("--intermediate", type=int, default=512)
    teacher.add_argument("--epochs", type=int, default=60)
    teacher.add_argument("--steps", type=int, default=0, help="instead of --epochs")
    teacher.add_argument("--batch", type=int, default=32, help="rows of 512 tokens a step")
    teacher.add_argument("--lr", type=float, default=4e-3)
    teacher.add_argument("--weight-decay", type=float, default=1.0)
    teacher.add_argument("--dropout", type=float, default=0.2)
    teacher.add_argument("--token-dropout", type=float, default=0.0)
    teacher.add_argument("--bpe-dropout", type=float, default=0.1)
    teacher.add_argument("--plain-share", type=float, default=0.25, help="end without BPE dropout")
    teacher.add_argument("--short-share", type=float, default=0.15)
    teacher.add_argument("--average", type=float, default=0.998, help="decay of the mean weights")
    teacher.add_argument("--evaluate-every", type=int, default=201)
    teacher.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)

    shipped = commands.add_parser("check", help="measure the shipped teacher on this CPU")
    shipped.add_argument("--demo", type=Path, default=Path("distily/demo"))
    shipped.add_argument("--documents", type=int, default=100, help="0: all of them")
    shipped.add_argument("--seed", type=int, default=0)

    args = parser.parse_args(argv)
    if args.command == "text":
        make_text(args.out)
    elif args.command == "train":
        train(args)
    else:
        check(args)


if __name__ == "__main__":
    main()
