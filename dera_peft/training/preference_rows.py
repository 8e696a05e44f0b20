"""Rows of preferences in the forms that data sets have them, as prompt, chosen and rejected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from datasets import Json

from dera_peft.decoding.chats import (
    SYSTEM,
    Chat,
    ChatError,
    as_chat,
    is_continued,
    render,
    template_arguments,
    texts_of,
    whole_chat,
    whole_prompt,
)
from dera_peft.decoding.prompts import token_ids
from dera_peft.training.rows import (
    CHAT_FEATURES,
    EMPTY,
    IDS,
    NO_PROMPT,
    REFUSED,
    UNREADABLE,
    ReadRow,
    UnusableError,
    is_blank,
    read_column,
    shared_length,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHOSEN, REJECTED = "chosen", "rejected"
PROMPTS = ("prompt", "conversations", "question", "instruction", "input", "query")  # columns with prompts, best first
PROMPT_IDS = "decoding_prompt_ids"  # the prompt's tokens in decoding

IDENTICAL = "have identical chosen and rejected"
OTHER_PROMPTS = "have chosen and rejected that answer different prompts"
PROMPT_NOT_IN_CHATS = "have a prompt that is not in the chats of chosen and rejected, which are taken as they are"
PROMPT_IN_TEXTS = "have chosen and rejected that begin with the prompt's text, which stands before them once more"

TURN = "\n\nAssistant:"  # before an answer, in the texts of Anthropic's HH data


@dataclass(frozen=True)
class PreferenceReader:
    """
    Reads a row's prompt, chosen and rejected, as texts or as chats; a row with one chat in it becomes chats.

    The prompt is in the first of the columns `PROMPTS` that there is, with the column `system` before it; or it is what
    chosen and rejected both begin with: the turns that they share, or in the texts of Anthropic's HH data all up to the
    last answer. Chosen and rejected may be whole chats or answers alone. They continue a prompt that ends with the
    beginning of an answer.

    Args:
        columns: of the dataset.
        tokenizer: its chat template renders the rows; one that it refuses can't be trained on.
    """

    columns: Sequence[str]
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def features(self) -> dict[str, Any]:
        return {"prompt": Json(), CHOSEN: Json(), REJECTED: Json(), **CHAT_FEATURES, PROMPT_IDS: IDS}

    @cached_property
    def prompt_column(self) -> str | None:
        return next((column for column in PROMPTS if column in self.columns), None)

    def note(self) -> str | None:
        """What the user is told of where the prompts are from; None where they are a prompt column."""
        column = self.prompt_column
        if column is None:
            return "there is no prompt column: the prompt is what chosen and rejected both begin with"
        system = SYSTEM in self.columns
        if column == "prompt" and not system:
            return None
        return f"the prompts are the column {column!r}" + (f", with the column {SYSTEM!r} before it" if system else "")

    def __call__(self, row: dict[str, Any]) -> ReadRow:
        chosen, rejected = read_column(row, CHOSEN), read_column(row, REJECTED)
        prompt = self._prompt(row)
        if is_blank(chosen) or is_blank(rejected):
            raise UnusableError(EMPTY)
        if chosen == rejected:
            raise UnusableError(IDENTICAL)
        if all(isinstance(each, str) for each in (prompt or "", chosen, rejected)):
            return self._read_texts(prompt, chosen, rejected, row)
        return self._read_chats(prompt, as_chat(chosen, "assistant"), as_chat(rejected, "assistant"), row)

    def _prompt(self, row: Mapping[str, Any]) -> str | Chat | None:
        """What the prompt column holds; None where it says nothing."""
        column = self.prompt_column
        if column is None or row[column] is None or row[column] == []:
            return None
        prompt = read_column(row, column)
        if column == "instruction" and isinstance(prompt, str) and str(row.get("input") or "").strip():
            prompt = f"{prompt}\n{row['input']}"  # Alpaca's form
        return None if not any(text.strip() for text in texts_of(prompt)) else prompt

    def _read_texts(self, prompt: Any, chosen: Any, rejected: Any, row: Mapping[str, Any]) -> ReadRow:
        remark = None
        if prompt is None:
            column = self.prompt_column
            if column is not None and row[column] is not None and TURN not in chosen:
                raise UnusableError(EMPTY)
            prompt, chosen, rejected = split_texts(chosen, rejected)
        elif chosen.startswith(prompt) and rejected.startswith(prompt):
            if TURN in prompt:
                chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
            else:
                remark = PROMPT_IN_TEXTS
        if is_blank(chosen) or is_blank(rejected):
            raise UnusableError(EMPTY)
        prompt = whole_prompt(prompt, row)
        try:
            ids = token_ids(self.tokenizer, prompt)
        except ChatError as error:
            raise UnusableError(UNREADABLE, str(error)) from None
        made = {"prompt": prompt, CHOSEN: chosen, REJECTED: rejected, "tools": None, "chat_template_kwargs": {}}
        return ReadRow({**made, PROMPT_IDS: ids}, chat=False, remark=remark)

    def _read_chats(self, prompt: Any, chosen: Chat, rejected: Chat, row: Mapping[str, Any]) -> ReadRow:
        remark = None
        if isinstance(prompt, str):
            repeats = all(_asks(each, prompt) for each in (chosen, rejected))
            if repeats or "assistant" not in (chosen[0]["role"], rejected[0]["role"]):  # they are whole chats
                remark = None if repeats else PROMPT_NOT_IN_CHATS
                prompt = None
        shared, chosen, rejected = split_chats([] if prompt is None else as_chat(prompt), chosen, rejected)
        whole = whole_chat(shared, row)
        try:
            arguments = template_arguments(row)
            ids = token_ids(self.tokenizer, whole, row) if self.tokenizer.chat_template else []
            if is_continued(whole):  # TRL would render it as a turn of its own
                begun, whole = whole[-1], whole[:-1]
                chosen, rejected = go_on(begun, chosen), go_on(begun, rejected)
            if not whole:
                raise UnusableError(NO_PROMPT)
            if self.tokenizer.chat_template:
                for answer in (chosen, rejected):
                    render(self.tokenizer, [*whole, *answer], arguments, tokenize=False)
        except ChatError as error:
            raise UnusableError(REFUSED, str(error)) from None
        tools = arguments.pop("tools")
        made = {"prompt": whole, CHOSEN: chosen, REJECTED: rejected, "tools": tools, "chat_template_kwargs": arguments}
        return ReadRow({**made, PROMPT_IDS: ids}, chat=True, remark=remark)


def _asks(chat: Chat, prompt: str) -> bool:
    """Whether a turn of the chat's, but for the assistant's, has the prompt's text."""
    return any(prompt.strip() in turn.get("content", "") for turn in chat if turn["role"] != "assistant")


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """
    Prompt and answers of texts that both begin with the prompt, as Anthropic's HH data: the prompt is all up to the
    beginning of the last answer that both have begun.

    Raises:
        UnusableError: they are no such texts. Where two texts cease to be alike is no prompt's end: it may be in the
            middle of a word.
    """
    head, turn, _ = chosen[: shared_length(chosen, rejected)].rpartition(TURN)
    if not turn or not head.strip():
        raise UnusableError(NO_PROMPT, f"neither in a column ({', '.join(PROMPTS)}), nor by a {TURN!r} in both texts")
    prompt = head + turn
    return prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt)


def split_chats(prompt: Chat, chosen: Chat, rejected: Chat) -> tuple[Chat, Chat, Chat]:
    """
    Prompt and answers of chats: the prompt is the given one and the turns that chosen and rejected both have behind it.

    Raises:
        UnusableError: there is no prompt, or it is not the same one.
    """
    chosen, rejected = join_chats(prompt, chosen), join_chats(prompt, rejected)
    shared = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        raise UnusableError(OTHER_PROMPTS)
    if not any(text.strip() for text in texts_of(chosen[:shared])):
        raise UnusableError(NO_PROMPT)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def join_chats(prompt: Chat, answer: Chat) -> Chat:
    """The chat of a prompt and an answer, which may begin with the prompt's last turns, or with all of them."""
    own = next(own for own in range(len(prompt) + 1) if answer[: len(prompt) - own] == prompt[own:])
    return [*prompt[:own], *answer]


def go_on(begun: dict[str, Any], answer: Chat) -> Chat:
    """An answer with the beginning that its prompt gave it."""
    return [{**begun, **answer[0], "content": begun["content"] + answer[0].get("content", "")}, *answer[1:]]
