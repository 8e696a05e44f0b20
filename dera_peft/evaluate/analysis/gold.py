"""From which λ the trained reward still rises while a held-out one falls: over-optimization, seen along λ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from dera_peft.decoding.lambdas import Lambda, NamedLambda
from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.analysis.choice import (
    Candidate,
    Rule,
    candidates,
    difference_of_draws,
    draws_of,
    interval_text,
    left_out_of,
)
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.resamples import INTERVAL, Estimate, left_out_estimate
from dera_peft.evaluate.analysis.summary import LambdaSummary


@dataclass(frozen=True)
class GoldStep:
    """
    A λ beyond the one where the gold reward is highest.

    Attributes:
        proxy, gold: what the rewards are higher by than there, paired over prompts. Each resample of the prompts has a
            highest λ of its own, and the differences are those on the prompts that it left out.
        estimated: between the measured λ.
    """

    lam: Lambda
    proxy: Estimate
    gold: Estimate
    estimated: bool

    @property
    def parts(self) -> bool:
        """Whether both intervals say so: the proxy is higher there, and the gold lower."""
        return self.proxy.low > 0 and self.gold.high < 0


@dataclass(frozen=True)
class GoldResult:
    """
    The trained reward (proxy) against a held-out one (gold), along λ.

    Attributes:
        proxy, gold: their names.
        turn: λ where the gold's mean is highest; `turn_low` and `turn_high` in 95 % of the resamples of the prompts,
            None with a single prompt.
        steps: the λ beyond, ascending.
        value: the gold at the recommended λ; None where it is not known.
        difference: that minus the gold at λ=1, paired over prompts.
        lam: the recommended λ.
    """

    proxy: str
    gold: str
    turn: Lambda
    turn_low: Lambda | None
    turn_high: Lambda | None
    steps: tuple[GoldStep, ...]
    value: Estimate | None
    difference: Estimate | None
    lam: Lambda

    @property
    def parts_from(self) -> Lambda | None:
        """The smallest λ at which the two have parted; None where the data show none."""
        return next((step.lam for step in self.steps if step.parts), None)

    def sentences(self) -> list[str]:
        low, high = self.turn_low, self.turn_high
        other = "" if low is None or high is None else f" (other prompts: between {low:g} and {high:g})"
        said = [f"The gold reward {self.gold!r} is highest at λ={self.turn:g}{other}."]
        if not self.steps:
            said.append("That is the greatest λ: further ones would tell where it falls.")
        step = next((step for step in self.steps if step.parts), None)
        if step is not None:
            said.append(
                f"From λ={step.lam:g} on {self.proxy!r} still rises while {self.gold!r} falls: against λ={self.turn:g} "
                f"by {step.proxy.mean:+.3f} ({interval_text(step.proxy)}) and {step.gold.mean:+.3f} "
                f"({interval_text(step.gold)})."
            )
        elif self.steps:
            said.append(f"No λ beyond is shown to have a higher {self.proxy!r} and a lower {self.gold!r}.")
        if self.value is not None:
            said.append(f"At λ* {self.gold!r} is {self.value.mean:+.3f} ({interval_text(self.value)}){self._against}.")
        if step is not None and _above(self.lam, step.lam):
            said.append(
                f"λ* lies where the two have parted: --choose-by {self.gold} chooses by the gold reward in its place."
            )
        return said

    @property
    def _against(self) -> str:
        if self.difference is None or math.isnan(self.difference.mean):
            return ""
        return f", against λ=1 {self.difference.mean:+.3f} ({interval_text(self.difference, 'paired over prompts')})"


def _above(lam: Lambda, other: Lambda) -> bool:
    return not isinstance(lam, NamedLambda) and not isinstance(other, NamedLambda) and lam >= other


def gold_result(
    summaries: Sequence[LambdaSummary], curve: Curve | None, proxy: str, gold: str, lam: Lambda
) -> GoldResult | None:
    """
    Args:
        summaries, curve: of the sweep.
        proxy, gold: the names of two of its rewards.
        lam: the recommended λ.

    Returns:
        None where the gold has no value, and for several adapters, which have no single λ to rise along.
    """
    own = [summary for summary in summaries if summary.arm == LOGITS]
    of_proxy, of_gold = (
        {each.lam: each for each in candidates(own, curve, Rule("reward"), name)} for name in (proxy, gold)
    )
    lams = [each for each in of_gold if each is not None and each in of_proxy]  # ascending
    if not lams or isinstance(lam, NamedLambda):
        return None
    clusters = own[0].clusters[1]
    means = numpy.array([of_gold[each].value.mean for each in lams])
    draws = numpy.stack([draws_of(of_gold[each].value) for each in lams])  # [C, 1000]
    there = numpy.flatnonzero(~numpy.isnan(draws).all(0))
    turns = numpy.nanargmax(draws[:, there], 0)  # in each resample
    turn = int(means.argmax())
    low = high = None
    if clusters > 1:
        low, high = (lams[place] for place in numpy.percentile(turns, INTERVAL, method="nearest").astype(int))

    def beyond(of: dict[Lambda | None, Candidate], place: int) -> Estimate:
        left_out = numpy.stack([left_out_of(of[each].value) for each in lams])[:, there]
        at_turns = numpy.take_along_axis(left_out, turns[None], 0)[0]
        return left_out_estimate(left_out[place] - at_turns)

    steps = [
        GoldStep(each, beyond(of_proxy, place), beyond(of_gold, place), of_gold[each].estimated)
        for place, each in enumerate(lams)
        if place > turn
    ]
    value = of_gold[lam].value if lam in of_gold else None
    at_1 = of_gold.get(1.0)
    difference = None if value is None or at_1 is None or lam == 1 else difference_of_draws(value, at_1.value)
    return GoldResult(proxy, gold, lams[turn], low, high, tuple(steps), value, difference, lam)
