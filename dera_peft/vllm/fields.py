"""λ in a request's body as `dera serve`'s own engine has it, for vLLM's server: the field `lambda`, or `name@λ`."""

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dera_peft.decoding.lambdas import NamedLambda, read_lambda
from dera_peft.engine.rules import MAX_LAMBDA
from dera_peft.errors import DeRaError
from dera_peft.serve.errors import APIError
from dera_peft.serve.names import ModelNames
from dera_peft.serve.settings import folder_name
from dera_peft.vllm import requests
from dera_peft.vllm.branches import LAMBDA, REFUSED, Branches

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
XARGS = "vllm_xargs"


class LambdaField:
    """
    vLLM drops the fields of a body that it does not know, and λ is to be in `vllm_xargs`. This puts it there.

    It stands before vLLM's application (`--middleware`).
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(PATHS):
            await self.app(scope, receive, send)
            return
        content = await _content(receive)
        try:
            body = json.loads(content)
        except ValueError:
            body = None  # vLLM says so
        if isinstance(body, dict) and requests.current is not None:
            try:
                content = json.dumps(with_xargs(body, requests.current)).encode()
            except APIError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(_of_length(scope, len(content)), _giving(content, receive), send)


def with_xargs(body: dict[str, Any], branches: Branches) -> dict[str, Any]:
    """
    A body with λ in its `vllm_xargs`, and with the model's plain name.

    Raises:
        APIError: λ is none that the model takes, or something is asked that vLLM would drop.
    """
    xargs = body.get(XARGS) or {}
    if not isinstance(xargs, dict):
        return body  # vLLM says so
    for name, reason in REFUSED.items():
        if body.get(name) not in (None, "linear", "", {}):
            raise APIError(f"{name}: {reason}", param=name)
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
        return dict(read_lambda([lam]))  # pyrefly: ignore[no-matching-overload] # of a text with "=" it is a mapping
    except DeRaError as error:
        raise APIError(str(error), param=LAMBDA) from None


async def _content(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)
    return b"".join(parts)


def _giving(content: bytes, receive: Receive) -> Receive:
    """Gives the body once, and then whatever comes, as that the client is gone."""
    given = False

    async def give() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return give


def _of_length(scope: Scope, length: int) -> Scope:
    others = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*others, (b"content-length", str(length).encode())]}
