"""
Rules at a token, as texts and small frozen objects: which there are, and which branches each needs.

What they compute is in `combine.py`. Nothing here imports torch.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

from dera_peft.errors import DeRaError

MAX_LAMBDA = (2 - 2**-23) * 2.0**127  # the largest float32: logits are mixed in fp32
MAX_POSITION = 2**63 - 1  # they are int64

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)

Schedule = tuple[tuple[int, float], ...]  # (position of a new token, λ from there on), the first at 0; () for none


def read_number(text: str) -> float:
    """A number as it is commonly written; Python's `float` takes others too, as 1_0. Raises `ValueError`."""
    if not NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


@dataclass(frozen=True)
class Parameter:
    """The number behind a rule's name."""

    symbol: str
    holds: Callable[[float], bool]
    wanted: str


SHARE = Parameter("α", lambda value: 0 < value <= 1, "in (0, 1]")
LINEAR, PLAUSIBLE, AAD, KL, KL_TOTAL, JSD = "linear", "plausible", "aad", "kl", "kl_total", "jsd"
RULES: dict[str, Parameter | None] = {
    LINEAR: None,
    PLAUSIBLE: SHARE,
    AAD: SHARE,
    KL: Parameter("ε", lambda value: value >= 0, "at least 0 nats"),
    KL_TOTAL: Parameter("E", lambda value: value >= 0, "at least 0 nats"),
    JSD: None,
}
FORMS = ", ".join(name if each is None else f"{name}:{each.symbol}" for name, each in RULES.items())


@dataclass(frozen=True)
class Rule:
    """
    How the logits of the reference and of the aligned branch become one at each token; its `str` is how it is written.

    Attributes:
        name: one of `RULES`.
        value: its parameter; None for a rule without one.
    """

    name: str = LINEAR
    value: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return self.name
        short = f"{self.value:g}"
        return f"{self.name}:{short if float(short) == self.value else self.value}"

    @property
    def has_lambda(self) -> bool:
        return self.name != AAD

    def needs(self, lam: float) -> tuple[bool, bool]:
        """Whether it needs the reference's logits and the aligned branch's, at λ."""
        if self.name == LINEAR:
            return lam != 1, lam != 0
        if self.name == PLAUSIBLE:  # from λ=0 on the aligned branch says what is plausible
            return lam != 1, True
        return True, self.name == AAD or lam != 0


def read_rule(value: Any) -> Rule:
    """
    `"kl:0.05"` -> `Rule("kl", 0.05)`.

    Raises:
        DeRaError: it is no such text, or its number is out of range.
    """
    if isinstance(value, Rule):
        return value
    name, colon, text = value.partition(":") if isinstance(value, str) else ("", "", "")
    name, parameter = name.strip(), RULES.get(name.strip())
    if name not in RULES:
        raise DeRaError(f"combine={value!r} is not a rule; there are {FORMS}.")
    if parameter is None:
        if colon:
            raise DeRaError(f"combine={value!r}: {name} takes no number; write {name!r}.")
        return Rule(name)
    try:
        number = read_number(text.strip())
    except ValueError:
        number = math.nan
    if not parameter.holds(number):
        raise DeRaError(
            f"combine={value!r}: write {name}:{parameter.symbol} with {parameter.symbol} {parameter.wanted}."
        )
    return Rule(name, number + 0.0)


def read_schedule(value: Any) -> Schedule:
    """
    `{0: 2.0, 20: 1.0}`, pairs or `"0:2.0,20:1.0"` -> ((0, 2.0), (20, 1.0)): λ=2 for the first 20 new tokens, then λ=1.

    Raises:
        DeRaError: it is no such thing, does not start at 0, or has a λ that is not finite in float32.
    """
    form = f"lambda_schedule={value!r} must give λ by position, as 0:2.0,20:1.0 or {{0: 2.0, 20: 1.0}}"
    try:
        if isinstance(value, str):
            pairs = [_read_pair(part) for part in value.split(",")]
        else:
            pairs = [tuple(pair) for pair in (value.items() if isinstance(value, Mapping) else value)]
    except (TypeError, ValueError):
        raise DeRaError(f"{form}.") from None
    schedule = []
    for pair in pairs:
        position, lam = pair if len(pair) == 2 else (None, None)
        if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position <= MAX_POSITION:
            raise DeRaError(f"{form}: {position!r} is not a position, a whole number from 0.")
        if not isinstance(lam, Real) or isinstance(lam, bool) or not abs(cast("float", lam)) <= MAX_LAMBDA:
            raise DeRaError(f"{form}: {lam!r} is not a number that is finite in fp32.")
        schedule.append((position, float(lam) + 0.0))
    schedule.sort()
    positions = [position for position, _ in schedule]
    if twice := [position for position in positions if positions.count(position) > 1]:
        raise DeRaError(f"{form}: the position {twice[0]} is there twice.")
    if positions[:1] != [0]:
        raise DeRaError(f"{form}: it must start at position 0, the first new token.")
    return tuple(schedule)


