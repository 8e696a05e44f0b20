"""Rows that SFT learns from in the forms that data sets have them: texts, prompts with completions, or chats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from datasets import Json, Value

from dera_peft.decoding.chats import (
    Chat,
    ChatError,
    as_chat,
    is_continued,
    render,
    template_arguments,
    whole_chat,
    whole_prompt,
)
from dera_peft.decoding.prompts import is_utf8
from dera_peft.training.preference_rows import go_on, join_chats
from dera_peft.training.rows import (
    CHAT_FEATURES,
    EMPTY,
    LEFT_OUT,
    NO_PROMPT,
    REFUSED,
    UNREADABLE,
    ReadRow,
    UnusableError,
    is_blank,
    missing_text,
    read_column,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = "num_tokens"


def columns_to_read(columns: Sequence[str], text_field: str = "text") -> tuple[str, ...]:
    """The columns that SFT reads, of those that a dataset has; the text field if there are not any."""
    for known in (("prompt", "completion"), ("messages",), ("conversations",)):
        if set(known) <= set(columns):
            return known
    return (text_field,)


@dataclass(frozen=True)
class SFTReader:
    """
    Reads a row's text; its prompt and completion; or its chat, from `messages` or `conversations`. A prompt and a
    completion of which one is a chat become chats. The column `system` stands before a prompt or a chat.

    Args:
        columns: from `columns_to_read`.
        tokenizer: its chat template renders the rows; one that it refuses can't be trained on.
        end: the text of the end token, which stands behind a text.
    """

    columns: tuple[str, ...]
    tokenizer: "PreTrainedTokenizerBase"
    end: str | None

    @cached_property
    def made(self) -> tuple[str, ...]:
        return ("messages",) if self.columns == ("conversations",) else self.columns

    @cached_property
    def features(self) -> dict[str, Any]:
        return {**dict.fromkeys(self.made, Json()), **CHAT_FEATURES, LENGTH: Value("int64")}

    def __call__(self, row: dict[str, Any]) -> ReadRow:
        values = [read_column(row, column) for column in self.columns]
        if any(is_blank(value) for value in values):
            raise UnusableError(EMPTY)
        if self.columns == ("prompt", "completion"):
            values = read_pair(values[0], values[1], row)
        elif self.made == ("messages",):
            if isinstance(values[0], str):
                raise UnusableError(UNREADABLE, f"{self.columns[0]} must be a list of chat messages; got a text.")
            values = [whole_chat(values[0], row)]
        elif not isinstance(values[0], str):
            raise UnusableError(UNREADABLE, f"{self.columns[0]} must be a text; got {values[0]!r}.")
        chat = not isinstance(values[0], str)
        try:
            arguments = template_arguments(row) if chat else {"tools": None}
            ids = self._ids(values, arguments)
        except ChatError as error:
            raise UnusableError(REFUSED, str(error)) from None
        remark = LEFT_OUT if ids and missing_text(values, self.tokenizer, ids) is not None else None
        tools = arguments.pop("tools")
        made: dict[str, Any] = dict(zip(self.made, values, strict=True))
        made.update({"tools": tools, "chat_template_kwargs": arguments, LENGTH: len(ids)})
        return ReadRow(made, chat, remark)

    def _ids(self, values: Sequence[Any], arguments: Mapping[str, Any]) -> list[int]:
        """Of the whole row; none where the tokenizer can't make them, which is told of all rows at once."""
        if isinstance(values[0], str):
            text, end = "".join(values), self.end or ""
            if not is_utf8(text):  # by its column `system`
                raise UnusableError(UNREADABLE, "the text is not valid UTF-8.")
            return self.tokenizer(text if text.endswith(end) else text + end)["input_ids"]
        if not self.tokenizer.chat_template:
            return []
        messages = [message for value in values for message in value]
        return render(self.tokenizer, messages, arguments, return_dict=True)["input_ids"]


def read_pair(prompt: str | Chat, completion: str | Chat, row: Mapping[str, Any]) -> list[str | Chat]:
    """A row's prompt and completion, both as texts, or both as chats."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return [whole_prompt(prompt, row), completion]
    before = as_chat(prompt)
    answer = join_chats(before, as_chat(completion, "assistant"))[len(before) :]
    before = whole_chat(before, row)
    if not answer:
        raise UnusableError(EMPTY)
    if is_continued(before) and answer[0]["role"] == "assistant":  # TRL would render it as a turn of its own
        before, answer = before[:-1], go_on(before[-1], answer)
    if not before:
        raise UnusableError(NO_PROMPT)
    return [before, answer]
