"""What benchmarks gave at each λ (`dera lm-eval`): the rows that are kept beside a sweep, for its report."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dera_peft.checkpoint.fingerprint import settings_fingerprint
from dera_peft.checkpoint.record import Record
from dera_peft.decoding.lambdas import Lambda, values_of
from dera_peft.decoding.rows import read_rows
from dera_peft.formatting import short_repr

FILE = "benchmarks.jsonl"


@dataclass(frozen=True)
class BenchmarkRow:
    """
    One metric of one task at one λ.

    Attributes:
        run: fingerprint of the model and of the task's settings; what shares one differs by λ alone.
        model: fingerprint of the weights, see `model_fingerprint`.
        task: or a group of tasks.
        filter: what the harness made of the completions before it measured; "none" where nothing.
        value: None where the harness gives no number.
        stderr: standard error over the task's documents, as the harness computes it; None where it has none.
        samples: documents that were measured.
        num_fewshot: solved examples in each prompt.
        higher_is_better: None where the task does not say.
    """

    kind: ClassVar[str] = "benchmarks"
    __repr__ = short_repr

    run: str
    model: str
    lam: Lambda
    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    samples: int | None
    num_fewshot: int | None
    higher_is_better: bool | None

    @property
    def line(self) -> tuple[str, str, str, str]:
        """What rows that differ by λ alone have in common."""
        return self.task, self.metric, self.filter, self.run


def model_fingerprint(record: Record) -> str:
    """Of the weights of base and adapters, wherever their folders are; of what is on the hub the name tells."""
    weights = record.weights()
    named = {"base": weights["base"], **weights["adapters"]}
    return settings_fingerprint(
        {"branches": record.branches, **{key: found or name for key, (name, found) in named.items()}}
    )


def read_benchmarks(folder: Path, model: str) -> list[BenchmarkRow]:
    """
    The benchmarks of one model in a folder, each as it was measured last: by line, and in it by ascending λ.

    Args:
        model: of `model_fingerprint`.

    Raises:
        DeRaError: the file has a line that is no such row.
    """
    try:
        rows, _ = read_rows(folder / FILE, BenchmarkRow)
    except FileNotFoundError:
        return []
    newest = {(*row.line, row.lam): row for row in rows if row.model == model}
    return [row for line in by_line(list(newest.values())).values() for row in line]


def by_line(rows: Sequence[BenchmarkRow]) -> dict[str, list[BenchmarkRow]]:
    """Label -> rows by ascending λ, in the order in which the lines come: one line of a plot or of a table."""
    lines: dict[tuple, list[BenchmarkRow]] = defaultdict(list)
    for row in rows:
        lines[row.line].append(row)
    names = [_name(line[0]) for line in lines.values()]
    labelled: dict[str, list[BenchmarkRow]] = {}
    for name, line in zip(names, lines.values(), strict=True):
        first = line[0]
        label = f"{name}, {first.num_fewshot or 0}-shot" if names.count(name) > 1 else name
        if label in labelled:  # they differ by another setting
            label += f", run {first.run}"
        labelled[label] = sorted(line, key=lambda row: values_of(row.lam))
    return labelled


def _name(row: BenchmarkRow) -> str:
    return f"{row.task} {row.metric}" + ("" if row.filter == "none" else f" ({row.filter})")
