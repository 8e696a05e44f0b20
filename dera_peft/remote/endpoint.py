"""Completions of a running server: of `dera serve`, or of vLLM's with the plugin."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx2
from anyio.from_thread import BlockingPortal, start_blocking_portal

from dera_peft.decoding.decoder import Prompts
from dera_peft.decoding.requests import Completion, Detokenizer, Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.errors import DeRaError, first_line
from dera_peft.messages import warn_once
from dera_peft.remote.forms import mixing_fields, read_completion, sampling_fields
from dera_peft.remote.settings import KEY_VARIABLE, RemoteSettings

WAITS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)  # seconds before a request is sent again
LONGEST_WAIT = 60.0  # seconds, of those that a server asks for
BUSY = 429
AGAIN = (BUSY, 500, 502, 503, 504)  # statuses of what may go well a second time
ABOUT, COMPLETIONS = "/dera/model", "/v1/completions"

logger = logging.getLogger(__name__)


class Unanswered(DeRaError):
    """A server can't be reached, or has not answered in time."""


@dataclass
class Server:
    """
    A server, from any thread.

    Attributes:
        portal: of the thread that the client is used in.
        said: what it said of its model when it was asked first.
        fingerprint: `system_fingerprint` of its last answer, which dera serve gives.
    """

    settings: RemoteSettings
    portal: BlockingPortal
    client: httpx2.AsyncClient
    said: dict[str, Any] | None = None
    fingerprint: Any = None

    @property
    def name(self) -> str:
        return f"endpoint={self.settings.endpoint!r}"

    def about(self) -> dict[str, Any] | None:
        """
        What it says of its model (`GET /dera/model`); None where it does not know the question.

        Raises:
            DeRaError: it can't be reached, refuses the key, or answers with something else.
        """
        self.said = self.portal.call(self._about)
        return self.said

    async def _about(self) -> dict[str, Any] | None:
        answer, _ = await self._send("GET", ABOUT, None)
        if answer.status_code == 404:
            return None
        found = self._read(answer)
        if not isinstance(found, dict) or "engine" not in found:
            raise DeRaError(
                f"{self.name}: {ABOUT} is answered with {str(found)[:200]!r}: is it the address of a server?"
            )
        return found

    async def _check_same(self) -> None:
        """
        Raises `DeRaError` where it has another model than at first: it may have been started anew, or be one of several
        behind an address.
        """
        now, then = ({**(about or {}), "lambda_range": None} for about in (await self._about(), self.said))
        if changed := [name for name in now.keys() | then.keys() if now.get(name) != then.get(name)]:
            raise DeRaError(
                f"{self.name} has another model than when it was asked first: {ABOUT} now says otherwise of "
                f"{', '.join(sorted(changed))}. The completions made before are kept where there is an output; "
                "start it with its former model and run the same command again to go on."
            )

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The one choice of a completion. Raises as `start`."""
        return self.start(body).result()

    def start(self, body: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """
        The future raises `DeRaError` where the server refuses the request, or does not answer it after several tries.
        """
        return self.portal.start_task_soon(self._complete, body)

    async def _complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        answer, tries = await self._send("POST", COMPLETIONS, {**body, "return_token_ids": True})
        found = self._read(answer)
        choices = found.get("choices") if isinstance(found, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise DeRaError(f"{self.name}: {COMPLETIONS} is answered with {str(found)[:200]!r}.")
        if tries > 1 or found.get("system_fingerprint") != self.fingerprint:
            await self._check_same()
            self.fingerprint = found.get("system_fingerprint")
        return choices[0]

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[httpx2.Response, int]:
        """
        Again where the connection fails, and where the server says that it may help; returns the number of tries, too.
        One that is busy is asked for as long as it may take to answer.
        """
        busy_until = time.monotonic() + self.settings.timeout
        tries = 0
        while True:
            tries += 1
            asked, is_busy = None, False
            try:
                answer = await self.client.request(method, path, json=body)
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__} {first_line(error)}".strip()
            except httpx2.HTTPError as error:
                raise DeRaError(f"{self.name}: {first_line(error)}") from error
            else:
                if answer.status_code not in AGAIN:
                    return answer, tries
                problem = f"status {answer.status_code}, {_message(answer)}"
                asked = _seconds(answer.headers.get("Retry-After"))
                is_busy = answer.status_code == BUSY
            if tries > len(WAITS) and not (is_busy and time.monotonic() < busy_until):
                raise Unanswered(
                    f"{self.name} does not answer, after {tries} tries: {problem}. The completions that were made are "
                    "kept where there is an output; run the same command again to go on."
                )
            warn_once(
                logger,
                f"{self.name}: {problem}; such requests are sent again, each for {sum(WAITS):g} seconds or longer",
                topic=f"again {self.name}",
            )
            seconds = WAITS[min(tries, len(WAITS)) - 1]
            await asyncio.sleep(seconds if asked is None else min(max(asked, seconds), LONGEST_WAIT))

    def _read(self, answer: httpx2.Response) -> Any:
        if answer.status_code in (401, 403):
            has_key = self.settings.api_key is not None
            way_out = f"is the key in {KEY_VARIABLE} right?" if has_key else f"put its key into {KEY_VARIABLE}."
            raise DeRaError(f"{self.name} asks for a key (status {answer.status_code}): {way_out}")
        if answer.status_code != 200:
            raise DeRaError(f"{self.name} refuses (status {answer.status_code}): {_message(answer)}")
        try:
            return answer.json()
        except ValueError:
            raise DeRaError(f"{self.name} answers with something else than JSON: {answer.text[:200]!r}.") from None


@contextmanager
def connect(settings: RemoteSettings) -> Iterator[Server]:
    """A client of `settings.endpoint`; what is under way when the body ends is cancelled."""
    assert settings.endpoint is not None
    key = settings.api_key
    client = httpx2.AsyncClient(
        base_url=settings.endpoint,
        headers={} if key is None else {"Authorization": f"Bearer {key}"},
        timeout=settings.timeout,
        verify=settings.endpoint.startswith("https:"),  # certificates are read for nothing where there is no TLS
        limits=httpx2.Limits(max_connections=settings.at_once, max_keepalive_connections=settings.at_once),
    )
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
        yield Server(settings, portal, client)


@dataclass(frozen=True)
class EndpointDecoder:
    """
    Sends each request by itself, many at once.

    Attributes:
        ends: the ids of the tokens that end a completion.
        lambda_range: the least and the greatest λ that the server takes.
        check: called with prompts, requests and sampling before the first request; raises `DeRaError` where the
            server does not decode with the model that is meant.
    """

    server: Server
    tokenizer: Detokenizer
    ends: Sequence[int]
    lambda_range: tuple[float, float]
    check: Callable[[Prompts, Sequence[Request], Sampling], None]

    def decode(
        self,
        prompts: Prompts,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        particles: int | None = None,
        reference_prompts: Prompts | None = None,
    ) -> Iterator[list[Completion]]:
        """
        Raises:
            DeRaError: the server refuses a request, or does not answer; what has been answered is yielded before.
        """
        assert (particles, reference_prompts) == (None, None)  # `RemoteSettings.check_way` refuses them
        self._check_range(requests)
        self.check(prompts, requests, sampling)
        engine = self.server.settings.engine
        waiting = iter(requests)
        started: dict[Future[dict[str, Any]], Request] = {}

        def start(number: int) -> None:
            for request in islice(waiting, number):
                body = {
                    "prompt": [*prompts[request.index]],
                    **sampling_fields(request, sampling, self.ends, engine),
                    **mixing_fields(request.lam, request, engine),
                }
                started[self.server.start(body)] = request

        try:
            start(self.server.settings.at_once)
            while started:
                done, _ = wait(started, return_when=FIRST_COMPLETED)
                completions, problems = [], []
                for future in done:
                    request = started.pop(future)
                    try:
                        answer = future.result()
                        completions.append(
                            read_completion(request, answer, sampling, self.ends, self.tokenizer, self.server.name)
                        )
                    except DeRaError as error:  # when what came with it has been handed on
                        problems.append(error)
                if completions:
                    yield completions
                if problems:
                    raise problems[0]
                start(len(done))
        finally:
            for future in started:
                future.cancel()

    def _check_range(self, requests: Sequence[Request]) -> None:
        low, high = self.lambda_range
        for request in requests:
            values = request.lam.values() if isinstance(request.lam, Mapping) else [request.lam]
            values = [*values, *(value for _, value in request.schedule)]
            for lam in (lam for lam in values if lam is not None and not low <= lam <= high):
                raise DeRaError(
                    f"{self.server.name} takes λ from {low:g} to {high:g}, and λ={lam:g} is asked for: start it with a "
                    "wider --lambda-range."
                )


def _message(answer: httpx2.Response) -> str:
    """What an answer says went wrong: OpenAI's form, or the text."""
    try:
        found = json.loads(answer.text)
        error = found["error"] if isinstance(found, dict) and "error" in found else found
        return str(error["message"] if isinstance(error, dict) and "message" in error else error)[:500]
    except ValueError:
        return answer.text[:200] or "nothing more is said"


def _seconds(text: str | None) -> float | None:
    """Of a header `Retry-After`; None without one, and where it is a date."""
    return float(text) if text is not None and text.isdecimal() else None
