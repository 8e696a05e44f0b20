"""Which λ to use, by a stated rule, and the β to retrain at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.summary import INTERVAL, Estimate, LambdaSummary, RewardSummary, number

RULES = {
    "reward": "the highest mean reward",
    "lower_bound": "the highest lower bound of the reward's interval",
    "kl_budget": "the highest mean reward within the KL budget",
    "worst_group": "the highest mean reward of the worst group",
}
# Of two λ whose values differ by less than this share of the largest value, none is the better one: where a reward is
# the same for all texts, a sum's order and the curve's weights leave differences of this kind.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Recommendation:
    """
    Attributes:
        rule: one of `RULES`.
        reward: the reward's name.
        lam: λ*.
        beta: β* = β/λ*; None if β is unknown or λ* is not above 0.
        value: what the rule looks at, at λ*: the reward's mean, or that of its worst group.
        group: the worst group at λ*, by the rule "worst_group".
        kl: KL(π_λ* ‖ π_ref) per sequence, in nats.
        kl_budget: of the rule "kl_budget".
        difference: `value` minus that at λ=1, paired over prompts; None if λ=1 was not measured, or has no value.
        lam_low, lam_high: 95 % of the λ* that other prompts would give (bootstrap); NaN with a single prompt.
        estimated: λ* lies between two measured λ, and its numbers are the curve's.
        between: λ between the measured ones could be chosen too, as far as the curve is known.
        at_edge: λ* is the least or the greatest λ that was measured.
        indifferent: what the rule looks at is the same at every λ that could be chosen, so that only the KL decided.
        measured: the λ that were measured, ascending.
        trained_beta: β of the adapter.
        notes: what else a reader has to know, as sentences.
    """

    rule: str
    reward: str
    lam: float
    beta: float | None
    value: Estimate
    group: str | None
    kl: Estimate
    kl_budget: float | None
    difference: Estimate | None
    lam_low: float
    lam_high: float
    estimated: bool
    between: bool
    at_edge: bool
    indifferent: bool
    measured: tuple[float, ...]
    trained_beta: float | None
    notes: tuple[str, ...]
    prompts_differ: bool = False

    @property
    def distinguishable(self) -> bool | None:
        """From λ=1: whether the interval of the paired difference excludes 0; None if there is no difference."""
        return None if self.difference is None else self.difference.excludes_zero

    def text(self) -> str:
        """Plain sentences, one a line."""
        return "\n".join([*self._choice(), *self._comparison(), *self._retraining(), *self.notes])

    def _choice(self) -> list[str]:
        rule = f"{self.rule!r}, {RULES[self.rule]}"
        if self.kl_budget is not None:
            rule += f" of {self.kl_budget:g} nats"
        between = " and those estimated between them" if self.between else ""
        of = f"{self.reward!r}" + (f" in the group {self.group!r}" if self.group is not None else "")
        measured = ", ".join(f"{lam:g}" for lam in self.measured)
        lines = [
            f"λ* = {self.lam:g} by the rule {rule}, among the measured λ ({measured}){between}.",
            f"There {of} is {self.value.mean:+.3f} ({_interval(self.value)}), at a KL of {self.kl.mean:.2f} nats.",
        ]
        if self.estimated:
            lines.append("This λ was not decoded: its numbers are estimated from the samples at the measured λ.")
        if self.indifferent:
            what = "The reward" if self.group is None else "The worst group's reward"
            where = "at every λ" if self.kl_budget is None else "at every λ within the budget"
            lines.append(f"{what} is the same {where}: there is nothing to choose by, and the least KL was taken.")
        if self.lam_low == self.lam == self.lam_high:
            lines.append("Other prompts would put it there as well (95 % of resamples).")
        elif self.lam_low == self.lam_high:
            lines.append(f"Other prompts would put λ* at {self.lam_low:g} (95 % of resamples).")
        elif not math.isnan(self.lam_low):
            lines.append(
                f"Other prompts would put λ* between {self.lam_low:g} and {self.lam_high:g} (95 % of resamples)."
            )
        return lines

    def _comparison(self) -> list[str]:
        if self.lam == 1:
            return ["That is the adapter as it was trained."]
        if self.difference is None and 1 not in self.measured:
            return ["λ=1, the adapter as it was trained, was not measured: there is no comparison with it."]
        if self.difference is None or math.isnan(self.difference.mean):
            return [
                "There is no comparison with λ=1, the adapter as it was trained: no sample has a value of "
                f"{self.reward!r} both there and here."
            ]
        by = f"{self.difference.mean:+.3f} ({_interval(self.difference, 'paired over prompts')})"
        if math.isnan(self.difference.low):
            return [f"Against λ=1 that is {by}: a single prompt does not tell whether they differ."]
        if self.distinguishable:
            return [f"Against {self._at_one}, that is {by}: a difference that these prompts show."]
        return [f"Against {self._at_one}, that is {by}: these prompts can't tell the two apart."]

    @property
    def _at_one(self) -> str:
        return "λ=1, the model with its own prompt" if self.prompts_differ else "λ=1, the adapter as trained"

    def _retraining(self) -> list[str]:
        if self.lam == 1 or self.prompts_differ:
            return []
        if self.lam == 0:
            return ["At λ=0 the reference is used alone: there is no β to retrain at."]
        if self.lam < 0:
            return ["λ* is below 0, away from what the adapter was trained for: there is no β to retrain at."]
        if self.trained_beta is None:
            return ["The adapter's record holds no β, so that β* = β/λ* is not known."]
        return [f"Retraining there: β* = β/λ* = {self.trained_beta:g}/{self.lam:g} = {self.beta:.4g}."]

    def to_dict(self) -> dict:
        """For JSON: None for what is unknown."""
        return {
            "rule": self.rule,
            "reward": self.reward,
            "lambda": self.lam,
            "beta": self.beta,
            "value": _numbers(self.value),
            "group": self.group,
            "kl": _numbers(self.kl),
            "kl_budget": self.kl_budget,
            "difference_to_lambda_1": None if self.difference is None else _numbers(self.difference),
            "distinguishable_from_lambda_1": self.distinguishable,
            "lambda_low": _known(self.lam_low),
            "lambda_high": _known(self.lam_high),
            "estimated": self.estimated,
            "between": self.between,
            "at_edge": self.at_edge,
            "indifferent": self.indifferent,
            "measured": list(self.measured),
            "trained_beta": self.trained_beta,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Candidate:
    """A λ that may be chosen; `value` is what the rule looks at."""

    lam: float
    value: Estimate
    kl: Estimate
    group: str | None = None
    estimated: bool = False


def recommend(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    rule: str,
    reward: str,
    kl_budget: float | None = None,
    beta: float | None = None,
    prompts_differ: bool = False,
) -> Recommendation:
    """
    λ* among the measured λ of the arm "logits" and those that the curve knows between them; never beyond.

    Where several are best, the one of the least KL is taken. The interval of the difference to λ=1 is that of two λ
    named beforehand: it does not know that one of them was chosen for its value.

    Args:
        summaries: of the sweep.
        curve: its estimates between the measured λ, if there are any. They have no groups: "worst_group" takes a
            measured λ.
        rule: one of `RULES`.
        reward: name of the reward that the rule looks at.
        kl_budget: of the rule "kl_budget": KL(π_λ ‖ π_ref) per sequence, in nats, not to be exceeded by the mean.
        beta: β of the adapter, if its record has it.
        prompts_differ: whether the branches have prompts of their own: λ then stands for no training.

    Raises:
        DeRaError: no such rule or reward; a rule without what it needs; no λ that fits.
    """
    own = [summary for summary in summaries if summary.arm == LOGITS]
    _check(own, rule, reward, kl_budget)
    measured = tuple(summary.lam for summary in own)
    candidates = [_measured(summary, summary.rewards[reward], rule) for summary in own]
    if curve is not None and rule != "worst_group":
        candidates += [
            _Candidate(point.lam, value, point.kl, estimated=True)
            for point in curve.points
            if point.kl is not None
            and (value := point.rewards[reward]) is not None
            and measured[0] < point.lam < measured[-1]
            and point.lam not in measured
        ]
    complete = (c for c in candidates if not math.isnan(c.value.mean) and not math.isnan(c.kl.mean))
    candidates = sorted(complete, key=lambda c: c.lam)
    if not candidates:
        raise DeRaError(f"reward={reward!r} has no value at any λ: there is nothing to recommend by.")
    if rule == "lower_bound" and all(math.isnan(c.value.low) for c in candidates):
        raise DeRaError("rule='lower_bound' needs at least two prompts: with one there is no interval.")
    budget = kl_budget if rule == "kl_budget" and kl_budget is not None else math.inf
    kl = numpy.array([[c.kl.mean] for c in candidates])  # [C, 1]
    values = numpy.array([[c.value.low if rule == "lower_bound" else c.value.mean] for c in candidates])
    values = _within(budget, values, kl)
    known = ~numpy.isnan(values)
    if not known.any():
        least = min(candidates, key=lambda c: c.kl.mean)
        raise DeRaError(
            f"kl_budget={kl_budget:g}: no λ has a KL so small; the least is {least.kl.mean:.3g} nats, at "
            f"λ={least.lam:g}. Raise the budget, or add a λ nearer to 0."
        )
    best = candidates[_chosen(values, kl).item()]
    indifferent = bool(known.sum() > 1 and _is_best(values)[known].all())
    at_edge = best.lam in (measured[0], measured[-1])
    lam_low, lam_high = _other_choices(candidates, rule, budget)
    as_trained = next((c for c in candidates if c.lam == 1), None)
    return Recommendation(
        rule=rule,
        reward=reward,
        lam=best.lam,
        beta=beta / best.lam if beta is not None and best.lam > 0 else None,
        value=best.value,
        group=best.group,
        kl=best.kl,
        kl_budget=kl_budget if rule == "kl_budget" else None,
        difference=_difference(best, as_trained, own, reward, rule),
        lam_low=lam_low,
        lam_high=lam_high,
        estimated=best.estimated,
        between=any(c.estimated for c in candidates),
        at_edge=at_edge,
        indifferent=indifferent,
        measured=measured,
        trained_beta=beta,
        notes=_notes(own, curve, best, rule, reward, beyond=at_edge and not indifferent),
        prompts_differ=prompts_differ,
    )


def _check(own: Sequence[LambdaSummary], rule: str, reward: str, kl_budget: float | None) -> None:
    if rule not in RULES:
        raise DeRaError(f"rule={rule!r} is not a rule; there are {list(RULES)}.")
    if not own:
        raise DeRaError(f"there is nothing to recommend from: no samples of the arm {LOGITS!r}.")
    if reward not in own[0].rewards:
        raise DeRaError(f"reward={reward!r} is not a reward of this sweep; there are {list(own[0].rewards)}.")
    if rule == "kl_budget" and (kl_budget is None or not 0 <= kl_budget < math.inf):
        raise DeRaError(f"kl_budget={kl_budget!r}: the rule 'kl_budget' needs a number of nats, 0 or more.")
    if rule == "worst_group" and not own[0].rewards[reward].groups:
        raise DeRaError("group=None: the rule 'worst_group' needs the column that names the groups.")


def _measured(summary: LambdaSummary, reward: RewardSummary, rule: str) -> _Candidate:
    if rule != "worst_group":
        return _Candidate(summary.lam, reward.level, summary.kl)
    group = reward.worst_group
    if group is None:  # no value in any group
        return _Candidate(summary.lam, reward.level, summary.kl)
    # in each resample the group that is the worst there
    draws = numpy.fmin.reduce([_draws(level) for level in reward.groups.values()])
    level = reward.groups[group]
    return _Candidate(summary.lam, Estimate(level.mean, level.se, level.low, level.high, draws), summary.kl, group)


def _draws(estimate: Estimate) -> numpy.ndarray:
    assert estimate.draws is not None  # of what was measured, or is estimated in the curve, there are resamples
    return estimate.draws


def _within(budget: float, values: numpy.ndarray, kl: numpy.ndarray) -> numpy.ndarray:
    """What each candidate is worth in each resample, `[C, N]`; NaN where its KL, `[C, N]`, is beyond the budget."""
    return numpy.where(kl <= budget * (1 + ROUNDING), values, numpy.nan)


def _is_best(values: numpy.ndarray) -> numpy.ndarray:
    """Where a candidate is as good as any in that resample: bool `[C, N]`, of values `[C, N]`, each column with one."""
    return values >= numpy.nanmax(values, 0) - ROUNDING * numpy.nanmax(numpy.abs(values), 0)


def _chosen(values: numpy.ndarray, kl: numpy.ndarray) -> numpy.ndarray:
    """The candidate that is taken in each resample, `[N]`: of the best ones that of the least KL."""
    return numpy.where(_is_best(values), kl, numpy.inf).argmin(0)


def _other_choices(candidates: Sequence[_Candidate], rule: str, budget: float) -> tuple[float, float]:
    """What the rule takes in each resample of the prompts: 95 % of it."""
    if any(math.isnan(c.value.low) for c in candidates):
        return math.nan, math.nan
    values = numpy.stack([_draws(c.value) for c in candidates])  # [C, 1000]
    if rule == "lower_bound":  # as far below each resample's mean as it lies below the mean of all
        values = values - numpy.array([[c.value.mean - c.value.low] for c in candidates])
    kl = numpy.stack([_draws(c.kl) for c in candidates])
    values = _within(budget, values, kl)
    there = ~numpy.isnan(values).all(0)
    if not there.any():
        return math.nan, math.nan
    chosen = numpy.array([c.lam for c in candidates])[_chosen(values[:, there], kl[:, there])]
    # a λ that was chosen, not a number between two
    low, high = numpy.percentile(chosen, INTERVAL, method="nearest")
    return float(low), float(high)


def _difference(
    best: _Candidate, as_trained: _Candidate | None, own: Sequence[LambdaSummary], reward: str, rule: str
) -> Estimate | None:
    if as_trained is None:
        return None
    if rule != "worst_group" and not (best.estimated or as_trained.estimated):  # paired sample by sample
        (summary,) = (summary for summary in own if summary.lam == best.lam)
        return summary.rewards[reward].versus[1.0].difference
    mean = best.value.mean - as_trained.value.mean
    if math.isnan(best.value.low) or math.isnan(as_trained.value.low):
        return Estimate(mean, math.nan, math.nan, math.nan)
    draws = _draws(best.value) - _draws(as_trained.value)  # of the same resamples of prompts
    low, high = numpy.nanpercentile(draws, INTERVAL)
    return Estimate(mean, float(numpy.nanstd(draws, ddof=1)), float(low), float(high), draws)


def _notes(
    own: Sequence[LambdaSummary],
    curve: Curve | None,
    best: _Candidate,
    rule: str,
    reward: str,
    beyond: bool,
) -> tuple[str, ...]:
    """`beyond`: a better λ may lie where nothing was measured."""
    notes = []
    lambdas = [summary.lam for summary in own]
    if len(lambdas) == 1:
        notes.append("Only one λ was measured: there was nothing to choose from.")
    elif beyond:
        end, neighbour = (lambdas[0], lambdas[1]) if best.lam == lambdas[0] else (lambdas[-1], lambdas[-2])
        step = end - neighbour
        side = "least" if step < 0 else "greatest"
        further = ", ".join(f"{lam:g}" for lam in (end + step, end + 2 * step))
        notes.append(
            f"The best is at the edge of what was measured, the {side} λ: it may lie beyond. Extend the sweep to "
            f"λ = {further}."
        )
    if curve is not None and rule != "worst_group":
        for gap in curve.gaps:
            notes.append(
                f"Between λ = {gap.low:g} and {gap.high:g} the samples don't tell what all λ give: add λ = {gap.lam:g} "
                "to the sweep."
            )
    failed = sum(summary.rewards[reward].failed for summary in own)
    if failed:
        samples = sum(summary.samples for summary in own)
        notes.append(f"{failed} of {samples} samples have no {reward!r} and were left out.")
    return tuple(notes)


def _interval(estimate: Estimate, what: str = "over prompts") -> str:
    if math.isnan(estimate.low):
        return "no interval with a single prompt"
    return f"95 % interval {what}: {number(estimate.low, '+.3f')} to {number(estimate.high, '+.3f')}"


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    return {name: _known(getattr(estimate, name)) for name in ("mean", "se", "low", "high")}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
