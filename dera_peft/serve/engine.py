"""Continuous batching: requests join and leave a running batch between two steps, each with its own λ."""

import logging
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from transformers import PreTrainedTokenizerBase

from dera_peft.checkpoint.end_tokens import configured_end_tokens
from dera_peft.decoding.room import Room
from dera_peft.engine.lengths import find_rope_switch
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.names import WEIGHTS
from dera_peft.engine.padding import padding_id
from dera_peft.engine.rules import LINEAR, read_rule
from dera_peft.errors import DeRaError, first_line
from dera_peft.serve.checks import check_request, context_of
from dera_peft.serve.handle import Handle
from dera_peft.serve.requests import GenerationRequest
from dera_peft.serve.scheduler import Scheduler
from dera_peft.serve.state import Kind, State
from dera_peft.serve.states import is_recurrent

logger = logging.getLogger(__name__)


class QueueFull(DeRaError):
    """As many requests wait as may: try again later."""


class EngineClosed(DeRaError):
    """The engine takes no requests any more."""


@dataclass(frozen=True)
class Statistics:
    """
    Counts since the engine was made, and how it stands now.

    Attributes:
        running: requests that are decoded or whose prompts are computed.
        rows: rows that a step of these computes, one for each branch that a request needs.
        waiting: requests in the queue.
        held_tokens: tokens whose keys and values are held for running requests, in all rows, with padding.
        prefix_tokens: tokens whose keys and values the prefix cache holds, in all rows.
        prompt_tokens: computed, once for each request, without those from the prefix cache.
        cached_tokens: of prompts, from the prefix cache.
        generated_tokens: drawn.
        steps: decoding steps.
        finished: requests by finish reason.
    """

    running: int = 0
    rows: int = 0
    waiting: int = 0
    held_tokens: int = 0
    prefix_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Engine:
    """
    Decodes requests as they come. All methods may be called from any thread.

    `start` lets it work in a thread of its own; without that, `step` does the work in the caller's. Between two steps
    it lets go of the model's turn: other threads may call `model.generate` and `forward` meanwhile.

    Where decoding steps are captured (see `generate`), sequences and lengths are rounded up to powers of two, and each
    sequence has a row in every branch.

    Args:
        model: any `MixtureModel` that decodes from a cache.
        tokenizer: makes texts of tokens.
        max_rows: rows that are decoded at once, one for each branch that a request needs (λ=0 and λ=1 need one);
            `Room.sequences` unless given.
        max_tokens: tokens whose keys and values are held at once, in all rows; `Room.cached` unless given.
        prefill_chunk: at most so many tokens of prompts are computed between two decoding steps.
        prefix_tokens: at most so many tokens are held for further requests that begin alike; part of max_tokens; a
            quarter of it unless given, 0 for none.
        max_queue: requests that may wait; None for any number.

    Attributes:
        context: the most tokens that a prompt and its completion may have together; None where nothing bounds them.

    Raises:
        DeRaError: the model can't be decoded in this way, with the reason.
    """

    def __init__(
        self,
        model: MixtureModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        prefill_chunk: int = 512,
        prefix_tokens: int | None = None,
        max_queue: int | None = None,
    ):
        room = Room.of(model)
        branches = len(model.branches) if model.mixing != WEIGHTS else 1
        max_tokens = room.cached * branches if max_tokens is None else max_tokens
        prefix_tokens = max_tokens // 4 if prefix_tokens is None else prefix_tokens
        if prefix_tokens >= max_tokens:
            raise DeRaError(f"prefix_tokens={prefix_tokens} leaves nothing of max_tokens={max_tokens} to decode with.")
        self.model, self.tokenizer = model, tokenizer
        self.context, self.max_queue = context_of(model), max_queue
        self._scheduler = Scheduler(
            model,
            max_rows=room.sequences * branches if max_rows is None else max_rows,
            max_tokens=max_tokens - prefix_tokens,
            prefill_chunk=prefill_chunk,
            prefix_tokens=prefix_tokens,
            filler=padding_id(model, tokenizer.pad_token_id),
        )
        if model.capture and (reason := model.why_not_captured()) is not None:
            logger.warning(f"decoding steps are not captured as CUDA graphs: {reason}")
        self._rope_switch = find_rope_switch(model.config)
        self._is_recurrent = is_recurrent(self._scheduler.kinds)
        self._incoming: deque[State] = deque()
        self._unfinished: list[State] = []  # some may have ended since the last submission
        self._changed = threading.Condition()
        self._closing = self._cancelling = False
        self._thread: threading.Thread | None = None
        self._statistics = Statistics()

    def submit(self, request: GenerationRequest) -> Handle:
        """As `submit_all`, of one."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[GenerationRequest]) -> list[Handle]:
        """
        Puts all of them into the queue, or none.

        Raises:
            DeRaError: one can never be decoded: an empty or too long prompt, a token without a row, a λ that does not
                fit the model, a setting that is out of range.
            QueueFull: more than `max_queue` requests would wait.
            EngineClosed: `close` was called.
        """
        states = [self._state(request) for request in requests]
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine was closed, and takes no more requests.")
            self._forget_finished()
            if self.max_queue is not None and self._waiting_beside(states) > self.max_queue:
                raise QueueFull(f"as many requests wait as may, {self.max_queue} (max_queue): try again later.")
            self._unfinished += states
            self._incoming += states
            self._changed.notify_all()
        return [state.handle for state in states]

    def _state(self, request: GenerationRequest) -> State:
        check_request(request, self.model, self.context)
        plan = self.model.plan(request.lam, 1, combine=request.combine, lambda_schedule=request.schedule or None)
        ends = () if request.ignore_eos else configured_end_tokens(self.model.generation_config)
        return State(Handle(request), plan, self._kind(request), frozenset(ends), self.tokenizer)

    def _forget_finished(self) -> None:
        self._unfinished = [each for each in self._unfinished if not (each.done or each.handle.cancelled)]

    def _waiting_beside(self, new: Sequence[State]) -> int:
        """How many of the unfinished requests and new ones have to wait, as there is no room to compute them."""
        states = [*self._unfinished, *new]
        return len(states) - self._scheduler.num_fitting(states)

    def _kind(self, request: GenerationRequest) -> Kind:
        length = len(request.prompt)
        lengths: Hashable = None
        if self._rope_switch is not None:
            lengths = self._rope_switch.kind(length, length + request.sampling.max_new_tokens - 1)
            if lengths != "short" and (lengths != "long" or self._rope_switch.grows):
                lengths = object()  # its positions change while it is decoded: it stands alone
        has_rule = read_rule(request.combine).name != LINEAR
        return Kind(has_rule, lengths, is_whole=self._is_recurrent or lengths not in (None, "short"))

    def cancel(self, handle: Handle) -> None:
        """Ends it before the next step; its rows are free then."""
        handle.cancel()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._incoming) + len(self._scheduler.waiting)

    def step(self) -> bool:
        """A decoding step of all running requests, and a chunk of new prompts; False where there is nothing to do."""
        scheduler = self._scheduler
        with self.model.turn:
            with self._changed:
                while self._incoming:
                    scheduler.waiting.append(self._incoming.popleft())
                if self._cancelling:
                    scheduler.end_all("cancelled")
            try:
                is_busy = scheduler.step()
            except Exception as error:
                logger.exception("the engine's step failed: all of its requests end")
                scheduler.end_all("error", f"decoding failed: {first_line(error)}")
                is_busy = False
            if not is_busy:
                with self._changed:
                    self._forget_finished()
            self._statistics = Statistics(
                running=len(scheduler.active),
                rows=scheduler.rows,
                held_tokens=scheduler.held,
                prefix_tokens=scheduler.prefixes.held,
                prompt_tokens=scheduler.prompt_tokens,
                cached_tokens=scheduler.cached_tokens,
                generated_tokens=scheduler.generated_tokens,
                steps=scheduler.steps,
                finished=dict(scheduler.finished),
            )
        return is_busy

    def start(self) -> Self:
        """Works in a thread of its own until `close`; returns itself. `with Engine(…) as engine` does both."""
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._work, name="dera-engine", daemon=True)
            self._thread.start()
        return self

    def _work(self) -> None:
        while True:
            is_busy = self.step()
            if not is_busy:
                with self._changed:
                    if self._closing and not self._incoming:
                        return
                    self._changed.wait_for(lambda: self._incoming or self._closing)

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """
        Takes no more requests, and ends the thread.

        Args:
            drain: finish the requests there are; else they are cancelled.
            timeout: seconds after which what is left is cancelled all the same.
        """
        with self._changed:
            self._closing = True
            self._cancelling = self._cancelling or not drain
            self._changed.notify_all()
        if self._thread is None:
            while self.step():
                pass
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._cancelling = True
            self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(drain=kind is None)

    def statistics(self) -> Statistics:
        """As of the last step."""
        return replace(self._statistics, waiting=self.waiting)
