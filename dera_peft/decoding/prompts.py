"""Prompts as users have them: texts, files, chats; and the token ids that they become."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from dera_peft.decoding.chats import (
    CONTEXT,
    Chat,
    ChatError,
    encode_chat,
    read_content,
    takes_system,
    text_of,
    texts_of,
    whole_prompt,
    with_system,
)
from dera_peft.decoding.jsonl import parse_row
from dera_peft.decoding.lambdas import LAMBDAS, Lambda, read_lambda, unique
from dera_peft.decoding.tokens import num_closing_tokens
from dera_peft.errors import DeRaError
from dera_peft.user_code import is_object_path, load_object

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

COLUMN = "prompt"  # holds prompts, where another column may hold whole chats

FILES = (".txt", ".jsonl", ".csv")


@dataclass(frozen=True)
class Prompt:
    """
    One prompt.

    Attributes:
        index: its place in the list, from 0; random numbers and results belong to it.
        content: a text, or chat messages (`[{"role": …, "content": …}, …]`); read by `prompt_of`.
        source: where it stands, for messages to the user: "prompts.txt, line 3".
        lam: λ of its own, which replace the run's; of several adapters by name, as the row has it.
        columns: further values of its row, for rewards and results; `system`, `tools` and `chat_template_kwargs` of
            them also for the prompt.
    """

    index: int
    content: str | Chat
    source: str
    lam: tuple[Lambda, ...] | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "content", prompt_of(self.content, COLUMN, self.source))
        texts = texts_of(self.content)
        if not any(text.strip() for text in texts):
            raise DeRaError(f"{self.source}: the prompt is empty.")
        if not all(map(is_utf8, texts)):
            raise DeRaError(f"{self.source}: the prompt is not valid UTF-8.")

    @property
    def text(self) -> str:
        """What a person is shown: the text, or the last message."""
        return text_of(self.content)


class PromptTooLong(DeRaError):
    """A prompt that, with what is to be generated, does not fit into the model's context."""


def column_names(prompts: Sequence[Prompt]) -> list[str]:
    """Of all the prompts, for rows need not be alike."""
    return list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))


def is_utf8(text: str) -> bool:
    """Whether it can be written: JSON's escapes can name half of a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def from_texts(texts: Sequence[str], source: str = "--prompt") -> list[Prompt]:
    return [Prompt(index, text, f"{source} {index + 1}") for index, text in enumerate(texts)]


def from_lines(stream: TextIO, source: str) -> list[Prompt]:
    """One prompt a line."""
    try:
        lines = _split_lines(stream.read().removeprefix("\ufeff"))  # a byte order mark is no part of a prompt
    except UnicodeDecodeError as error:
        raise DeRaError(f"{source} can't be read: {error}") from None
    return [Prompt(index, line, f"{source}, line {index + 1}") for index, line in enumerate(lines)]


def _split_lines(text: str) -> list[str]:
    """Only \\n or \\r\\n ends a line: `str.splitlines` would also cut at U+2028, which JSON allows inside a string."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():  # blank ones at the end are an editor's
        lines.pop()
    return lines


