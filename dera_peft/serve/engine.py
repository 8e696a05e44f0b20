"""Continuous batching: requests join and leave a running batch between two steps, each with its own λ."""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from dera_peft.engine.mixture import MixtureModel
from dera_peft.errors import DeRaError
from dera_peft.serve.handle import Handle
from dera_peft.serve.requests import GenerationRequest


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
        raise NotImplementedError

    @property
    def context(self) -> int | None:
        """The most tokens that a prompt and its completion may have together; None where nothing bounds them."""
        raise NotImplementedError

    def submit(self, request: GenerationRequest) -> Handle:
        """
        Puts it into the queue.

        Raises:
            DeRaError: it can never be decoded: an empty or too long prompt, a token without a row, a λ that does not
                fit the model, a setting that is out of range.
            QueueFull: `max_queue` requests wait.
            EngineClosed: `close` was called.
        """
        raise NotImplementedError

    def cancel(self, handle: Handle) -> None:
        """Ends it before the next step; its rows are free then."""
        handle.cancel()

    def step(self) -> bool:
        """A decoding step of all running requests, and a chunk of new prompts; False where there is nothing to do."""
        raise NotImplementedError

    def start(self) -> "Engine":
        """Works in a thread of its own until `close`; returns itself. `with Engine(…) as engine` does both."""
        raise NotImplementedError

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """
        Takes no more requests, and ends the thread.

        Args:
            drain: finish the requests there are; else they are cancelled.
            timeout: seconds after which what is left is cancelled all the same.
        """
        raise NotImplementedError

    def statistics(self) -> Statistics:
        """As of the last step."""
        raise NotImplementedError
