"""A request that was submitted, and how far it is."""

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from dera_peft.engine.noise import row_key
from dera_peft.engine.plan import BatchPlan
from dera_peft.engine.rules import LINEAR
from dera_peft.serve.handle import Handle
from dera_peft.serve.requests import Event, FinishReason
from dera_peft.serve.text import TextStream

LEAST = 8  # tokens that must be alike for sequences to be computed from a common beginning


@dataclass(frozen=True)
class Kind:
    """
    What requests have in common that can be computed together.

    Attributes:
        has_rule: whether their branches are combined by another rule than the straight line, behind the head.
        lengths: where positions depend on the longest sequence of the batch, which lengths can share one.
        is_whole: whether a prompt has to be computed in one pass and from its beginning.
    """

    has_rule: bool = False
    lengths: Hashable = None
    is_whole: bool = False


@dataclass(frozen=True)
class Drawn:
    """A token and, where they were asked for, log-probabilities; or why there is none."""

    token: int = -1
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str | None = None


class State:
    """
    Attributes:
        plan: of it alone.
        lam: the plan's, `[1, K]`.
        spent: nats that its rule has spent.
        ends: the tokens that end it as "eos".
        tokens: drawn so far.
        counts: how often each of them was.
        key: of its random numbers.
        warping: what `row_warpers` reads of its settings, which requests share whose tokens are drawn together.
    """

    def __init__(
        self,
        handle: Handle,
        plan: BatchPlan,
        kind: Kind,
        ends: frozenset[int],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.handle, self.request = handle, handle.request
        self.plan, self.lam, self.kind, self.ends = plan, plan.lam, kind, ends
        self.spent = 0.0
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.counts: Counter[int] = Counter()
        self.key = row_key(self.request.sampling.seed, 0, self.request.sample)
        sampling = self.request.sampling
        self.warping = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        # a text that nobody reads on the way is made at the end
        self._text = TextStream(tokenizer, self.request.stop) if self.request.stream or self.request.stop else None
        self._unsaid: list[str] = []

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and completion."""
        return (*self.request.prompt, *self.tokens)

    @property
    def start(self) -> tuple[int, ...]:
        """The first tokens, by which sequences that begin alike are found."""
        return (*self.request.prompt[:LEAST], *self.tokens[:LEAST])[:LEAST]

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens)

    @property
    def remaining(self) -> int:
        """The most tokens that are yet to come."""
        return self.request.sampling.max_new_tokens - len(self.tokens)

    @property
    def done(self) -> bool:
        return self.handle.done

    def take(self, drawn: Drawn, lam: float | None) -> None:
        """The next token, or the error in its place; with the λ that a rule or a schedule gave it."""
        if drawn.error is not None:
            self.end("error", drawn.error)
            return
        token, request = drawn.token, self.request
        self.tokens.append(token)
        self.counts[token] += 1
        reason: FinishReason | None = None
        if token in self.ends:
            reason = "eos"
        elif token in request.stop_token_ids:
            reason = "stop"
        text = self._add(token, is_last=reason is not None)
        if reason is None:
            if self._text is not None and self._text.stopped:
                reason = "stop"
            elif self.remaining <= 0:
                reason = "length"
        if reason is not None:
            text += self._rest(reason)
            if reason == "length" and self._text is not None and self._text.stopped:
                reason = "stop"
        has_lambda = lam is not None and not math.isnan(lam) and (request.combine != LINEAR or bool(request.schedule))
        self.handle.put(Event(token, text, drawn.logprob, drawn.top_logprobs, lam if has_lambda else None, reason))

    def _add(self, token: int, is_last: bool) -> str:
        """The text to show after a token; one that ended the completion has none."""
        if self._text is None or is_last:
            return ""
        text = self._text.add(token)
        if self.request.stream:
            return text
        self._unsaid.append(text)
        return ""

    def _rest(self, reason: FinishReason) -> str:
        """What was not shown before the end."""
        if self._text is not None:
            return "".join(self._unsaid) + self._text.end()
        tokens = self.tokens if reason == "length" else self.tokens[:-1]
        return cast("str", self.tokenizer.decode(tokens, skip_special_tokens=True))  # of one sequence one text

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """Without another token."""
        self.handle.put(Event(None, "", finish_reason=reason, error=error))
