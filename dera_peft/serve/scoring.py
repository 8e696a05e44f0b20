"""What needs a pass of its own: log-probabilities of a prompt, and each token with what each branch would have said."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dera_peft.decoding.lambdas import Lambda
from dera_peft.decoding.room import Room
from dera_peft.decoding.scoring import score
from dera_peft.decoding.token_views import token_texts, token_views
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.padding import check_have_rows
from dera_peft.engine.plan import read_lam
from dera_peft.serve.errors import APIError
from dera_peft.serve.forms import TokenLogprob, token_logprob
from dera_peft.serve.text import TextStream


@torch.no_grad()
def prompt_logprobs(
    model: MixtureModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    text: str,
    lam: Lambda | None,
    top: int,
) -> list[TokenLogprob]:
    """
    Log-probabilities of a prompt's tokens under the mixture, and the `top` most probable ones in each place. The first
    token has none.

    Args:
        text: the prompt's, in which the tokens stand.
    """
    lengths = _lengths(tokenizer, prompt, text)
    found = [token_logprob(tokenizer, None, prompt[0], None, [], lengths[0])]
    if len(prompt) == 1:
        return found
    check_have_rows(model, set(prompt))
    _check_room(model, len(prompt))
    logits = model(torch.tensor([prompt], device=model.device), lam=lam, use_cache=False).logits
    log_probs = logits[0, :-1].float().log_softmax(-1)
    values = log_probs.gather(-1, torch.tensor(prompt[1:], device=log_probs.device)[:, None])[:, 0].tolist()
    best = log_probs.topk(top)
    for place, value in enumerate(values):
        most = zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True)
        before, token = prompt[place : place + 2]
        found.append(token_logprob(tokenizer, before, token, value, list(most), lengths[place + 1]))
    return found


def _lengths(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], text: str) -> list[int]:
    """Characters that each token adds to the text; none that its special tokens add which are not written there."""
    special, stream = {*tokenizer.all_special_ids}, TextStream(tokenizer)
    found, place = [], 0
    for token in prompt:
        before = stream.length
        stream.add(token)
        length = stream.length - before
        if token in special:
            name = str(tokenizer.decode([token]))
            length = len(name) if text.startswith(name, place) else 0
        found.append(length)
        place += length
    return found


def scored_tokens(
    model: MixtureModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    completion: Sequence[int],
    lam: Lambda,
    top: int,
) -> dict[str, Any]:
    """
    The body of `/dera/tokens`.

    Returns:
        `{"log_p", "kl", "branches": […], "tokens": [{"token": text, "id", "js", "log_p", "kl", "branch_log_p": {branch:
        nats}, branch: [[text, probability], …]}]}`, in nats; branches only where logits are mixed.
    """
    _check_room(model, len(prompt) + len(completion))
    # each branch by itself too: λ=0 is the reference, and an aligned branch has 1 at its own place
    own = torch.eye(len(model.aligned), dtype=torch.float64)
    wanted = torch.cat([read_lam(lam, 1, model.aligned), torch.zeros_like(own[:1]), own])
    (scored,) = score(model, [prompt], [completion], wanted, top=top)
    if scored.disagreement is None:
        texts = token_texts(prompt, completion, tokenizer)
        views: list[dict[str, Any]] = [{"token": text, "js": 0.0} for text in texts]
    else:
        views = token_views(scored, prompt, completion, tokenizer)
    (log_p, *of_branches), kl = scored.log_p.tolist(), scored.kl[0].tolist()
    names = list(scored.best)
    return {
        "log_p": sum(log_p),
        "kl": sum(kl),
        "branches": names,
        "tokens": [
            {
                "id": token,
                "log_p": log_p[place],
                "kl": kl[place],
                "branch_log_p": {name: each[place] for name, each in zip(names, of_branches, strict=bool(names))},
                **view,
            }
            for place, (token, view) in enumerate(zip(completion, views, strict=True))
        ],
    }


def _check_room(model: MixtureModel, length: int) -> None:
    passes = len(model.branches)
    vocabulary = model.config.get_text_config().vocab_size
    if length * passes * vocabulary > (most := Room.of(model).logits):
        raise APIError(
            f"{length} tokens are too many to be scored here at once; at most {most // (passes * vocabulary)} are",
            code="context_length_exceeded",
        )
