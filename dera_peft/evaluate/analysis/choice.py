"""What a rule chooses among, and what it takes: the ways to decode that were measured, or that the curve knows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy

from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of, with_values
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.summary import INTERVAL, Estimate, LambdaSummary, RewardSummary, number

RuleName = Literal["reward", "lower_bound", "kl_budget", "worst_group", "robust"]
RULES: dict[str, str] = {
    "reward": "the highest mean reward",
    "lower_bound": "the highest lower bound of the reward's interval",
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

    Raises:
        DeRaError: there is no such rule, or it lacks what it needs.
    """

    name: str
    kl_budget: float | None = None
    radius: float | None = None

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
    """

    arm: str
    lam: Lambda | None
    value: Estimate
    kl: Estimate
    group: str | None = None
    by_prompt: numpy.ndarray | None = None
    estimated: bool = False


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
            Candidate(LOGITS, point.lam, value, point.kl, estimated=True)
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


def _values(candidate: Candidate) -> tuple[float, ...]:
    assert candidate.lam is not None  # of plain λ
    return values_of(candidate.lam)


def _measured(summary: LambdaSummary, reward: RewardSummary, rule: Rule) -> Candidate:
    if rule.name == "robust" and reward.robust is not None:
        return Candidate(summary.arm, summary.lam, reward.robust, summary.kl)
    group = reward.worst_group
    if rule.name != "worst_group" or group is None:  # None: no value in any group
        return Candidate(summary.arm, summary.lam, reward.level, summary.kl, by_prompt=reward.by_prompt)
    # in each resample the group that is the worst there
    draws = numpy.fmin.reduce([draws_of(level) for level in reward.groups.values()])
    level = reward.groups[group]
    value = Estimate(level.mean, level.se, level.low, level.high, draws)
    return Candidate(summary.arm, summary.lam, value, summary.kl, group)


def draws_of(estimate: Estimate) -> numpy.ndarray:
    assert estimate.draws is not None  # of what was measured, or is estimated in the curve, there are resamples
    return estimate.draws


@dataclass(frozen=True)
class Choice:
    """
    What a rule takes.

    Attributes:
        best: of those with the highest value the one with the least KL.
        indifferent: what the rule looks at is the same for all that could be chosen, so that only the KL decided.
    """

    best: Candidate
    indifferent: bool


def choose(among: Sequence[Candidate], rule: Rule, reward: str) -> Choice:
    """
    What the rule takes of some candidates.

    Raises:
        DeRaError: none has a value, an interval where the rule needs one, or a KL within the budget.
    """
    if not among:
        raise DeRaError(f"reward={reward!r} has no value at any λ: there is nothing to recommend by.")
    if rule.name == "lower_bound" and all(math.isnan(c.value.low) for c in among):
        raise DeRaError("rule='lower_bound' needs at least two prompts: with one there is no interval.")
    kl = numpy.array([[c.kl.mean] for c in among])  # [C, 1]
    values = numpy.array([[c.value.low if rule.name == "lower_bound" else c.value.mean] for c in among])
    values = _within(rule.budget, values, kl)
    known = ~numpy.isnan(values)
    if not known.any():
        least = min(among, key=lambda c: c.kl.mean)
        raise DeRaError(
            f"kl_budget={rule.kl_budget:g}: no λ has a KL so small; the least is {least.kl.mean:.3g} nats, at "
            f"λ={least.lam:g}. Raise the budget, or add a λ nearer to 0."
        )
    best = among[_chosen(values, kl).item()]
    return Choice(best, bool(known.sum() > 1 and _is_best(values)[known].all()))


def other_choices(among: Sequence[Candidate], rule: Rule) -> tuple[Lambda, Lambda] | None:
    """
    The least and the greatest plain λ that the rule takes in 95 % of the resamples of the prompts, of several adapters
    each by itself; None where they are unknown.
    """
    if any(math.isnan(c.value.low) for c in among):
        return None
    values = numpy.stack([draws_of(c.value) for c in among])  # [C, 1000]
    if rule.name == "lower_bound":  # as far below each resample's mean as it lies below the mean of all
        values = values - numpy.array([[c.value.mean - c.value.low] for c in among])
    kl = numpy.stack([draws_of(c.kl) for c in among])
    values = _within(rule.budget, values, kl)
    there = ~numpy.isnan(values).all(0)
    if not there.any():
        return None
    chosen = numpy.array([_values(c) for c in among])[_chosen(values[:, there], kl[:, there])]  # [N, K]
    # a λ that was chosen, not a number between two
    low, high = numpy.percentile(chosen, INTERVAL, axis=0, method="nearest").tolist()
    like = cast("Lambda", among[0].lam)
    return with_values(like, low), with_values(like, high)


def difference_of_draws(one: Estimate, other: Estimate) -> Estimate:
    """One minus the other, of the same resamples of the prompts."""
    mean = one.mean - other.mean
    if math.isnan(one.low) or math.isnan(other.low):
        return Estimate(mean, math.nan, math.nan, math.nan)
    draws = draws_of(one) - draws_of(other)
    low, high = numpy.nanpercentile(draws, INTERVAL)
    return Estimate(mean, float(numpy.nanstd(draws, ddof=1)), float(low), float(high), draws)


def _within(budget: float, values: numpy.ndarray, kl: numpy.ndarray) -> numpy.ndarray:
    """What each candidate is worth in each resample, `[C, N]`; NaN where its KL, `[C, N]`, is beyond the budget."""
    return numpy.where(kl <= budget * (1 + ROUNDING), values, numpy.nan)


def _is_best(values: numpy.ndarray) -> numpy.ndarray:
    """Where a candidate is as good as any in that resample: bool `[C, N]`, of values `[C, N]`, each column with one."""
    return values >= numpy.nanmax(values, 0) - ROUNDING * numpy.nanmax(numpy.abs(values), 0)


def _chosen(values: numpy.ndarray, kl: numpy.ndarray) -> numpy.ndarray:
    """The candidate that is taken in each resample, `[N]`: of the best ones that of the least KL."""
    return numpy.where(_is_best(values), kl, numpy.inf).argmin(0)


def interval_text(estimate: Estimate, what: str = "over prompts") -> str:
    if math.isnan(estimate.low):
        return "no interval with a single prompt"
    return f"95 % interval {what}: {number(estimate.low, '+.3f')} to {number(estimate.high, '+.3f')}"
