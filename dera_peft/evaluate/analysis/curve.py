"""
From a few λ to the whole curve: reward and KL at every λ between those that were decoded.

A completion y that was drawn at one λ counts for another with the weight w(y) = p_λ(y|x) / q(y|x), where
q = Σ_j n_j/N · p_λj is the mixture that this prompt's N completions were drawn from: n_j of them at λ_j. That is
multiple importance sampling with the balance heuristic (Veach and Guibas, 1995), whose weights stay bounded near each
λ_j. The weighted means over all prompts' samples divide by the weights' sum (self-normalized).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy

from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.analysis.summary import GUARDS, prompt_positions, resamples_of
from dera_peft.evaluate.points import is_between, neighbours

# When a point is drawn. At a λ that was decoded n times the effective size is about n or more: no weight is above 1/n.
# Between λ that are too far apart it falls, and it can't be trusted there: on models small enough to enumerate it was
# seen to differ tenfold from run to run, and to be large in those runs that had missed the few texts of large weight.
# So a point has to be worth most of what decoding there would give,
MIN_SHARE = 0.75
# and its weights have to reach what π_λ writes. Their mean is 1 but for chance, every p_λ being normalized, and smaller
# where the samples miss a part: with 200 samples a λ, means of 0.5 to 0.75 went with an error of several bands at an
# effective size that looked sufficient, and none was seen below 0.8 where the estimates were good.
MIN_MASS = 0.8
# With fewer effective samples than that, the bias of self-normalization (about 1/size of a standard deviation) and the
# chance in the size itself are no longer small.
MIN_SIZE = 50


@dataclass(frozen=True)
class Point:
    """
    One λ of the curve.

    Attributes:
        lam: λ; of several adapters by name.
        ess: the effective sample size (Σw)²/Σw² of all samples.
        mass: the mean weight, 1 where the samples reach all that π_λ writes.
        kl: KL(π_λ ‖ π_ref) per sequence, in nats; None where the samples don't carry an estimate.
        rewards: by name; None there as well, and for a reward that has no values.
        guards: as in `LambdaSummary`; None as of `rewards`.
    """

    lam: Lambda
    ess: float
    mass: float
    kl: Estimate | None
    rewards: dict[str, Estimate | None]
    guards: dict[str, Estimate | None] = field(default_factory=dict)

    @property
    def drawn(self) -> bool:
        return self.kl is not None


@dataclass(frozen=True)
class Gap:
    """Two neighbours among the measured λ, between which the curve is not known everywhere; `lam` would help most."""

    low: Lambda
    high: Lambda
    lam: Lambda


@dataclass(frozen=True)
class Curve:
    """
    Attributes:
        points: one per λ of the grid, ascending where those are numbers.
        samples: how many all estimates are made from.
        needed: the effective sample size from which on a point is drawn.
        gaps: where another λ is needed.
        reason: why there is no curve; None if there is one.
    """

    points: list[Point] = field(default_factory=list)
    samples: int = 0
    needed: float = 0.0
    gaps: list[Gap] = field(default_factory=list)
    reason: str | None = None


def reason_off(sampling: Sampling, wanted: bool = True) -> str | None:
    """Why samples drawn like that can't, or shall not, be weighed for another λ; None if they are."""
    if not wanted:
        return "curve is off, so that completions were scored at their own λ alone"
    if sampling.temperature == 0:
        return "greedy decoding draws no samples, so that there is nothing to weigh for another λ"
    truncations = {"top_k": sampling.top_k > 0, "top_p": sampling.top_p < 1, "min_p": sampling.min_p > 0}
    if truncated := [name for name, is_on in truncations.items() if is_on]:
        return (
            f"{' and '.join(truncated)} cut{'s' if len(truncated) == 1 else ''} off texts at one λ that another would "
            "write, which no weight can bring back"
        )
    if sampling.repetition_penalty != 1:
        return "repetition_penalty changes what is drawn, and the weights know only λ and the temperature"
    return None


