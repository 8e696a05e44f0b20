"""
The rows that a sweep keeps: completions, their scores, and their rewards and verdicts, in a log of each kind.

A row begins with the fingerprint ("run") of all that it depends on. A score or a reward whose fingerprint is no longer
right is ignored and made anew; the old row stays in its file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from dera_peft.decoding.lambdas import Lambda
from dera_peft.decoding.prompts import Chat
from dera_peft.decoding.rows import Expected, RowLog
from dera_peft.formatting import short_repr

Kind = TypeVar("Kind", bound="SweepRow")


class Key(NamedTuple):
    """Which completion a row is of. `lam` is the λ that it was decoded at; None in an arm that knows no λ."""

    arm: str
    index: int
    lam: Lambda | None
    sample: int


@dataclass(frozen=True)
class SweepRow:
    """What all rows of a sweep have: a fingerprint, and which completion they are of."""

    kind: ClassVar[str]  # names their files

    run: str
    arm: str
    prompt_index: int
    lam: Lambda | None
    sample: int

    @property
    def key(self) -> Key:
        return Key(self.arm, self.prompt_index, self.lam, self.sample)


@dataclass(frozen=True)
class CompletionRow(SweepRow):
    """
    A completion.

    Attributes:
        token_ids: with the end token if the model gave one.
        finish_reason, token_lambda: as in `Completion`.
        log_z: of a sample of the exact mixture, as in `ExactSample`.
    """

    kind: ClassVar[str] = "completions"
    __repr__ = short_repr

    prompt: str | Chat
    completion: str
    token_ids: list[int]
    finish_reason: str
    token_lambda: list[float] | None = None
    log_z: float | None = None


@dataclass(frozen=True)
class ScoreRow(SweepRow):
    """
    What a completion is worth, in nats.

    Attributes:
        kl: KL(π ‖ π_ref) along it, π being what it was decoded from at temperature 1: at its λ, by its arm's rule.
        log_ref, log_aligned: its log-probabilities at temperature 1; the latter of the sweep's own adapter alone.
        log_p, kl_grid: at each λ of the fine grid, where the curve is estimated.
        token_views: of `token_views`, where the report may show them.
    """

    kind: ClassVar[str] = "scores"
    __repr__ = short_repr

    kl: float
    log_ref: float
    log_aligned: float | None = None
    log_p: list[float] | None = None
    kl_grid: list[float] | None = None
    token_views: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class RewardRow(SweepRow):
    """
    The value that a reward gave to a completion, or a judge's verdict on it.

    Attributes:
        name: of the reward; for a verdict "judge 0" or "judge 1", by the λ that was compared with.
        error: what went wrong.
    """

    kind: ClassVar[str] = "rewards"
    __repr__ = short_repr

    name: str
    value: float | None
    error: str | None = None


def open_log(
    folder: Path, row_type: type[Kind], rank: int, expected: Callable[[Kind], Expected | None] | None = None
) -> RowLog[Kind]:
    """The log of one kind of rows in a sweep's folder; each process appends to a file of its own, by its rank."""
    return RowLog(
        folder / "parts" / f"{row_type.kind}.{rank}.jsonl",
        row_type,
        expected=expected,
        pattern=f"{row_type.kind}.*.jsonl",
        output=folder,
    )
