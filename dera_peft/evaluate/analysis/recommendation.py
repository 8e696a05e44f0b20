"""A recommended λ: its numbers, and what they say in plain sentences."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of
from dera_peft.evaluate.analysis.choice import Candidate, Rule, interval_text
from dera_peft.evaluate.analysis.gold import GoldResult
from dera_peft.evaluate.analysis.guards import GuardResult
from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.points import anchor_name, is_as_trained


@dataclass(frozen=True)
class Decoded:
    """What was measured at a λ that was decoded because it was recommended; as of a `Recommendation`."""

    value: Estimate
    kl: Estimate
    difference: Estimate | None


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
        lam_low, lam_high: 95 % of the λ* that other prompts would give (bootstrap of the whole choice), of several
            adapters each by itself; None with a single prompt.
        estimated: λ* lies between two measured λ, and its numbers are the curve's.
        between: λ between the measured ones could be chosen too, as far as the curve is known.
        at_edge: λ* is the least or the greatest λ that was measured; of several adapters for one of them, where 0 is no
            edge.
        indifferent: what the rule looks at is the same at every λ that could be chosen, so that the smallest was taken.
        measured: the λ that were measured, ascending.
        trained_beta: β of the adapter.
        notes: what else a reader has to know, as sentences.
        standard_errors: as in `choice.Rule`.
        best: what has the highest value; another λ than λ* where a smaller one can't be told from it.
        lead: as in `choice.Choice`.
        out_of_bag_value, out_of_bag_difference: `value` and `difference` where each resample of the prompts makes the
            choice anew and is measured on the prompts that it left out: they know that λ* was chosen.
        guards: what each guard found.
        gold: the reward against a held-out one.
        decoded: what was measured at λ*, where it was decoded after it had been chosen.
        use: "generate", "export" and "serve": commands that use λ*.
        retrain: the command that trains at β*.
        clusters: what the bootstrap drew, as in `Resamples`.
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
    standard_errors: float = 0.0
    best: Candidate | None = None
    lead: Estimate | None = None
    out_of_bag_value: Estimate | None = None
    out_of_bag_difference: Estimate | None = None
    guards: tuple[GuardResult, ...] = ()
    gold: GoldResult | None = None
    decoded: Decoded | None = None
    use: Mapping[str, str] = field(default_factory=dict)
    retrain: str | None = None
    clusters: tuple[str, int] = ("prompts", 0)

    @property
    def distinguishable(self) -> bool | None:
        """From `against`: whether the interval of the difference excludes 0; None if there is no difference."""
        found = self.out_of_bag_difference
        return None if self.difference is None or found is None else found.excludes_zero

    @property
    def where(self) -> str:
        """Which prompts the value is of, for a sentence: "" of all."""
        if self.group is not None:
            return f" in the group {self.group!r}"
        return " under the worst reweighting of the prompts" if self.rule == "robust" else ""

    def text(self) -> str:
        """Plain sentences, one a line."""
        return "\n".join(sentence for part in self.sections().values() for sentence in part)

    def sections(self) -> dict[str, list[str]]:
        """The sentences of `text`, by what they are about."""
        return {
            "choice": self._choice(),
            "guards": [said for guard in self.guards if (said := guard.text())],
            "gold": [] if self.gold is None else self.gold.sentences(),
            "comparison": self._comparison(),
            "use": self._use(),
            "retraining": self._retraining(),
            "notes": list(self.notes),
        }

    def _choice(self) -> list[str]:
        rule = Rule(self.rule, self.kl_budget, self.radius)
        between = " and those estimated between them" if self.between else ""
        of = f"{self.reward!r}{self.where}"
        of_several = isinstance(self.lam, NamedLambda)
        listed = ", ".join(f"{lam:g}" for lam in self.measured)
        measured = f"{len(self.measured)} measured points" if of_several else f"measured λ ({listed})"
        star = f"λ*{':' if of_several else ' ='} {self.lam:g}"
        lines = [f"{star} by the rule {rule}, among the {measured}{between}."]
        if self.best is not None and self.lead is not None:
            errors = "one standard error" if self.standard_errors == 1 else f"{self.standard_errors:g} standard errors"
            lines.append(
                f"It is the smallest that is within {errors} of the best, λ={self.best.lam:g} "
                f"({self.best.value.mean:+.3f} at {self.best.kl.mean:.2f} nats): that leads by {self.lead.mean:+.3f} ± "
                f"{self.lead.se:.3f}, paired over {self.clusters[0]} and corrected for being the best of many."
            )
        lines.append(
            f"There {of} is {self.value.mean:+.3f} ({self._interval(self.value)}), at a KL of {self.kl.mean:.2f} nats."
        )
        if self.decoded is not None:
            lines.append(
                "These numbers are estimated from the samples at the measured λ. Decoded there, it is "
                f"{self.decoded.value.mean:+.3f} ({self._interval(self.decoded.value)}), at a KL of "
                f"{self.decoded.kl.mean:.2f} nats."
            )
        elif self.estimated:
            lines.append("This λ was not decoded: its numbers are estimated from the samples at the measured λ.")
        if self.indifferent:
            of_worst = {"worst_group": "The worst group's reward", "robust": "The worst reweighting's reward"}
            what = of_worst.get(self.rule, "The reward")
            where = "at every λ" if self.kl_budget is None else "at every λ within the budget"
            lines.append(f"{what} is the same {where}: there is nothing to choose by, and the smallest λ was taken.")
        low, high = self.lam_low, self.lam_high
        if low is None or high is None:
            return lines
        if low == self.lam == high:
            return [*lines, f"Other {self.clusters[0]} would put it there as well (95 % of resamples)."]
        names = self.lam if isinstance(self.lam, NamedLambda) else ["λ*"]
        ranges = [
            f"{name} at {least:g}" if least == most else f"{name} between {least:g} and {most:g}"
            for name, least, most in zip(names, values_of(low), values_of(high), strict=True)
        ]
        return [*lines, f"Other {self.clusters[0]} would put {', '.join(ranges)} (95 % of resamples)."]

    def _interval(self, estimate: Estimate) -> str:
        return interval_text(estimate, f"over {self.clusters[0]}")

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
        found = self.out_of_bag_difference
        one = anchor_name(self.against) if adapters else "λ=1"
        if found is None or math.isnan(found.low):
            by = f"{self.difference.mean:+.3f} (no interval with a single prompt)"
            return [f"Against {one} that is {by}: a single prompt does not tell whether they differ."]
        paired = interval_text(found, f"paired over {self.clusters[0]}, the choice included")
        trained = "the model with its own prompt" if self.prompts_differ else "the adapter as trained"
        one = one if adapters else f"λ=1, {trained}"
        said = f"Against {one}, that is {self.difference.mean:+.3f} ({paired}):"
        if self.distinguishable:
            return [f"{said} a difference that these {self.clusters[0]} show."]
        return [f"{said} these {self.clusters[0]} can't tell the two apart."]

    @property
    def _trained(self) -> str:
        return "the model with its own prompt" if self.prompts_differ else "the adapter as it was trained"

    def _use(self) -> list[str]:
        names = {"generate": "To use it", "export": "As one LoRA adapter for other servers", "serve": "To serve it"}
        return [f"{names[name]}: {command}" for name, command in self.use.items()]

    def _retraining(self) -> list[str]:
        if isinstance(self.lam, NamedLambda) or self.lam == 1 or self.prompts_differ:
            return []
        if self.lam == 0:
            return ["At λ=0 the reference is used alone: there is no β to retrain at."]
        if self.lam < 0:
            return ["λ* is below 0, away from what the adapter was trained for: there is no β to retrain at."]
        if self.trained_beta is None:
            return ["The adapter's record holds no β, so that β* = β/λ* is not known."]
        command = "" if self.retrain is None else f" {self.retrain}"
        return [f"To retrain there: β* = β/λ* = {self.trained_beta:g}/{self.lam:g} = {self.beta:.4g}.{command}"]

    def to_dict(self) -> dict:
        """For JSON: None for what is unknown."""
        best, gold, decoded = self.best, self.gold, self.decoded
        return {
            "rule": self.rule,
            "reward": self.reward,
            "lambda": _json(self.lam),
            "beta": self.beta,
            "value": numbers(self.value),
            "group": self.group,
            "kl": numbers(self.kl),
            "kl_budget": self.kl_budget,
            "radius": self.radius,
            "against": _json(self.against),
            "difference": numbers(self.difference),
            "distinguishable": self.distinguishable,
            "lambda_low": _json(self.lam_low),
            "lambda_high": _json(self.lam_high),
            "estimated": self.estimated,
            "between": self.between,
            "at_edge": self.at_edge,
            "indifferent": self.indifferent,
            "measured": list(map(_json, self.measured)),
            "trained_beta": self.trained_beta,
            "standard_errors": self.standard_errors,
            "best": best
            and {"lambda": _json(best.lam), "value": numbers(best.value), "kl": numbers(best.kl)}
            | {"estimated": best.estimated},
            "lead": numbers(self.lead),
            "out_of_bag_value": numbers(self.out_of_bag_value),
            "out_of_bag_difference": numbers(self.out_of_bag_difference),
            "guards": [
                {
                    "name": guard.name,
                    "threshold": guard.threshold,
                    "at": _json(guard.at),
                    "limit": guard.limit,
                    "figures": [{"lambda": _json(lam), **(numbers(found) or {})} for lam, found in guard.figures],
                    "passed_over": list(map(_json, guard.passed_over)),
                }
                for guard in self.guards
            ],
            "gold": gold
            and {
                "proxy": gold.proxy,
                "gold": gold.gold,
                "turn": _json(gold.turn),
                "turn_low": _json(gold.turn_low),
                "turn_high": _json(gold.turn_high),
                "parts_from": _json(gold.parts_from),
                "steps": [
                    {"lambda": _json(step.lam), "proxy": numbers(step.proxy), "gold": numbers(step.gold)}
                    | {"estimated": step.estimated, "parts": step.parts}
                    for step in gold.steps
                ],
                "value": numbers(gold.value),
                "difference": numbers(gold.difference),
            },
            "decoded": decoded
            and {
                "value": numbers(decoded.value),
                "kl": numbers(decoded.kl),
                "difference": numbers(decoded.difference),
            },
            "use": dict(self.use),
            "retrain": self.retrain,
            "clusters": {"of": self.clusters[0], "count": self.clusters[1]},
            "notes": list(self.notes),
        }


def numbers(estimate: Estimate | None) -> dict[str, float | None] | None:
    if estimate is None:
        return None
    return {name: _known(getattr(estimate, name)) for name in ("mean", "se", "low", "high")}


def _json(lam: Lambda | None) -> Any:
    return dict(lam) if isinstance(lam, NamedLambda) else lam


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
