"""Decoding many requests, each with its own λ, in batches."""

import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from dera_peft.checkpoint.end_tokens import configured_end_tokens
from dera_peft.decoding.lambdas import Lambda, covering
from dera_peft.decoding.memory import Attempt, go_on_with_half
from dera_peft.decoding.pairs import PromptPairs
from dera_peft.decoding.requests import Completion, Detokenizer, Request
from dera_peft.decoding.room import Room
from dera_peft.decoding.sampling import Sampling
from dera_peft.decoding.warpers import logits_processor
from dera_peft.engine.exact import sample_exact
from dera_peft.engine.generation import PLAIN_GENERATION, plain_generation
from dera_peft.engine.lengths import find_rope_switch, forget_lengths
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.names import WEIGHTS
from dera_peft.engine.noise import row_key
from dera_peft.engine.padding import check_have_rows, pad, padding_id
from dera_peft.engine.plan import BatchPlan
from dera_peft.engine.prefill import Prefill, can_be_shared
from dera_peft.engine.prompts import longest, tokens_of_reference
from dera_peft.engine.rules import LINEAR, Rules, read_rule
from dera_peft.engine.samples import ExactSample
from dera_peft.errors import DeRaError
from dera_peft.messages import warn_once

GROUP_BATCHES = 8  # of a group: one of them may be short
OWN_OPTIONS = {"do_sample", "temperature", "top_k", "top_p", "min_p"}  # of a command; most bases' configs hold others

logger = logging.getLogger(__name__)


class Tokenizer(Detokenizer, Protocol):
    """What decoding needs of a tokenizer."""

    @property
    def pad_token_id(self) -> int | None: ...


@torch.no_grad()
def decode(
    model: MixtureModel | PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
    requests: Sequence[Request],
    sampling: Sampling,
    batch_size: int | None = None,
    streamer: BaseStreamer | None = None,
    *,
    batch_tokens: int | None = None,
    particles: int | None = None,
    reference_prompts: Sequence[Sequence[int]] | Mapping[int, Sequence[int]] | None = None,
) -> Iterator[list[Completion]]:
    """
    Yields each batch of completions as it is finished. A batch mixes λ freely; each row pays for the branches it needs.

    A prompt of several requests is computed once for all of them, in the branches that any of them needs, where the
    model's cache allows it (`prefill.can_be_shared`).

    Batches are made by length, longest prompts first, so that too little memory shows at once; then the tokens that are
    held at once are halved, with a warning.

    Args:
        prompts: token ids by prompt index, from `prompts.encode`.
        model: a `MixtureModel`, or any causal language model. Requests have a λ where a model's branches differ, by
            their adapters or by `reference_prompts`.
        requests: indices into `prompts`.
        batch_size: at most so many completions are decoded at once; `Room.sequences` unless given.
        streamer: of transformers, for a single request.
        batch_tokens: at most so many tokens are held at once (but one request's at least): those of a batch, its new
            ones included, and those of the prompts that are kept for the batches to come; `Room.cached` unless given.
        particles: draws each completion from the exact mixture, with so many sequences (`engine.exact`), which are
            counted as completions that are decoded at once.
        reference_prompts: token ids by prompt index, which the reference reads in place of `prompts`.

    Raises:
        DeRaError: a request has no λ and the model needs one, or the other way round; the model has no row for a token;
            too little memory for a single request; or particles, where tokens are not drawn from the mixture as it is.
    """
    needs_lam = isinstance(model, MixtureModel) and (model.branches_differ or reference_prompts is not None)
    if particles is not None:
        _check_exact(model, requests, sampling)
        if reference_prompts is not None:
            raise DeRaError(f"particles={particles} does not go together with prompts of the reference's own.")
    for request in requests:
        if (request.lam is None) == needs_lam:
            raise DeRaError(
                f"{request}: a request has a λ where branches differ, by an adapter of the model or by their prompts, "
                "and None where they do not."
            )
    pairs = PromptPairs(prompts, reference_prompts)
    check_have_rows(
        model,
        {token for index in {request.index for request in requests} for token in pairs.tokens(index)},
        lambda token: cast("str", tokenizer.decode([token], skip_special_tokens=False)),
    )
    _check_generation_config(model)
    room = Room.of(model)
    batch_size, batch_tokens = batch_size or room.sequences, batch_tokens or room.cached
    filler = padding_id(model, tokenizer.pad_token_id)
    queue = _Queue(model, pairs, requests, batch_size, batch_tokens, sampling.max_new_tokens, particles or 1)
    prefill = None
    while queue:
        if not queue.group:
            prefill = None  # freed before the next one is made
            queue.open_group()
        batch = queue.batch()
        error = None
        if len(batch) == 1 and not queue.kept:
            error = (
                f"out of memory for a single prompt of {pairs.length(batch[0].index)} tokens and "
                f"{sampling.max_new_tokens} new ones{'' if particles is None else f', {particles} particles'}: lower "
                f"max_new_tokens{'' if particles is None else ' or particles'}, or quantize the base (quantization)."
            )
        with Attempt(error) as attempt:
            if queue.kept and prefill is None:
                kept, lam = queue.kept_prompts()
                plan = model.plan(lam, len(kept), by_prompt=pairs.differ) if isinstance(model, MixtureModel) else None
                prefill = Prefill(model, pairs.of(kept), plan, filler, pairs.of_reference(kept))
            places = [queue.kept[queue.prefix(request)] for request in batch] if queue.kept else None
            completions = _decode_batch(
                model, tokenizer, pairs, batch, sampling, filler, streamer, prefill, places, particles
            )
        if attempt.failed:
            prefill = None
            if isinstance(model, MixtureModel):
                model.release_captures()
            tokens = queue.halve(batch)
            go_on_with_half(f"out of memory: going on with half as many tokens at once, {tokens}")
            continue
        queue.finish(batch)
        yield completions


