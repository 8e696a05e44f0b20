"""What given completions are worth at many λ: their log-probabilities, and how far each λ is from the reference."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from dera_peft.decoding.given_rules import combine_given
from dera_peft.decoding.memory import Attempt, go_on_with_half
from dera_peft.decoding.room import Room
from dera_peft.engine.combine import divergence
from dera_peft.engine.lengths import RopeSwitch, find_rope_switch, forget_lengths
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.names import WEIGHTS
from dera_peft.engine.padding import check_have_rows, pad, padding_id
from dera_peft.engine.plan import BatchPlan
from dera_peft.engine.prefill import Prefill, can_be_shared
from dera_peft.engine.rules import LINEAR, Rule, Schedule, read_rule, read_schedule
from dera_peft.engine.strength import read_strength
from dera_peft.errors import DeRaError


@dataclass(frozen=True)
class Scored:
    """
    One completion of T tokens at L λ; tensors on the CPU, in nats.

    Attributes:
        log_p: `[L, T]` fp32, log p_λ(y_t | x, y_<t) of softmax(z_λ / temperature), each λ with its own normalizer.
        kl: `[L, T]` fp32, KL(p_λ ‖ p_ref) between the whole next-token distributions at temperature 1. Its sum over a
            sample of π_λ estimates KL(π_λ ‖ π_ref) with less variance than the sample's log-ratios, and is never
            negative.
        log_p_at_1: `[L, T]` fp32, as `log_p`, at temperature 1.
        disagreement: `[T]` fp32, the Jensen-Shannon divergence between the branches' next-token distributions at
            temperature 1, all branches weighing the same; None with mixing="weights", which has no branches.
        best: branch name -> its most probable next tokens, (ids `[T, k]` int64, probabilities `[T, k]` fp32), best
            first; empty unless asked for, and with mixing="weights".
        token_lambda: `[L, T]` fp32, the λ that the rule or the schedule gave each token, NaN where the rule has none;
            None at plain λ.
    """

    log_p: torch.Tensor
    kl: torch.Tensor
    log_p_at_1: torch.Tensor
    disagreement: torch.Tensor | None = None
    best: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    token_lambda: torch.Tensor | None = None

    @property
    def total(self) -> torch.Tensor:
        """`[L]` fp32, log p_λ(y | x)."""
        return self.log_p.sum(-1)

    @property
    def per_token(self) -> torch.Tensor:
        """`[L]` fp32, the mean over the tokens; NaN where there are none."""
        return self.log_p.mean(-1)

    @property
    def perplexity(self) -> torch.Tensor:
        """`[L]` fp32, exp of minus the mean; NaN where there are no tokens."""
        return (-self.per_token).exp()


def score(
    model: MixtureModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    lam: Any,
    temperature: float = 1.0,
    top: int = 0,
    *,
    combine: Any = None,
    lambda_schedule: Any = None,
    reference_prompts: Sequence[Sequence[int]] | None = None,
) -> list[Scored]:
    """
    Scores every completion at every λ, from one pass of all branches (with mixing="weights" from one pass a λ).

    Where there are at least twice as many completions as prompts, each prompt is computed once for those of a slice (if
    the model's cache allows it, see `prefill.can_be_shared`).

    Args:
        prompts: token ids, one list per sequence, none empty. Of an encoder-decoder model, the encoder's input.
        completions: token ids, one list per sequence; one may be empty.
        lam: L strengths, all of them for every sequence: a number (L is 1), a list of L, a `[L, K]` tensor for K
            aligned adapters, a dict by aligned branch of numbers or lists of L, or a list of L dicts. None for the
            model's own, for the λ of a schedule, and for a rule without λ.
        temperature: of `log_p`, more than 0.
        top: how many of each branch's most probable tokens to return as `best`.
        combine: the rule at each token, as `generate` takes one.
        lambda_schedule: in λ's place, λ by the position of a completion's token, as {0: 2.0, 20: 1.0}.
        reference_prompts: token ids that the reference reads in place of `prompts`, one list per sequence.

    Returns:
        One per sequence, in their order.

    Raises:
        DeRaError: bad input; or too little memory for a single sequence.
    """
    rule = {"combine": combine, "lambda_schedule": lambda_schedule, "reference_prompts": reference_prompts}
    found = dict(score_each(model, prompts, completions, lam, temperature, top, **rule))
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def score_each(
    model: MixtureModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    lam: Any,
    temperature: float = 1.0,
    top: int = 0,
    *,
    combine: Any = None,
    lambda_schedule: Any = None,
    reference_prompts: Sequence[Sequence[int]] | None = None,
) -> Iterator[tuple[int, Scored]]:
    """
    As `score`, but yields (index, scored) as they are ready, sequences of like lengths together.

    Where there is too little memory for a slice of the sequences it is halved, with a warning.
    """
    strengths = _read_strengths(model, lam, combine, lambda_schedule)
    _check(model, prompts, completions, temperature, top, reference_prompts)
    has_one = reference_prompts is None  # prompt for all branches, which can be computed once
    may_share = has_one and len(prompts) >= 2 * len(set(map(tuple, prompts))) and can_be_shared(model)
    pairs = zip(prompts, prompts if has_one else reference_prompts, strict=True)
    prompt_lengths = [(len(own), len(its)) for own, its in pairs]
    switch = find_rope_switch(model.config)

    def kind(index: int) -> tuple[int, ...]:
        """Of its lengths: another kind's positions would change its own in one pass."""
        if switch is None:
            return ()
        # a sequence's last token is never read
        kinds = {_kind(switch, length + len(completions[index]) - 1) for length in prompt_lengths[index]}
        if len(kinds) > 1:
            raise DeRaError(
                f"sequence {index} has prompts of {prompt_lengths[index]} tokens in its branches, for which this model "
                "has different rotary embeddings: they can't be scored together."
            )
        return kinds.pop()

    waiting = sorted(
        range(len(prompts)),
        key=lambda index: (kind(index), len(prompts[index]), tuple(prompts[index]), len(completions[index])),
    )
    room, halvings = Room.of(model), 0
    while waiting:
        alike = next([*group] for _, group in groupby(waiting, kind))
        shares = may_share and not kind(waiting[0])  # a prompt's keys would be those of its own length
        lengths = [(max(prompt_lengths[index]), len(completions[index])) for index in alike]
        chosen = waiting[: _slice_size(model, lengths, room, halvings, shares)]
        error = None
        if len(chosen) == 1:
            error = (
                f"out of memory for a single sequence of {sum(lengths[0])} tokens: quantize the base (quantization), "
                "or shorten it."
            )
        with Attempt(error) as attempt:
            of = [prompts[index] for index in chosen], [completions[index] for index in chosen]
            reference = None if reference_prompts is None else [reference_prompts[index] for index in chosen]
            scored = _score_slice(model, *of, strengths, temperature, top, shares, reference)
        if attempt.failed:
            halvings += 1
            go_on_with_half(f"out of memory for {len(chosen)} sequences: going on with half as many at once")
            continue
        waiting = waiting[len(chosen) :]
        yield from zip(chosen, scored, strict=True)


def _kind(switch: RopeSwitch, read: int) -> tuple[int, ...]:
    if read <= switch.length:
        return ()
    return (read,) if switch.grows else (switch.length,)


Strengths = tuple[torch.Tensor, Rule, Schedule]  # λ `[L, K]` float64, and the rule and the schedule of all of them


def _read_strengths(model: MixtureModel, lam: Any, combine: Any, lambda_schedule: Any) -> Strengths:
    values = lam.values() if isinstance(lam, Mapping) else [lam]
    counts = [len(value) for value in values if isinstance(value, Sequence) or getattr(value, "ndim", 0)]
    if 0 in counts:
        raise DeRaError(f"lam={lam!r} is empty; give at least one λ.")
    count = max(counts, default=1)
    rule = read_rule(LINEAR if combine is None else combine)
    schedule = read_schedule(lambda_schedule) if lambda_schedule else ()
    values, _ = read_strength(lam, [rule] * count, [schedule] * count, count, model.aligned, model.mixing, model.lam)
    return values, rule, schedule


def _check(model, prompts, completions, temperature, top, reference_prompts) -> None:
    if reference_prompts is None and not model.branches_differ:
        raise DeRaError(
            "this model has no adapter, so that its branches can only differ by prompts: give reference_prompts."
        )
    for name, sequences in (("prompts", prompts), ("reference_prompts", reference_prompts)):
        if sequences is None:
            continue
        if len(sequences) != len(completions):
            raise DeRaError(f"there are {len(sequences)} {name} and {len(completions)} completions: give one for each.")
        if empty := [index for index, prompt in enumerate(sequences) if len(prompt) == 0]:
            raise DeRaError(f"{name}[{empty[0]}] is empty: a completion's first token needs one before it.")
    if not 0 < temperature < math.inf:
        raise DeRaError(f"temperature={temperature!r} must be more than 0: greedy decoding has no probabilities.")
    vocabulary = model.config.get_text_config().vocab_size
    if not 0 <= top <= vocabulary:
        raise DeRaError(f"top={top!r} must be from 0 to the vocabulary's {vocabulary} tokens.")
    read = (*prompts, *completions, *(reference_prompts or ()))
    check_have_rows(model, {token for sequence in read for token in sequence})


def _slice_size(
    model: MixtureModel, lengths: Sequence[tuple[int, int]], room: Room, halvings: int, shares: bool
) -> int:
    """How many of the first sequences, of (prompt, completion) lengths, to take at once; at least one."""
    vocabulary = model.config.get_text_config().vocab_size
    passes = 2 if model.mixing == WEIGHTS else len(model.branches)  # whose logits are held at once
    first_prompt = lengths[0][0]  # the shortest
    whole = max(map(sum, lengths))  # what the model can read; some have no masks or biases for more, not even padded
    longest_prompt = longest_completion = longest = 0
    for count, (prompt, completion) in enumerate(lengths, start=1):
        longest_prompt, longest_completion = max(longest_prompt, prompt), max(longest_completion, completion)
        longest = longest_prompt + longest_completion if shares else max(longest, prompt + completion)
        tokens = count * longest * passes
        logits = count * (longest_completion if shares else longest - first_prompt) * passes * vocabulary
        is_full = longest > whole or tokens > room.tokens >> halvings or logits > room.logits >> halvings
        if count > 1 and is_full:
            return count - 1
    return len(lengths)


def _score_slice(
    model: MixtureModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    strengths: Strengths,
    temperature: float,
    top: int,
    shares: bool,
    reference_prompts: Sequence[Sequence[int]] | None,
) -> list[Scored]:
    """The tokens of all completions stand in one dimension, N, in which there is no padding."""
    lam, rule, schedule = strengths
    lengths = [len(completion) for completion in completions]
    chosen: list[torch.Tensor] = []
    is_plain = rule.name == LINEAR and not schedule
    inputs = prompts, completions, shares
    if model.mixing == WEIGHTS:
        branches: dict[str, torch.Tensor] = {}
        log_ref = _log_probs(model, *inputs, torch.zeros_like(lam[0]))[""]
        mixtures = (_log_probs(model, *inputs, each)[""] for each in lam)
    else:
        branches = _log_probs(model, *inputs, reference_prompts=reference_prompts)
        log_ref, *log_aligned = branches.values()
        differences = [log_k - log_ref for log_k in log_aligned] if is_plain else []

        def by_rule(lam: float) -> torch.Tensor:
            combined, of_tokens = combine_given(rule, schedule, lam, log_ref, log_aligned[0], lengths)
            chosen.append(of_tokens.cpu())
            return combined

        mixtures = (_mix(log_ref, differences, each) if is_plain else by_rule(float(each)) for each in lam)
    targets = torch.tensor([token for completion in completions for token in completion], device=log_ref.device)
    targets = targets.long()[:, None]
    log_p, kl, log_p_at_1 = [], [], []
    for mixed, strength in zip(mixtures, lam, strict=True):
        log_mixed = mixed.log_softmax(-1)
        log_p_at_1.append(log_mixed.gather(-1, targets)[:, 0].cpu())
        if temperature == 1:
            log_p.append(log_p_at_1[-1])
        else:
            log_p.append((mixed / temperature).log_softmax(-1).gather(-1, targets)[:, 0].cpu())
        if not is_plain:  # which may leave tokens out
            kl.append(divergence(log_mixed, log_ref).clamp(min=0).cpu())
            continue
        kl.append(torch.linalg.vecdot(log_mixed.exp(), log_mixed.sub_(log_ref)).clamp(min=0).cpu())
        if not strength.any():
            kl[-1].zero_()  # without the rounding

    parts = [torch.stack(values).split(lengths, dim=1) for values in (log_p, kl, log_p_at_1)]
    if not branches:
        return [Scored(*values) for values in zip(*parts, strict=True)]
    parts.append(_disagreement(list(branches.values())).split(lengths))
    best: dict[str, list] = {}
    for name, log_probs in branches.items() if top else ():
        most, ids = log_probs.topk(top)
        best[name] = list(zip(ids.cpu().split(lengths), most.exp().cpu().split(lengths), strict=True))
    lambdas = torch.stack(chosen).split(lengths, dim=1) if chosen else [None] * len(lengths)
    return [
        Scored(*values, best={name: pairs[index] for name, pairs in best.items()}, token_lambda=lambdas[index])
        for index, values in enumerate(zip(*parts, strict=True))
    ]


def _mix(log_ref: torch.Tensor, differences: Sequence[torch.Tensor], strengths: torch.Tensor) -> torch.Tensor:
    """z_λ = z_ref + Σ λ_k·(z_k - z_ref), but for a constant in each row, which no softmax sees."""
    mixed = log_ref
    for difference, strength in zip(differences, strengths.tolist(), strict=True):
        if strength != 0:
            mixed = torch.add(mixed, difference, alpha=strength)
    return mixed


def _disagreement(log_probs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The Jensen-Shannon divergence of `[N, V]` distributions of the same weight: mean KL from their mean; `[N]`."""
    log_mean = log_probs[0]
    for other in log_probs[1:]:
        log_mean = torch.logaddexp(log_mean, other)
    log_mean = log_mean - math.log(len(log_probs))
    divergences = [(each.exp() * (each - log_mean)).sum(-1) for each in log_probs]
    return torch.stack(divergences).mean(0).clamp(min=0).cpu()


def _log_probs(
    model: MixtureModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    shares: bool,
    strengths: torch.Tensor | None = None,
    reference_prompts: Sequence[Sequence[int]] | None = None,
) -> dict[str, torch.Tensor]:
    """
    Branch name -> log-probabilities `[N, V]` (fp32) of every token at each place of the completions; with `strengths`
    (`[K]`), those of the mixture, under the name "". With `shares` each prompt is computed once.
    """
    lengths = [len(completion) for completion in completions]
    if not any(lengths):
        nothing = torch.zeros(0, model.config.get_text_config().vocab_size)
        return dict.fromkeys([""] if strengths is not None else model.adapters, nothing)

    by_prompt = reference_prompts is not None

    def plan(count: int) -> BatchPlan:
        lam = None if strengths is None else strengths.expand(count, -1)
        return model.plan(lam, count, strengths is None, by_prompt=by_prompt)

    filler = padding_id(model, None)
    if reference_prompts is not None:  # what is given are the branches' rows, of the reference first
        prompts = [*reference_prompts, *list(prompts) * len(model.aligned)]
        completions = list(completions) * len(model.branches)

    def padded(sequences: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = pad(sequences, filler, left=False)
        return {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}

    # A sequence's last token is predicted and never read. Padding stands on the right, where causal models do not see
    # it: they need no positions, and each sequence is scored as if it were alone. Prompts that are computed once are
    # padded on the left, as in decoding: what follows each of them begins in one column of the cache.
    inputs: dict[str, Any] = {"lam": plan(len(lengths)), "use_cache": False}
    starts = [0] * len(prompts)
    if model.config.is_encoder_decoder:
        labels, _ = pad(completions, filler, left=False)
        inputs["decoder_input_ids"] = model.base.prepare_decoder_input_ids_from_labels(labels.to(model.device))
        inputs |= padded(prompts)
    elif shares and len(prompts) > 1 and max(map(len, prompts)) > 1:
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        prefill = Prefill(model, list(places), plan(len(places)), filler)
        of = [places[tuple(prompt)] for prompt in prompts]
        inputs |= prefill.inputs_of(of, [completion[:-1] for completion in completions], inputs["lam"])
    else:
        inputs |= padded([[*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)])
        first = min(map(len, prompts)) - 1
        inputs["logits_to_keep"] = inputs["input_ids"].shape[1] - first
        starts = [len(prompt) - 1 - first for prompt in prompts]
    forget_lengths(model)
    output = model(output_branches=strengths is None, **inputs)
    logits = output.branch_logits if strengths is None else {"": output.logits}
    log_probs = {}
    for place, (name, values) in enumerate(logits.items()):
        own = starts[place * len(lengths) :] if by_prompt else starts  # of this branch's rows
        rows = [row[start : start + length] for row, start, length in zip(values, own, lengths, strict=False)]
        log_probs[name] = torch.cat(rows).float().log_softmax(-1)
    return log_probs
