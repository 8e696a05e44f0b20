"""Which λ to use, by a stated rule, and the β to retrain at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.choice import (
    OF_PROMPTS,
    Candidate,
    Rule,
    candidates,
    choose,
    difference_of_draws,
    interval_text,
    other_choices,
)
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.summary import Estimate, LambdaSummary
from dera_peft.evaluate.points import anchor_name, is_as_trained


@dataclass(frozen=True)
class Recommendation:
    """
    Attributes:
        rule: its name, one of `choice.RULES`.
        reward: the reward's name.
        lam: λ*; of several adapters by name.
        beta: β* = β/λ*; None if β is unknown, λ* is not above 0, or there are several adapters.
        value: what the rule looks at, at λ*: the reward's mean, that of its worst group, or of the worst reweighting of
            the prompts.
        group: the worst group at λ*, by the rule "worst_group".
        kl: KL(π_λ* ‖ π_ref) per sequence, in nats.
        kl_budget, radius: of the rules "kl_budget" and "robust".
        against: the λ of the adapter as it was trained, 1; of several adapters the best one alone, by name. None if it
            was not measured, or has no value.
        difference: `value` minus that at `against`, paired over prompts; None without it.
        lam_low, lam_high: 95 % of the λ* that other prompts would give (bootstrap), of several adapters each by itself;
            None with a single prompt.
        estimated: λ* lies between two measured λ, and its numbers are the curve's.
        between: λ between the measured ones could be chosen too, as far as the curve is known.
        at_edge: λ* is the least or the greatest λ that was measured; of several adapters for one of them, where 0 is no
            edge.
        indifferent: what the rule looks at is the same at every λ that could be chosen, so that only the KL decided.
        measured: the λ that were measured, ascending.
        trained_beta: β of the adapter.
        notes: what else a reader has to know, as sentences.
    """

    rule: str
    reward: str
    lam: Lambda
    beta: float | None
    value: Estimate
    group: str | None
    kl: Estimate
    kl_budget: float | None
    radius: float | None
    against: Lambda | None
    difference: Estimate | None
    lam_low: Lambda | None
    lam_high: Lambda | None
    estimated: bool
    between: bool
    at_edge: bool
    indifferent: bool
    measured: tuple[Lambda, ...]
    trained_beta: float | None
    notes: tuple[str, ...]
    prompts_differ: bool = False

    @property
    def distinguishable(self) -> bool | None:
        """From `against`: whether the interval of the paired difference excludes 0; None if there is no difference."""
        return None if self.difference is None else self.difference.excludes_zero

    @property
    def where(self) -> str:
        """Which prompts the value is of, for a sentence: "" of all."""
        if self.group is not None:
            return f" in the group {self.group!r}"
        return " under the worst reweighting of the prompts" if self.rule == "robust" else ""

    def text(self) -> str:
        """Plain sentences, one a line."""
        return "\n".join([*self._choice(), *self._comparison(), *self._retraining(), *self.notes])

    def _choice(self) -> list[str]:
        rule = Rule(self.rule, self.kl_budget, self.radius)
        between = " and those estimated between them" if self.between else ""
        of = f"{self.reward!r}{self.where}"
        of_several = isinstance(self.lam, NamedLambda)
        listed = ", ".join(f"{lam:g}" for lam in self.measured)
        measured = f"{len(self.measured)} measured points" if of_several else f"measured λ ({listed})"
        lines = [
            f"λ*{':' if of_several else ' ='} {self.lam:g} by the rule {rule}, among the {measured}{between}.",
            f"There {of} is {self.value.mean:+.3f} ({interval_text(self.value)}), at a KL of {self.kl.mean:.2f} nats.",
        ]
        if self.estimated:
            lines.append("This λ was not decoded: its numbers are estimated from the samples at the measured λ.")
        if self.indifferent:
            of_worst = {"worst_group": "The worst group's reward", "robust": "The worst reweighting's reward"}
            what = of_worst.get(self.rule, "The reward")
            where = "at every λ" if self.kl_budget is None else "at every λ within the budget"
            lines.append(f"{what} is the same {where}: there is nothing to choose by, and the least KL was taken.")
        low, high = self.lam_low, self.lam_high
        if low is None or high is None:
            return lines
        if low == self.lam == high:
            return [*lines, "Other prompts would put it there as well (95 % of resamples)."]
        names = self.lam if isinstance(self.lam, NamedLambda) else ["λ*"]
        ranges = [
            f"{name} at {least:g}" if least == most else f"{name} between {least:g} and {most:g}"
            for name, least, most in zip(names, values_of(low), values_of(high), strict=True)
        ]
        return [*lines, f"Other prompts would put {', '.join(ranges)} (95 % of resamples)."]

    def _comparison(self) -> list[str]:
        adapters = list(self.lam) if isinstance(self.lam, NamedLambda) else []
        if is_as_trained(self.lam):
            return [f"That is {anchor_name(self.lam)}."] if adapters else [f"That is {self._trained}."]
        if not any(map(is_as_trained, self.measured)):
            if adapters:
                return ["No adapter was measured alone as it was trained, at λ=1: there is no comparison with one."]
            return [f"λ=1, {self._trained}, was not measured: there is no comparison with it."]
        if self.against is None or self.difference is None or math.isnan(self.difference.mean):
            one = "an adapter alone as it was trained" if adapters else f"λ=1, {self._trained}"
            return [f"There is no comparison with {one}: no sample has a value of {self.reward!r} both there and here."]
        by = f"{self.difference.mean:+.3f} ({interval_text(self.difference, 'paired over prompts')})"
        if math.isnan(self.difference.low):
            one = anchor_name(self.against) if adapters else "λ=1"
            return [f"Against {one} that is {by}: a single prompt does not tell whether they differ."]
        trained = "the model with its own prompt" if self.prompts_differ else "the adapter as trained"
        one = anchor_name(self.against) if adapters else f"λ=1, {trained}"
        if self.distinguishable:
            return [f"Against {one}, that is {by}: a difference that these prompts show."]
        return [f"Against {one}, that is {by}: these prompts can't tell the two apart."]

    @property
    def _trained(self) -> str:
        return "the model with its own prompt" if self.prompts_differ else "the adapter as it was trained"

    def _retraining(self) -> list[str]:
        if isinstance(self.lam, NamedLambda):
            return [f"To use it: --lambda {self.lam:g}; dera export with that λ writes it as one adapter."]
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
            "lambda": _json(self.lam),
            "beta": self.beta,
            "value": _numbers(self.value),
            "group": self.group,
            "kl": _numbers(self.kl),
            "kl_budget": self.kl_budget,
            "radius": self.radius,
            "against": _json(self.against),
            "difference": None if self.difference is None else _numbers(self.difference),
            "distinguishable": self.distinguishable,
            "lambda_low": _json(self.lam_low),
            "lambda_high": _json(self.lam_high),
            "estimated": self.estimated,
            "between": self.between,
            "at_edge": self.at_edge,
            "indifferent": self.indifferent,
            "measured": list(map(_json, self.measured)),
            "trained_beta": self.trained_beta,
            "notes": list(self.notes),
        }


def recommend(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    rule: str,
    reward: str,
    kl_budget: float | None = None,
    beta: float | None = None,
    radius: float | None = None,
    prompts_differ: bool = False,
) -> Recommendation:
    """
    λ* among the measured λ of the arm "logits" and those that the curve knows between them; never beyond.

    Where several are best, the one of the least KL is taken. The interval of the difference to λ=1 is that of two λ
    named beforehand: it does not know that one of them was chosen for its value.

    Args:
        summaries: of the sweep.
        curve: its estimates between the measured λ, if there are any. They are of all prompts together: "worst_group"
            and "robust" take a measured λ.
        rule, kl_budget, radius: as in `choice.Rule`.
        reward: name of the reward that the rule looks at.
        beta: β of the adapter, if its record has it.
        prompts_differ: whether the branches have prompts of their own: λ then stands for no training.

    Raises:
        DeRaError: no such rule or reward; a rule without what it needs; no λ that fits.
    """
    own = [summary for summary in summaries if summary.arm == LOGITS]
    by = Rule(rule, kl_budget, radius)
    check_summaries(own, by, reward)
    among = candidates(own, curve, by, reward)
    choice = choose(among, by, reward)
    best, lam = choice.best, cast("Lambda", choice.best.lam)  # of plain λ
    measured = tuple(cast("Lambda", summary.lam) for summary in own)
    beyond = _beyond(lam, measured)
    lam_low, lam_high = other_choices(among, by) or (None, None)
    alone = [c for c in among if c.lam is not None and is_as_trained(c.lam)]
    as_trained = max(alone, key=lambda c: c.value.mean, default=None)
    return Recommendation(
        rule=rule,
        reward=reward,
        lam=lam,
        beta=beta / lam if beta is not None and not isinstance(lam, NamedLambda) and lam > 0 else None,
        value=best.value,
        group=best.group,
        kl=best.kl,
        kl_budget=kl_budget if rule == "kl_budget" else None,
        radius=radius if rule == "robust" else None,
        against=None if as_trained is None else as_trained.lam,
        difference=_difference(best, as_trained, own, reward, by),
        lam_low=lam_low,
        lam_high=lam_high,
        estimated=best.estimated,
        between=any(c.estimated for c in among),
        at_edge=bool(beyond),
        indifferent=choice.indifferent,
        measured=measured,
        trained_beta=beta,
        notes=_notes(own, curve, rule, reward, {} if choice.indifferent else beyond),
        prompts_differ=prompts_differ,
    )


def check_summaries(own: Sequence[LambdaSummary], rule: Rule, reward: str) -> None:
    """Raises `DeRaError` where there is nothing to choose by."""
    if not own:
        raise DeRaError(f"there is nothing to recommend from: no samples of the arm {LOGITS!r}.")
    if reward not in own[0].rewards:
        raise DeRaError(f"reward={reward!r} is not a reward of this sweep; there are {list(own[0].rewards)}.")
    if rule.name == "worst_group" and not own[0].rewards[reward].groups:
        raise DeRaError("group=None: the rule 'worst_group' needs the column that names the groups.")
    if rule.name == "robust" and own[0].rewards[reward].robust is None:
        raise DeRaError("radius=None: the rule 'robust' needs summaries that were made with a radius.")


def _difference(
    best: Candidate, as_trained: Candidate | None, own: Sequence[LambdaSummary], reward: str, rule: Rule
) -> Estimate | None:
    if as_trained is None:
        return None
    if rule.name not in OF_PROMPTS and not (best.estimated or as_trained.estimated):  # paired sample by sample
        (summary,) = (summary for summary in own if summary.lam == best.lam)
        return summary.rewards[reward].versus[cast("Lambda", as_trained.lam)].difference
    return difference_of_draws(best.value, as_trained.value)


def _beyond(lam: Lambda, measured: Sequence[Lambda]) -> dict[str, list[float]]:
    """
    Where λ is at an edge of what was measured, the next λ beyond it: by adapter, "" for a single one. An adapter of
    several that is not used, at 0, is at no edge.
    """
    beyond = {}
    columns = zip(*map(values_of, measured), strict=True)
    names = lam if isinstance(lam, NamedLambda) else [""]
    for name, value, column in zip(names, values_of(lam), columns, strict=True):
        known = sorted(set(column))
        if value not in (known[0], known[-1]) or len(known) == 1 or (name and value == 0):
            continue
        step = known[0] - known[1] if value == known[0] else known[-1] - known[-2]
        beyond[name] = [value + step, value + 2 * step]
    return beyond


def _notes(
    own: Sequence[LambdaSummary],
    curve: Curve | None,
    rule: str,
    reward: str,
    beyond: dict[str, list[float]],
) -> tuple[str, ...]:
    """`beyond`: λ where nothing was measured, and a better one may lie."""
    notes = []
    if len(own) == 1:
        notes.append("Only one λ was measured: there was nothing to choose from.")
    elif beyond:
        further = "; ".join(
            f"{name or 'λ'} = {', '.join(f'{value:g}' for value in values)}" for name, values in beyond.items()
        )
        first, second = next(iter(beyond.values()))
        of = "" if "" in beyond else f" of {' and '.join(beyond)}"
        side = f", the {'least' if second < first else 'greatest'} λ{of}" if len(beyond) == 1 else f", in the λ{of}"
        notes.append(
            f"The best is at the edge of what was measured{side}: it may lie beyond. Extend the sweep to {further}."
        )
    if curve is not None and rule not in OF_PROMPTS:
        points = [gap.lam for gap in curve.gaps if isinstance(gap.lam, NamedLambda)]
        if points:
            notes.append(
                f"Between {len(points)} pairs of neighbouring points the samples don't tell what all λ give. Points "
                f"between them would, as {points[0]:g}."
            )
        for gap in () if points else curve.gaps:
            notes.append(
                f"Between λ = {gap.low:g} and {gap.high:g} the samples don't tell what all λ give: add λ = {gap.lam:g} "
                "to the sweep."
            )
    failed = sum(summary.rewards[reward].failed for summary in own)
    if failed:
        samples = sum(summary.samples for summary in own)
        notes.append(f"{failed} of {samples} samples have no {reward!r} and were left out.")
    return tuple(notes)


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    return {name: _known(getattr(estimate, name)) for name in ("mean", "se", "low", "high")}


def _json(lam: Lambda | None) -> Any:
    return dict(lam) if isinstance(lam, NamedLambda) else lam


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
