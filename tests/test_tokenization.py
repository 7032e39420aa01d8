"""Text to tokens and labels: plain text, completions, chat; what is supervised, what is cut, what a cache key tells apart."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizer

from distily.batch import IGNORE_INDEX
from distily.errors import DistilyError
from distily.models import load_tokenizer
from distily.tokenization import fingerprint, text_format, tokenizer_function

EOS = "<|endoftext|>"
CHAT = (
    "{% for message in messages %}{{ message.role }}:\n{{ message.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
FORGETS = (
    "{% for message in messages %}{{ message.role }}:\n{% if loop.last %}{{ message.content }}{% else %}…{% endif %}<|endoftext|>"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + CHAT
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "Here."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Still there, as before."},
]


def tokenizer(template: str | None = None) -> Any:
    loaded = load_tokenizer("demo", "teacher.model")
    loaded.chat_template = template
    return loaded


@cache
def plain() -> Any:
    return tokenizer()


@cache
def chat() -> Any:
    return tokenizer(CHAT)


class Characters(PreTrainedTokenizer):
    """A slow tokenizer: a token for each character."""

    def __init__(self, upper: bool = False, **options: Any) -> None:
        self.upper = upper
        self.vocabulary = {EOS: 0, **{chr(code): code - 8 for code in range(9, 127)}}
        super().__init__(eos_token=EOS, upper=upper, **options)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.vocabulary)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text.upper() if self.upper else text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocabulary.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return {number: token for token, number in self.vocabulary.items()}[index]


def run(
    batch: dict[str, list[Any]], using: Any = None, column: str | None = None, max_length: int = 512, **settings: Any
) -> list[dict[str, Any]]:
    """The sequences of a batch of documents, as rows."""
    options = {"long_documents": None, "append_eos": True, **settings}
    column = column or text_format(list(batch), None)
    columns = tokenizer_function(using or plain(), column, max_length, options["long_documents"], options["append_eos"])(batch)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def supervised_text(row: dict[str, Any], using: Any) -> str:
    return using.decode([label for label in row["labels"] if label != IGNORE_INDEX])


# ---------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("columns", "chosen", "format_"),
    [
        (["text"], None, "text"),
        (["text", "messages"], None, "messages"),
        (["prompt", "completion", "text"], None, "prompt"),
        (["prompt", "text"], None, "text"),
        (["body", "text"], "body", "body"),
    ],
)
def test_the_column_decides_the_format(columns: list[str], chosen: str | None, format_: str) -> None:
    assert text_format(columns, chosen) == format_


@pytest.mark.parametrize(("columns", "chosen"), [(["text"], "body"), (["body"], None), (["prompt"], None)])
def test_a_column_that_is_not_there_is_named(columns: list[str], chosen: str | None) -> None:
    with pytest.raises(DistilyError, match=r"data\.column: .*" + columns[0]):
        text_format(columns, chosen)


# ------------------------------------------------------------------------- plain text


def test_plain_text_is_supervised_whole_and_ends_once() -> None:
    rows = run({"text": ["Return the value.", f"It ends by itself.{EOS}", "", None]})
    for row, text in zip(rows[:2], ["Return the value.", "It ends by itself."], strict=True):
        assert row["input_ids"] == [*plain()(text)["input_ids"], 0]
        assert row["labels"] == row["input_ids"]
        assert row["supervised"] == len(row["input_ids"]) - 1
    assert [row["supervised"] for row in rows[2:]] == [0, 0]
    assert rows[2]["input_ids"] == rows[3]["input_ids"] == []


def test_the_end_token_is_left_out_where_it_is_not_wanted() -> None:
    (row,) = run({"text": ["Return the value."]}, append_eos=False)
    assert row["input_ids"] == plain()("Return the value.")["input_ids"]


def test_another_column_is_text_too() -> None:
    assert run({"body": ["Hello"], "text": ["no"]}, column="body")[0]["input_ids"] == [*plain()("Hello")["input_ids"], 0]


@given(st.lists(st.text(alphabet="ab .\n√", max_size=60), min_size=1, max_size=5), st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_long_documents_are_split_without_loss(texts: list[str], max_length: int) -> None:
    pieces = run({"text": texts}, max_length=max_length)
    whole = run({"text": texts}, max_length=10**6)
    assert [token for piece in pieces for token in piece["input_ids"]] == [token for row in whole for token in row["input_ids"]]
    assert [label for piece in pieces for label in piece["labels"]] == [token for row in whole for token in row["input_ids"]]
    assert all(len(piece["input_ids"]) <= max_length and piece["cut"] == 0 for piece in pieces)
    for text in texts:  # no piece reaches over the end of a document
        alone = run({"text": [text]}, max_length=max_length)
        assert alone == pieces[: len(alone)]
        pieces = pieces[len(alone) :]
    assert not pieces


@given(st.lists(st.text(alphabet="ab .\n√", max_size=60), min_size=1, max_size=5), st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_truncation_is_counted(texts: list[str], max_length: int) -> None:
    rows = run({"text": texts}, max_length=max_length, long_documents="truncate")
    whole = run({"text": texts}, max_length=10**6)
    assert len(rows) == len(texts)
    for row, full in zip(rows, whole, strict=True):
        assert row["input_ids"] == full["input_ids"][:max_length]
        assert row["cut"] == len(full["input_ids"]) - len(row["input_ids"])
        assert row["supervised"] == max(0, len(row["input_ids"]) - 1)


# -------------------------------------------------------------- prompt and completion


def test_only_the_completion_is_supervised() -> None:
    batch = {"prompt": ["Count to three:", ""], "completion": [" one, two, three", f"Nothing.{EOS}"]}
    for row, prompt, completion in zip(run(batch), batch["prompt"], [" one, two, three", "Nothing."], strict=True):
        before, after = plain()(prompt)["input_ids"], [*plain()(completion)["input_ids"], 0]
        assert row["input_ids"] == before + after
        assert row["labels"] == [IGNORE_INDEX] * len(before) + after
        assert row["supervised"] == len(after) - (not before)


def test_a_long_prompt_is_cut_and_not_split() -> None:
    rows = run({"prompt": ["word " * 50, "a"], "completion": [" yes", " no"]}, max_length=8)
    assert [len(row["input_ids"]) for row in rows] == [8, 3]
    assert rows[0]["supervised"] == 0
    assert rows[0]["cut"] > 40


def test_a_tokenizer_that_ends_every_text_does_not_part_prompt_and_completion() -> None:
    ending = tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 0)])
    assert ending("Hello")["input_ids"][-1] == 0
    (row,) = run({"prompt": ["Say it:"], "completion": [" now"]}, ending)
    assert row["input_ids"].count(0) == 1
    assert row["input_ids"][-1] == 0
    (row,) = run({"text": ["Hello"]}, ending)
    assert row["input_ids"].count(0) == 1


# ------------------------------------------------------------------------------- chat


def test_exactly_the_assistants_turns_are_supervised() -> None:
    (row,) = run({"messages": [TALK]}, chat())
    assert row["input_ids"] == chat().apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert supervised_text(row, chat()) == f"Here.{EOS}Still there, as before.{EOS}"
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def byte_ends(ids: list[int], using: Any) -> list[int]:
    """Where each token ends in bytes: a byte-level token has a character for each byte."""
    lengths = [len(EOS) if token == 0 else len(using.convert_ids_to_tokens(token)) for token in ids]
    return [sum(lengths[: place + 1]) for place in range(len(lengths))]


words = st.text(alphabet="ab \n√é.", max_size=12)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), words), min_size=1, max_size=5))
@example([("user", "x"), ("assistant", "    indented"), ("user", "y"), ("assistant", "\n\nz")])
@settings(deadline=None, max_examples=100)
def test_supervised_are_the_tokens_that_end_in_an_answer(turns: list[tuple[str, str]]) -> None:
    """Also where the tokenizer merges the answer's first characters with what the template puts before it."""
    messages = [{"role": role, "content": content} for role, content in turns]
    (row,) = run({"messages": [messages]}, chat())
    spans, place = [], 0
    for turn, (role, content) in enumerate(turns):
        start = place + len(f"{role}:\n".encode())
        place = start + len(f"{content}{EOS}".encode())
        if role == "assistant" and turn:
            spans.append((start, place))
    expected = [
        token if any(start < end <= stop for start, stop in spans) else IGNORE_INDEX
        for token, end in zip(row["input_ids"], byte_ends(row["input_ids"], chat()), strict=True)
    ]
    assert row["labels"] == expected