def from_file(name: str, column: str = COLUMN) -> list[Prompt]:
    """
    Prompts from a file: `.txt` (one a line), `.jsonl` or `.csv` (rows with the prompts in `column`, perhaps "lambda",
    and further columns), or `path.py:name`, a Python function that returns prompts or such rows (a `datasets.Dataset`
    too).

    Raises:
        DeRaError: no such file, or a line that is malformed or empty, with its number.
    """
    if is_object_path(name):
        return from_rows(load_object(name)(), name, column)
    path = Path(name)
    if path.suffix not in FILES:
        raise DeRaError(f"prompts={name!r}: give a {', '.join(FILES)} file, or a function as path.py:name.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of a prompt
    except FileNotFoundError:
        raise DeRaError(f"prompts={name!r}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeRaError(f"prompts={name!r} can't be read: {error}") from None
    if path.suffix == ".csv":
        rows = _read_csv(text, name)
    else:
        lines = {f"{name}, line {number}": line for number, line in enumerate(_split_lines(text), start=1)}
        if path.suffix == ".txt":
            rows = {source: {column: line} for source, line in lines.items()}
        else:
            rows = {source: parse_row(line, source) for source, line in lines.items() if line.strip()}
    if not rows:
        raise DeRaError(f"prompts={name!r} has no prompts in it.")
    return _from_rows(rows, column)


def read_prompts(
    source: str | Sequence[Any],
    column: str = COLUMN,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Prompts from a list, a file or a function (see `from_file`), or else a dataset (see `from_dataset`)."""
    if not isinstance(source, str):
        return from_rows(source, "prompts", column)[:limit]
    if Path(source).suffix in FILES or source.rpartition(":")[0].endswith(".py"):
        return from_file(source, column)[:limit]
    prompts, _ = from_dataset(source, split, subset, column, limit)
    return prompts


def from_dataset(
    name: str,
    split: str = "train",
    subset: str | None = None,
    column: str = COLUMN,
    limit: int | None = None,
    *,
    argument: str = "prompts",
    columns: Sequence[str] | None = None,
    skip_empty: bool = False,
) -> tuple[list[Prompt], int]:
    """
    Prompts from a dataset (see `datasets.read_dataset`): texts, or chats (see `prompt_of`).

    Args:
        limit: read the first so many rows; None for all.
        argument: what names the dataset for the user, for messages.
        columns: those that become the prompts' own, beside those that belong to a prompt (`chats.CONTEXT`); None for
            all but the prompt's.
        skip_empty: leave out rows that have no prompt, where they are an error otherwise.

    Returns:
        The prompts, and how many rows were left out.
    """
    from dera_peft.decoding.datasets import (
        read_dataset,  # datasets takes a second to import, which a file of prompts does not need
    )

    dataset = read_dataset(name, split, subset, argument)
    for each in (column, *(columns or ())):
        if each not in dataset.column_names:
            way_out = ": set prompt_column." if each == column else "."
            raise DeRaError(f"{argument}={name!r} has no column {each!r}; it has {dataset.column_names}{way_out}")
    if columns is not None:
        columns = list(dict.fromkeys((*columns, *(each for each in CONTEXT if each in dataset.column_names))))
        dataset = cast("Dataset", dataset.select_columns(list(dict.fromkeys((column, *columns)))))
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    found = cast("Iterable[dict[str, Any]]", dataset)  # as a Dataset's rows are unless it was given another format
    prompts: list[Prompt] = []
    for number, row in enumerate(found, start=1):
        source = f"{name}, row {number}"
        content = prompt_of(row[column], column, source)
        if skip_empty and not any(text.strip() for text in texts_of(content)):
            continue
        lam = row.get("lambda") if columns is None else None
        own = [each for each in row if each not in (column, "lambda")] if columns is None else columns
        lambdas = None if lam is None else _read_lambdas(lam, source)
        prompts.append(Prompt(len(prompts), content, source, lambdas, {each: row[each] for each in own}))
    return prompts, len(dataset) - len(prompts)


def prompt_of(value: Any, column: str, source: str) -> str | Chat:
    """
    The prompt in a column of a row: a text, or a chat, which is empty where there is no prompt.

    A chat in a column called `prompt` is one; where it ends with an answer of the assistant's, that is begun, and is to
    be continued. Another column may hold a whole chat: what stands before its last answer is the prompt.

    Raises:
        DeRaError: it is neither.
    """
    if value is None or value == []:
        return []
    try:
        content = read_content(value)
    except ChatError as error:
        raise DeRaError(f"{source}: {error}") from None
    if column != COLUMN and not isinstance(content, str) and content[-1]["role"] == "assistant":
        return content[:-1]
    return content


def from_rows(rows: Iterable[Any], source: str, column: str = COLUMN) -> list[Prompt]:
    """Prompts from texts, chats, or rows as those of a .jsonl file."""
    rows = [{column: row} if isinstance(row, (str, list)) else row for row in rows]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DeRaError(f"{source}, prompt {number}: must be a text, a chat or a row; got {row!r}.")
    return _from_rows({f"{source}, prompt {number}": row for number, row in enumerate(rows, start=1)}, column)


def _read_csv(text: str, name: str) -> dict[str, dict]:
    """Rows under a head of names; a number is a text too, but for λ."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, names = {}, None
    while True:
        source = f"{name}, line {reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DeRaError(f"{source}: not valid CSV: {error}") from None
        if values is None:
            return rows
        if not "".join(values).strip() and len(values) < 2:  # a blank line
            continue
        if names is None:
            names = values
            continue
        if len(values) != len(names):
            raise DeRaError(f"{source}: has {len(values)} values, and the file's first line names {len(names)}.")
        row: dict[str, Any] = dict(zip(names, values, strict=True))
        if "lambda" in row:
            try:
                row["lambda"] = read_lambda([row["lambda"]])
            except DeRaError:
                raise DeRaError(
                    f"{source}: lambda must be a number, or name=λ,name=λ; got {row['lambda']!r}."
                ) from None
        rows[source] = row


def _from_rows(rows: Mapping[str, Mapping[str, Any]], column: str) -> list[Prompt]:
    """Of rows by where they stand."""
    prompts = []
    for index, (source, row) in enumerate(rows.items()):
        columns = dict(row)
        if column not in columns:
            raise DeRaError(f"{source}: has no key {column!r}; its keys are {sorted(columns)}.")
        content, lam = prompt_of(columns.pop(column), column, source), columns.pop("lambda", None)
        prompts.append(Prompt(index, content, source, None if lam is None else _read_lambdas(lam, source), columns))
    return prompts


def _read_lambdas(lam: Any, source: str) -> tuple[Lambda, ...]:
    values = lam if isinstance(lam, list) else [lam]
    # a dataset's rows have all names, with None for those that a row did not have
    values = [
        {name: part for name, part in value.items() if part is not None} if isinstance(value, Mapping) else value
        for value in values
    ]
    if not LAMBDAS.holds(values):
        raise DeRaError(
            f"{source}: lambda must be a finite number, an object with one for each adapter, or a list of such; got "
            f"{lam!r}."
        )
    if not values:
        raise DeRaError(f"{source}: lambda is an empty list.")
    return unique(values)


def encode(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    config: "PreTrainedConfig",
    max_new_tokens: int,
    chat: bool = False,
    system: str | None = None,
) -> list[list[int]]:
    """
    Token ids of each prompt, checked to fit the context with what will be generated; nothing is ever cut.

    Args:
        chat: render with the tokenizer's chat template; a text becomes one user message. A row's columns `system`,
            `tools` and `chat_template_kwargs` go with its prompt, as in training.
        system: a system prompt before each, and before a row's own; a text before it where the chat template takes no
            system message, or there is none.

    Raises:
        PromptTooLong: a prompt does not fit (with its length).
        DeRaError: there is no chat template, or it refuses a chat.
    """
    if chat and not tokenizer.chat_template:
        raise DeRaError(
            "the tokenizer has no chat template: leave --chat away, or use a model that was trained for chat."
        )
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    as_message = system is not None and bool(tokenizer.chat_template) and takes_system(tokenizer)
    result = []
    for prompt in prompts:
        if not chat and not isinstance(prompt.content, str):
            raise DeRaError(f"{prompt.source}: the prompt is a chat; pass --chat to render it with the chat template.")
        content = with_system(whole_prompt(prompt.content, prompt.columns, chat), system, as_message)
        try:
            ids = token_ids(tokenizer, content, prompt.columns, closed=config.is_encoder_decoder)
        except ChatError as error:
            raise DeRaError(f"{prompt.source}: {error}") from error
        if context is not None and len(ids) + max_new_tokens > context:
            room = context - len(ids)
            way_out = f"at most {room} new tokens fit after it (--max-new-tokens)" if room > 0 else "shorten it"
            raise PromptTooLong(
                f"{prompt.source}: the prompt has {len(ids)} tokens, which with {max_new_tokens} new ones is more than "
                f"the model's context of {context}; {way_out}."
            )
        result.append(ids)
    return result


def token_ids(
    tokenizer: "PreTrainedTokenizerBase",
    content: str | Chat,
    columns: Mapping[str, Any] | None = None,
    closed: bool = False,
) -> list[int]:
    """
    Token ids of a prompt, from `chats.whole_prompt`.

    Args:
        columns: of its row, for a chat's template.
        closed: whether a text ends as the tokenizer ends it, as an encoder's input does; any other prompt goes on.

    Raises:
        ChatError: the chat template refuses the chat; or a text is not valid UTF-8, by its column `system`.
    """
    if isinstance(content, str):
        if not is_utf8(content):
            raise ChatError("the prompt is not valid UTF-8.")
        ids = list(tokenizer(content)["input_ids"])
        return ids if closed else ids[: len(ids) - num_closing_tokens(tokenizer)]
    return encode_chat(tokenizer, content, columns)
