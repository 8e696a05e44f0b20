"""What a forward pass of the mixture returns."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class MixtureOutput(CausalLMOutputWithPast):
    """
    `CausalLMOutputWithPast` of the mixture, with the branches' own logits where they were asked for.

    Attributes:
        logits: `[B, S, V]`, z_λ = (1-λ)·z_ref + λ·z_aligned.
        branch_logits: branch name -> `[B, S, V]`, with `output_branches=True`.
        encoder_last_hidden_state: `[R, S, D]`, a row for each branch of each sequence (encoder-decoder models only).
        token_lambda: `[B, S]` fp32, the λ that `combine` chose at each place, NaN where the rule has none; None where
            all sequences are linear.
        token_spent: `[B, S]` fp32, KL(p ‖ p_ref) in nats where the rule is "kl_total", else 0; None likewise.
        log_z: `[B, S]` fp32, with `output_log_z=True`: log Σ_v Π_k p_k(v)^w_k over the vocabulary, with the branches'
            weights w. The logits are then log Π_k p_k^w_k, in fp32.
    """

    branch_logits: dict[str, torch.Tensor] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    token_lambda: torch.Tensor | None = None
    token_spent: torch.Tensor | None = None
    log_z: torch.Tensor | None = None
