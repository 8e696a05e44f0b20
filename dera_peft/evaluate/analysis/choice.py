"""What a rule chooses among, and what it takes: the ways to decode that were measured, or that the curve knows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy

from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of, with_values
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.guards import Limit
from dera_peft.evaluate.analysis.resamples import INTERVAL, Estimate
from dera_peft.evaluate.analysis.summary import LambdaSummary, RewardSummary, number
from dera_peft.evaluate.config import STANDARD_ERRORS

RuleName = Literal["reward", "kl_budget", "worst_group", "robust"]
RULES: dict[str, str] = {
    "reward": "the highest mean reward",
    "kl_budget": "the highest mean reward within the KL budget",
    "worst_group": "the highest mean reward of the worst group",
    "robust": "the highest mean reward under the worst reweighting of the prompts",
}
OF_PROMPTS = ("worst_group", "robust")  # they need each prompt's value, which the curve does not have
# Of two λ whose values differ by less than this share of the largest value, none is the better one: where a reward is
# the same for all texts, a sum's order and the curve's weights leave differences of this kind.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Rule:
    """
    Attributes:
        name: one of `RULES`.
        kl_budget: of "kl_budget", KL(π_λ ‖ π_ref) per sequence, in nats, not to be exceeded by the mean.
        radius: of "robust", of the KL ball of weights of the prompts, in nats.
        standard_errors: how far below the best a smaller λ may lie to be taken in its place; 0 takes the best.

    Raises:
        DeRaError: there is no such rule, or it lacks what it needs.
    """

    name: str
    kl_budget: float | None = None
    radius: float | None = None
    standard_errors: float = STANDARD_ERRORS

    def __post_init__(self):
        if self.name not in RULES:
            raise DeRaError(f"rule={self.name!r} is not a rule; there are {list(RULES)}.")
        if self.name == "kl_budget" and (self.kl_budget is None or not 0 <= self.kl_budget < math.inf):
            raise DeRaError(f"kl_budget={self.kl_budget!r}: the rule 'kl_budget' needs a number of nats, 0 or more.")

    @property
    def budget(self) -> float:
        return self.kl_budget if self.name == "kl_budget" and self.kl_budget is not None else math.inf

    def __str__(self) -> str:
        """In words: "'kl_budget', the highest mean reward within the KL budget of 3 nats"."""
        words = f"{self.name!r}, {RULES[self.name]}"
        if self.name == "kl_budget":
            return f"{words} of {self.kl_budget:g} nats"
        return f"{words} within {self.radius:g} nats" if self.name == "robust" and self.radius is not None else words


@dataclass(frozen=True)
class Candidate:
    """
    An arm and λ that may be chosen.

    Attributes:
        arm, lam: as in `LambdaSummary`.
        value: what the rule looks at: the reward's mean, that of its worst group, or of the worst reweighting.
        kl: per sequence, in nats.
        group: the worst one, by the rule "worst_group".
        by_prompt: the reward of each prompt where `value` is their mean, `[P]`; None of an estimate.
        estimated: by the curve.
        guards: as in `LambdaSummary`.
    """

    arm: str
    lam: Lambda | None
    value: Estimate
    kl: Estimate
    group: str | None = None
    by_prompt: numpy.ndarray | None = None
    estimated: bool = False
    guards: dict[str, Estimate] = field(default_factory=dict)

    @property
    def size(self) -> tuple[float, float]:
        """By which the smallest λ is found: Σ|λ|, then the KL. Other arms' λ mean other things, and the KL decides."""
        lam = 0.0 if self.arm != LOGITS or self.lam is None else round(sum(map(abs, values_of(self.lam))), 9)
        return lam, self.kl.mean


