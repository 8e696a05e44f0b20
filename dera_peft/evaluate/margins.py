"""
How well DeRa's implicit reward tells the better of two completions, by λ.

The implicit reward at λ is β·log(π_λ(y|x)/π_ref(y|x)), as of any model that DPO gave (Rafailov et al., 2023, eq. 5),
with the β of the adapter's training at every λ; the margin of a pair is that of its chosen completion minus that of its
rejected one. It predicts that the chosen one is preferred with the probability σ(margin) (Bradley and Terry). Were
whole texts mixed, the margin at λ would be λ times that at 1, and no pair would be told otherwise at another λ. π_λ has
a normalizer at each token, so that the margin is another function of λ for each pair.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy

from dera_peft.decoding.lambdas import Lambda
from dera_peft.evaluate.analysis.recommendation import numbers
from dera_peft.evaluate.analysis.resamples import Estimate, Resamples, left_out_estimate

BINS = 10  # of the calibration, at most
MIN_PAIRS = 10  # in each of them


@dataclass(frozen=True)
class Bin:
    """
    Pairs of like confidence.

    Attributes:
        predicted: mean of σ(|margin|), the probability that the answer of the higher reward is the preferred one.
        observed: the share in which it is; its interval is Wilson's, of as many draws as there are prompts, for a
            bootstrap has no spread where all pairs are told rightly.
    """

    pairs: int
    predicted: float
    observed: Estimate


@dataclass(frozen=True)
class Margins:
    """
    One λ. All means are over pairs, with errors over prompts, of which a pair's share its prompt.

    Attributes:
        pairs, prompts: how many.
        margin: in units of the reward.
        accuracy: the share of pairs whose margin is above 0; one of 0 counts as half.
        log_loss: mean of -log σ(margin), in nats; log 2 is that of a guess.
        overconfidence: mean of σ(|margin|) minus the accuracy; 0 where predictions are right on average.
        calibration_error: the expected calibration error over `bins`: mean of |observed - predicted| over pairs.
        bins: by rising confidence, of as many pairs each.
        accuracy_difference, log_loss_difference: minus those at λ=1; None where that is not among the λ.
    """

    lam: Lambda
    pairs: int
    prompts: int
    margin: Estimate
    accuracy: Estimate
    log_loss: Estimate
    overconfidence: Estimate
    calibration_error: float
    bins: tuple[Bin, ...]
    accuracy_difference: Estimate | None = None
    log_loss_difference: Estimate | None = None

    def to_dict(self) -> dict:
        """For JSON: None for what is unknown."""
        estimates = ("margin", "accuracy", "log_loss", "overconfidence", "accuracy_difference", "log_loss_difference")
        return {
            "lambda": self.lam if isinstance(self.lam, float) else dict(self.lam),
            "pairs": self.pairs,
            "prompts": self.prompts,
            **{name: numbers(getattr(self, name)) for name in estimates},
            "calibration_error": self.calibration_error,
            "calibration": [
                {"pairs": each.pairs, "predicted": each.predicted, "observed": numbers(each.observed)}
                for each in self.bins
            ],
        }


@dataclass(frozen=True)
class BestMargin:
    """
    The λ that is best by "accuracy" or "log_loss".

    Attributes:
        lam: the smallest of those that are best.
        difference: to λ=1, of a λ that each resample of the prompts chooses for itself, on the prompts that it left
            out; None without λ=1.
    """

    by: str
    lam: Lambda
    value: float
    difference: Estimate | None


def margins_of(
    log_ratios: Mapping[Lambda, tuple[Sequence[float], Sequence[float]]],
    prompts: Sequence[Hashable],
    beta: float,
    seed: int = 0,
) -> list[Margins]:
    """
    Args:
        log_ratios: λ, ascending -> log(π_λ/π_ref) of the chosen and of the rejected completion of each pair, in nats.
        prompts: the prompt of each pair; pairs of one prompt are drawn together.
        beta: β.
        seed: of the bootstrap.
    """
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    of = numpy.array([places[prompt] for prompt in prompts])
    resamples = Resamples(len(places), seed)

    def means(columns: Mapping[str, numpy.ndarray]) -> dict[str, Estimate]:
        """Mean over pairs of values for each, `[N]`."""
        values = numpy.stack(list(columns.values()), axis=1)
        sums, counts = numpy.zeros((2, len(places), values.shape[1]))
        numpy.add.at(sums, of, values)
        numpy.add.at(counts, of, 1.0)
        return dict(zip(columns, resamples.ratios(sums, counts), strict=True))

    columns = {lam: _columns(beta * (numpy.array(pair[0]) - numpy.array(pair[1]))) for lam, pair in log_ratios.items()}
    found = []
    for lam, own in columns.items():
        estimates = means(own)
        if 1.0 in columns and lam != 1.0:
            both = {f"{name}_difference": own[name] - columns[1.0][name] for name in ("accuracy", "log_loss")}
            estimates |= means(both)
        order = numpy.argsort(own["confidence"], kind="stable")
        parts = numpy.array_split(order, max(1, min(BINS, len(of) // MIN_PAIRS)))
        bins = [
            Bin(len(part), float(own["confidence"][part].mean()), _share(own["accuracy"][part], len(set(of[part]))))
            for part in parts
        ]
        error = sum(each.pairs * abs(each.observed.mean - each.predicted) for each in bins) / len(of)
        estimates.pop("confidence")
        found.append(Margins(lam, len(of), len(places), **estimates, calibration_error=error, bins=tuple(bins)))
    return found


def _share(hits: numpy.ndarray, prompts: int) -> Estimate:
    """A share with Wilson's score interval (1927)."""
    share, z = float(hits.mean()), NormalDist().inv_cdf(0.975)
    middle = (share + z * z / (2 * prompts)) / (1 + z * z / prompts)
    reach = z / (1 + z * z / prompts) * math.sqrt(share * (1 - share) / prompts + z * z / (4 * prompts**2))
    return Estimate(share, math.sqrt(share * (1 - share) / prompts), middle - reach, middle + reach)


def _columns(margin: numpy.ndarray) -> dict[str, numpy.ndarray]:
    accuracy = (numpy.sign(margin) + 1) / 2
    confidence = 1 / (1 + numpy.exp(-numpy.abs(margin)))
    return {
        "margin": margin,
        "accuracy": accuracy,
        "log_loss": numpy.logaddexp(0, -margin),
        "confidence": confidence,
        "overconfidence": confidence - accuracy,
    }


def best_margin(found: Sequence[Margins], by: str) -> BestMargin:
    """
    Args:
        by: "accuracy", or "log_loss", which is best where it is least.
    """
    sign = -1.0 if by == "log_loss" else 1.0
    estimates = [getattr(each, by) for each in found]
    means = sign * numpy.array([estimate.mean for estimate in estimates])
    place = int((means >= means.max() - 1e-9).argmax())
    as_trained = next((number for number, each in enumerate(found) if each.lam == 1), None)
    difference = None
    if as_trained is not None:
        draws = sign * numpy.stack([estimate.draws for estimate in estimates])
        left_out = numpy.stack([estimate.out_of_bag for estimate in estimates])
        chosen = (draws >= draws.max(0) - 1e-9).argmax(0)
        there = left_out[chosen, numpy.arange(len(chosen))]
        difference = left_out_estimate(there - left_out[as_trained])
    return BestMargin(by, found[place].lam, estimates[place].mean, difference)
