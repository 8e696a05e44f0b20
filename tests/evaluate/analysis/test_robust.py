"""The worst mean over reweightings of the prompts, by numbers worked out by hand and by trying all of a simplex."""

import math

import numpy as np
import pytest

from dera_peft.evaluate.analysis.resamples import Resamples
from dera_peft.evaluate.analysis.robust import worst_mean


def worst(values, radius, counts=None) -> float:
    values = np.array(values, dtype=float)
    return worst_mean(values, np.ones((1, len(values))) if counts is None else np.array([counts]), radius)[0]


def kl(q, p) -> float:
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)


def test_two_prompts_by_hand():
    """q on the worse one has KL q·ln 2q + (1-q)·ln 2(1-q); at ln 2 all weight is there."""
    assert worst([0, 1], kl((0.75, 0.25), (0.5, 0.5))) == pytest.approx(0.25, abs=1e-6)
    assert worst([3, 5], kl((0.9, 0.1), (0.5, 0.5))) == pytest.approx(3.2, abs=1e-6)
    assert worst([0, 1], math.log(2)) == pytest.approx(0, abs=1e-6)
    assert worst([0, 1], 7) == pytest.approx(0, abs=1e-6)
    assert worst([0, 1], 0) == 0.5
    assert worst([0, 1], 1e-8) == pytest.approx(0.5 - 1e-4 / math.sqrt(2), abs=1e-6)  # √(2ρ·variance) below the mean
    # three of four are good: q = 1/2 on the bad one instead of 1/4
    assert worst([0, 1, 1, 1], kl((0.5, 0.5), (0.25, 0.75))) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("radius", [0.01, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("counts", [(1, 2, 1), (1, 0, 3)])
def test_no_weights_of_a_simplex_are_worse(radius, counts):
    values, steps = np.array([0.3, -1.2, 2.0]), 400
    p = np.array(counts) / sum(counts)
    grid = [(a / steps, b / steps, 1 - (a + b) / steps) for a in range(steps + 1) for b in range(steps + 1 - a)]
    inside = [q for q in grid if all(b > 0 or a < 1e-12 for a, b in zip(q, p, strict=True)) and kl(q, p) <= radius]
    least = min(float(np.dot(q, values)) for q in inside)
    assert len(inside) > 2
    found = worst(values, radius, counts)
    assert least - 0.02 < found <= least + 1e-9, "as low as any on the grid, and no lower than its steps"


def test_what_has_no_value_has_no_part():
    assert worst([math.nan, 0, 1], 0.1) == worst([0, 1], 0.1)
    assert worst([2, 2, 2], 1) == 2
    assert math.isnan(worst([1, 0], 1, counts=[0, 0]))
    assert worst([5, 0, 1], 99, counts=[1, 0, 1]) == pytest.approx(1), "the least that was drawn"


def test_its_interval_is_that_of_other_prompts():
    values = np.random.default_rng(0).normal(size=30)
    resamples = Resamples(30)
    found = resamples.worst_mean(values, 0.5)
    assert found.mean == worst(values, 0.5)
    assert found.draws[7] == worst(values, 0.5, resamples.counts[7])
    assert found.low < found.mean < found.high
    one = Resamples(1).worst_mean(np.array([2.0]), 0.5)
    assert (one.mean, math.isnan(one.low)) == (2.0, True)
