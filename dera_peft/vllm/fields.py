"""λ in a request's body as `dera serve`'s own engine has it, for vLLM's server: the field `lambda`, or `name@λ`."""

import json
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dera_peft.decoding.lambdas import NamedLambda, read_lambda
from dera_peft.engine.rules import MAX_LAMBDA
from dera_peft.errors import DeRaError
from dera_peft.serve.errors import APIError
from dera_peft.serve.names import ModelNames
from dera_peft.serve.settings import folder_name
from dera_peft.vllm import requests
from dera_peft.vllm.branches import LAMBDA, REFUSED, Branches, check_names

# Of vLLM's server: where λ goes into a request of the engine, and where the model's name alone is read.
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/invocations",
    "/v1/messages/count_tokens",
    "/tokenize",
)
XARGS = "vllm_xargs"


class LambdaField:
    """
    vLLM drops the fields of a body that it does not know, and λ is to be in `vllm_xargs`. This puts it there.

    It stands before all of vLLM's application (`--middleware`), and reads a body when that asks for it: a client
    without the key is told nothing, and a refusal has the headers of every other answer.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            # the length that a client says is that of another body
            headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
            scope, receive = {**scope, "headers": headers}, _reading(receive, path)
        await self.app(scope, receive, send)


def _reading(receive: Receive, path: str) -> Receive:
    """Gives the body that vLLM is to have, once, and then whatever comes, as that the client is gone."""
    given = False

    async def read() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        content = await _content(receive)
        try:
            body = json.loads(content)
        except ValueError:
            body = None  # vLLM says so
        if isinstance(body, dict):
            try:
                content = json.dumps(for_vllm(body, path)).encode()
            except APIError as error:  # the one exception that vLLM, while it reads a body, makes an answer of
                raise HTTPException(error.status, error.message) from None
        return {"type": "http.request", "body": content, "more_body": False}

    return read


def for_vllm(body: dict[str, Any], path: str) -> dict[str, Any]:
    """
    A body as vLLM has it.

    Raises:
        APIError: see `with_xargs`; or λ is given where vLLM would drop it.
    """
    if requests.current is None:
        raise APIError("this process has no model with an adapter of DeRa", 503)
    if path in PATHS:
        return with_xargs(body, requests.current)
    if body.get(LAMBDA) is not None:
        raise APIError(f"{LAMBDA}: {path} takes none; {', '.join(PATHS[:-2])} do", param=LAMBDA)
    return body


def with_xargs(body: dict[str, Any], branches: Branches) -> dict[str, Any]:
    """
    A body with λ in its `vllm_xargs`, and with the model's plain name.

    Raises:
        APIError: λ is none that the model takes, or something is asked that vLLM would drop.
    """
    xargs = body.get(XARGS) or {}
    if not isinstance(xargs, dict) or not isinstance(body.get("model"), str | None):
        return body  # vLLM says so
    try:
        check_names(body)
    except DeRaError as error:
        raise APIError(str(error)) from None
    if body.get("use_beam_search"):
        raise APIError("use_beam_search: vLLM's beams drop λ; take n and best of them", param="use_beam_search")
    lam, inner = body.get(LAMBDA), xargs.get(LAMBDA)
    if lam is not None and inner is not None:
        raise APIError(f"{LAMBDA}: it is in the body and in {XARGS}: leave one of the two away", param=LAMBDA)
    low, high = branches.lambda_range or (-MAX_LAMBDA, MAX_LAMBDA)
    default = branches.lam if isinstance(branches.lam, (int, float)) else dict(branches.lam)
    names = ModelNames(branches.served, folder_name(branches.base), default, (low, high))
    point = names.read(body.get("model"), _by_name(lam if lam is not None else inner))
    value = str(point) if isinstance(point, NamedLambda) else point
    return {
        **{name: each for name, each in body.items() if name not in (LAMBDA, *REFUSED)},
        "model": names.plain,
        XARGS: {**xargs, LAMBDA: value},
    }


def _by_name(lam: Any) -> Any:
    """`"helpful=0.7,harmless=0.3"` as a mapping."""
    if not isinstance(lam, str) or "=" not in lam:
        return lam
    try:
        return dict(read_lambda([lam], LAMBDA))  # pyrefly: ignore[no-matching-overload] # of a text with "=" it is a mapping
    except DeRaError as error:
        raise APIError(str(error), param=LAMBDA) from None


async def _content(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)
    return b"".join(parts)
