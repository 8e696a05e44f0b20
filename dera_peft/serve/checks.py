"""What a request must fulfil before it is put into the queue."""

import math
from collections.abc import Iterable

from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.padding import check_have_rows, num_rows
from dera_peft.errors import DeRaError
from dera_peft.serve.requests import GenerationRequest


def context_of(model: MixtureModel) -> int | None:
    """The most tokens of a prompt and its completion; None where nothing bounds them."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_request(request: GenerationRequest, model: MixtureModel, context: int | None) -> None:
    """
    Raises:
        DeRaError: it can never be decoded.
    """
    length, new = len(request.prompt), request.sampling.max_new_tokens
    if length == 0:
        raise DeRaError("prompt: there is no token in it; give one at least.")
    check_have_rows(model, request.prompt)
    if context is not None and length + new > context:
        raise DeRaError(
            f"prompt: it has {length} tokens, which with {new} new ones (max_new_tokens) is more than the model's "
            f"context of {context}."
        )
    vocabulary = num_rows(model)
    for name in ("presence_penalty", "frequency_penalty"):
        _check_number(name, getattr(request, name))
    for token, value in request.logit_bias:
        _check_tokens("logit_bias", [token], vocabulary)
        _check_number(f"logit_bias of token {token}", value)
    _check_tokens("stop_token_ids", request.stop_token_ids, vocabulary)
    if any(not isinstance(text, str) or not text for text in request.stop):
        raise DeRaError(f"stop={list(request.stop)}: each must be a text of at least one character.")
    if request.logprobs is not None and not 0 <= request.logprobs <= vocabulary:
        raise DeRaError(f"logprobs={request.logprobs}: it must be from 0 to the vocabulary's {vocabulary}.")
    if request.sample < 0:
        raise DeRaError(f"sample={request.sample}: it must be 0 or more.")


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise DeRaError(f"{name}={value!r}: it must be a finite number.")


def _check_tokens(name: str, tokens: Iterable[int], vocabulary: int) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise DeRaError(f"{name}: there is no token {token}; the model's vocabulary has {vocabulary}.")
