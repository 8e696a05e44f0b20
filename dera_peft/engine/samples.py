"""What sequential Monte Carlo gives: a sample, and what its particles say of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

KL_WANTED = 0.1  # nats from the exact mixture; more is worth a word


@dataclass(frozen=True)
class ExactSample:
    """
    A sample of the exact mixture, and what its particles say of it. Logarithms are natural.

    Attributes:
        tokens: the new ones, with the end token if there is one.
        log_z: estimate of log Z = log Σ_y Π_k π_k(y|x)^w_k. For one aligned adapter log Z is at most 0 for λ from 0 to
            1, and at least 0 elsewhere. exp(log_z) has no bias.
        log_z_error: its standard error, estimated from these particles (`Particles.log_z_errors`); None for one.
        effective_size: of the particles at the end, 1/Σ W² of their weights.
        resamplings: how often they were drawn anew.
        ancestors: from how many of the first particles the last ones descend.
        particles: N.
    """

    tokens: list[int]
    log_z: float
    log_z_error: float | None
    effective_size: float
    resamplings: int
    ancestors: int
    particles: int

    @property
    def kl(self) -> float:
        """
        How far the sample's distribution is from the exact mixture, at most, in nats; an estimate.

        The KL divergence is at most that of all random numbers that the sample was made with, log Z - E[log_z]; and
        since exp(log_z) has no bias, that is about half of the variance of log_z.
        """
        return math.inf if self.log_z_error is None else self.log_z_error**2 / 2

    @property
    def particles_wanted(self) -> int:
        """
        With so many it would be near enough: N, or more where the weights were too uneven. The variance of log_z is
        inversely proportional to N.
        """
        if self.log_z_error is None or self.kl <= KL_WANTED:
            return self.particles
        return 2 ** math.ceil(math.log2(self.particles * self.kl / KL_WANTED))


def advice(samples: Sequence[ExactSample]) -> str | None:
    """What to say of the samples whose particles were too few for them; None where they were enough."""
    if any(sample.particles == 1 for sample in samples):
        return "one particle is token-level DeRa, and says nothing of how far that is from the exact mixture; take more"
    far = [sample for sample in samples if sample.particles_wanted > sample.particles]
    if not far:
        return None
    wanted = max(sample.particles_wanted for sample in far)
    return (
        f"the weights of {far[0].particles} particles were too uneven for {len(far)} of {len(samples)} samples, which "
        f"may be farther than {KL_WANTED:g} nats from the exact mixture; about {wanted} particles would do for all"
    )
