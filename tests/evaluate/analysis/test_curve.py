"""The curve between the decoded λ, against a model small enough to enumerate all that it can write."""

import itertools
import math
from dataclasses import replace

import numpy
import pytest
from scipy.interpolate import PchipInterpolator

from dera_peft import DeRaError
from dera_peft.decoding.sampling import Sampling
from dera_peft.evaluate.analysis.curve import MIN_MASS, Curve, estimate_curve, reason_off, through_points
from dera_peft.evaluate.analysis.resamples import RESAMPLES
from dera_peft.evaluate.analysis.summary import summarise

VOCABULARY, LENGTH = 3, 4
TEXTS = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
PREFIXES = [prefix for length in range(LENGTH) for prefix in itertools.product(range(VOCABULARY), repeat=length)]


class Table:
    """
    Two random next-token tables per prompt, for every prefix, and their mixture token by token. All is exact: λ ->
    log p_λ(y|x) and KL(p_λ ‖ p_ref) along y, of every prompt and text, `[P, S]`.
    """

    def __init__(self, prompts: int, strength: float, seed: int = 0):
        generator = numpy.random.default_rng(seed)
        self.reference = generator.normal(size=(prompts, len(PREFIXES), VOCABULARY))
        self.aligned = self.reference + strength * generator.normal(size=self.reference.shape)
        self.reward = generator.normal(size=(prompts, len(TEXTS))) + 0.3 * (self.at(1.0)[0] - self.at(0.0)[0])

    def at(self, lam: float) -> tuple[numpy.ndarray, numpy.ndarray]:
        where = {prefix: place for place, prefix in enumerate(PREFIXES)}
        path = numpy.array([[where[text[:t]] for t in range(LENGTH)] for text in TEXTS])  # [S, T]
        log_p = _log_softmax((1 - lam) * self.reference + lam * self.aligned)
        kl = (numpy.exp(log_p) * (log_p - _log_softmax(self.reference))).sum(-1)
        return log_p[:, path, numpy.array(TEXTS)].sum(-1), kl[:, path].sum(-1)

    def expected(self, lam: float) -> tuple[float, float]:
        """E[reward] and KL(π_λ ‖ π_ref) per sequence, mean over prompts."""
        log_p, kl = self.at(lam)
        # the sum of the tokens' divergences, in expectation, is the divergence of the sequences
        of_sequences = (numpy.exp(log_p) * (log_p - self.at(0.0)[0])).sum(1).mean()
        assert (numpy.exp(log_p) * kl).sum(1).mean() == pytest.approx(of_sequences)
        return (numpy.exp(log_p) * self.reward).sum(1).mean(), of_sequences

    def rows(self, measured, grid, samples: int, seed: int = 1) -> list[dict]:
        generator = numpy.random.default_rng(seed)
        exact = {lam: self.at(lam) for lam in {*grid, *measured}}
        log_p, kl = (numpy.stack([exact[lam][which] for lam in grid], -1) for which in (0, 1))  # [P, S, G]
        return [
            {
                "arm": "logits", "lambda": lam, "prompt_index": prompt, "sample": sample, "num_tokens": LENGTH,
                "finish_reason": "eos",
                "kl": exact[lam][1][prompt, text], "rewards": {"r": float(self.reward[prompt, text])},
                "log_p": log_p[prompt, text].tolist(), "kl_grid": kl[prompt, text].tolist(),
            }
            for prompt in range(len(self.reference))
            for lam in measured
            for sample, text in enumerate(generator.choice(len(TEXTS), samples, p=numpy.exp(exact[lam][0][prompt])))
        ]  # fmt: skip


def _log_softmax(z: numpy.ndarray) -> numpy.ndarray:
    return z - numpy.logaddexp.reduce(z, -1, keepdims=True)


def by_lam(curve: Curve) -> dict:
    return {point.lam: point for point in curve.points}


def test_many_samples_come_to_the_exact_values():
    table, grid = Table(prompts=5, strength=2.0), [0.0, 0.25, 0.5, 0.75, 1.0]
    curve = estimate_curve(table.rows([0.0, 0.5, 1.0], grid, samples=4000), grid, ["r"])
    assert (curve.samples, curve.needed, curve.gaps, curve.reason) == (60_000, 15_000, [], None)
    levels = [table.expected(lam) for lam in grid]
    assert levels[-1][0] - levels[0][0] > 1, "a curve to speak of"
    assert levels[-1][1] > 1
    for point, (reward, kl) in zip(curve.points, levels, strict=True):
        assert point.drawn
        assert point.mass == pytest.approx(1, abs=0.01)
        assert point.rewards["r"].mean == pytest.approx(reward, abs=0.03)
        assert point.kl.mean == pytest.approx(kl, abs=0.03)
    assert curve.points[0].kl.mean == 0


