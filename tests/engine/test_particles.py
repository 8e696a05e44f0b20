"""Weights of particles, on numbers worked out by hand."""

import math
from collections import Counter

import pytest
import torch

from dera_peft.engine.noise import particle_key, row_key, uniform
from dera_peft.engine.particles import Particles, systematic

KEY = row_key(0, 0, 0)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (0.0, [0, 0, 1, 3]),  # places 0, 0.25, 0.5, 0.75 in sums 0.5, 0.7, 0.7, 1
        (0.5, [0, 0, 1, 3]),  # 0.125, 0.375, 0.625, 0.875
        (0.9, [0, 0, 3, 3]),  # 0.225, 0.475, 0.725, 0.975
    ],
)
def test_systematic_resampling(start, expected):
    weights = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=torch.float64)
    assert systematic(weights, 4, start).tolist() == expected


def test_one_is_drawn_by_its_weight():
    weights = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    counts = Counter(systematic(weights, 1, (number + 0.5) / 1000).item() for number in range(1000))
    assert counts == {0: 100, 1: 600, 2: 300}


def test_weights_effective_sizes_and_log_z():
    particles = Particles(4, [KEY, KEY])
    particles.weigh(torch.tensor([8.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]).log())
    assert particles.weights[0].tolist() == pytest.approx([8 / 11, 1 / 11, 1 / 11, 1 / 11])
    assert particles.effective_sizes.tolist() == pytest.approx([121 / 67, 4])
    assert particles.log_z.tolist() == pytest.approx([math.log(11 / 4), math.log(2)])
    # of independent weights: their standard deviation by their mean, over the root of their number
    assert particles.log_z_errors.tolist() == pytest.approx([math.sqrt(36.75 / 3) / 2.75 / 2, 0.0])


def test_only_the_uneven_are_drawn_anew_and_nothing_of_log_z_is_lost():
    particles = Particles(4, [KEY, KEY])
    particles.weigh(torch.tensor([8.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]).log())
    before = particles.log_z.tolist()
    chosen = particles.resample(step=1)
    assert chosen[4:].tolist() == [4, 5, 6, 7]
    counts = Counter(chosen[:4].tolist())
    assert counts[0] in (2, 3), "4 · 8/11 is between"
    assert set(counts) <= {0, 1, 2, 3}
    assert particles.log_z.tolist() == pytest.approx(before)
    assert particles.resamplings.tolist() == [1, 0]
    assert particles.weights.tolist() == [[0.25] * 4] * 2
    assert particles.ancestors.tolist() == [chosen[:4].tolist(), [0, 1, 2, 3]]
    assert particles.resample(step=2) is None

    particles.weigh(torch.tensor([3.0] * 4 + [1.0] * 4).log())
    assert particles.log_z.tolist() == pytest.approx([math.log(11 / 4 * 3), math.log(2)]), "the product of the means"


def test_the_error_of_descendants():
    """Of ancestors 0 (three particles) and 3 (one): N/(N-1) · ((3/4 - 1/4)² + 2 · (1/4)² + (1/4 - 1/4)²)."""
    particles = Particles(4, [KEY])
    particles.ancestors = torch.tensor([[0, 0, 0, 3]])
    assert particles.log_z_errors.tolist() == pytest.approx([math.sqrt(4 / 3 * (0.25 + 2 * 0.0625))])
    particles.ancestors = torch.tensor([[2, 2, 2, 2]])
    assert particles.log_z_errors.tolist() == pytest.approx([1.0])


def test_streams_are_apart():
    assert particle_key(KEY, 0) == KEY, "the first particle draws as the sample would without particles"
    keys = [row_key(0, prompt, sample) for prompt in range(8) for sample in range(8)]
    streams = [particle_key(key, number) for key in keys for number in range(32)]
    assert len(set(streams)) == len(streams)
    draws = torch.tensor([uniform(key, number) for key in keys for number in range(200)])
    assert 0 <= draws.min() < 0.001
    assert 0.999 < draws.max() < 1
    assert torch.histc(draws, 10).min() > 0.09 * len(draws)
    assert len(draws.unique()) > 0.99 * len(draws)