def _check_exact(model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling) -> None:
    """Raises `DeRaError` where something else than the mixture of branches, as it is, would be drawn from."""
    sampling.check_exact()
    if not isinstance(model, MixtureModel) or not model.branches_differ:
        raise DeRaError("particles: without an adapter there is no mixture that they could be drawn from.")
    for request in requests:
        if (request.combine, request.schedule) != (LINEAR, ()):
            name = "combine" if request.combine != LINEAR else "lambda_schedule"
            raise DeRaError(f"{request}: the exact mixture is of λ alone; leave {name} out, or particles.")


def _check_generation_config(model: PreTrainedModel) -> None:
    """Says what of it is left aside, or why it can't be read."""
    config = model.generation_config
    try:
        config.validate()
    except ValueError as error:  # which transformers' generate would not take, whatever it is given beside
        raise DeRaError(f"the base's generation config (generation_config.json) is not valid: {error}") from None
    values = {n: getattr(config, n, None) for n in PLAIN_GENERATION if n not in OWN_OPTIONS}
    # False, 0 and None are the same "off"
    if own := [
        f"{n}={v!r}" for n, v in values.items() if v is not None and (v or None) != (PLAIN_GENERATION[n] or None)
    ]:
        warn_once(
            logger,
            f"the base's generation config sets {', '.join(own)}: left aside, since tokens are drawn by the options of "
            "this command alone",
        )


def _plan(model: MixtureModel, batch: Sequence[Request], by_prompt: bool) -> BatchPlan:
    if batch[0].lam is None:  # nor has any other one
        return model.plan(None, len(batch), by_prompt=by_prompt)
    return model.plan(
        [request.lam for request in batch],
        len(batch),
        combine=[request.combine for request in batch],
        lambda_schedule=[request.schedule for request in batch],
        by_prompt=by_prompt,
    )


