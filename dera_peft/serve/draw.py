"""Drawing the next token of each sequence from its mixed logits."""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

from dera_peft.decoding.warpers import row_warpers
from dera_peft.engine.noise import as_int64, gumbel_noise
from dera_peft.errors import first_line
from dera_peft.serve.state import Drawn, State

NO_TOKEN = (
    "no token is left to draw: the rule, the grammar, logit_bias and the penalties leave none with a finite logit."
)
NOT_FINITE = "the mixed logits are not finite: a λ this far from 0 and 1 is more than the model's numbers hold."


@torch.no_grad()
def draw(states: Sequence[State], logits: torch.Tensor) -> list[Drawn]:
    """
    One token for each sequence. What goes wrong with one of them is in its place, and harms no other.

    In order: the grammar's mask, logit_bias, the repetition penalty, presence and frequency penalties, temperature,
    top_k, top_p, min_p, and the noise that makes the argmax a sample.

    Args:
        logits: `[B, V]` fp32, z_λ.
    """
    # a rule may leave tokens out by -inf; NaN, +inf and nothing but -inf show in the largest
    is_fine = logits.amax(dim=-1).isfinite().tolist()
    errors: dict[int, str] = {i: NOT_FINITE for i, fine in enumerate(is_fine) if not fine}
    scores = _adjusted(states, logits, errors)
    if scores is not logits:
        left = scores.amax(dim=-1).isfinite().tolist()
        errors = {i: NO_TOKEN for i, fine in enumerate(left) if not fine} | errors
    tokens = _choose(states, scores).tolist()
    logprobs = _logprobs(states, logits, tokens)
    drawn = []
    for i, (state, token) in enumerate(zip(states, tokens, strict=True)):
        if i in errors:
            drawn.append(Drawn(error=errors[i]))
            continue
        if state.request.mask is not None:
            try:
                state.request.mask.accept(token)
            except Exception as error:  # a user's grammar, say: its request's fault alone
                drawn.append(Drawn(error=f"the output can't follow the grammar: {first_line(error)}"))
                continue
        logprob, top = logprobs.get(i, (None, ()))
        drawn.append(Drawn(token, logprob, top))
    return drawn


def _adjusted(states: Sequence[State], logits: torch.Tensor, errors: dict[int, str]) -> torch.Tensor:
    """The logits with masks, biases and penalties; a copy where there are any."""
    scores = logits
    for i, state in enumerate(states):
        request = state.request
        penalty, counts = request.sampling.repetition_penalty, state.counts
        presence, frequency = request.presence_penalty, request.frequency_penalty
        if i in errors or not (
            request.mask is not None or request.logit_bias or penalty != 1 or ((presence or frequency) and counts)
        ):
            continue
        if scores is logits:
            scores = logits.clone()
        row = scores[i]
        if request.mask is not None:
            try:
                allowed = request.mask.allowed()
                row.masked_fill_(~allowed.to(row.device), -torch.inf)
            except Exception as error:  # a user's grammar, say: its request's fault alone
                errors[i] = f"the output can't follow the grammar: {first_line(error)}"
                continue
            if not allowed.any():
                errors[i] = "the output can't follow the grammar: it allows no token here."
        if request.logit_bias:
            places, values = zip(*request.logit_bias, strict=True)
            row[_index(places, row)] += torch.tensor(values, dtype=row.dtype, device=row.device)
        if penalty != 1:  # transformers' RepetitionPenaltyLogitsProcessor, for a row without padding
            places = _index({*request.prompt, *counts}, row)
            there = row[places]
            row[places] = torch.where(there < 0, there * penalty, there / penalty)
        if (presence or frequency) and counts:
            times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
            row[_index(counts, row)] -= presence + frequency * times
    return scores


def _index(tokens, row: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=row.device)


def _choose(states: Sequence[State], scores: torch.Tensor) -> torch.Tensor:
    """`[B]` int64: the argmax, with noise where the temperature is not 0."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    for i, state in enumerate(states):
        alike[state.warping].append(i)
    tokens = torch.empty(len(states), dtype=torch.long, device=scores.device)
    for places in alike.values():
        sampling = states[places[0]].request.sampling
        rows = slice(None) if len(places) == len(states) else torch.tensor(places, device=scores.device)
        some = scores[rows]
        if sampling.temperature > 0:
            some = row_warpers(sampling)(None, some)  # pyrefly: ignore[bad-argument-type] # none of them reads the ids
            keys = as_int64([states[i].key for i in places]).to(scores.device)
            steps = torch.tensor([len(states[i].tokens) for i in places], device=scores.device)
            some = some + gumbel_noise(keys, steps, some.shape[-1])
        tokens[rows] = some.argmax(dim=-1)
    return tokens


def _logprobs(
    states: Sequence[State], logits: torch.Tensor, tokens: list[int]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Those of the requests that asked: of the token, and of the most probable ones."""
    asked = [i for i, state in enumerate(states) if state.request.logprobs is not None]
    if not asked:
        return {}
    of_all = logits[torch.tensor(asked, device=logits.device)].log_softmax(dim=-1)
    most = max(states[i].request.logprobs or 0 for i in asked)
    values, places = (each.tolist() for each in of_all.topk(min(most, of_all.shape[-1]), dim=-1))
    found = {}
    for row, i in enumerate(asked):
        top = list(zip(places[row], values[row], strict=True))[: states[i].request.logprobs]
        top = [(place, value) for place, value in top if math.isfinite(value)]  # a rule may leave fewer tokens
        found[i] = (float(of_all[row, tokens[i]]), tuple(top))
    return found
