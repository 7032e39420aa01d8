"""Documents become token ids and labels: plain text, prompt and completion, or chat messages. Supervised tokens are those with a label.

A sequence is ``{input_ids, labels, cut, supervised}``: ``labels`` are the ids themselves or -100, unshifted; ``cut`` counts the
tokens lost to truncation, ``supervised`` the tokens that will be predicted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from distily.batch import IGNORE_INDEX
from distily.errors import DistilyError

Sequences = dict[str, list[Any]]
COLUMNS = ("messages", "prompt", "text")
VERSION = 2
"""Raised when the same text would give other sequences, so that no old cache entry is read."""


def fingerprint(tokenizer: Any, **settings: Any) -> str:
    """A hash of everything that decides how text becomes sequences; two tokenizers never share one."""
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        content: Any = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    else:
        content = [tokenizer.get_vocab(), tokenizer.init_kwargs]
    described = {
        "version": VERSION,
        "class": type(tokenizer).__name__,
        "tokenizer": content,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
        "template": tokenizer.chat_template,
        **settings,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def text_format(columns: Sequence[str], column: str | None, key: str = "data.column") -> str:
    """Which column decides the format. Raises ``DistilyError`` where none of the known ones is there."""
    if column is not None:
        if column not in columns:
            raise DistilyError(f"{key}: {column!r} is no column of the data set; allowed: {', '.join(sorted(columns))}.")
        return column
    for known in COLUMNS:
        if known in columns and (known != "prompt" or "completion" in columns):
            return known
    raise DistilyError(
        f"{key}: the data set has the columns {', '.join(sorted(columns))}; allowed: text, prompt and completion, or messages; "
        "name another text column with data.column."
    )


def tokenizer_function(
    tokenizer: Any, column: str, max_length: int, long_documents: str | None, append_eos: bool
) -> Callable[[Mapping[str, list[Any]]], Sequences]:
    """The batched function for ``Dataset.map``: documents in, sequences of at most ``max_length`` tokens out."""
    split = (long_documents or "split") == "split"

    def apply(batch: Mapping[str, list[Any]]) -> Sequences:
        result: Sequences = {"input_ids": [], "labels": [], "cut": [], "supervised": []}
        for ids, labels, whole in _documents(tokenizer, column, batch, append_eos):
            pieces = _pieces(ids, labels, max_length, split and whole)
            for piece_ids, piece_labels, cut in pieces:
                result["input_ids"].append(piece_ids)
                result["labels"].append(piece_labels)
                result["cut"].append(cut)
                result["supervised"].append(sum(label != IGNORE_INDEX for label in piece_labels[1:]))
        return result

    return apply


def _pieces(ids: list[int], labels: list[int], max_length: int, split: bool) -> Iterator[tuple[list[int], list[int], int]]:
    if not split or len(ids) <= max_length:
        yield ids[:max_length], labels[:max_length], max(0, len(ids) - max_length)
        return
    for start in range(0, len(ids), max_length):
        yield ids[start : start + max_length], labels[start : start + max_length], 0


def _documents(
    tokenizer: Any, column: str, batch: Mapping[str, list[Any]], append_eos: bool
) -> Iterator[tuple[list[int], list[int], bool]]:
    """``(input_ids, labels, is plain text)`` of every document."""
    if column == "messages":
        for messages in batch["messages"]:
            yield *_chat(tokenizer, messages), False
    elif column == "prompt" and "completion" in batch:
        for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True):
            yield *_completion(tokenizer, prompt, completion), False
    else:
        texts = [_text(text or "", column) for text in batch[column]]
        for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]:
            if append_eos and ids and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
                ids = [*ids, tokenizer.eos_token_id]
            yield ids, list(ids), True


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise DistilyError(f"data.column: {column!r} holds {value!r}"[:200] + ", which is no text; allowed: a column of texts.")
    return value


def _completion(tokenizer: Any, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
    """Prompt and completion, as texts or as lists of messages; only the completion is supervised."""
    if isinstance(prompt, list):
        answers = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return _chat(tokenizer, [*prompt, *answers], answers_from=len(prompt))
    before = tokenizer(_text(prompt, "prompt"), verbose=False)["input_ids"]
    if before and before[-1] == tokenizer.eos_token_id and len(before) > 1:
        before = before[:-1]  # a tokenizer that ends every text would part prompt and completion
    after = tokenizer(_text(completion, "completion"), add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and after[-1:] != [tokenizer.eos_token_id]:
        after = [*after, tokenizer.eos_token_id]
    return [*before, *after], [IGNORE_INDEX] * len(before) + after


def _chat(tokenizer: Any, messages: list[Mapping[str, Any]], answers_from: int = 0) -> tuple[list[int], list[int]]:
    """A conversation by the tokenizer's template; the assistant's turns are supervised, but for one that answers nothing.

    Raises ``DistilyError`` for a tokenizer without a template, or one whose turns cannot be told apart.
    """
    if not isinstance(messages, list) or not all(
        isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in messages
    ):
        raise DistilyError(f"data.dataset: {messages!r}"[:200] + " is no conversation; allowed: a list of {role and content}.")
    if not tokenizer.chat_template:
        raise DistilyError("data.dataset: it holds chat messages, and the teacher's tokenizer has no chat template.")
    whole = _rendered(tokenizer, messages)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded["input_ids"]
    labels = [IGNORE_INDEX] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn < max(1, answers_from):
            continue
        start = _rendered(tokenizer, messages[:turn], add_generation_prompt=True)
        end = _rendered(tokenizer, messages[: turn + 1])
        if not whole.startswith(end) or not end.startswith(start):
            raise DistilyError(
                "data.dataset: the chat template renders earlier turns anew when turns follow, so the assistant's tokens "
                "cannot be found; allowed: templates that only append, or prompt and completion."
            )
        answer = slice(_tokens(tokenizer, encoded, start), _tokens(tokenizer, encoded, end))
        labels[answer] = ids[answer]
    return ids, labels


def _rendered(tokenizer: Any, messages: list[Mapping[str, Any]], **options: Any) -> str:
    """The conversation as text. Raises ``DistilyError`` where the template refuses it."""
    from jinja2 import TemplateError

    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DistilyError(f"data.dataset: the chat template refuses {messages!r}"[:200] + f": {error}.") from error


def _tokens(tokenizer: Any, encoded: Any, beginning: str) -> int:
    """How many tokens of a text end in its ``beginning``; a token across the border belongs to what follows."""
    if tokenizer.is_fast:
        return sum(end <= len(beginning) for _, end in encoded["offset_mapping"])
    ids = tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"]
    if encoded["input_ids"][: len(ids)] != ids:
        raise DistilyError("data.dataset: the tokenizer parts a chat otherwise when turns follow; allowed: a fast tokenizer.")
    return len(ids)
