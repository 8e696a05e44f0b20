"""Particles of sequential Monte Carlo: their weights, how they are drawn anew, and what they say of log Z."""

import math
from collections.abc import Sequence

import torch

from dera_peft.engine.noise import particle_key, uniform

UNEVEN = 0.5  # of the particles: where their effective number is less, they are drawn anew


class Particles:
    """
    The weights of N particles for each of B prompts, on the host in fp64.

    Args:
        count: N.
        keys: of the random numbers, one for each prompt.

    Attributes:
        log_weights: `[B, N]`, since the particles were last drawn anew.
        ancestors: `[B, N]`, which of the first N particles each one descends from.
        resamplings: `[B]`, how often a prompt's particles were drawn anew.
    """

    def __init__(self, count: int, keys: Sequence[int]):
        self.count, self.keys = count, keys
        self.log_weights = torch.zeros(len(keys), count, dtype=torch.float64)
        self.ancestors = torch.arange(count).repeat(len(keys), 1)
        self.resamplings = torch.zeros(len(keys), dtype=torch.long)
        self._log_z = torch.zeros(len(keys), dtype=torch.float64)  # up to the last resampling

    @property
    def row_keys(self) -> list[int]:
        """Of the noise of each of the `B·N` rows. A prompt's first row has the prompt's own, as without particles."""
        return [particle_key(key, number) for key in self.keys for number in range(self.count)]

    def weigh(self, log_factors: torch.Tensor) -> None:
        """Multiplies the weights by the exponentials of `log_factors`, `[B·N]`."""
        self.log_weights += log_factors.double().cpu().view_as(self.log_weights)

    def resample(self, step: int) -> torch.Tensor | None:
        """
        Draws the particles of the prompts whose weights are uneven from among themselves, each with the same weight.

        Args:
            step: the number of tokens that they have.

        Returns:
            For each of the `B·N` rows the one whose place it takes, int64; None where all stay.
        """
        weights = self.weights
        uneven = self.effective_sizes < UNEVEN * self.count
        if not uneven.any():
            return None
        chosen = torch.arange(self.count).repeat(len(self.keys), 1)
        for place in uneven.nonzero()[:, 0].tolist():
            chosen[place] = systematic(weights[place], self.count, uniform(self.keys[place], step + 1))
        self._log_z = torch.where(uneven, self.log_z, self._log_z)
        self.log_weights[uneven] = 0
        self.ancestors = self.ancestors.gather(1, chosen)
        self.resamplings += uneven
        return (chosen + self.count * torch.arange(len(self.keys))[:, None]).flatten()

    def draw(self) -> list[int]:
        """A row for each prompt, drawn by the weights."""
        drawn = [systematic(each, 1, uniform(key, 0)) for each, key in zip(self.weights, self.keys, strict=True)]
        return [place * self.count + int(chosen) for place, chosen in enumerate(drawn)]

    @property
    def weights(self) -> torch.Tensor:
        """`[B, N]`; those of a prompt sum to 1."""
        return self.log_weights.softmax(-1)

    @property
    def effective_sizes(self) -> torch.Tensor:
        """`[B]`, 1/Σ W², from 1 to N."""
        return 1 / self.weights.square().sum(-1)

    @property
    def log_z(self) -> torch.Tensor:
        """`[B]`, the log of the product of the mean weights at each resampling and now. exp(log_z) has no bias."""
        return self._log_z + self.log_weights.logsumexp(-1) - math.log(self.count)

    @property
    def log_z_errors(self) -> torch.Tensor:
        """
        `[B]`, estimates of the standard errors of `log_z`, of at least two particles.

        With S_e the weight of all that descend from the first particle e, the variance is N/(N-1) Σ_e (S_e - 1/N)²
        (after Chan and Lai, "A general theory of particle filters in hidden Markov models and some applications",
        2013). Before any resampling it is that of a mean of N weights; where one ancestor is left it is 1, and says no
        more than that the error is large.
        """
        shares = torch.zeros_like(self.log_weights).scatter_add_(1, self.ancestors, self.weights)
        variance = self.count / (self.count - 1) * (shares - 1 / self.count).square().sum(-1)
        return variance.clamp(max=1).sqrt()  # 1 but for rounding, at most


def systematic(weights: torch.Tensor, count: int, start: float) -> torch.Tensor:
    """
    Systematic resampling: `count` indices into `weights` (`[N]`, of sum 1), ascending, each as often as count times its
    weight says, rounded up or down.

    Args:
        start: uniform in [0, 1).
    """
    places = (torch.arange(count, dtype=weights.dtype) + start) / count
    return torch.searchsorted(weights.cumsum(0), places, right=True).clamp(max=len(weights) - 1)