def _plain(request: Request) -> Lambda:
    """A λ at which "linear" needs the branches that the request needs."""
    lam = cast("Lambda", request.lam)
    rules = Rules((read_rule(request.combine),), (request.schedule,))
    if rules.is_linear and not request.schedule:
        return lam
    ((reference, aligned),) = rules.needed([cast("float", lam)])  # a rule is for one adapter
    return 0.5 if reference and aligned else float(aligned)


class _Queue:
    """
    The requests that wait, and which of them are decoded at once, each by as many sequences.

    They are taken in groups, each of one kind of lengths. A group's prompts are computed once for all of its requests;
    or it has none to keep.
    What is shared is a prefix: a prompt, and where weights are mixed a λ too, for then keys and values depend on it.

    Attributes:
        group: the requests of the group that are not finished.
        kept: the group's prefixes, each with its place in the prefill.
    """

    def __init__(
        self,
        model,
        pairs: PromptPairs,
        requests,
        batch_size: int,
        batch_tokens: int,
        new_tokens: int,
        sequences: int = 1,
    ):
        self.pairs, self.new_tokens, self.sequences = pairs, new_tokens, sequences
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.mixes_weights = isinstance(model, MixtureModel) and model.mixing == WEIGHTS
        self.counts = Counter(map(self.prefix, requests)) if can_be_shared(model) else Counter()
        self.group: list[Request] = []
        self.kept: dict[tuple, int] = {}
        self.rope_switch = find_rope_switch(model.config)
        # those whose prompt is shared stand together, before the others
        self.waiting = sorted(
            requests,
            key=lambda r: (
                self.counts[self.prefix(r)] < 2,
                -self.length(r),
                r.index,
                r.lam,
                r.combine,
                r.schedule,
                r.sample,
            ),
        )

    def __bool__(self) -> bool:
        return bool(self.group or self.waiting)

    def length(self, request: Request) -> int:
        return self.pairs.length(request.index)

    def held(self, request: Request) -> int:
        """The tokens that it needs at once."""
        return self.sequences * (self.length(request) + self.new_tokens)

    def prefix(self, request: Request) -> tuple:
        return (request.index, request.lam) if self.mixes_weights else (request.index,)

    def kind(self, request: Request) -> Hashable:
        """Of its lengths: another kind's positions would change its own in one batch."""
        if self.rope_switch is None:
            return None
        kinds = {  # the last new token is never read
            self.rope_switch.kind(length, length + self.new_tokens - 1) for length in self.pairs.lengths(request.index)
        }
        if len(kinds) > 1:
            raise DeRaError(
                f"prompt {request.index} has {' and '.join(map(str, self.pairs.lengths(request.index)))} tokens in its "
                "branches, for which this model has different rotary embeddings: they can't be decoded together."
            )
        return kinds.pop()

    def can_be_kept(self, request: Request) -> bool:
        """Whether its prompt is worth keeping, and leaves room for decoding."""
        return self.counts[self.prefix(request)] > 1 and 1 < self.length(request) <= self.batch_tokens // 4

    def open_group(self) -> None:
        """As many prompts as leave few batches short, but in no more than a quarter of the tokens."""
        self.kept, self.kept_length = {}, self.length(self.waiting[0])
        is_kept, kind = self.can_be_kept(self.waiting[0]), self.kind(self.waiting[0])
        for request in self.waiting:
            if self.can_be_kept(request) != is_kept or self.kind(request) != kind:
                break
            if is_kept and self.prefix(request) not in self.kept:
                is_full = len(self.kept) == self.batch_tokens // 4 // self.kept_length
                if is_full or len(self.group) >= GROUP_BATCHES * self.batch_size:
                    break
                self.kept[self.prefix(request)] = len(self.kept)
            self.group.append(request)
        self.waiting = self.waiting[len(self.group) :]

    def kept_prompts(self) -> tuple[list[int], list[Lambda] | None]:
        """Whose prompts are computed once, and for each a λ that needs the branches that any of its requests needs."""
        lambdas: dict[tuple, list] = {prefix: [] for prefix in self.kept}
        for request in self.group:
            lambdas[self.prefix(request)].append(None if request.lam is None else _plain(request))
        indices = [index for index, *_ in self.kept]
        if self.group[0].lam is None:  # nor has any other one
            return indices, None
        return indices, [covering(values) for values in lambdas.values()]

    def batch(self) -> list[Request]:
        """The next requests; those of a group that is kept have less room."""
        room = self.batch_tokens - len(self.kept) * self.kept_length
        each = self.held(self.group[0])
        return self.group[: max(1, min(self.batch_size // self.sequences, room // each))]

    def finish(self, batch: list[Request]) -> None:
        self.group = self.group[len(batch) :]

    def halve(self, batch: list[Request]) -> int:
        """After too little memory for a batch: the group is opened anew, with half of the tokens; returns how many."""
        held = len(self.kept) * self.kept_length + len(batch) * self.held(batch[0])
        self.batch_tokens = min(self.batch_tokens, held) // 2
        self.group, self.waiting = [], [*self.group, *self.waiting]
        return self.batch_tokens


def _decode_batch(
    model: MixtureModel | PreTrainedModel,
    tokenizer: Tokenizer,
    pairs: PromptPairs,
    batch: Sequence[Request],
    sampling: Sampling,
    filler: int,
    streamer: BaseStreamer | None,
    prefill: Prefill | None,
    places: Sequence[int] | None,
    particles: int | None,
) -> list[Completion]:
    """`filler` is the id to pad with; `places` are those of the batch's prompts in `prefill`."""
    has_encoder = model.config.is_encoder_decoder
    # an encoder's positions count from the left, so its padding stands on the right
    indices = [request.index for request in batch]
    input_ids, attention_mask = pad(pairs.of(indices), filler, left=not has_encoder)
    length = input_ids.shape[1]
    padding = (length - attention_mask.sum(-1)).tolist()
    if has_encoder:  # what is generated starts with the decoder's start token, not with the prompt
        length, padding = 1, [0] * len(batch)
    ends = configured_end_tokens(model.generation_config)
    plan = _plan(model, batch, pairs.differ) if isinstance(model, MixtureModel) else None
    inputs: dict[str, Any] = {} if plan is None else {"lam": plan}
    row_length = length
    if (reference := pairs.of_reference(indices)) is not None:
        inputs["reference_inputs"] = tokens_of_reference(model, reference, filler)
        row_length = longest(plan, length, inputs["reference_inputs"]["input_ids"].shape[1])
    if prefill is not None:
        assert places is not None  # they come with it
        new_tokens = sampling.max_new_tokens if particles is None else None  # particles move the cache's rows
        inputs["past_key_values"] = prefill.select(places, row_length, plan, new_tokens)
    forget_lengths(model)
    keys = [row_key(sampling.seed, request.index, request.sample) for request in batch]
    inputs |= {
        "attention_mask": attention_mask.to(model.device),
        "max_new_tokens": sampling.max_new_tokens,
        "pad_token_id": filler,
    }
    samples: Sequence[ExactSample | None] = [None] * len(batch)
    if particles is None:
        sequences = model.generate(
            input_ids.to(model.device),
            **inputs,
            # greedy: the noise in the logits makes the argmax a sample
            logits_processor=logits_processor(sampling, keys, length, padding),
            **plain_generation(),
            streamer=streamer,
        )
        drawn = sequences[:, length:].tolist()
    else:
        assert isinstance(model, MixtureModel)  # `_check_exact` has seen to it
        samples = sample_exact(model, input_ids.to(model.device), particles, keys, **inputs)
        drawn = [sample.tokens for sample in samples]
    traced = inputs["lam"].token_lambda if "lam" in inputs else None
    lambdas: list[list[float]] = [[]] * len(batch) if traced is None else traced.tolist()
    return [
        Completion.of_tokens(request, tokens, ends, tokenizer, token_lambda, sample)
        for request, tokens, token_lambda, sample in zip(batch, drawn, lambdas, samples, strict=True)
    ]
