"""Estimates over prompts, and the bootstrap resamples that all estimates of a run share."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy

from dera_peft.evaluate.analysis.robust import worst_mean

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles: 95 %
# With fewer groups a bootstrap of groups gives intervals that are too short (Cameron, Gelbach and Miller, 2008).
MIN_GROUPS = 10


@dataclass(frozen=True)
class Estimate:
    """
    A mean over prompts, with its uncertainty. Each prompt counts the same, however many samples it has.

    Samples of one prompt are not independent, so the error is that of drawing other prompts. With a single prompt it is
    unknown: `se`, `low` and `high` are NaN then. Where there is no value at all, so is `mean`.

    Attributes:
        mean: over prompts.
        se: its standard error.
        low, high: 95 % percentile bootstrap over prompts.
        draws: the mean in each bootstrap resample, fp64 `[1000]`. All estimates of a run share their resamples, so that
            the differences of two estimates' draws are paired.
        out_of_bag: the mean over the prompts that each resample left out, fp64 `[1000]`.
    """

    mean: float
    se: float
    low: float
    high: float
    draws: numpy.ndarray | None = field(default=None, repr=False, compare=False)
    out_of_bag: numpy.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does; False where there is none."""
        return self.low > 0 or self.high < 0


class Resamples:
    """
    Bootstrap resamples of prompts: the same for every estimate of a run, so that their differences are paired.

    Args:
        prompts: how many there are.
        seed: of the draws.
        groups: the group of each prompt, where whole groups are drawn; prompts by themselves are unless given.

    Attributes:
        counts: how often each resample holds each prompt, `[1000, P]`.
        left_out: 1 for a prompt that the resample does not hold, else 0, `[1000, P]`.
        clusters: what is drawn, and how many there are: ("prompts", 64), or ("groups", 12).
    """

    def __init__(self, prompts: int, seed: int = 0, groups: Sequence[str] | None = None):
        names, of = numpy.unique(numpy.arange(prompts) if groups is None else list(groups), return_inverse=True)
        count = len(names)
        drawn = numpy.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
        flat = (drawn + count * numpy.arange(RESAMPLES)[:, None]).ravel()
        counts = numpy.bincount(flat, minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(float)
        self.counts = counts[:, of]
        self.left_out = (self.counts == 0).astype(float)
        self.clusters = ("prompts" if groups is None else "groups", count)
        self._of = of

    def _by_cluster(self, values: numpy.ndarray) -> numpy.ndarray:
        """Sums over the prompts of each cluster, of `[P, K]`."""
        sums = numpy.zeros((self.clusters[1], values.shape[1]))
        numpy.add.at(sums, self._of, values)
        return sums

    def ratios(self, numerators: numpy.ndarray, denominators: numpy.ndarray) -> list[Estimate]:
        """
        Σ numerators / Σ denominators over prompts, for each of K columns: `[P, K]` both, fp64.

        A prompt that has no part in a column has 0 in both. The standard error is the delta method's.
        """
        clusters = (self._by_cluster(denominators) > 0).sum(0)
        total = denominators.sum(0)
        with numpy.errstate(divide="ignore", invalid="ignore"):
            mean = numerators.sum(0) / total
            residuals = self._by_cluster(numerators - mean * denominators)
            se = numpy.sqrt((residuals**2).sum(0) * clusters / (clusters - 1)) / total
            # [1000, K]; NaN where none was drawn, or left out
            draws, out_of_bag = (
                (weights @ numerators) / (weights @ denominators) for weights in (self.counts, self.left_out)
            )
        estimates = []
        for column in range(numerators.shape[1]):
            error = low = high = math.nan
            if clusters[column] > 1:
                error = float(se[column])
                low, high = map(float, numpy.nanpercentile(draws[:, column], INTERVAL))
            drawn = draws[:, column], out_of_bag[:, column]
            estimates.append(Estimate(float(mean[column]), error, low, high, *drawn))
        return estimates

    def means(self, columns: Mapping[Hashable, numpy.ndarray]) -> dict[Hashable, Estimate]:
        """The mean of each column: one value per prompt, `[P]`, NaN for a prompt that has no part in it."""
        values = numpy.stack(list(columns.values()), axis=1)  # [P, K]
        there = ~numpy.isnan(values)
        estimates = self.ratios(numpy.where(there, values, 0.0), there.astype(float))
        return dict(zip(columns, estimates, strict=True))

    def worst_mean(self, values: numpy.ndarray, radius: float) -> Estimate:
        """The worst mean over reweightings of the prompts, of one value per prompt as in `means`."""
        mean = float(worst_mean(values, numpy.ones((1, len(values))), radius)[0])
        draws = worst_mean(values, self.counts, radius)
        out_of_bag = worst_mean(values, self.left_out, radius)
        if (~numpy.isnan(values)).sum() < 2:
            return Estimate(mean, math.nan, math.nan, math.nan, draws, out_of_bag)
        low, high = numpy.nanpercentile(draws, INTERVAL)
        return Estimate(mean, float(numpy.nanstd(draws, ddof=1)), float(low), float(high), draws, out_of_bag)


def left_out_estimate(draws: numpy.ndarray) -> Estimate:
    """
    What a choice is worth that each resample makes by itself, measured on what that resample left out.

    A value that was chosen for being high is high by chance, too; on prompts that had no part in the choice it is not
    (Tsamardinos, Greasidou and Borboudakis, 2018, arXiv 1708.07180). The interval errs on the wide side: a resample
    leaves out 37 % of the prompts, whose mean has a larger error than that of all.

    Args:
        draws: `[1000]` fp64; NaN where nothing was left out.
    """
    draws = draws[~numpy.isnan(draws)]
    if len(draws) < RESAMPLES / 10:  # a single prompt is in each of them
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    low, high = numpy.percentile(draws, INTERVAL)
    return Estimate(float(draws.mean()), float(draws.std(ddof=1)), float(low), float(high))
