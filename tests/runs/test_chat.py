"""Chats: what is learned, layouts, templates that rewrite the past. Run: pytest tests/runs/test_chat.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moa.errors import ConfigError
from moa.runs.encode import IGNORED, EncodedTask, encode_tasks
from moa.runs.tasks import Task
from tests.tiny_run import VOCAB, tokenizer, write_jsonl

# a turn is: role word, content, end; the assistant's answer is asked for with the word "label:"
PLAIN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}label: {{ m.content }} [EOS] "
    "{% else %}{% if m.role == 'system' %}the {% else %}review {% endif %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}label: {% endif %}"
)
MARKED = PLAIN.replace("{{ m.content }} [EOS] ", "{% generation %}{{ m.content }} [EOS]{% endgeneration %} ", 1)
# the last answer is shown with a thought before it, those before without, as some reasoning models' templates do
FORGETS = PLAIN.replace("label: {{ m.content }}", "label: {% if loop.last %}it {% endif %}{{ m.content }}")
TALK = [
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "was good"},
    {"role": "user", "content": "the plot"},
    {"role": "assistant", "content": "was bad"},
]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK]


def encode(
    folder: Path,
    chats: list[Any],
    template: str | None = PLAIN,
    max_length: int = 64,
    mode: str = "truncate",
    **task: Any,
) -> EncodedTask:
    file = write_jsonl(folder / "chats.jsonl", [{task.get("messages", "messages"): chat} for chat in chats])
    tok = tokenizer()
    tok.chat_template = template
    made = Task(kind="chat", train=str(file), eval=str(file), **task)
    return encode_tasks({"talk": made}, tok, max_length, long_rows=mode)[0]


def text(ids: list[int]) -> str:
    return " ".join(VOCAB[i] for i in ids)


def learned(row: dict[str, Any]) -> str:
    return " ".join(VOCAB[i] if i != IGNORED else "·" for i in row["labels"])


def test_only_the_assistant_is_learned(tmp_path: Path) -> None:
    row = encode(tmp_path, [TALK]).train[0]
    assert text(row["input_ids"]) == "review the film label: was good [EOS] review the plot label: was bad [EOS]"
    assert learned(row) == "· · · · was good [EOS] · · · · was bad [EOS]"


def test_it_agrees_with_a_template_that_marks_its_turns(tmp_path: Path) -> None:
    """The oracle is transformers' own mask of the assistant's tokens."""
    tok = tokenizer()
    tok.chat_template = MARKED
    theirs = tok.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    for template in (PLAIN, MARKED):
        row = encode(tmp_path, [TALK], template).train[0]
        assert row["input_ids"] == theirs["input_ids"]
        assert [int(label != IGNORED) for label in row["labels"]] == theirs["assistant_masks"]


def test_the_layouts_are_one(tmp_path: Path) -> None:
    one = encode(tmp_path, [TALK])
    other = encode(tmp_path, [SHAREGPT], messages="conversations")
    assert one.train[:] == other.train[:]


def test_a_system_prompt_is_added_where_there_is_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "very"}, *TALK[:2]]
    made = encode(tmp_path, [own, TALK[:2]], system="so")
    assert [text(row["input_ids"]) for row in made.train] == [
        "the very review the film label: was good [EOS]",
        "the so review the film label: was good [EOS]",
    ]


def test_a_template_that_forgets_gives_a_row_an_answer(tmp_path: Path) -> None:
    made = encode(tmp_path, [TALK], FORGETS)
    assert [learned(row) for row in made.train] == [
        "· · · · it was good [EOS]",
        "· · · · · · · · · · · it was bad [EOS]",
    ]


def test_long_chats(tmp_path: Path) -> None:
    made = encode(tmp_path, [TALK, TALK[:2]], max_length=8)
    assert learned(made.train[0]) == "· · · · was good [EOS] ·"
    assert "talk: 1 of 2 training rows are longer than max_length=8 and were truncated." in made.notes
    assert len(encode(tmp_path, [TALK, TALK[:2]], max_length=8, mode="skip").train) == 1
    with pytest.raises(ConfigError, match=r"1 of 2 training rows are longer than max_length=8, first row 1 of chats"):
        encode(tmp_path, [TALK, TALK[:2]], max_length=8, mode="refuse")
    with pytest.raises(ConfigError, match="none of the training rows is left within max_length=3"):
        encode(tmp_path, [TALK], max_length=3)


def test_the_prompts_shown_end_before_the_last_answer(tmp_path: Path) -> None:
    assert encode(tmp_path, [TALK]).prompts == [
        ("review the film label: was good [EOS] review the plot label: ", "was bad")
    ]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("a text", r"row 1 of chats.jsonl has .*expected a list of messages"),
        ([], r"expected a list of messages"),
        (["a"], r"expected a list of messages"),
        ([{"speaker": "me", "text": "it"}], r"a message has the keys speaker, text, expected role and content"),
        ([{"from": "martian", "value": "it"}], r"unknown speaker 'martian'"),
        ([{"role": "user", "content": "it"}], r"no message of the assistant"),
        ([{"role": "assistant", "content": 3}], r"content of a message must be text"),
    ],
)
def test_what_is_no_chat_is_named(tmp_path: Path, chat: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode(tmp_path, [chat])


def test_the_tokenizer_needs_a_template_and_its_refusals_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        encode(tmp_path, [TALK], None)
    with pytest.raises(ConfigError, match=r"the chat template refuses row 1 of chats.jsonl: turns must alternate"):
        encode(tmp_path, [TALK], "{{ raise_exception('turns must alternate') }}")
