"""Prompts as users have them: texts, files, chats; and the token ids that they become."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeGuard, cast

from dera_peft.decoding.jsonl import parse_row
from dera_peft.decoding.lambdas import is_lambda
from dera_peft.decoding.tokens import num_closing_tokens
from dera_peft.errors import DeRaError
from dera_peft.user_code import is_object_path, load_object

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Chat = list[dict[str, str]]

FILES = (".txt", ".jsonl", ".csv")


@dataclass(frozen=True)
class Prompt:
    """
    One prompt.

    Attributes:
        index: its place in the list, from 0; random numbers and results belong to it.
        content: a text, or chat messages (`[{"role": …, "content": …}, …]`).
        source: where it stands, for messages to the user: "prompts.txt, line 3".
        lam: λ of its own, which replace the run's.
        columns: further values of its row, for rewards and results.
    """

    index: int
    content: str | Chat
    source: str
    lam: tuple[float, ...] | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        texts: list[str] = []  # of an empty chat
        if is_chat(self.content):
            texts = [message["content"] for message in self.content]
        elif isinstance(self.content, str):
            texts = [self.content]
        elif self.content != []:
            raise DeRaError(f"{self.source}: a prompt must be a text or a list of chat messages; got {self.content!r}.")
        if not any(text.strip() for text in texts):
            raise DeRaError(f"{self.source}: the prompt is empty.")
        if not all(map(is_utf8, texts)):
            raise DeRaError(f"{self.source}: the prompt is not valid UTF-8.")

    @property
    def text(self) -> str:
        """What a person is shown: the text, or the last message."""
        return self.content if isinstance(self.content, str) else self.content[-1]["content"]


class PromptTooLong(DeRaError):
    """A prompt that, with what is to be generated, does not fit into the model's context."""


def column_names(prompts: Sequence[Prompt]) -> list[str]:
    """Of all the prompts, for rows need not be alike."""
    return list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))


def is_utf8(text: str) -> bool:
    """Whether it can be written: JSON's escapes can name half of a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_chat(content: Any) -> TypeGuard[Chat]:
    return (
        isinstance(content, list)
        and bool(content)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in content
        )
    )


def as_chat(content: str | Chat) -> Chat:
    """A text as the only message of its chat."""
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


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
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def from_file(name: str, column: str = "prompt") -> list[Prompt]:
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
            rows = {source: parse_row(line, source) for source, line in lines.items()}
    if not rows:
        raise DeRaError(f"prompts={name!r} has no prompts in it.")
    return _from_rows(rows, column)


def read_prompts(
    source: str | Sequence[Any],
    column: str = "prompt",
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
    column: str = "prompt",
    limit: int | None = None,
    *,
    argument: str = "prompts",
    columns: Sequence[str] | None = None,
    skip_empty: bool = False,
) -> tuple[list[Prompt], int]:
    """
    Prompts from a dataset (see `datasets.read_dataset`): texts, or chats; of a chat that ends with an answer, what
    stands before it.

    Args:
        limit: read the first so many rows; None for all.
        argument: what names the dataset for the user, for messages.
        columns: those that become the prompts' own; None for all but the prompt's.
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
        dataset = cast("Dataset", dataset.select_columns(list(dict.fromkeys((column, *columns)))))
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    found = cast("Iterable[dict[str, Any]]", dataset)  # as a Dataset's rows are unless it was given another format
    prompts: list[Prompt] = []
    for number, row in enumerate(found, start=1):
        source, content = f"{name}, row {number}", row[column]
        if is_chat(content) and content[-1]["role"] == "assistant":
            content = content[:-1]
        texts = [message["content"] for message in content] if is_chat(content) else [content]
        if skip_empty and not any(isinstance(text, str) and text.strip() for text in texts):
            continue
        lam = row.get("lambda") if columns is None else None
        own = [each for each in row if each not in (column, "lambda")] if columns is None else columns
        lambdas = None if lam is None else _read_lambdas(lam, source)
        prompts.append(Prompt(len(prompts), content, source, lambdas, {each: row[each] for each in own}))
    return prompts, len(dataset) - len(prompts)


