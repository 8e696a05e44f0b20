"""The rules at a token along completions that are given."""

from collections.abc import Sequence

import torch

from dera_peft.engine.combine import FUNCTIONS, Combined, divergence
from dera_peft.engine.rules import KL_TOTAL, Rule, Schedule


def combine_given(
    rule: Rule,
    schedule: Schedule,
    lam: float,
    log_reference: torch.Tensor,
    log_aligned: torch.Tensor,
    lengths: Sequence[int],
) -> Combined:
    """
    The combined logits at each token of completions, `[N, V]`, and the λ there, `[N]`.

    Args:
        lam: of completions without a schedule.
        log_reference, log_aligned: `[N, V]` fp32, the branches' log-probabilities at the N tokens of all completions.
        lengths: of the completions, whose sum is N.
    """
    device = log_reference.device
    position = torch.cat([torch.arange(length) for length in lengths]).to(device)
    strengths = torch.full_like(position, lam, dtype=torch.float32)
    for start, strength in schedule:
        strengths[position >= start] = strength
    values = torch.full_like(strengths, rule.value or 0.0)
    function = FUNCTIONS[rule.name]
    if rule.name != KL_TOTAL:
        return function(log_reference, log_aligned, strengths, values)
    starts = torch.tensor([0, *lengths[:-1]], device=device).cumsum(0)
    spent = torch.zeros(len(lengths), device=device)
    combined, chosen = torch.empty_like(log_reference), torch.empty_like(strengths)
    for place in range(max(lengths, default=0)):
        of = torch.tensor([index for index, length in enumerate(lengths) if length > place], device=device)
        rows = starts[of] + place
        left = (values[rows] - spent[of]).clamp(min=0)
        combined[rows], chosen[rows] = function(log_reference[rows], log_aligned[rows], strengths[rows], left)
        spent[of] += divergence(combined[rows].log_softmax(-1), log_reference[rows]).clamp(min=0)
    return combined, chosen