def test_bands_hold_the_exact_values_and_held_out_decoding():
    """25 sweeps, each over 40 prompts of its own: how often the mean over all prompts is in the band."""
    world, measured, held_out = Table(prompts=1000, strength=1.5, seed=3), [0.0, 0.5, 1.0], [0.25, 0.75]
    grid = sorted(measured + held_out)
    truth = {lam: world.expected(lam) for lam in held_out}
    inside, differences = [], []
    for sweep in range(25):
        part = Table(prompts=40, strength=1.5)
        chosen = slice(40 * sweep, 40 * (sweep + 1))
        part.reference, part.aligned, part.reward = world.reference[chosen], world.aligned[chosen], world.reward[chosen]
        curve = by_lam(estimate_curve(part.rows(measured, grid, samples=2, seed=sweep), grid, ["r"]))
        direct = {
            s.lam: s.rewards["r"].level for s in summarise(part.rows(held_out, grid, samples=2, seed=100 + sweep))
        }
        for lam, (reward, kl) in truth.items():
            estimate = curve[lam].rewards["r"]
            inside += [estimate.low <= reward <= estimate.high, curve[lam].kl.low <= kl <= curve[lam].kl.high]
            differences.append((estimate.mean - direct[lam].mean) / math.hypot(estimate.se, direct[lam].se))
    assert 0.85 <= numpy.mean(inside) <= 0.99  # 95 % bands
    assert abs(numpy.mean(differences)) < 0.4  # in standard errors, over 50 comparisons with decoding at that λ
    assert max(map(abs, differences)) < 3.5


def test_an_estimate_is_the_weighted_mean_worked_out_by_hand():
    # two prompts, decoded once at each of λ=0 and λ=1; 0.5 is between
    p = [[0.5, 0.4, 0.2], [0.1, 0.3, 0.6], [0.2, 0.2, 0.2], [0.3, 0.4, 0.5]]
    kl = [[0.0, 1.0, 2.0], [0.0, 3.0, 4.0], [0.0, 5.0, 6.0], [0.0, 7.0, 8.0]]
    rewards = [1.0, 2.0, 3.0, None]
    rows = [
        {
            "arm": "logits", "lambda": float(row % 2), "prompt_index": row // 2, "sample": 0,
            "rewards": {"r": rewards[row]},
            "log_p": [math.log(value) for value in p[row]], "kl_grid": kl[row],
        }
        for row in range(4)
    ]  # fmt: skip
    curve = estimate_curve(rows, [0.0, 0.5, 1.0], ["r"])
    w = [0.4 / (0.5 + 0.2), 0.3 / (0.1 + 0.6), 0.2 / (0.2 + 0.2), 0.4 / (0.3 + 0.5)]
    point = curve.points[1]
    assert point.ess == pytest.approx(sum(w) ** 2 / sum(x * x for x in w))
    assert point.mass == pytest.approx(sum(w) / 2)
    assert not point.drawn, "four samples don't carry a curve"
    assert curve.gaps[0].lam == 0.5

    many = [{**row, "prompt_index": row["prompt_index"] + 2 * copy} for copy in range(50) for row in rows]
    curve = estimate_curve(many, [0.0, 0.5, 1.0], ["r"])
    point = curve.points[1]
    assert curve.needed == 75
    assert point.rewards["r"].mean == pytest.approx((w[0] + 2 * w[1] + 3 * w[2]) / (w[0] + w[1] + w[2]))
    assert point.kl.mean == pytest.approx((w[0] + 3 * w[1] + 5 * w[2] + 7 * w[3]) / sum(w))
    # the pairs of prompts differ: w and w·kl are 1 and (w0 + 3·w1) for one kind, 1 and 6 for the other
    residual = (6 - w[0] - 3 * w[1]) / 2
    assert point.kl.se == pytest.approx(residual / math.sqrt(99))


def test_a_grid_too_far_apart_is_seen_and_not_drawn():
    table, grid = Table(prompts=100, strength=12.0), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 1.5]
    curve = estimate_curve(table.rows([0.0, 1.0], grid, samples=1), grid, ["r"])
    points = by_lam(curve)
    assert curve.needed == 75
    assert points[0.3].ess < 25
    assert points[0.3].kl is points[0.3].rewards["r"] is None
    assert [lam for lam, point in points.items() if point.drawn] == [0.0, 1.0]  # and not 1.5, beyond the measured
    (gap,) = curve.gaps
    assert (gap.low, gap.high) == (0.0, 1.0)
    assert gap.lam == min(grid[1:6], key=lambda lam: points[lam].ess)
    # the λ that it asks for more than doubles the least effective size
    closer = by_lam(estimate_curve(table.rows([0.0, gap.lam, 1.0], grid, samples=1), grid, ["r"]))
    assert min(closer[lam].ess for lam in grid[:7]) > 2 * points[gap.lam].ess
    assert closer[gap.lam].drawn


