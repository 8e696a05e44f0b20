"""What an engine elsewhere is sent for a request, and the completion that is made of its answer."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dera_peft.decoding.lambdas import Lambda, NamedLambda
from dera_peft.decoding.requests import Completion, Detokenizer, Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.noise import row_key, seed_of
from dera_peft.engine.rules import LINEAR
from dera_peft.errors import DeRaError

MIXED = "lambda"


def sampling_fields(request: Request, sampling: Sampling, ends: Sequence[int], engine: str) -> dict[str, Any]:
    """
    By the names that vLLM's `SamplingParams`, its server and `dera serve` share. All are said, since what is not would
    be the engine's own default.

    Args:
        ends: the ids of the tokens that end a completion, and nothing else does.
    """
    key = row_key(sampling.seed, request.index, request.sample)
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        # dera serve draws from it what a model in this process draws; vLLM takes 63 bits
        "seed": seed_of(key) if engine == "dera" else key >> 1,
        "stop_token_ids": [*ends],
        "ignore_eos": True,
    }


def mixing_fields(lam: Lambda | None, request: Request | None, engine: str) -> dict[str, Any]:
    """λ, and of a request its rule and schedule, as a field of a body."""
    if lam is None:
        return {}
    if engine == "vllm":
        return {"vllm_xargs": {MIXED: lambda_text(lam) if isinstance(lam, NamedLambda) else lam}}
    found: dict[str, Any] = {MIXED: dict(lam) if isinstance(lam, NamedLambda) else lam}
    if request is not None and request.combine != LINEAR:
        found["combine"] = request.combine
    if request is not None and request.schedule:
        del found[MIXED]  # the schedule says it
        found["lambda_schedule"] = {str(position): value for position, value in request.schedule}
    return found


def lambda_text(lam: NamedLambda) -> str:
    """`helpful=0.7,harmless=0.3`, each number with all of its digits."""
    return ",".join(f"{name}={value!r}" for name, value in lam.items())


def read_completion(
    request: Request,
    answer: Any,
    sampling: Sampling,
    ends: Collection[int],
    tokenizer: Detokenizer,
    where: str,
) -> Completion:
    """
    Args:
        answer: with `token_ids`, and `token_lambda` where the request has a rule or a schedule that gives one.
        where: what answered, for messages.

    Raises:
        DeRaError: it is not what this request can become.
    """
    tokens = answer.get("token_ids") if isinstance(answer, Mapping) else None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise DeRaError(f"{where}: an answer has no token ids (token_ids): {str(answer)[:200]!r}.")
    lambdas = answer.get("token_lambda") or []
    made = Completion.of_tokens(request, tokens, ends, tokenizer, lambdas)
    if request.gives_token_lambda and len(lambdas) != len(tokens):
        raise DeRaError(f"{where}: an answer to {request} does not say the λ of each token (token_lambda).")
    ended = made.end_token_id is not None or len(tokens) == sampling.max_new_tokens
    if not ended or len(made.tokens) != len(tokens) or len(tokens) > sampling.max_new_tokens:
        raise DeRaError(
            f"{where}: the completion of {request} has {len(tokens)} tokens and ends "
            f"({answer.get('finish_reason')!r}) neither at one of the tokens {sorted(ends)} nor at max_new_tokens="
            f"{sampling.max_new_tokens}: its context may be shorter, or something else ends completions there."
        )
    return made
