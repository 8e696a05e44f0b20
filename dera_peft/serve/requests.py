"""What a server asks of the engine, and what it gets: a request, the events of its tokens, and the whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.rules import LINEAR
from dera_peft.formatting import short_repr

# "eos": the model ended it; "stop": a stop string, or a token of stop_token_ids; "length": max_new_tokens
FinishReason = Literal["eos", "stop", "length", "cancelled", "error"]


class LogitsMask(Protocol):
    """
    Which tokens may come next, as a grammar says. It belongs to one request, is called in the engine's thread, and is
    applied to the mixed logits, before penalties, temperature and everything else. Whatever it raises ends its request
    with an error, and no other.
    """

    def allowed(self) -> torch.Tensor:
        """`[V]` bool, on any device; True for the tokens that may come next, the end tokens where the text may end."""
        ...

    def accept(self, token: int) -> None:
        """A token was drawn; called for each one, the end token too, before `allowed` is asked for the next."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """
    One completion to be made. `Engine.submit` checks it.

    Attributes:
        prompt: token ids, at least one.
        lam: λ, a number or one by aligned adapter; None for the model's own.
        combine: the rule that makes one set of logits of the branches', as `generate` has it: "kl:0.05".
        schedule: `generate`'s lambda_schedule as pairs, ((0, 2.0), (20, 1.0)) for λ=1 from the 20th new token on; none
            for one λ throughout.
        sampling: temperature, top_k, top_p, min_p, repetition penalty, seed and the most new tokens. The same prompt,
            seed and sample draw the same random numbers at every λ and beside any other requests: those of
            `dera generate` with this seed and this prompt alone.
        sample: its number among the completions of its prompt: OpenAI's `n` is n requests, of samples 0 to n-1.
        stop: texts that end it; the completion's text ends before the first of them.
        stop_token_ids: tokens that end it beside the model's own end tokens; left out of the text.
        ignore_eos: go on past the model's end tokens.
        presence_penalty: taken from the logits of tokens that are in the completion (OpenAI).
        frequency_penalty: taken from a token's logit once for each time that it is in the completion (OpenAI).
        logit_bias: (token, value) pairs, added to the logits.
        logprobs: None, or how many of the most probable tokens to report beside the one that was drawn; 0 for it alone.
            They are the mixture's own: log softmax(z_λ), before masks, penalties and temperature.
        stream: whether each event has its text as soon as it can be shown. False: all of it comes with the last event,
            which costs less.
        mask: a grammar.
    """

    __repr__ = short_repr

    prompt: tuple[int, ...]
    lam: float | Mapping[str, float] | None = None
    combine: str = LINEAR
    schedule: tuple[tuple[int, float], ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    sample: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    stream: bool = True
    mask: LogitsMask | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Event:
    """
    A token of a completion, or its end without one ("cancelled" and "error").

    Attributes:
        token: the token id, that of an end token too.
        text: what can be shown now: whole characters that are in no stop string. The texts of all events, joined, are
            the completion's text.
        logprob: of the token, where `logprobs` was asked for.
        top_logprobs: (token, log-probability) of the most probable ones, the most probable first.
        token_lambda: the λ that the request's rule or schedule gave this token; None without one.
        finish_reason: of the last event; None before.
        error: one line for the user, where the reason is "error".
    """

    token: int | None
    text: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    token_lambda: float | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True)
class Generated:
    """
    All of a request's events together.

    Attributes:
        tokens: the new token ids, with the token that ended it.
        text: without special tokens, the end token, and the stop string with what follows it.
        logprobs: of each token; None where not asked for.
        top_logprobs: of each token, as an event has them.
        token_lambda: the λ that the request's rule or schedule gave each token; None without one.
        error: where the reason is "error".
    """

    __repr__ = short_repr

    request: GenerationRequest
    tokens: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    top_logprobs: list[tuple[tuple[int, float], ...]] | None = None
    token_lambda: list[float] | None = None
    error: str | None = None