def from_rows(rows: Iterable[Any], source: str, column: str = "prompt") -> list[Prompt]:
    """Prompts from texts, chats, or rows as those of a .jsonl file."""
    rows = [{column: row} if isinstance(row, str) or is_chat(row) else row for row in rows]
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
        if not values:  # a blank line
            continue
        if names is None:
            names = values
            continue
        if len(values) != len(names):
            raise DeRaError(f"{source}: has {len(values)} values, and the file's first line names {len(names)}.")
        row: dict[str, Any] = dict(zip(names, values, strict=True))
        if "lambda" in row:
            try:
                row["lambda"] = float(row["lambda"])
            except ValueError:
                raise DeRaError(f"{source}: lambda must be a number; got {row['lambda']!r}.") from None
        rows[source] = row


def _from_rows(rows: Mapping[str, Mapping[str, Any]], column: str) -> list[Prompt]:
    """Of rows by where they stand."""
    prompts = []
    for index, (source, row) in enumerate(rows.items()):
        columns = dict(row)
        if column not in columns:
            raise DeRaError(f"{source}: has no key {column!r}; its keys are {sorted(columns)}.")
        content, lam = columns.pop(column), columns.pop("lambda", None)
        prompts.append(Prompt(index, content, source, None if lam is None else _read_lambdas(lam, source), columns))
    return prompts


def _read_lambdas(lam: Any, source: str) -> tuple[float, ...]:
    values = lam if isinstance(lam, list) else [lam]
    for value in values:
        if not is_lambda(value):
            raise DeRaError(f"{source}: lambda must be a finite number or a list of such; got {lam!r}.")
    if not values:
        raise DeRaError(f"{source}: lambda is an empty list.")
    return tuple(dict.fromkeys(float(value) + 0.0 for value in values))  # -0.0 is 0.0


def encode(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    config: "PreTrainedConfig",
    max_new_tokens: int,
    chat: bool = False,
) -> list[list[int]]:
    """
    Token ids of each prompt, checked to fit the context with what will be generated; nothing is ever cut.

    Args:
        chat: render with the tokenizer's chat template; a text becomes one user message.

    Raises:
        PromptTooLong: a prompt does not fit (with its length).
        DeRaError: there is no chat template, or it refuses a chat.
    """
    from jinja2 import TemplateError

    if chat and not tokenizer.chat_template:
        raise DeRaError(
            "the tokenizer has no chat template: leave --chat away, or use a model that was trained for chat."
        )
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    # an encoder's input ends as its tokenizer ends it; any other prompt goes on
    closing = 0 if config.is_encoder_decoder else num_closing_tokens(tokenizer)
    result = []
    for prompt in prompts:
        if chat:
            messages = as_chat(prompt.content)
            try:
                rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            except TemplateError as error:
                raise DeRaError(f"{prompt.source}: the chat template refuses this chat: {error}") from error
            ids = cast("dict[str, list[int]]", rendered)["input_ids"]  # by return_dict
        elif isinstance(prompt.content, str):
            ids = tokenizer(prompt.content)["input_ids"]
            ids = ids[: len(ids) - closing]
        else:
            raise DeRaError(f"{prompt.source}: the prompt is a chat; pass --chat to render it with the chat template.")
        if context is not None and len(ids) + max_new_tokens > context:
            room = context - len(ids)
            way_out = f"at most {room} new tokens fit after it (--max-new-tokens)" if room > 0 else "shorten it"
            raise PromptTooLong(
                f"{prompt.source}: the prompt has {len(ids)} tokens, which with {max_new_tokens} new ones is more than "
                f"the model's context of {context}; {way_out}."
            )
        result.append(list(ids))
    return result
