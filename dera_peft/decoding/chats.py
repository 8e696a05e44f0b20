"""Chats as data sets write them, read as messages; and the token ids that a chat template makes of them."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]

SYSTEM, TOOLS, TEMPLATE_ARGUMENTS = "system", "tools", "chat_template_kwargs"
CONTEXT = (SYSTEM, TOOLS, TEMPLATE_ARGUMENTS)  # columns of a row that belong to its prompt; the last two are TRL's

# Roles by the names that ShareGPT, OpenAssistant and others give them. One that is not here stays as it is.
ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "bot": "assistant",
    "model": "assistant", "ai": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
JSON = (str, int, float, list, dict)


class ChatError(ValueError):
    """A value that is not a chat, or a chat that a template refuses; the message does not say where it stands."""


def read_content(value: Any, what: str = "a prompt") -> str | Chat:
    """
    A text as it is, or a chat's messages with role and content: see `read_chat`.

    Args:
        what: what the value is, for messages.

    Raises:
        ChatError: it is neither.
    """
    return value if isinstance(value, str) else read_chat(value, what)


def read_chat(value: Any, what: str = "a chat") -> Chat:
    """
    A chat's messages, each with its role and a text as content, from a list of messages or a single one.

    A message has `role` and `content`, or `from` and `value`. Content may be a text or a list of text parts. A message
    with tool calls may have no content. Keys without a value, with which `datasets` fills rows, are left out, and those
    with a date or another value that JSON does not know.

    Raises:
        ChatError: it is not a chat.
    """
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages:
        raise ChatError(f"{what} must be a text or a list of chat messages; got {value!r}.")
    return [_read_message(message, what) for message in messages]


def _read_message(message: Any, what: str) -> dict[str, Any]:
    given = (
        {key: part for key, part in message.items() if isinstance(part, JSON)} if isinstance(message, Mapping) else {}
    )
    role = given.pop("role", None) or given.pop("from", None)
    parts = given.pop("content", None)
    content = given.pop("value", None) if parts is None else _join_parts(parts, what)
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and given.get("tool_calls"))):
        raise ChatError(
            f"{what} must be a text or a list of chat messages, each with 'role' and 'content' (or 'from' and "
            f"'value'); one of the messages is {message!r}."
        )
    read = {"role": ROLES.get(role.lower(), role)}
    return {**read, **given} if content is None else {**read, "content": content, **given}


def _join_parts(content: Any, what: str) -> Any:
    """The text of content that is a list of text parts; other content as it is."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise ChatError(f"{what} must consist of texts alone; a message's content is {content!r}.")
    return "".join(cast("list[str]", texts))


def text_of(content: str | Chat) -> str:
    """The text, or that of a chat's last message."""
    return content if isinstance(content, str) else content[-1].get("content", "")


def texts_of(content: str | Chat) -> list[str]:
    """The text, or those of a chat's messages."""
    return [content] if isinstance(content, str) else [message.get("content", "") for message in content]


def is_continued(chat: Chat) -> bool:
    """Whether the chat ends with an answer of the assistant's that is begun (a prefill), and is to be continued."""
    last = chat[-1]
    return last["role"] == "assistant" and bool(last.get("content")) and not last.get("tool_calls")


def with_answer(prompt: str | Chat, answer: str) -> Chat:
    """The chat in which `answer` continues, or else follows, the prompt."""
    chat = as_chat(prompt)
    if is_continued(chat):
        return [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + answer}]
    return [*chat, {"role": "assistant", "content": answer}]