def test_prompt_and_completion_may_be_messages() -> None:
    (row,) = run({"prompt": [TALK[:4]], "completion": [TALK[4:]]}, chat())
    (other,) = run({"prompt": [TALK[:4]], "completion": ["Still there, as before."]}, chat())
    assert supervised_text(row, chat()) == f"Still there, as before.{EOS}"  # not the answer within the prompt
    assert row == other


def test_an_answer_to_nothing_is_not_supervised() -> None:
    (row,) = run({"messages": [[{"role": "assistant", "content": "Welcome!"}, *TALK[1:3]]]}, chat())
    assert supervised_text(row, chat()) == f"Here.{EOS}"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = tokenizer(FORGETS)
    with pytest.raises(DistilyError, match="renders earlier turns anew"):
        run({"messages": [TALK]}, forgetful)
    (row,) = run({"messages": [TALK[1:3]]}, tokenizer(FORGETS.replace("…", "{{ message.content }}")))
    assert supervised_text(row, chat()) == f"Here.{EOS}"


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (None, TALK, "no chat template"),
        (STRICT, TALK, "the chat template refuses .*the user begins"),
        (CHAT, [{"role": "user"}], "no conversation"),
        (CHAT, None, "no conversation"),
    ],
)
def test_what_is_no_conversation_is_said(template: str | None, messages: Any, says: str) -> None:
    with pytest.raises(DistilyError, match=says):
        run({"messages": [messages]}, tokenizer(template))


