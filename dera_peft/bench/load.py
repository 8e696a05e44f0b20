"""Clients of a server: each sends a completion, reads its text as it streams, and sends the next."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any

TIMEOUT = 600.0  # seconds without a byte, after which an answer is lost


@dataclass(frozen=True)
class Answer:
    """
    A completion as its client saw it; times in seconds, of `time.perf_counter`.

    Attributes:
        first: when its first text came.
        ended: when all of it had come.
        error: why it is lost; None where it came.
    """

    sent: float
    first: float
    ended: float
    text: str = ""
    error: str | None = None


def ask(port: int, body: dict[str, Any]) -> Answer:
    """One streamed `POST /v1/completions` to a server on this machine."""
    sent, first, text, finished = time.perf_counter(), None, "", False
    try:
        with closing(HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
            head = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}), head)
            answer = connection.getresponse()
            if answer.status != 200:
                return _lost(sent, f"{answer.status}: {answer.read(500).decode(errors='replace')}")
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    return _lost(sent, str(chunk["error"]))
                for choice in chunk["choices"]:
                    if choice["text"] and first is None:
                        first = time.perf_counter()
                    text += choice["text"]
                    finished = finished or choice.get("finish_reason") is not None
    except (OSError, HTTPException, ValueError) as error:
        return _lost(sent, f"{type(error).__name__}: {error}")
    if not finished:
        return _lost(sent, "it broke off")
    ended = time.perf_counter()
    return Answer(sent, ended if first is None else first, ended, text)


def _lost(sent: float, error: str) -> Answer:
    now = time.perf_counter()
    return Answer(sent, now, now, error=error)


def send(port: int, bodies: Sequence[dict[str, Any]], clients: int, advance: Callable[[int], None]) -> list[Answer]:
    """The answers to all bodies, which so many clients send in their order."""
    pool = ThreadPoolExecutor(clients)
    try:
        futures = [pool.submit(ask, port, body) for body in bodies]
        for _ in as_completed(futures):
            advance(1)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # where it was interrupted, answers are not waited for