def estimate_curve(
    rows: Sequence[dict], grid: Sequence[Lambda], rewards: Sequence[str], seed: int = 0, group: str | None = None
) -> Curve:
    """
    Reward, KL and guards at every λ of `grid`, from the rows of the arm "logits".

    Args:
        rows: of the sweep, all arms'. Those of "logits" carry `log_p` (log p_λ(y|x) as it was sampled, in nats) and
            `kl_grid` (KL along y at λ, in nats), one number per λ of the grid.
        grid: λ, those that were decoded among them; numbers ascending, points of several adapters between decoded ones.
        rewards: names.
        seed, group: of the bootstrap; those of the summaries, so that draws are paired with theirs.

    Raises:
        DeRaError: a decoded λ is not on the grid.
    """
    own = [row for row in rows if row["arm"] == LOGITS]
    measured = sorted({row["lambda"] for row in own}, key=values_of)
    if len(measured) < 2:
        return Curve(reason="estimates between λ need at least two decoded ones")
    if missing := [lam for lam in measured if lam not in grid]:
        raise DeRaError(f"grid={list(grid)!r} must hold each λ that was decoded; {missing[0]:g} is not there.")
    positions = prompt_positions(rows)
    own.sort(key=lambda row: positions[row["prompt_index"]])  # by prompt, for the sums over each prompt's samples
    prompt = numpy.array([positions[row["prompt_index"]] for row in own])
    log_p = numpy.array([row["log_p"] for row in own])  # [N, G]
    log_weights = _log_weights(log_p, prompt, [row["lambda"] for row in own], measured, list(grid))
    peak = log_weights.max(0)
    weights = numpy.exp(log_weights - peak)  # [N, G]: up to a factor for each λ, which cancels
    with numpy.errstate(over="ignore"):
        mass = numpy.exp(peak) * weights.sum(0) / len(set(prompt))
    needed = max(MIN_SIZE, MIN_SHARE * len(own) / len(measured))
    least, greatest = values_of(measured[0]), values_of(measured[-1])
    inside = [isinstance(lam, NamedLambda) or least <= values_of(lam) <= greatest for lam in grid]

    resamples = resamples_of(rows, group, seed)
    starts = numpy.flatnonzero(numpy.diff(prompt, prepend=-1))
    places = prompt[starts]

    def estimates(values: numpy.ndarray) -> list[Estimate | None]:
        """The weighted mean at each λ of the grid of `[N, G]` or `[N, 1]` values, NaN for a sample without one."""
        there = numpy.where(numpy.isnan(values), 0.0, weights)
        sums = numpy.zeros((2, len(positions), len(grid)))
        sums[0, places] = numpy.add.reduceat(there * numpy.nan_to_num(values), starts)
        sums[1, places] = numpy.add.reduceat(there, starts)
        holds = inside & (_effective_size(there) >= needed) & (mass >= MIN_MASS)
        found = resamples.ratios(*sums)
        return [estimate if drawn else None for estimate, drawn in zip(found, holds, strict=True)]

    kl = estimates(numpy.array([row["kl_grid"] for row in own]))

    def of_each(kind: str, names: Sequence[str]) -> list[dict[str, Estimate | None]]:
        values = [numpy.array([[row[kind].get(name)] for row in own], dtype=float) for name in names]
        found = {name: estimates(each) for name, each in zip(names, values, strict=True)}
        return [{name: each[g] for name, each in found.items()} for g in range(len(grid))]

    of_rewards = of_each("rewards", rewards)
    guards = of_each("guards", [name for name in GUARDS if any(name in row.get("guards", {}) for row in own)])
    points = [
        Point(lam, float(ess), float(share), kl[g], of_rewards[g], guards[g])
        for g, (lam, ess, share) in enumerate(zip(grid, _effective_size(weights), mass, strict=True))
    ]
    return Curve(points, len(own), needed, _gaps(points, measured))


def _log_weights(log_p, prompt, lam, measured, grid) -> numpy.ndarray:
    """log p_λ(y|x) - log Σ_j n_j p_λj(y|x), `[N, G]`: a prompt's weights sum to 1, but for chance."""
    decoded_at = [measured.index(value) for value in lam]
    counts = numpy.zeros((prompt.max() + 1, len(measured)))
    numpy.add.at(counts, (prompt, decoded_at), 1)
    with numpy.errstate(divide="ignore"):  # a prompt may lack a λ
        log_parts = numpy.log(counts)[prompt] + log_p[:, [grid.index(value) for value in measured]]  # [N, J]
    return log_p - numpy.logaddexp.reduce(log_parts, axis=1, keepdims=True)


def _effective_size(weights: numpy.ndarray) -> numpy.ndarray:
    """(Σw)²/Σw² of each column."""
    with numpy.errstate(invalid="ignore"):
        return numpy.nan_to_num(weights.sum(0) ** 2 / (weights**2).sum(0))


def _gaps(points: Sequence[Point], measured: Sequence[Lambda]) -> list[Gap]:
    gaps = []
    for low, high in neighbours(measured):
        if unknown := [point for point in points if not point.drawn and is_between(point.lam, low, high)]:
            gaps.append(Gap(low, high, min(unknown, key=lambda point: point.ess).lam))
    return gaps


def through_points(lam: Sequence[float], values: Sequence[float], at: Sequence[float] | numpy.ndarray) -> list[float]:
    """
    A smooth line through measured points: an aid to the eye where there is no estimate, and to be labelled so.

    It is a monotone cubic (Fritsch and Butland, 1984): between two points it stays between their values.

    Args:
        lam: ascending; of a single one the line is its value.
        values: at each.
        at: where the line is wanted, within the measured range.
    """
    x, y, places = (numpy.asarray(numbers, dtype=float) for numbers in (lam, values, at))
    if len(x) == 1:
        return [float(values[0])] * len(places)
    steps = numpy.diff(x)
    slopes = numpy.diff(y) / steps
    tangents = numpy.empty_like(y)
    tangents[[0, -1]] = slopes[[0, -1]]
    left, right = slopes[:-1], slopes[1:]
    same = left * right > 0  # elsewhere is a peak or a valley, and the line is flat there
    weight_left, weight_right = steps[:-1] + 2 * steps[1:], 2 * steps[:-1] + steps[1:]
    with numpy.errstate(divide="ignore", invalid="ignore"):
        harmonic = (weight_left + weight_right) / (weight_left / left + weight_right / right)
    tangents[1:-1] = numpy.where(same, harmonic, 0.0)
    k = numpy.clip(numpy.searchsorted(x, places, side="right") - 1, 0, len(steps) - 1)
    t = (places - x[k]) / steps[k]
    line = (
        (1 + 2 * t) * (1 - t) ** 2 * y[k]
        + t * (1 - t) ** 2 * steps[k] * tangents[k]
        + t**2 * (3 - 2 * t) * y[k + 1]
        - t**2 * (1 - t) * steps[k] * tangents[k + 1]
    )
    return line.tolist()