def as_chat(content: str | Chat, role: str = "user") -> Chat:
    """A text as the only message of its chat."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def whole_prompt(content: str | Chat, columns: Mapping[str, Any], chat: bool = False) -> str | Chat:
    """
    What stands before the answer: a row's prompt, with its column `system` before it.

    Args:
        columns: of the prompt's row. Before a text `system` stands with a blank line; see also `whole_chat`.
        chat: whether a text becomes a user message.
    """
    if chat or not isinstance(content, str):
        return whole_chat(content, columns)
    system = _system(columns)
    return content if system is None else f"{system}\n\n{content}"


def whole_chat(content: str | Chat, columns: Mapping[str, Any]) -> Chat:
    """As `whole_prompt`, of chats: `system` is the first message, unless there is a system message."""
    chat, system = as_chat(content), _system(columns)
    if system is None or chat[0]["role"] == "system":
        return chat
    return [{"role": "system", "content": system}, *chat]


def with_system(prompt: str | Chat, system: str | None, as_message: bool) -> str | Chat:
    """
    The whole prompt, from `whole_prompt`, behind a further system prompt.

    Args:
        as_message: whether it is a message of the system's (together with one that is there), and not a text before the
            first message. Before a text it stands with a blank line.
    """
    if system is None:
        return prompt
    if isinstance(prompt, str):
        return f"{system}\n\n{prompt}"
    first, *others = prompt
    if as_message and first["role"] != SYSTEM:
        return [{"role": SYSTEM, "content": system}, *prompt]
    return [{**first, "content": f"{system}\n\n{first.get('content', '')}"}, *others]


def takes_system(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template has a place for a system message: some refuse one, and some leave it out."""
    chat = [{"role": SYSTEM, "content": "a system message"}, {"role": "user", "content": "a question"}]
    try:
        return "a system message" in render(tokenizer, chat, {}, tokenize=False)
    except ChatError:
        return False


def _system(columns: Mapping[str, Any]) -> str | None:
    system = columns.get(SYSTEM)
    return system if isinstance(system, str) and system.strip() else None


def template_arguments(columns: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a row gives its chat template beside the messages: its columns `tools` (also as JSON) and
    `chat_template_kwargs`, as TRL's trainers do.

    Raises:
        ChatError: one of them is not what it should be.
    """
    tools, further = columns.get(TOOLS), columns.get(TEMPLATE_ARGUMENTS)
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
        further = json.loads(further) if isinstance(further, str) and further.strip() else further
    except ValueError as error:
        raise ChatError(f"{TOOLS!r} or {TEMPLATE_ARGUMENTS!r} is not valid JSON: {error}") from None
    if not isinstance(tools or [], list):
        raise ChatError(f"{TOOLS!r} must be a list; got {tools!r}.")
    if not isinstance(further or {}, Mapping):
        raise ChatError(f"{TEMPLATE_ARGUMENTS!r} must be names with values; got {further!r}.")
    # None stands for no tools: some templates write their preamble for an empty list
    arguments = {key: value for key, value in (further or {}).items() if value is not None}
    return {"tools": tools or None, **arguments}


def render(tokenizer: "PreTrainedTokenizerBase", chat: Chat, arguments: Mapping[str, Any], **how: Any) -> Any:
    """
    What the tokenizer's `apply_chat_template` makes of a chat.

    Raises:
        ChatError: the template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(chat, **arguments, **how)
    except Exception as error:  # a template is a program: it can raise anything
        raise ChatError(f"the chat template refuses this chat: {error}") from error


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase", chat: Chat, columns: Mapping[str, Any] | None = None
) -> list[int]:
    """
    Token ids of a chat up to where the model's answer begins, or, where the chat ends with one, goes on.

    Args:
        columns: of the prompt's row: see `template_arguments`.

    Raises:
        ChatError: the template refuses the chat.
    """
    rendered = _render_prompt(tokenizer, chat, columns, return_dict=True)
    return list(cast("dict[str, list[int]]", rendered)["input_ids"])


def chat_text(tokenizer: "PreTrainedTokenizerBase", chat: Chat, columns: Mapping[str, Any] | None = None) -> str:
    """The text whose token ids `encode_chat` gives."""
    return _render_prompt(tokenizer, chat, columns, tokenize=False)


def _render_prompt(
    tokenizer: "PreTrainedTokenizerBase", chat: Chat, columns: Mapping[str, Any] | None, **how: Any
) -> Any:
    continued = is_continued(chat)
    return render(
        tokenizer, chat, template_arguments(columns or {}),
        add_generation_prompt=not continued, continue_final_message=continued, **how,
    )  # fmt: skip
