"""Guards of a choice: at which λ text breaks, by its perplexity under the reference and by what it repeats."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

from dera_peft.decoding.lambdas import Lambda
from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.analysis.summary import LambdaSummary, exponential
from dera_peft.evaluate.points import anchors

ROUNDING = 1e-9
SHOWN = {"log_perplexity": "perplexity", "repetition": "repetition"}  # a guard as it is averaged, and as it is told


@dataclass(frozen=True)
class Limit:
    """
    How far a guard lets a λ go.

    Attributes:
        guard: a name in `LambdaSummary.guards`.
        threshold: the setting: of the perplexity a factor, of the repetition what may be added.
        at: the λ whose text it is compared with: of 0 and 1 (of several adapters the reference and each alone) that
            with the highest figure.
        most: the greatest value that passes, in the guard's unit; `draws` in each resample.
    """

    guard: str
    threshold: float
    at: Lambda
    most: float
    draws: numpy.ndarray

    def passes(self, guards: Mapping[str, Estimate]) -> bool:
        estimate = guards.get(self.guard)
        return estimate is None or not estimate.mean > self.most + ROUNDING

    def passing_draws(self, guards: Mapping[str, Estimate]) -> numpy.ndarray:
        """`passes` in each resample, bool `[1000]`."""
        estimate = guards.get(self.guard)
        if estimate is None or estimate.draws is None:
            return numpy.ones(len(self.draws), dtype=bool)
        return ~(estimate.draws > self.draws + ROUNDING)


def limits_of(summaries: Sequence[LambdaSummary], max_perplexity: float, max_repetition: float) -> list[Limit]:
    """
    The limits of the guards that were measured at λ=0 or 1 of the arm "logits": there text is taken to be as it should.

    Args:
        max_perplexity, max_repetition: the thresholds; with infinity there is no such guard.
    """
    plain = [summary for summary in summaries if summary.arm == LOGITS]
    margins = {"log_perplexity": (max_perplexity, math.log(max_perplexity)), "repetition": (max_repetition,) * 2}
    ends = anchors(summary.lam for summary in plain)
    limits = []
    for guard, (threshold, margin) in margins.items():
        sound = {
            lam: s.guards[guard] for s in plain for lam in ends
            if s.lam == lam and guard in s.guards and not math.isnan(s.guards[guard].mean)
        }  # fmt: skip
        if not sound or math.isinf(threshold):
            continue
        at = max(sound, key=lambda lam: sound[lam].mean)
        draws = numpy.fmax.reduce([draws for estimate in sound.values() if (draws := estimate.draws) is not None])
        limits.append(Limit(guard, threshold, at, sound[at].mean + margin, draws + margin))
    return limits


@dataclass(frozen=True)
class GuardResult:
    """
    What a guard found at the measured plain λ.

    Attributes:
        name: "perplexity" (under the reference, a token; geometric mean over completions), or "repetition" (the share
            of a completion's 4-grams that it had before).
        threshold, at: as in `Limit`.
        limit: the greatest value that passes.
        figures: λ and what was measured there.
        passed_over: the λ beyond the limit.
    """

    name: str
    threshold: float
    at: Lambda
    limit: float
    figures: tuple[tuple[Lambda, Estimate], ...]
    passed_over: tuple[Lambda, ...]

    def text(self) -> str:
        """One sentence; "" where no λ was passed over."""
        if not self.passed_over:
            return ""
        found = dict(self.figures)
        listed = ", ".join(f"λ={lam:g} ({found[lam].mean:.3g})" for lam in self.passed_over)
        what = {
            "perplexity": f"perplexity under the reference may be {self.limit:.3g}, {self.threshold:g} times that "
            f"at λ={self.at:g} (--max-perplexity)",
            "repetition": f"share of repeated 4-grams may be {self.limit:.3g}, {self.threshold:g} more than at "
            f"λ={self.at:g} (--max-repetition)",
        }[self.name]
        return f"Passed over for its {self.name}: {listed}. Its {what}."


def results_of(summaries: Sequence[LambdaSummary], limits: Sequence[Limit]) -> tuple[GuardResult, ...]:
    """One for each limit."""
    results = []
    for limit in limits:
        is_log = limit.guard == "log_perplexity"
        figures: list[tuple[Lambda, Estimate]] = []
        over: list[Lambda] = []
        for summary in summaries:
            found = summary.guards.get(limit.guard)
            if summary.arm != LOGITS or summary.lam is None or found is None:
                continue
            figures.append((summary.lam, exponential(found) if is_log else found))
            over += [] if limit.passes(summary.guards) else [summary.lam]
        results.append(
            GuardResult(
                SHOWN[limit.guard],
                limit.threshold,
                limit.at,
                math.exp(limit.most) if is_log else limit.most,
                tuple(figures),
                tuple(over),
            )
        )
    return tuple(results)
