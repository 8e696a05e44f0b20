"""Random numbers that belong to a prompt and a sample, not to a run, a batch or λ."""

from collections.abc import Sequence
from typing import cast

import torch
from transformers import LogitsProcessor

GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment: 2^64 over the golden ratio, odd
MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The output of splitmix64 at a 64-bit state (Steele, Lea and Flood, 2014)."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def row_key(seed: int, prompt: int, sample: int) -> int:
    """The stream of one sample of one prompt. λ has no part in it: all λ draw the same numbers."""
    key = splitmix64((seed + GAMMA) & MASK)
    key = splitmix64((key + (prompt + 1) * GAMMA) & MASK)
    return splitmix64((key + (sample + 1) * GAMMA) & MASK)


def seed_of(key: int) -> int:
    """The seed whose first sample of the first prompt has this stream: `row_key(seed_of(key), 0, 0) == key`."""
    for _ in range(3):
        key = (_inverse_splitmix64(key) - GAMMA) & MASK
    return key


def _inverse_splitmix64(value: int) -> int:
    """Each step of `splitmix64` is one to one, and the factors are odd."""
    value = _inverse_xorshift(value, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    value = _inverse_xorshift(value, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    return _inverse_xorshift(value, 30)


def _inverse_xorshift(value: int, by: int) -> int:
    """The inverse of `x ^ (x >> by)` on 64 bits, for `by` of 22 or more."""
    return value ^ (value >> by) ^ (value >> 2 * by)


def particle_key(key: int, particle: int) -> int:
    """
    The stream of one of the particles that a sample is drawn from (`particles.Particles`), by the sample's key. The
    first one has the sample's own.
    """
    return key if particle == 0 else splitmix64((~key + particle * GAMMA) & MASK)


def uniform(key: int, number: int) -> float:
    """A number in [0, 1), of a stream beside those of the noise."""
    return (splitmix64((~key - (number + 1) * GAMMA) & MASK) >> 11) * 2.0**-53


def as_int64(keys: Sequence[int]) -> torch.Tensor:
    """64-bit keys as `[B]` int64, whose arithmetic wraps around as theirs does."""
    return torch.tensor([_signed(key) for key in keys], dtype=torch.long)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _splitmix64(state: torch.Tensor) -> torch.Tensor:
    """`splitmix64` of int64 tensors, whose arithmetic wraps around at 2^64 on every device."""
    state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift(state, 31)


def gumbel_noise(keys: torch.Tensor, step: int | torch.Tensor, vocabulary: int) -> torch.Tensor:
    """
    Standard Gumbel noise `[B, V]` (fp32) that depends only on each row's key (`[B]` int64), its step (one for all, or
    `[B]` int64) and the token.

    Adding it to log-probabilities makes their argmax a sample (the Gumbel-max trick). It is -log(-log(u)) for u uniform
    in (0, 1), computed from 1 - u: a float is precise near 0, and it is there that the largest noise comes from.
    """
    streams = _splitmix64(keys + (torch.as_tensor(step, device=keys.device) + 1) * _signed(GAMMA))  # [B]
    tokens = torch.arange(1, vocabulary + 1, device=keys.device)  # [V]
    bits = _splitmix64(streams[:, None] + tokens * _signed(GAMMA))  # [B, V]
    complement = (_shift(~bits, 1).float() + 0.5) * 2.0**-63  # 1 - u, from 2^-64
    exponential = -torch.log1p(-complement.clamp(max=1 - 2.0**-24))
    return -exponential.log()


class GumbelMax(LogitsProcessor):
    """
    Adds each row's own Gumbel noise, so that greedy decoding draws from softmax(scores).

    The same request draws the same numbers in any batch, after any interruption, on a CPU and on a GPU; and different
    λ of one sample draw the same numbers, so that their difference is sharper than their level (common random numbers).
    """

    def __init__(self, keys: Sequence[int], prompt_length: int):
        self.keys = as_int64(keys)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.keys = self.keys.to(scores.device)
        noise = gumbel_noise(self.keys, input_ids.shape[1] - self.prompt_length, scores.shape[-1])
        return cast("torch.FloatTensor", scores + noise.to(scores.dtype))
