"""How far a mixture is from its reference, token by token."""

from collections.abc import Sequence

import torch

from dera_peft.branches import REFERENCE
from dera_peft.errors import DeRaError
from dera_peft.model import DeRaModel

# Logits of one slice of a batch, all branches and their softmaxes: bounds memory at a vocabulary of 150,000 too.
MAX_LOGITS = 64 * 1024 * 1024


@torch.no_grad()
def token_kl(
    model: DeRaModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    lam: Sequence[float],
) -> list[torch.Tensor]:
    """
    KL(p_λ(·|x, y<t) ‖ p_ref(·|x, y<t)) at each token t of each completion, in nats.

    It is taken between the whole next-token distributions (at temperature 1), not from the log-ratios of the sampled
    tokens: the sum over a sample of π_λ is an estimate of KL(π_λ ‖ π_ref) of lower variance, and never negative.

    Args:
        prompts: token ids, one list per sequence, none empty.
        completions: token ids, one list per sequence.
        lam: λ of each sequence.

    Returns:
        fp32 tensors on the CPU, one per sequence, as long as its completion.
    """
    if model.config.is_encoder_decoder:
        raise DeRaError("the KL of encoder-decoder models is not measured; decode them with dera generate.")
    result: list[torch.Tensor] = [torch.zeros(len(completion)) for completion in completions]
    # at λ=0 the two are one distribution; and nothing was written in an empty completion
    todo = [index for index, strength in enumerate(lam) if strength != 0 and completions[index]]
    longest = max((len(completions[index]) for index in todo), default=0)
    vocabulary = model.config.get_text_config().vocab_size
    step = max(1, MAX_LOGITS // (longest * vocabulary * 2)) if todo else 1
    for start in range(0, len(todo), step):
        chosen = todo[start : start + step]
        for index, kl in zip(chosen, _slice_kl(model, prompts, completions, lam, chosen), strict=True):
            result[index] = kl
    return result


def _slice_kl(model, prompts, completions, lam, chosen: list[int]) -> list[torch.Tensor]:
    sequences = [[*prompts[index], *completions[index]] for index in chosen]
    length = max(map(len, sequences))
    input_ids = torch.zeros(len(chosen), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):  # padded on the left, so that all completions end in the last column
        input_ids[row, length - len(sequence) :] = torch.tensor(sequence)
        attention_mask[row, length - len(sequence) :] = 1
    longest = max(len(completions[index]) for index in chosen)
    output = model(
        input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0).to(model.device),
        lam=[lam[index] for index in chosen],
        output_branches=True,
        use_cache=False,
        logits_to_keep=longest + 1,
    )
    # logits at position t are of the token at t+1
    log_p = output.logits[:, :-1].float().log_softmax(-1)  # [B, longest, V]
    log_ref = output.branch_logits[REFERENCE][:, :-1].float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_ref)).sum(-1).clamp(min=0).cpu()  # [B, longest]
    return [kl[row, longest - len(completions[index]) :] for row, index in enumerate(chosen)]