def _read_pair(text: str) -> tuple[int, float]:
    position, lam = (part.strip() for part in text.split(":"))
    if not (position.isascii() and position.isdecimal()):
        raise ValueError(f"{position!r} is not a position")
    return int(position), read_number(lam)


@dataclass(frozen=True)
class Rules:
    """
    The rules of a batch.

    Attributes:
        each: one for each of the B sequences.
        schedules: likewise; () for a sequence whose λ stays.
    """

    each: tuple[Rule, ...]
    schedules: tuple[Schedule, ...]

    @property
    def unlike_linear(self) -> Rule | None:
        """The first rule that is not linear."""
        return next((rule for rule in self.each if rule.name != LINEAR), None)

    @property
    def is_linear(self) -> bool:
        return self.unlike_linear is None

    @property
    def argument(self) -> str:
        """What a message says of them: the first thing that is not plain λ."""
        return "lambda_schedule" if self.unlike_linear is None else f"combine={str(self.unlike_linear)!r}"

    @property
    def state(self) -> str | None:
        """As `argument`, but of what makes a token's logits depend on the tokens of the completion before it."""
        if any(self.schedules):
            return "lambda_schedule"
        return next((f"combine={str(rule)!r}" for rule in self.each if rule.name == KL_TOTAL), None)

    def needed(self, lam: Sequence[float]) -> list[tuple[bool, bool]]:
        """Whether each sequence needs the reference's branch and the aligned one, at its λ or those of its schedule."""
        found = []
        for rule, schedule, value in zip(self.each, self.schedules, lam, strict=True):
            needs = [rule.needs(each) for each in ([value] if not schedule else [each for _, each in schedule])]
            found.append((any(reference for reference, _ in needs), any(aligned for _, aligned in needs)))
        return found

    def repeat(self, repeats: int) -> "Rules":
        """Of a batch in which each sequence stands `repeats` times in a row."""
        each = tuple(rule for rule in self.each for _ in range(repeats))
        return Rules(each, tuple(schedule for schedule in self.schedules for _ in range(repeats)))


def read_rules(combine: Any, lambda_schedule: Any, batch_size: int) -> Rules | None:
    """
    What a caller asks for, one for all sequences or a list with one for each; None where all is plain λ.

    Raises:
        DeRaError: a rule or a schedule is none, or there is another number of them than sequences.
    """
    if combine is None and lambda_schedule is None:
        return None
    if isinstance(lambda_schedule, (Mapping, str)) and not lambda_schedule:
        read_schedule(lambda_schedule)  # which says what it lacks
    rules = _one_each("combine", combine, batch_size, isinstance(combine, (list, tuple)))
    # one schedule may be a sequence of pairs too, of which none is a mapping, a text or has pairs in it
    is_list = isinstance(lambda_schedule, (list, tuple)) and all(
        each is None or isinstance(each, (Mapping, str)) or _holds_pairs(each) for each in lambda_schedule
    )
    schedules = _one_each("lambda_schedule", lambda_schedule or None, batch_size, bool(is_list and lambda_schedule))
    read = Rules(
        tuple(read_rule(LINEAR if each is None else each) for each in rules),
        tuple(read_schedule(each) if each else () for each in schedules),
    )
    for rule, schedule in zip(read.each, read.schedules, strict=True):
        if schedule and not rule.has_lambda:
            raise DeRaError(f"combine={str(rule)!r} knows no λ: leave lambda_schedule out.")
    return None if read.is_linear and read.state is None else read


def _holds_pairs(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(pair, (list, tuple)) for pair in value)


def _one_each(name: str, value: Any, batch_size: int, is_list: bool) -> Sequence[Any]:
    if not is_list:
        return [value] * batch_size
    if len(value) != batch_size:
        raise DeRaError(
            f"{name} has {len(value)} entries, and the batch {batch_size} sequences: give one for all, or exactly one "
            "per prompt (before beams and return sequences expand them)."
        )
    return value
