"""From the engine's events to an answer: whole, or streamed; and what a client that goes away leaves behind."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dera_peft.errors import DeRaError
from dera_peft.serve.bodies import ChatBody, CompletionBody
from dera_peft.serve.engine import EngineClosed, QueueFull
from dera_peft.serve.errors import APIError, from_user_error, server_ends
from dera_peft.serve.forms import ChatForm, Choice, CompletionForm, Form, LogprobReader, TokenLogprob
from dera_peft.serve.handle import Handle
from dera_peft.serve.preparing import Prepared
from dera_peft.serve.requests import Event
from dera_peft.serve.scoring import prompt_logprobs
from dera_peft.serve.service import Service
from dera_peft.serve.tools import can_parse, parse_message
from dera_peft.serve.trace import add_details

GONE = Response(status_code=499)  # for a client that has gone: nobody reads it


class EventStream(StreamingResponse):
    """
    Args:
        ended: called when all is sent, or when the client has gone, for which Starlette cancels the response wherever
            it is.
    """

    def __init__(self, lines: AsyncIterator[str], ended: Callable[[], None]):
        super().__init__(
            lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ended()


class Answer:
    """
    One request's way to its answer.

    Args:
        request: of HTTP, to see when the client goes away.
    """

    def __init__(self, service: Service, body: CompletionBody | ChatBody, prepared: Prepared, request: Request):
        self.service, self.body, self.prepared, self.request = service, body, prepared, request
        self.form: Form = ChatForm() if isinstance(body, ChatBody) else CompletionForm()
        self.head = {
            "id": self.form.prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": prepared.model,
            "lambda": service.names.shown(prepared.lam),
            "system_fingerprint": service.fingerprint,
        }
        self.handles: list[Handle] = []
        self.choices = [self._choice(place) for place in range(len(prepared.prompts) * body.n)]
        self.readers = [LogprobReader(service.tokenizer, self._prompt(choice)[-1]) for choice in self.choices]

    def _choice(self, place: int) -> Choice:
        echo = ""
        if isinstance(self.body, CompletionBody) and self.body.echo:
            echo = self.prepared.prompts[place // self.body.n].echo(self.service.tokenizer)
        logprobs: list[TokenLogprob] | None = None if self.body.num_logprobs is None else []
        return Choice(place, echo, logprobs=logprobs, finish_reason=None if self.prepared.requests else "length")

    async def make(self) -> Response:
        """
        The answer; a streamed one goes on being made after this.

        Raises:
            APIError: the queue is full, the engine refuses the request, or it has failed.
        """
        await self._score_echo()
        try:
            await self._submit()
            if self.body.stream:
                return self._stream()
            return await self._whole()
        finally:
            if not self.body.stream or len(self.handles) < len(self.prepared.requests):
                self._leave()

    async def _score_echo(self) -> None:
        """Log-probabilities of prompts that are echoed."""
        top = self.body.num_logprobs
        if not isinstance(self.body, CompletionBody) or not self.body.echo or top is None:
            return
        for place, prompt in enumerate(self.prepared.prompts):
            choices = self.choices[place * self.body.n : (place + 1) * self.body.n]
            scored = await run_in_threadpool(
                prompt_logprobs, self.service.model, self.service.tokenizer, prompt.ids, choices[0].echo,
                self.prepared.lam, top,
            )  # fmt: skip
            for choice in choices:
                choice.echo_logprobs = scored

    async def _submit(self) -> None:
        """All of its completions, or none."""
        if not self.prepared.requests:  # an echo alone
            return
        try:
            self.handles = await run_in_threadpool(self.service.engine.submit_all, self.prepared.requests)
        except QueueFull as error:
            seconds = self.service.metrics.retry_after()
            raise APIError(
                f"{error} Try again in {seconds} s.", 429, code="queue_full", kind="rate_limit_error",
                headers={"Retry-After": str(seconds)},
            ) from None  # fmt: skip
        except EngineClosed:
            raise server_ends() from None
        except DeRaError as error:
            raise from_user_error(error, type(self.body).model_fields) from None
        for _ in self.handles:
            self.service.began(self.prepared.lam)

    # -- whole ---------------------------------------------------------------------------------------------------------

    async def _whole(self) -> Response:
        working = asyncio.ensure_future(asyncio.gather(*map(self._fill, self.choices)))
        leaving = asyncio.ensure_future(_gone(self.request))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                return GONE
            working.result()
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)
        choices = []
        for choice in self.choices:
            made = self.form.choice(choice)
            choices.append({**made, **self._ids(choice.tokens, choice.token_lambda)})
        answer = {**self.head, "object": self.form.whole, "choices": choices, "usage": self.usage()}
        return JSONResponse({**answer, **self._prompt_ids()})

    async def _fill(self, choice: Choice) -> None:
        """A choice with all of its events."""
        if self.handles:
            async for event in self.handles[choice.index]:
                self._take(choice, event)
        self._parse(choice)

    def _prompt(self, choice: Choice) -> list[int]:
        return self.prepared.prompts[choice.index // self.body.n].ids

    def _take(self, choice: Choice, event: Event) -> list[TokenLogprob]:
        """Adds an event to its choice; returns the log-probabilities that came with it."""
        if event.finish_reason == "error":
            raise APIError(event.error or "the completion has failed", code="generation_failed")
        if event.finish_reason == "cancelled":
            raise server_ends()
        choice.text += event.text
        choice.finish_reason = event.finish_reason
        if event.token is not None:
            choice.tokens.append(event.token)
        if event.token_lambda is not None:
            choice.token_lambda.append(event.token_lambda)
        if choice.logprobs is None:
            return []
        new = self.readers[choice.index].read(event)
        choice.logprobs += new
        return new

    @property
    def holds_back(self) -> bool:
        """Whether texts wait for their end, to be parsed as a whole."""
        if not isinstance(self.body, ChatBody) or not self.body.tools or self.body.tool_choice == "none":
            return False
        return can_parse(self.service.tokenizer)

    def _parse(self, choice: Choice) -> None:
        if self.holds_back and isinstance(self.body, ChatBody):
            choice.message = parse_message(self.service.tokenizer, self._prompt(choice), choice.tokens, self.body.tools)

    # -- streamed ------------------------------------------------------------------------------------------------------

    def _stream(self) -> Response:
        return EventStream(self._lines(), self._leave)

    async def _lines(self) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            async for chunk in self._chunks():
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except APIError as error:  # the status is sent already
            yield f"data: {json.dumps(error.body(), ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        options = self.body.stream_options
        head: dict[str, Any] = {
            **self.head,
            "object": self.form.chunk,
            **({"usage": None} if options.include_usage else {}),
        }
        for choice in self.choices:
            for made in self.form.first(choice):
                yield {**head, **self._prompt_ids(), "choices": [made]}
        async for choice, event in _merged(self.choices, self.handles):
            for made in self._pieces(choice, event):
                yield {**head, "choices": [made]}
        if not self.handles:
            for choice in self.choices:
                yield {**head, "choices": [self.form.last(choice)]}
        if options.include_usage:
            yield {**head, "choices": [], "usage": self.usage()}

    def _pieces(self, choice: Choice, event: Event) -> list[dict[str, Any]]:
        logprobs = self._take(choice, event)
        ids = self._ids(
            [] if event.token is None else [event.token], [] if event.token_lambda is None else [event.token_lambda]
        )
        pieces = []
        held = self.holds_back
        text = "" if held else event.text
        if text or logprobs or ids:
            pieces.append({**self.form.piece(choice, text, logprobs), **ids})
        if event.finish_reason is not None:
            self._parse(choice)
            if held and choice.message is None and choice.text:
                pieces.append(self.form.piece(choice, choice.text, []))
            pieces.append(self.form.last(choice))
        return pieces

    # -- at the end ----------------------------------------------------------------------------------------------------

    def _ids(self, tokens: list[int], token_lambda: list[float]) -> dict[str, Any]:
        """Of some tokens of a choice, where they are asked for; with the λ that a rule or a schedule gave each."""
        if not self.body.return_token_ids:
            return {}
        return {"token_ids": tokens, **({"token_lambda": token_lambda} if token_lambda else {})}

    def _prompt_ids(self) -> dict[str, Any]:
        if not self.body.return_token_ids:
            return {}
        ids = [prompt.ids for prompt in self.prepared.prompts]
        return {"prompt_token_ids": ids[0] if len(ids) == 1 else ids}

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(each.ids) for each in self.prepared.prompts)
        completion = sum(len(choice.tokens) for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(handle.cached_tokens for handle in self.handles[:: self.body.n])
            },
        }

    def _leave(self) -> None:
        """Frees the rows of what has not ended, and has the rest written down."""
        for handle in self.handles:
            handle.cancel()
        first = [handle.first_token - handle.created for handle in self.handles if handle.first_token is not None]
        add_details(
            self.request.scope,
            id=self.head["id"],
            model=self.prepared.model,
            **{"lambda": self.head["lambda"]},
            completions=len(self.choices),
            prompt_tokens=sum(len(each.ids) for each in self.prepared.prompts),
            completion_tokens=sum(len(choice.tokens) for choice in self.choices),
            first_token_seconds=round(min(first), 4) if first else None,
        )
        for handle in self.handles:
            self.service.follow(self.head["id"], self.request.url.path, self.body, self.prepared, handle)


async def _gone(request: Request) -> None:
    """Until the client has gone away; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _merged(choices: Sequence[Choice], handles: Sequence[Handle]) -> AsyncIterator[tuple[Choice, Event]]:
    """The events of all choices as they come."""
    queue: asyncio.Queue[tuple[Choice, Event]] = asyncio.Queue()

    async def read(choice: Choice, handle: Handle) -> None:
        async for event in handle:
            queue.put_nowait((choice, event))

    tasks = [asyncio.ensure_future(read(*pair)) for pair in zip(choices, handles, strict=bool(handles))]
    try:
        left = len(handles)
        while left:
            choice, event = await queue.get()
            left -= event.finish_reason is not None
            yield choice, event
    finally:
        for task in tasks:
            task.cancel()