def candidates(summaries: Sequence[LambdaSummary], curve: Curve | None, rule: Rule, reward: str) -> list[Candidate]:
    """
    What the rule may choose: each summary, and of the arm "logits" the λ that the curve knows between two measured
    ones. Plain λ comes first, ascending. Those without a value are left out.
    """
    found = [_measured(summary, summary.rewards[reward], rule) for summary in summaries if reward in summary.rewards]
    plain = [each for each in found if each.arm == LOGITS]
    if curve is not None and plain and rule.name not in OF_PROMPTS:
        measured = [_values(each) for each in plain]
        plain += [
            Candidate(LOGITS, point.lam, value, point.kl, estimated=True, guards=_known(point.guards))
            for point in curve.points
            if point.kl is not None
            and (value := point.rewards[reward]) is not None
            # of several adapters all of its points lie between measured ones
            and (isinstance(point.lam, NamedLambda) or min(measured) < values_of(point.lam) < max(measured))
            and values_of(point.lam) not in measured
        ]
    plain.sort(key=_values)
    others = [each for each in found if each.arm != LOGITS]
    return [each for each in (*plain, *others) if not math.isnan(each.value.mean) and not math.isnan(each.kl.mean)]


def _known(guards: dict[str, Estimate | None]) -> dict[str, Estimate]:
    return {name: estimate for name, estimate in guards.items() if estimate is not None}


def _values(candidate: Candidate) -> tuple[float, ...]:
    assert candidate.lam is not None  # of plain λ
    return values_of(candidate.lam)


def _measured(summary: LambdaSummary, reward: RewardSummary, rule: Rule) -> Candidate:
    value, group, by_prompt = reward.level, None, reward.by_prompt
    if rule.name == "robust" and reward.robust is not None:
        value, by_prompt = reward.robust, None
    elif rule.name == "worst_group" and reward.worst_group is not None:  # None: no value in any group
        group, by_prompt = reward.worst_group, None
        level = reward.groups[group]
        # in each resample the group that is the worst there
        draws = numpy.fmin.reduce([draws_of(each) for each in reward.groups.values()])
        # what was left out tells it where all groups are there
        left_out = numpy.min([left_out_of(each) for each in reward.groups.values() if not math.isnan(each.mean)], 0)
        value = Estimate(level.mean, level.se, level.low, level.high, draws, left_out)
    return Candidate(summary.arm, summary.lam, value, summary.kl, group, by_prompt, guards=summary.guards)


def draws_of(estimate: Estimate) -> numpy.ndarray:
    assert estimate.draws is not None  # of what was measured, or is estimated in the curve, there are resamples
    return estimate.draws


def left_out_of(estimate: Estimate) -> numpy.ndarray:
    """The means on what each resample left out; NaN of an estimate without."""
    return numpy.full(len(draws_of(estimate)), numpy.nan) if estimate.out_of_bag is None else estimate.out_of_bag


@dataclass(frozen=True)
class Choice:
    """
    What a rule takes.

    Attributes:
        best: of those with the highest value the smallest (`Candidate.size`).
        chosen: the smallest that is within the rule's standard errors of the best.
        lead: the value of the best minus that of the chosen one, paired over prompts. The best's lead is less by what
            it gains from being the best of many: the mean over resamples of how much higher their best is there than in
            all prompts. Its error is over resamples, each with a best of its own. None where the two are one.
        indifferent: what the rule looks at is the same for all that could be chosen, so that only their size decided.
        again: what the same rule chooses in each resample, those in which it can.
        draws: which resamples these are.
    """

    best: Candidate
    chosen: Candidate
    lead: Estimate | None
    indifferent: bool
    again: tuple[Candidate, ...]
    draws: tuple[int, ...]

    def left_out(self, other: Candidate | None = None) -> numpy.ndarray:
        """In each resample the value of what it chooses, on the prompts that it left out; minus that of another."""
        values = [left_out_of(each.value)[draw] for each, draw in zip(self.again, self.draws, strict=True)]
        return numpy.array(values) - (0.0 if other is None else left_out_of(other.value)[list(self.draws)])


