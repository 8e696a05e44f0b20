"""What a server writes down: a row for each completion (`--trace`), a line of JSON for each request."""

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dera_peft.decoding.chats import Chat
from dera_peft.decoding.rows import RowLog
from dera_peft.errors import DeRaError
from dera_peft.formatting import short_repr
from dera_peft.serve.metrics import Metrics

DETAILS = "dera"  # in a scope's state: what an endpoint adds to the line of its request
PATHS = {
    "/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/dera/tokens",
    "/dera/settings",
}  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TraceRow:
    """
    A completion that a server has made, or that was cancelled.

    Attributes:
        run: fingerprint of the model.
        id: of its answer; several completions may share one.
        time: when it was submitted, UTC.
        settings: of its request, those that are not defaults, as they were sent; without prompt and λ.
        lam: λ, or λ by adapter; null without one.
        seed: also where the request named none.
        prompt, columns: the text, token ids or chat, and what the template was given beside.
        finish_reason: "eos", "stop", "length", "cancelled" or "error".
        seconds: from submission to the end; first_token_seconds: to the first token, null without one.
    """

    kind: ClassVar[str] = "traces"
    __repr__ = short_repr

    run: str
    id: str
    time: str
    path: str
    model: str
    lam: float | dict[str, float] | None
    seed: int
    sample: int
    settings: dict[str, Any]
    prompt: str | list[int] | Chat
    columns: dict[str, Any]
    completion: str
    num_tokens: int
    finish_reason: str
    token_ids: list[int]
    seconds: float
    first_token_seconds: float | None


class Trace:
    """A file of `TraceRow`s that further servers continue."""

    def __init__(self, file: str | os.PathLike):
        self.log = RowLog(file, TraceRow, argument="--trace")
        self.log.rows.clear()  # they stay in the file alone

    def write(self, row: TraceRow) -> None:
        """A full disk is told of, and stops no answer."""
        try:
            self.log.append([row])
        except DeRaError as error:
            logger.error(f"--trace: {error}")
        self.log.rows.clear()


def utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def add_details(scope: Mapping[str, Any], **details: Any) -> None:
    """To the line of this request in the access log."""
    scope["state"].setdefault(DETAILS, {}).update(details)


class AccessLog:
    """ASGI middleware, the outermost: counts every answer, and writes a line of JSON for each."""

    def __init__(self, app: ASGIApp, metrics: Metrics, wanted: bool):
        self.app, self.metrics, self.wanted = app, metrics, wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})
        began, started, status = time.time(), time.monotonic(), 499  # nginx's number for a client that went away

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.in_progress += 1
        try:
            await self.app(scope, receive, sending)
        finally:
            self.metrics.in_progress -= 1
            path = scope["path"]
            self.metrics.answers.labels(path if path in PATHS else "other", str(status)).inc()
            if self.wanted:
                client = scope.get("client")
                line = {
                    "time": utc(began),
                    "client": client[0] if client else None,
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "seconds": round(time.monotonic() - started, 4),
                    **scope["state"].get(DETAILS, {}),
                }
                logger.info(json.dumps(line, ensure_ascii=False))
