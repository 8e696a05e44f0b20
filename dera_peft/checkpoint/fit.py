"""How far one adapter at a fixed λ is from DeRa, which it stands in for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dera_peft.engine.generation import plain_generation
from dera_peft.engine.mixture import MixtureModel
from dera_peft.errors import DeRaError

NEW_TOKENS = 32  # of each prompt's continuation, on which the two are compared


@torch.no_grad()
def compare(model: MixtureModel, lam: Mapping[str, float], other: Any, prompts: Sequence[Sequence[int]]) -> dict:
    """
    Each prompt is continued greedily by DeRa, and both are compared at every new token.

    Args:
        lam: DeRa's, by aligned branch.
        other: what stands in for it, as λ or a plan for one sequence of the same model.
        prompts: token ids.

    Returns:
        `{"kl": mean KL(DeRa ‖ other) in nats a token, "max_kl": ..., "tokens": how many, "prompts": how many}`.

    Raises:
        DeRaError: the model has an encoder.
    """
    if model.config.is_encoder_decoder:
        raise DeRaError("prompts: an export of an encoder-decoder model is not compared; leave the prompts out.")
    divergences = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        sequence = model.generate(ids, lam=dict(lam), **plain_generation(max_new_tokens=NEW_TOKENS))
        keep = {"logits_to_keep": sequence.shape[1] - ids.shape[1] + 1, "use_cache": False}
        log_p = model(sequence, lam=dict(lam), **keep).logits[0, :-1].float().log_softmax(-1)  # [new, V]
        log_q = model(sequence, lam=other, **keep).logits[0, :-1].float().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
    kl = torch.cat(divergences)
    return {"kl": kl.mean().item(), "max_kl": kl.max().item(), "tokens": len(kl), "prompts": len(prompts)}


def describe_fit(fit: dict) -> str:
    """What `compare` returned, as a sentence."""
    if not fit:
        return "How far it is from DeRa was not measured: no prompts were given."
    return (
        f"Measured over {fit['tokens']} tokens that DeRa wrote at this λ (greedily, at most {NEW_TOKENS} a prompt, "
        f"{fit['prompts']} prompts): KL(DeRa ‖ this adapter) is {fit['kl']:.4g} nats a token, at most "
        f"{fit['max_kl']:.4g}."
    )
