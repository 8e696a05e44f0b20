"""A submitted request, as its submitter sees it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

from dera_peft.serve.requests import Event, FinishReason, Generated, GenerationRequest


class Handle:
    """
    Iterate over it for the request's events as they come, with `for` in any thread or `async for` in any event loop.
    Each iteration starts at the first event. The last event has a `finish_reason`.

    Attributes:
        request: what was submitted.
        created, started, first_token, finished: `time.monotonic()` when it was submitted, taken from the queue, had its
            first token, and ended; None before.
        cached_tokens: how many of the prompt's tokens came from the prefix cache.
    """

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.created = time.monotonic()
        self.started: float | None = None
        self.first_token: float | None = None
        self.finished: float | None = None
        self.cached_tokens = 0
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], object]] = []
        self._cancelled = threading.Event()

    @property
    def finish_reason(self) -> FinishReason | None:
        """None before the end."""
        return self._events[-1].finish_reason if self.done else None

    @property
    def done(self) -> bool:
        return self.finished is not None

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for it; it ends before the engine's next step."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ends it before the engine's next step, with the reason "cancelled"; no matter if it has ended already."""
        self._cancelled.set()

    def start(self) -> None:
        """For the engine: it was taken from the queue, perhaps not for the first time."""
        self.started = self.started or time.monotonic()

    def put(self, event: Event) -> None:
        """For the engine: the next event."""
        with self._changed:
            now = time.monotonic()
            if self.first_token is None and event.token is not None:
                self.first_token = now
            if event.finish_reason is not None:
                self.finished = now
            self._events.append(event)
            self._changed.notify_all()
            for wake in self._wakers:
                wake()

    def __iter__(self) -> Iterator[Event]:
        return self.events()

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """
        The events as they come.

        Args:
            timeout: seconds to wait for each; None for as long as it takes.

        Raises:
            TimeoutError: none came in that time.
        """
        place = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda seen=place: len(self._events) > seen, timeout):
                    raise TimeoutError(f"no event of the engine within {timeout} s.")
                new = self._events[place:]
            for event in new:
                yield event
                if event.finish_reason is not None:
                    return
            place += len(new)

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, changed, place = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake() -> None:
            # a client's loop may be gone before the engine's last event
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            while True:
                changed.clear()
                with self._changed:
                    new = self._events[place:]
                for event in new:
                    yield event
                    if event.finish_reason is not None:
                        return
                place += len(new)
                if not new:
                    await changed.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)

    def result(self, timeout: float | None = None) -> Generated:
        """
        Waits for its end.

        Args:
            timeout: seconds to wait for each event.

        Raises:
            TimeoutError: no event came in that time.
        """
        events = list(self.events(timeout))
        of_tokens = [event for event in events if event.token is not None]
        has_logprobs = self.request.logprobs is not None
        finish_reason = events[-1].finish_reason
        assert finish_reason is not None  # of the last event
        return Generated(
            self.request,
            [event.token for event in of_tokens if event.token is not None],
            "".join(event.text for event in events),
            finish_reason,
            [event.logprob for event in of_tokens if event.logprob is not None] if has_logprobs else None,
            [event.top_logprobs for event in of_tokens] if has_logprobs else None,
            [event.token_lambda for event in of_tokens if event.token_lambda is not None] or None,
            events[-1].error,
        )