def test_an_even_set_of_samples_that_misses_what_matters_is_not_drawn():
    """Weights that are all alike have a large effective size, also where they are of texts that π_λ hardly writes."""
    rows = [
        {
            "arm": "logits", "lambda": lam, "prompt_index": index, "sample": 0, "rewards": {},
            "log_p": [-3.0, -9.0, -3.0], "kl_grid": [0.0, 1.0, 2.0],
        }
        for index in range(100)
        for lam in (0.0, 1.0)
    ]  # fmt: skip
    point = estimate_curve(rows, [0.0, 0.5, 1.0], []).points[1]
    assert point.ess == pytest.approx(200)
    assert point.mass == pytest.approx(math.exp(-6))
    assert point.mass < MIN_MASS
    assert not point.drawn


def test_numbers_far_below_what_a_float_holds():
    """A text of 2,000 nats, and prompts that differ by hundreds: nothing under- or overflows on the way."""
    table, grid = Table(prompts=30, strength=1.0), [0.0, 0.5, 1.0, 40.0]
    rows = table.rows([0.0, 1.0], grid, samples=3)
    found = estimate_curve(rows, grid, ["r"])
    shifted = [{**row, "log_p": [value - 2000 - 300 * row["prompt_index"] for value in row["log_p"]]} for row in rows]
    for before, after in zip(found.points, estimate_curve(shifted, grid, ["r"]).points, strict=True):
        assert after.ess == pytest.approx(before.ess)
        assert after.mass == pytest.approx(before.mass)
        assert after.drawn == before.drawn
        assert not before.drawn or after.kl.mean == pytest.approx(before.kl.mean)
    assert not found.points[3].drawn


def test_draws_are_paired_with_the_summaries():
    """Where all λ write the same, the curve's resamples are those of the measured means, one by one."""
    table = Table(prompts=30, strength=0.0)
    rows = table.rows([0.0, 1.0], [0.0, 0.5, 1.0], samples=4)
    half = estimate_curve(rows, [0.0, 0.5, 1.0], ["r"]).points[1].rewards["r"]
    zero, one = (summary.rewards["r"].level for summary in summarise(rows))
    assert half.draws.shape == (RESAMPLES,)
    numpy.testing.assert_allclose(half.draws, (zero.draws + one.draws) / 2)


def test_where_there_is_no_curve():
    pure = Sampling(temperature=0.7)
    assert reason_off(pure) is None
    assert reason_off(pure, wanted=False).startswith("curve is off")
    assert reason_off(replace(pure, temperature=0)).startswith("greedy decoding")
    assert reason_off(replace(pure, top_k=50, top_p=0.9)).startswith("top_k and top_p cut off texts")
    assert reason_off(replace(pure, min_p=0.1)).startswith("min_p cuts off texts")
    assert reason_off(replace(pure, repetition_penalty=1.2)).startswith("repetition_penalty")
    table = Table(prompts=2, strength=1.0)
    curve = estimate_curve(table.rows([0.5], [0.5], samples=1), [0.5], ["r"])
    assert (curve.points, curve.reason) == ([], "estimates between λ need at least two decoded ones")
    with pytest.raises(DeRaError, match=r"must hold each λ that was decoded; 0.5 is not there"):
        estimate_curve(table.rows([0.0, 0.5], [0.0], samples=1), [0.0], ["r"])


def test_a_line_through_points():
    lam, values = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0], [0.0, 1.0, 1.5, 1.2, 1.2, 3.0]
    inner = numpy.linspace(0.25, 1.5, 26)
    assert through_points(lam, values, inner) == pytest.approx(PchipInterpolator(lam, values)(inner))
    assert through_points(lam, values, lam) == pytest.approx(values)
    line = numpy.array(through_points(lam, values, numpy.linspace(0, 2, 201)))
    assert line.min() >= 0
    assert line.max() <= 3
    assert (numpy.diff(line[:51]) >= 0).all(), "it does not swing between points that rise"
    assert through_points([0, 1], [2, 4], [0.25, 1]) == [2.5, 4.0]
    assert through_points([1], [2.0], [1]) == [2.0]
