"""
What the rules at a token compute: the logits of a reference and an aligned branch become one.

Each is a pure function of raw logits, before temperature and truncation, in fp32:

    (reference `[B, V]`, aligned `[B, V]`, λ `[B]`, its parameter `[B]`) -> combined logits `[B, V]`, effective λ `[B]`

A token whose logit is -inf (or as low as -1e30) in a branch that has a part in the mixture is impossible in it.
"""

import math
from collections.abc import Callable

import torch

from dera_peft.engine.rules import AAD, JSD, KL, KL_TOTAL, LINEAR, PLAUSIBLE

IMPOSSIBLE = -1e30  # some models exclude a token by the lowest number of their dtype
BISECTIONS = 24  # as many as a float32 has digits
# below the bound, so that it also holds as another sum in fp32 has it
MARGIN, NATS_MARGIN = 1e-5, 1e-6

Combined = tuple[torch.Tensor, torch.Tensor]


def mix(reference: torch.Tensor, aligned: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """z_λ = (1-λ)·z_ref + λ·z_aligned (DeRa; Liu et al., arXiv 2402.02992)."""
    lam = lam[:, None]
    mixed = (1 - lam) * reference.clamp(min=IMPOSSIBLE) + lam * aligned.clamp(min=IMPOSSIBLE)
    impossible = ((reference <= IMPOSSIBLE) & (lam != 1)) | ((aligned <= IMPOSSIBLE) & (lam != 0))
    return mixed.masked_fill(impossible, -math.inf)


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(logits <= IMPOSSIBLE, -math.inf).log_softmax(-1)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) in nats, `[B, V]` log-probabilities to `[B]`."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def linear(reference: torch.Tensor, aligned: torch.Tensor, lam: torch.Tensor, value: torch.Tensor) -> Combined:
    """z_λ, as it is."""
    return mix(reference, aligned, lam), lam


def keep_plausible(combined: torch.Tensor, judge: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """
    Of the combined logits those of the tokens with p_judge ≥ α·max p_judge, the others -inf (the constraint of
    contrastive decoding; Li et al., arXiv 2210.15097). The maximum is over the tokens that are possible in both.
    """
    judge = judge.masked_fill(combined == -math.inf, -math.inf)
    return combined.masked_fill(judge < judge.amax(-1, keepdim=True) + alpha.log()[:, None], -math.inf)


def plausible(reference: torch.Tensor, aligned: torch.Tensor, lam: torch.Tensor, alpha: torch.Tensor) -> Combined:
    """z_λ of the tokens that are plausible to the aligned branch, for λ<0 to the reference."""
    judge = torch.where(lam[:, None] < 0, reference, aligned)
    return keep_plausible(mix(reference, aligned, lam), judge, alpha), lam


def aad(reference: torch.Tensor, aligned: torch.Tensor, lam: torch.Tensor, alpha: torch.Tensor) -> Combined:
    """
    Alignment-aware decoding (arXiv 2509.26169): log p_aligned - log p_ref of the tokens that are plausible to the
    aligned branch. It has no λ, and gives NaN for it.
    """
    ratio = aligned.clamp(min=IMPOSSIBLE) - reference.clamp(min=IMPOSSIBLE)
    ratio = ratio.masked_fill((reference <= IMPOSSIBLE) | (aligned <= IMPOSSIBLE), -math.inf)
    return keep_plausible(ratio, aligned, alpha), torch.full_like(lam, math.nan)


def kl(reference: torch.Tensor, aligned: torch.Tensor, lam: torch.Tensor, epsilon: torch.Tensor) -> Combined:
    """
    z_λ at the largest |λ_t| ≤ |λ|, of λ's sign, with KL(p_λt ‖ p_ref) ≤ ε nats.

    KL grows with |λ| (its derivative is λ·Var_pλ(z_aligned - z_ref)), so λ_t is found by halving an interval, whose
    lower end always keeps the bound.
    """
    log_reference = log_probs(reference)
    bound = epsilon * (1 - MARGIN) - NATS_MARGIN

    def is_within(strength: torch.Tensor) -> torch.Tensor:
        return divergence(mix(reference, aligned, strength).log_softmax(-1), log_reference) <= bound

    lowest, highest = torch.zeros_like(lam), lam
    for _ in range(BISECTIONS):
        middle = (lowest + highest) / 2
        is_lower = is_within(middle)
        lowest, highest = torch.where(is_lower, middle, lowest), torch.where(is_lower, highest, middle)
    chosen = torch.where(is_within(lam), lam, lowest)
    return mix(reference, aligned, chosen), chosen


def jsd(reference: torch.Tensor, aligned: torch.Tensor, lam: torch.Tensor, value: torch.Tensor) -> Combined:
    """
    z_λ at λ_t = λ·JSD(p_ref, p_aligned) / ln 2: strong where the branches disagree (after AdaCAD, arXiv 2409.07394).
    """
    log_reference, log_aligned = log_probs(reference), log_probs(aligned)
    log_mean = torch.logaddexp(log_reference, log_aligned) - math.log(2)
    disagreement = (divergence(log_reference, log_mean) + divergence(log_aligned, log_mean)) / 2
    chosen = lam * (disagreement / math.log(2)).clamp(0, 1)
    return mix(reference, aligned, chosen), chosen


# what is left of the budget of "kl_total" is the bound of the next token
FUNCTIONS: dict[str, Callable[..., Combined]] = {
    LINEAR: linear, PLAUSIBLE: plausible, AAD: aad, KL: kl, KL_TOTAL: kl, JSD: jsd,
}  # fmt: skip
