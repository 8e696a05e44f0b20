"""Rows in the one form that is trained on; those that can't be trained on are counted and told before it starts."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol, cast

from accelerate import PartialState
from datasets import Dataset, Features, Json, List, Value

from dera_peft import __version__
from dera_peft.decoding.chats import Chat, ChatError, read_content, texts_of
from dera_peft.decoding.prompts import is_utf8
from dera_peft.errors import DeRaError
from dera_peft.training.program import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT = "are cut by max_length"
EMPTY = "are empty"
NO_PROMPT = "have no prompt"
UNREADABLE = "can't be read"
REFUSED = "can't be rendered"
TEXTS = "are texts where other rows are chats"
LEFT_OUT = "have text that is not in their tokens: the chat template or the tokenizer leaves it out"

NUMBER, FAULT, DETAIL, REMARK, CHAT = "row", "fault", "detail", "remark", "chat"  # columns beside those of a reader
SHOWN = 300  # characters of a detail


class UnusableError(Exception):
    """A row that can't be trained on: `args` are the reason, which completes "3 rows …", and perhaps a detail."""


@dataclass(frozen=True)
class ReadRow:
    """
    A row in the form that is trained on.

    Attributes:
        columns: for the trainer.
        chat: whether they hold chats.
        remark: what the user is told of it; completes "3 rows …".
    """

    columns: dict[str, Any]
    chat: bool
    remark: str | None = None


class Reader(Protocol):
    """Brings the rows of a dataset into the form that is trained on."""

    @property
    def features(self) -> dict[str, Any]:
        """Of the columns that it makes, as `datasets.Features` takes them."""
        ...

    def __call__(self, row: dict[str, Any]) -> ReadRow:
        """Raises `UnusableError` for a row that can't be trained on."""
        ...


@dataclass
class RowCount:
    """
    What became of a dataset's rows.

    Attributes:
        name: of the dataset, for messages.
        total: rows before anything was left out.
        unusable: reason -> rows left out because of it.
        cut: rows that are longer than max_length, and lose their end (or start, as truncation_mode says) to it.
        remarks: what else is to be told of rows that stay -> how many they are.
        first: reason or remark -> where it was met first, and what is wrong there.
    """

    name: str
    total: int
    unusable: Counter = field(default_factory=Counter)
    cut: int = 0
    remarks: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def leave_out(self, number: int, reason: str, detail: str = "") -> None:
        """Counts the row of this number, from 1."""
        self.unusable[reason] += 1
        self._note(number, reason, detail)

    def remark(self, number: int, remark: str, detail: str = "") -> None:
        self.remarks[remark] += 1
        self._note(number, remark, detail)

    def add_cut(self, number: int) -> None:
        self.cut += 1
        self._note(number, CUT)

    def _note(self, number: int, reason: str, detail: str = "") -> None:
        detail = detail if len(detail) <= SHOWN else f"{detail[:SHOWN]}…"
        self.first.setdefault(reason, f"row {number}: {detail}" if detail else f"row {number}")

    def check(self, most: float) -> None:
        """
        Raises:
            DeRaError: more than the share `most` of the rows is unusable or cut, or no row is left.
        """
        bad = self.unusable.total() + self.cut
        if self.unusable.total() == self.total:
            raise DeRaError(f"{self}. No row is left to train on: mend the data.")
        if bad > most * self.total:
            way_out = f"set max_bad_rows above {bad / self.total:.2g} if it is meant so"
            way_out = f"raise max_length, or {way_out}" if self.cut else f"or {way_out}"
            raise DeRaError(f"{self}. That is more than max_bad_rows={most:g} of them: mend the data, {way_out}.")

    def tell(self) -> None:
        """Logs what became of the rows."""
        log(str(self))
        for remark, count in self.remarks.items():
            rows = "1 row" if count == 1 else f"{count} rows"
            log(f"{self.name}: {rows} {remark} (first: {self.first[remark]})", logging.WARNING)

    def as_dict(self) -> dict[str, int]:
        return {"total": self.total, **{reason: count for reason, count in self.faults().items() if count}}

    def faults(self) -> dict[str, int]:
        return {**self.unusable, CUT: self.cut}

    def __str__(self) -> str:
        text = f"{self.name}: {self.total} rows"
        faults = {reason: count for reason, count in self.faults().items() if count}
        if not faults:
            return f"{text}, all usable"
        counts = ", ".join(f"{count} {reason}" for reason, count in faults.items())
        places = "; ".join(self.first[reason] for reason in faults)
        return f"{text}, {self.unusable.total()} of them left out: {counts} (first: {places})"