def choose(among: Sequence[Candidate], rule: Rule, reward: str, limits: Sequence[Limit] = ()) -> Choice:
    """
    What the rule takes of some candidates: the smallest within its standard errors of the best.

    Args:
        limits: of guards; what is beyond one is passed over.

    Raises:
        DeRaError: none has a value, or is within the KL budget and the limits.
    """
    if not among:
        raise DeRaError(f"reward={reward!r} has no value at any λ: there is nothing to recommend by.")
    among = sorted(among, key=lambda candidate: candidate.size)
    means = numpy.array([candidate.value.mean for candidate in among])  # [C]
    fits = numpy.array([c.kl.mean <= rule.budget * (1 + ROUNDING) for c in among])
    if not fits.any():
        least = min(among, key=lambda c: c.kl.mean)
        raise DeRaError(
            f"kl_budget={rule.kl_budget:g}: no λ has a KL so small; the least is {least.kl.mean:.3g} nats, at "
            f"λ={least.lam:g}. Raise the budget, or add a λ nearer to 0."
        )
    fits &= numpy.array([all(limit.passes(c.guards) for limit in limits) for c in among])
    if not fits.any():
        names = " and ".join(f"max_{limit.guard.removeprefix('log_')}={limit.threshold:g}" for limit in limits)
        raise DeRaError(f"{names}: the guards pass over every λ. Raise them, or add a λ nearer to 0.")
    values = numpy.where(fits, means, numpy.nan)[:, None]  # [C, 1]
    best = _is_best(values).argmax()

    draws = numpy.stack([draws_of(c.value) for c in among])  # [C, 1000]
    within = numpy.stack([draws_of(c.kl) for c in among]) <= rule.budget * (1 + ROUNDING)
    for limit in limits:
        within &= numpy.stack([limit.passing_draws(c.guards) for c in among])
    drawn = numpy.where(within, draws, numpy.nan)
    there = numpy.flatnonzero(~numpy.isnan(drawn).all(0))
    drawn, errors, optimism = drawn[:, there], numpy.zeros((len(among), 1)), 0.0
    if rule.standard_errors and len(there):
        own_best = numpy.nanargmax(drawn, 0)
        highest = numpy.take_along_axis(drawn, own_best[None], 0)[0]
        optimism = max(0.0, float((highest - means[own_best]).mean()))
        with numpy.errstate(invalid="ignore"):
            errors = numpy.nanstd(highest - draws[:, there], axis=1)[:, None]
    margins = optimism + rule.standard_errors * numpy.nan_to_num(errors)  # [C, 1]
    chosen = _is_best(values, margins).argmax()
    again = _is_best(drawn, margins).argmax(0) if len(there) else []
    lead = None
    if chosen != best:
        lead = difference_of_draws(among[best].value, among[chosen].value)
        error = float(errors[chosen, 0])
        lead = Estimate(lead.mean - optimism, error, lead.low, lead.high) if rule.standard_errors else lead
    known = values[fits]
    return Choice(
        among[best],
        among[chosen],
        lead,
        bool(len(known) > 1 and _is_best(known).all()),
        tuple(among[place] for place in again),
        tuple(there.tolist()),
    )


def other_choices(choice: Choice) -> tuple[Lambda, Lambda] | None:
    """
    The least and the greatest plain λ that the rule takes in 95 % of the resamples of the prompts, of several adapters
    each by itself; None where they are unknown.
    """
    if not choice.again or math.isnan(choice.chosen.value.low):
        return None
    chosen = numpy.array([_values(candidate) for candidate in choice.again])  # [N, K]
    # a λ that was chosen, not a number between two
    low, high = numpy.percentile(chosen, INTERVAL, axis=0, method="nearest").tolist()
    like = cast("Lambda", choice.chosen.lam)
    return with_values(like, low), with_values(like, high)


def difference_of_draws(one: Estimate, other: Estimate) -> Estimate:
    """One minus the other, of the same resamples of the prompts."""
    mean = one.mean - other.mean
    if math.isnan(one.low) or math.isnan(other.low):
        return Estimate(mean, math.nan, math.nan, math.nan)
    draws = draws_of(one) - draws_of(other)
    low, high = numpy.nanpercentile(draws, INTERVAL)
    return Estimate(mean, float(numpy.nanstd(draws, ddof=1)), float(low), float(high), draws)


def _is_best(values: numpy.ndarray, margins: numpy.ndarray | float = 0.0) -> numpy.ndarray:
    """Where a candidate is within its margin of the best of that resample: bool `[C, N]`, of values `[C, N]`."""
    return values >= numpy.nanmax(values, 0) - margins - ROUNDING * numpy.nanmax(numpy.abs(values), 0)


def interval_text(estimate: Estimate, what: str = "over prompts") -> str:
    if math.isnan(estimate.low):
        return "no interval with a single prompt"
    return f"95 % interval {what}: {number(estimate.low, '+.3f')} to {number(estimate.high, '+.3f')}"
