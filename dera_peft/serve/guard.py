"""What a request must fulfil before anything reads it: its host, its origin, its key, its size."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dera_peft.serve.errors import APIError
from dera_peft.serve.settings import is_loopback

OPEN = {"/", "/health"}  # need no key: the page asks for it, and neither says anything of the model


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:  # an address that is none belongs to nobody
        return urlsplit("")


@dataclass(frozen=True)
class Guard:
    """
    ASGI middleware. Whatever it refuses is answered in OpenAI's form.

    Args:
        keys: that clients may send; none asks for no key, and answers to this machine's own names alone, so that no web
            page can reach the server under a name of its own (DNS rebinding).
        host: that the server listens at.
        origins: of web pages that may call it beside its own; "*" for any.
        max_body: bytes.
    """

    app: ASGIApp
    keys: Sequence[bytes]
    host: str
    origins: Sequence[str]
    max_body: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
            body = await self._read(headers, receive)
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _Replay(body, receive), send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self.keys:
            name = _split(f"//{host}").hostname or ""
            if not (is_loopback(name) or name == self.host):
                raise APIError(f"this server does not answer to the name {host!r}", 403, code="host_not_allowed")
        origin = headers.get("origin")
        is_own = origin is not None and _split(origin).netloc == host
        if origin is not None and not is_own and "*" not in self.origins and origin not in self.origins:
            raise APIError(
                f"pages of {origin} may not call this server: --allow-origin allows them",
                403,
                code="origin_not_allowed",
            )
        # a browser asks without the key whether another origin may call; the answer says nothing of the model
        if self.keys and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            self._check_key(headers.get("authorization", ""))

    def _check_key(self, authorization: str) -> None:
        kind, _, given = authorization.partition(" ")
        sent = given.strip().encode("latin-1")  # the bytes that came
        # each is compared, in a time that does not tell how much of it agrees
        agrees = [hmac.compare_digest(sent, key) for key in self.keys]
        if kind.lower() != "bearer" or not any(agrees):
            raise APIError(
                "this server asks for a key: send it as Authorization: Bearer KEY", 401, code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; None where the client went away."""
        too_large = APIError(f"the body has more than the {self.max_body} bytes that this server takes", 413)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_body:
            raise too_large
        body, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body.append(message.get("body", b""))
            size += len(body[-1])
            if size > self.max_body:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(body)


class _Replay:
    """The body that was read, once; then what the client does."""

    def __init__(self, body: bytes, receive: Receive):
        self.message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self.receive = receive

    async def __call__(self) -> Message:
        message, self.message = self.message, None
        return await self.receive() if message is None else message