def read_rows(name: str, dataset: Dataset, reader: Reader, num_proc: int | None = None) -> tuple[Dataset, RowCount]:
    """
    The rows that can be trained on, in the reader's form and with their numbers, from 1; and the count of the others.

    Args:
        name: of the dataset, for messages.
        num_proc: processes to read in.
    """
    notes = {NUMBER: Value("int64"), FAULT: Value("string"), DETAIL: Value("string"), REMARK: Value("string")}
    read = map_rows(
        dataset, _read, {**reader.features, **notes, CHAT: Value("bool")}, num_proc, desc="Reading rows",
        with_indices=True, remove_columns=dataset.column_names, reader=reader,
    )  # fmt: skip
    any_chat, count, kept = any(read[CHAT]), RowCount(name, len(dataset)), []
    for place, row in enumerate(cast("Iterable[dict]", read.select_columns([*notes, CHAT]))):
        if row[FAULT] is not None:
            count.leave_out(row[NUMBER], row[FAULT], row[DETAIL])
        elif any_chat and not row[CHAT]:
            count.leave_out(row[NUMBER], TEXTS)
        else:
            kept.append(place)
            if row[REMARK] is not None:
                count.remark(row[NUMBER], row[REMARK])
    return cast("Dataset", read.select(kept).remove_columns([FAULT, DETAIL, REMARK])), count


def map_rows(
    dataset: Dataset, function: Any, features: Mapping[str, Any], num_proc: int | None, desc: str, *,
    with_indices: bool = False, remove_columns: list[str] | None = None, **arguments: Any,
) -> Dataset:  # fmt: skip
    """`Dataset.map`, first in one process, of which the others read what it has cached."""
    if num_proc is not None and num_proc < 0:
        raise DeRaError(f"dataset_num_proc={num_proc} must not be negative.")
    with PartialState().local_main_process_first():
        mapped = dataset.map(
            function,
            with_indices=with_indices,
            remove_columns=remove_columns,
            features=Features(features),
            num_proc=num_proc,
            desc=desc,
            fn_kwargs={**arguments, "version": __version__},  # what another version has cached is made anew
        )
    return cast("Dataset", mapped)


def _read(row: dict[str, Any], index: int, reader: Reader, version: str) -> dict[str, Any]:
    made = {**dict.fromkeys(reader.features), NUMBER: index + 1, FAULT: None, DETAIL: None, REMARK: None, CHAT: False}
    try:
        read = reader(row)
    except UnusableError as error:
        reason, detail = (*error.args, "")[:2]
        return {**made, FAULT: reason, DETAIL: detail}
    return {**made, **read.columns, REMARK: read.remark, CHAT: read.chat}


CHAT_FEATURES = {"tools": Json(), "chat_template_kwargs": Json()}
IDS = List(Value("int64"))


def read_column(row: Mapping[str, Any], column: str) -> str | Chat:
    """
    The text or the chat in a column.

    Raises:
        UnusableError: there is none.
    """
    value = row[column]
    if value is None:
        raise UnusableError(f"lack {column}")
    if value == []:
        raise UnusableError(EMPTY)
    try:
        content = read_content(value, column)
    except ChatError as error:
        raise UnusableError(UNREADABLE, str(error)) from None
    if not all(map(is_utf8, texts_of(content))):
        raise UnusableError(UNREADABLE, f"{column} is not valid UTF-8.")
    return content


def is_blank(content: str | Chat) -> bool:
    """Whether a text, or a chat's last message, says nothing and calls no tool."""
    if isinstance(content, str):
        return not content.strip()
    return not content[-1].get("content", "").strip() and not content[-1].get("tool_calls")


def shared_length(*sequences: Sequence) -> int:
    """How many items they all begin with."""
    together = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda items: all(each == items[0] for each in items), together))


def missing_text(written: Iterable[str | Chat], tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str | None:
    """The first text of `written` that is not in what the tokens say, but for white space; None where all are."""
    found = "".join(cast("str", tokenizer.decode(list(ids))).split())
    texts = (text for content in written for text in texts_of(content))
    return next((text for text in texts if "".join(text.split()) not in found), None)


def check_data(name: str, dataset: Dataset, needed: tuple[str, ...]) -> None:
    """
    Raises:
        DeRaError: the dataset lacks a column, or holds images.
    """
    if missing := [column for column in needed if column not in dataset.column_names]:
        raise DeRaError(f"dataset_name={name!r} has no column {missing[0]!r}; it has {dataset.column_names}.")
    if images := {"image", "images"} & set(dataset.column_names):
        raise DeRaError(
            f"dataset_name={name!r} has a column {images.pop()!r}: these programs train on texts alone; remove it if "
            "the rows do without."
        )


def check_tokenizer(name: str, rows: Dataset, tokenizer: Any, end: str | None) -> None:
    """
    Args:
        rows: from `read_rows`.
        end: the text of the end token, if there is one.

    Raises:
        DeRaError: the rows are chats and the tokenizer has no chat template, or texts and it has no end token.
    """
    chat = len(rows) > 0 and rows[0][CHAT]
    if chat and not tokenizer.chat_template:
        raise DeRaError(
            f"dataset_name={name!r} holds chats, and the model's tokenizer has no chat template: give the model one, "
            "or write the chats as plain texts."
        )
    if not chat and end is None:
        raise DeRaError(
            f"dataset_name={name!r} holds texts, and the model's tokenizer has no end token, which is to stand behind "
            "each: give the tokenizer one (eos_token)."
        )
