"""Rows that can't be trained on, counted and told before training starts."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

from datasets import Dataset
from trl import is_conversational

from dera_peft.errors import DeRaError

CUT = "are cut by max_length"
EMPTY = "are empty"
IDENTICAL = "have identical chosen and rejected"


@dataclass
class RowCount:
    """
    What became of a dataset's rows.

    Attributes:
        name: of the dataset, for messages.
        total: rows before anything was left out.
        unusable: reason -> rows left out because of it.
        cut: rows that are longer than max_length, and lose their end (or start, as truncation_mode says) to it.
    """

    name: str
    total: int
    unusable: Counter = field(default_factory=Counter)
    cut: int = 0

    def check(self, most: float) -> None:
        """
        Raises:
            DeRaError: more than the share `most` of the rows is unusable or cut.
        """
        bad = self.unusable.total() + self.cut
        if bad > most * self.total:
            way_out = f"raise max_length, or set max_bad_rows above {bad / self.total:.2g} if it is meant so"
            raise DeRaError(f"{self}. That is more than max_bad_rows={most:g} of them: mend the data, {way_out}.")

    def as_dict(self) -> dict[str, int]:
        return {"total": self.total, **{reason: count for reason, count in self.faults().items() if count}}

    def faults(self) -> dict[str, int]:
        return {**self.unusable, CUT: self.cut}

    def __str__(self) -> str:
        text = f"{self.name}: {self.total} rows"
        faults = [f"{count} {reason}" for reason, count in self.faults().items() if count]
        if not faults:
            return f"{text}, all usable"
        return f"{text}, {self.unusable.total()} of them left out: {', '.join(faults)}"


def usable_rows(name: str, dataset: Dataset, fault: Callable[[dict], str | None]) -> tuple[Dataset, RowCount]:
    """The rows in which `fault` finds none, and the count of the others."""
    count, kept = RowCount(name, len(dataset)), []
    for index, row in enumerate(cast("Iterable[dict]", dataset)):
        reason = fault(row)
        if reason is None:
            kept.append(index)
        else:
            count.unusable[reason] += 1
    return dataset if len(kept) == len(dataset) else cast("Dataset", dataset.select(kept)), count


def preference_fault(row: dict) -> str | None:
    """Why DPO can't learn from a row: (prompt,) chosen and rejected, as texts or as lists of messages."""
    for column in ("prompt", "chosen", "rejected"):
        if column in row and row[column] is None:
            return f"lack {column}"
    if any(_is_empty(row[column]) for column in ("prompt", "chosen", "rejected") if column in row):
        return EMPTY
    return IDENTICAL if row["chosen"] == row["rejected"] else None


def text_fault(row: dict, columns: tuple[str, ...]) -> str | None:
    """Why SFT can't learn from a row."""
    for column in columns:
        if row[column] is None:
            return f"lack {column}"
    return EMPTY if any(_is_empty(row[column]) for column in columns) else None


def text_columns(dataset: Dataset, text_field: str = "text") -> tuple[str, ...]:
    """The columns that SFT reads, of those that TRL's SFTTrainer knows; the text field if there are not any."""
    for columns in (("prompt", "completion"), ("messages",), ("conversations",)):
        if set(columns) <= set(dataset.column_names):
            return columns
    return (text_field,)


def check_columns(name: str, dataset: Dataset, needed: tuple[str, ...], has_template: bool) -> None:
    """
    Raises:
        DeRaError: the dataset lacks a column, or holds chats that the tokenizer has no template for.
    """
    if missing := [column for column in needed if column not in dataset.column_names]:
        raise DeRaError(f"dataset_name={name!r} has no column {missing[0]!r}; it has {dataset.column_names}.")
    if is_conversational(dataset[0]) and not has_template:
        raise DeRaError(
            f"dataset_name={name!r} holds chats, and the model's tokenizer has no chat template: give the model one, "
            "or write the chats as plain texts."
        )


def _is_empty(value: str | list) -> bool:
    """A blank text, or messages of which the last one is blank."""
    if isinstance(value, str):
        return not value.strip()
    if not value:
        return True
    last = value[-1]
    content = last.get("content") or last.get("value") or last.get("tool_calls")
    return _is_empty(content) if isinstance(content, str) else not content