def test_a_slow_tokenizer_finds_the_answers_too() -> None:
    slow = Characters()
    slow.chat_template = CHAT
    assert not slow.is_fast
    (row,) = run({"messages": [TALK]}, slow)
    answers = "".join(f"{turn['content']}\0" for turn in TALK if turn["role"] == "assistant")
    kept = [label for label in row["labels"] if label != IGNORE_INDEX]
    assert "".join("\0" if label == 0 else slow._convert_id_to_token(label) for label in kept) == answers


# ------------------------------------------------------------------------ fingerprints


def changed_backend(key: str, value: Any) -> Any:
    from tokenizers import Tokenizer

    other = tokenizer()
    backend = json.loads(other.backend_tokenizer.to_str())
    backend[key] = value
    other._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return other


def without_last_merge() -> Any:
    """The same vocabulary with one merge less."""
    model = json.loads(plain().backend_tokenizer.to_str())["model"]
    return changed_backend("model", {**model, "merges": model["merges"][:-1]})


def with_special_tokens_split() -> Any:
    other = tokenizer()
    other.split_special_tokens = True
    return other


def with_added_token() -> Any:
    other = tokenizer()
    other.add_tokens(["<|more|>"])
    return other


def test_the_same_tokenizer_has_one_fingerprint() -> None:
    used = tokenizer()
    used(["a", "a b c d"], padding=True, truncation=True, max_length=2)  # both are written into the backend
    assert fingerprint(used) == fingerprint(plain())


@pytest.mark.parametrize(
    "other",
    [
        lambda: tokenizer(CHAT),
        without_last_merge,
        lambda: changed_backend("normalizer", {"type": "Lowercase"}),
        lambda: changed_backend(
            "pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        ),
        with_special_tokens_split,
        with_added_token,
        Characters,
    ],
)
def test_two_tokenizers_never_share_a_fingerprint(other: Any) -> None:
    assert fingerprint(other()) != fingerprint(plain())


def test_slow_tokenizers_with_one_vocabulary_have_their_own() -> None:
    assert Characters().get_vocab() == Characters(upper=True).get_vocab()
    assert fingerprint(Characters()) != fingerprint(Characters(upper=True))
    assert fingerprint(Characters()) == fingerprint(Characters())


def test_settings_are_part_of_the_fingerprint() -> None:
    assert fingerprint(plain(), max_length=8) != fingerprint(plain(), max_length=9)
