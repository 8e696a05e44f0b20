"""Which of all arms is best by the rule, and whether the data show that it is better than the best plain λ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dera_peft.decoding.lambdas import NamedLambda
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.choice import (
    Candidate,
    Rule,
    candidates,
    choose,
    difference_of_draws,
    interval_text,
)
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.guards import Limit
from dera_peft.evaluate.analysis.recommendation import numbers
from dera_peft.evaluate.analysis.resamples import Estimate, Resamples
from dera_peft.evaluate.analysis.summary import LambdaSummary


@dataclass(frozen=True)
class BestArm:
    """
    Attributes:
        rule: that of the recommendation.
        reward: the reward's name.
        best: what the rule takes among all arms and their λ.
        plain: what it takes of plain λ; None where nothing there fits.
        other: what it takes of the other arms; None where nothing there fits.
        difference: the value of `other` minus that of `plain`, paired over prompts; None where one of them is missing.
        count: among how many the best one was chosen.
        use: how to decode like that, for a user.
    """

    rule: Rule
    reward: str
    best: Candidate
    plain: Candidate | None
    other: Candidate | None
    difference: Estimate | None
    count: int
    use: str | None = None

    @property
    def is_plain(self) -> bool:
        return self.best.arm == LOGITS

    @property
    def distinguishable(self) -> bool | None:
        """Whether the interval of the difference excludes 0; None if there is no difference."""
        return None if self.difference is None else self.difference.excludes_zero

    @property
    def name(self) -> str:
        return name_of(self.best)

    def text(self) -> str:
        """Plain sentences, one a line."""
        value, kl = self.best.value, self.best.kl
        where = f" in the group {self.best.group!r}" if self.best.group is not None else ""
        where = " under the worst reweighting of the prompts" if self.rule.name == "robust" else where
        lines = [
            f"Of all arms {self.name} is the best by the rule {self.rule}: {self.reward!r}{where} is {value.mean:+.3f} "
            f"({interval_text(value)}), at a KL of {kl.mean:.2f} nats."
        ]
        if self.best.estimated:
            lines.append("Its numbers are estimated from the samples at the measured λ.")
        return "\n".join([*lines, *self._comparison()])

    def to_dict(self) -> dict:
        """For JSON: None for what is unknown."""
        return {
            "rule": self.rule.name,
            "reward": self.reward,
            "best": _json(self.best),
            "plain": None if self.plain is None else _json(self.plain),
            "other": None if self.other is None else _json(self.other),
            "difference": numbers(self.difference),
            "count": self.count,
            "use": self.use,
        }

    def _comparison(self) -> list[str]:
        if self.plain is None or self.other is None:
            what = "No plain λ" if self.plain is None else "None of the other arms"
            return [f"{what} fits the rule, so that there is nothing to compare with."]
        two = self.other if self.is_plain else self.plain
        against = f"the best of the other arms, {name_of(two)}" if self.is_plain else f"the best plain λ, λ={two.lam:g}"
        at = f"Against {against} ({two.value.mean:+.3f} at {two.kl.mean:.2f} nats),"
        difference = self.difference
        if difference is None or math.isnan(difference.mean):
            return [f"{at} there is no comparison: no prompt has a value of {self.reward!r} in both."]
        sign = -1.0 if self.is_plain else 1.0
        low, high = sorted((sign * difference.low, sign * difference.high))
        by = Estimate(sign * difference.mean, difference.se, low, high)
        said = f"{at} that is {by.mean:+.3f} ({interval_text(by, 'paired over prompts')}):"
        if math.isnan(by.low):
            return [f"{said} a single prompt does not tell whether they differ."]
        if self.distinguishable:
            return [
                f"{said} a difference that these prompts show. (The interval is that of two named beforehand, and does "
                f"not account for the choice among {self.count}.)"
            ]
        return [f"{said} these prompts can't tell the two apart."]


def _json(candidate: Candidate) -> dict:
    lam = dict(candidate.lam) if isinstance(candidate.lam, NamedLambda) else candidate.lam
    return {"arm": candidate.arm, "lambda": lam, "value": numbers(candidate.value), "kl": numbers(candidate.kl)}


def name_of(candidate: Candidate) -> str:
    """In a sentence: "plain λ=1.5", "plausible:0.1 at λ=3", "aad:0.1"."""
    if candidate.arm == LOGITS:
        return f"plain λ={candidate.lam:g}"
    return candidate.arm if candidate.lam is None else f"{candidate.arm} at λ={candidate.lam:g}"


def best_arm(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    rule: Rule,
    reward: str,
    limits: Sequence[Limit] = (),
    resamples: Resamples | None = None,
) -> BestArm | None:
    """
    What the rule takes of plain λ and of the other arms apart, and the better one of the two.

    Args:
        summaries: of the sweep, all arms'.
        curve: between the measured plain λ.
        limits: of guards.
        resamples: of the sweep; of its prompts unless given.

    Returns:
        None where there is no other arm, or nothing that can be chosen.
    """
    among = candidates(summaries, curve, rule, reward)
    plain = _choice([each for each in among if each.arm == LOGITS], rule, reward, limits)
    other = _choice([each for each in among if each.arm != LOGITS], rule, reward, limits)
    both = [each for each in (plain, other) if each is not None]
    if not both or all(summary.arm == LOGITS for summary in summaries):
        return None
    best = choose(both, replace(rule, standard_errors=0.0), reward).chosen
    difference = None if plain is None or other is None else _difference(other, plain, resamples)
    return BestArm(rule, reward, best, plain, other, difference, len(among))


def _choice(among: Sequence[Candidate], rule: Rule, reward: str, limits: Sequence[Limit]) -> Candidate | None:
    try:
        return choose(among, rule, reward, limits).chosen
    except DeRaError:  # nothing has a value, or is within the budget and the guards
        return None


def _difference(one: Candidate, other: Candidate, resamples: Resamples | None) -> Estimate:
    if one.by_prompt is None or other.by_prompt is None:
        return difference_of_draws(one.value, other.value)
    differences = one.by_prompt - other.by_prompt  # NaN for a prompt that one of them has no value of
    return (resamples or Resamples(len(differences))).means({0: differences})[0]
