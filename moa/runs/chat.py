"""Chats through the tokenizer's own template, and which of their tokens the assistant wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from .table_files import Rows
from .tasks import Task
from .yaml_values import one_line, shortened

ASSISTANT = "assistant"
# ShareGPT's words for who speaks -> those of chat templates
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
    "assistant": ASSISTANT,
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
Message = dict[str, Any]
Tokens = tuple[list[int], list[bool]]  # ids, and which of them the assistant wrote


class Conversations:
    """Reads the chats of a task and encodes them.

    Args:
        name: of the task, for messages.
        task: its columns and its system prompt.
        tokenizer: with a chat template.

    Raises:
        ConfigError: a tokenizer without a template, or one that does not say where its tokens stand in the text.
    """

    def __init__(self, name: str, task: Task, tokenizer: Any) -> None:
        self.where, self.task, self.tokenizer = f"task {name!r}", task, tokenizer
        template = tokenizer.chat_template
        if not template:
            raise ConfigError(
                f"{self.where}: this base's tokenizer has no chat template: take a base that was made for chats, or "
                "kind: generation with prompt and answer."
            )
        self.marks_turns = "generation %}" in str(template) or "generation -%}" in str(template)
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{self.where}: kind: chat needs a fast tokenizer, and {type(tokenizer).__name__} is not."
            )

    def encoded(self, rows: Rows, i: int) -> list[Tokens]:
        """Return one row's chat as ids and what of them is learned.

        A template that marks the assistant's turns itself is believed. Else a turn begins where the chat before it
        ends, prompt for an answer included, and ends where the chat with it ends: that is what generation is given
        and should write. A template that rewrites earlier turns later on (some drop an older turn's thoughts) has no
        such places: there each of the assistant's turns is a row of its own.

        Args:
            rows: of the task.
            i: which one.

        Raises:
            ConfigError: no list of messages, or one that the template refuses; the row is named.
        """
        messages, tools = self._messages(rows, i), self._tools(rows, i)
        place = rows.place(i)
        text = self._text(messages, tools, place)
        if self.marks_turns:
            return [self._marked(messages, tools)]
        turns = [t for t, message in enumerate(messages) if message["role"] == ASSISTANT]
        spans = [self._span(messages, turn, tools, place) for turn in turns]
        if all(text.startswith(whole) for _, whole in spans):
            return [self._tokens(text, [(start, len(whole)) for start, whole in spans])]
        return [self._tokens(whole, [(start, len(whole))]) for start, whole in spans]

    def last_turn(self, rows: Rows, i: int) -> tuple[str, str]:
        """Return one row's chat up to the assistant's last turn as text, and what the assistant says there."""
        messages = self._messages(rows, i)
        last = max(t for t, message in enumerate(messages) if message["role"] == ASSISTANT)
        prompt = self._text(messages[:last], self._tools(rows, i), rows.place(i), answer=True)
        return prompt, str(messages[last].get("content") or "")

    def _span(self, messages: Sequence[Message], turn: int, tools: Any, place: str) -> tuple[int, str]:
        """Return where a turn begins in the text of the chat up to its end, and that text."""
        whole = self._text(messages[: turn + 1], tools, place)
        before = self._text(messages[:turn], tools, place, answer=True) if turn else ""
        if not whole.startswith(before):  # the prompt for an answer is another one than that of a finished turn
            before = self._text(messages[:turn], tools, place) if turn else ""
        if not whole.startswith(before):
            raise ConfigError(
                f"{self.where}: the chat template changes earlier messages of {place} once an answer follows, so the "
                "place of that answer is not known: mark it in the template with {% generation %}."
            )
        return len(before), whole

    def _text(self, messages: Sequence[Message], tools: Any, place: str, answer: bool = False) -> str:
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=answer
                )
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{self.where}: the chat template refuses {place}: {one_line(error)}.") from error

    def _marked(self, messages: Sequence[Message], tools: Any) -> Tokens:
        out = self.tokenizer.apply_chat_template(
            list(messages), tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(out["input_ids"]), [bool(own) for own in out["assistant_masks"]]

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> Tokens:
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        learned = [
            any(start < last and first < end for start, end in spans) and first < last
            for first, last in out["offset_mapping"]
        ]
        return list(out["input_ids"]), learned

    # ---------------------------------------------------------------- reading

    def _tools(self, rows: Rows, i: int) -> Any:
        return (rows.columns[self.task.tools][i] or None) if self.task.tools else None

    def _messages(self, rows: Rows, i: int) -> list[Message]:
        """Return one row's messages as templates want them: {role, content, …}."""
        value, where = rows.columns[self.task.messages][i], f"{self.where}: {rows.place(i)}"
        if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
            raise ConfigError(
                f"{where} has {shortened(repr(value), 60)} in column {self.task.messages!r}, expected a list of "
                "messages, {role, content} or {from, value} each."
            )
        messages = [self._message(one, where) for one in value]
        if self.task.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.task.system})
        if not any(message["role"] == ASSISTANT for message in messages):
            raise ConfigError(f"{where} has no message of the assistant: there is nothing to learn in it.")
        return messages

    def _message(self, value: Mapping[str, Any], where: str) -> Message:
        if "role" in value:
            message = {key: inner for key, inner in value.items() if inner is not None}
            message.setdefault("content", "")
        elif {"from", "value"} <= set(value):
            message = {"role": ROLES.get(str(value["from"])), "content": value["value"]}
            if message["role"] is None:
                raise ConfigError(f"{where}: unknown speaker {value['from']!r}. Known: {', '.join(ROLES)}.")
        else:
            raise ConfigError(
                f"{where}: a message has the keys {', '.join(map(str, value))}, expected role and content, or from and "
                "value."
            )
        if not isinstance(message["content"], str | list):
            raise ConfigError(f"{where}: the content of a message must be text, got {shortened(repr(message), 60)}.")
        return message
