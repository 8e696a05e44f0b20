"""Which λ to use, by a stated rule, and the β to retrain at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

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


@dataclass(frozen=True)
class Recommendation:
    """
    Attributes:
        rule: its name, one of `choice.RULES`.
        reward: the reward's name.
        lam: λ*.
        beta: β* = β/λ*; None if β is unknown or λ* is not above 0.
        value: what the rule looks at, at λ*: the reward's mean, that of its worst group, or of the worst reweighting of
            the prompts.
        group: the worst group at λ*, by the rule "worst_group".
        kl: KL(π_λ* ‖ π_ref) per sequence, in nats.
        kl_budget, radius: of the rules "kl_budget" and "robust".
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
    radius: float | None
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
        measured = ", ".join(f"{lam:g}" for lam in self.measured)
        lines = [
            f"λ* = {self.lam:g} by the rule {rule}, among the measured λ ({measured}){between}.",
            f"There {of} is {self.value.mean:+.3f} ({interval_text(self.value)}), at a KL of {self.kl.mean:.2f} nats.",
        ]
        if self.estimated:
            lines.append("This λ was not decoded: its numbers are estimated from the samples at the measured λ.")
        if self.indifferent:
            of_worst = {"worst_group": "The worst group's reward", "robust": "The worst reweighting's reward"}
            what = of_worst.get(self.rule, "The reward")
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
        by = f"{self.difference.mean:+.3f} ({interval_text(self.difference, 'paired over prompts')})"
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
            "radius": self.radius,
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
    best, lam = choice.best, cast("float", choice.best.lam)  # of plain λ
    measured = tuple(cast("float", summary.lam) for summary in own)
    at_edge = lam in (measured[0], measured[-1])
    lam_low, lam_high = other_choices(among, by)
    as_trained = next((c for c in among if c.lam == 1), None)
    return Recommendation(
        rule=rule,
        reward=reward,
        lam=lam,
        beta=beta / lam if beta is not None and lam > 0 else None,
        value=best.value,
        group=best.group,
        kl=best.kl,
        kl_budget=kl_budget if rule == "kl_budget" else None,
        radius=radius if rule == "robust" else None,
        difference=_difference(best, as_trained, own, reward, by),
        lam_low=lam_low,
        lam_high=lam_high,
        estimated=best.estimated,
        between=any(c.estimated for c in among),
        at_edge=at_edge,
        indifferent=choice.indifferent,
        measured=measured,
        trained_beta=beta,
        notes=_notes(own, measured, curve, lam, rule, reward, beyond=at_edge and not choice.indifferent),
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
        return summary.rewards[reward].versus[1.0].difference
    return difference_of_draws(best.value, as_trained.value)


def _notes(
    own: Sequence[LambdaSummary],
    lambdas: Sequence[float],
    curve: Curve | None,
    best: float,
    rule: str,
    reward: str,
    beyond: bool,
) -> tuple[str, ...]:
    """`beyond`: a better λ may lie where nothing was measured."""
    notes = []
    if len(lambdas) == 1:
        notes.append("Only one λ was measured: there was nothing to choose from.")
    elif beyond:
        end, neighbour = (lambdas[0], lambdas[1]) if best == lambdas[0] else (lambdas[-1], lambdas[-2])
        step = end - neighbour
        side = "least" if step < 0 else "greatest"
        further = ", ".join(f"{lam:g}" for lam in (end + step, end + 2 * step))
        notes.append(
            f"The best is at the edge of what was measured, the {side} λ: it may lie beyond. Extend the sweep to "
            f"λ = {further}."
        )
    if curve is not None and rule not in OF_PROMPTS:
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


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    return {name: _known(getattr(estimate, name)) for name in ("mean", "se", "low", "high")}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
