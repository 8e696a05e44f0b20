"""OpenAI's forms of an answer: whole or in chunks, of a completion or a chat; and of log-probabilities."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dera_peft.decoding.token_views import REPLACEMENT, text_after
from dera_peft.serve.requests import Event
from dera_peft.serve.text import TextStream

BYTES = "bytes:"  # before a token that is a part of a character
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # such a token of sentencepiece
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # of a byte-level vocabulary
FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class TokenLogprob:
    """
    A token's text behind the one before it, its log-probability, and those of the most probable ones; of the first
    token of a prompt there is no log-probability.

    Attributes:
        length: whole characters that it adds to the choice's text: none for a part of a character but the last.
    """

    text: str
    logprob: float | None
    top: Sequence[tuple[str, float]] = ()
    length: int = 0


def token_text(before: int | None, token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token's text behind another; of a part of a character its bytes, as OpenAI writes them: `bytes:\\xe2\\x80`."""
    text = text_after(before, token, tokenizer)
    if text != REPLACEMENT:
        return text
    name = str(tokenizer.convert_ids_to_tokens(token))
    if found := BYTE.fullmatch(name):
        return BYTES + f"\\x{found[1].lower()}"
    if all(character in BYTE_OF for character in name):
        return BYTES + "".join(f"\\x{BYTE_OF[character]:02x}" for character in name)
    return name


class LogprobReader:
    """From the events of a completion, in their order, the texts and numbers of its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: int):
        self.tokenizer, self.before = tokenizer, before
        self._text = TextStream(tokenizer)

    def read(self, event: Event) -> list[TokenLogprob]:
        """One for the event's token; none for an end token, which is no part of the text."""
        if event.token is None or event.logprob is None or event.finish_reason == "eos":
            return []
        before = self._text.length
        self._text.add(event.token)
        length = self._text.length - before
        found = token_logprob(self.tokenizer, self.before, event.token, event.logprob, event.top_logprobs, length)
        self.before = event.token
        return [found]


def token_logprob(
    tokenizer: PreTrainedTokenizerBase,
    before: int | None,
    token: int,
    logprob: float | None,
    top: Sequence[tuple[int, float]],
    length: int,
) -> TokenLogprob:
    """`top` are the most probable (token, log-probability) in the token's place; for `length` see `TokenLogprob`."""
    texts = [(token_text(before, other, tokenizer), value) for other, value in top]
    return TokenLogprob(token_text(before, token, tokenizer), logprob, texts, length)


def offsets(tokens: Sequence[TokenLogprob], first: int) -> list[int]:
    """Where tokens begin, in characters; a part of a character where the character does."""
    return [*accumulate((each.length for each in tokens[:-1]), initial=first)] if tokens else []


def completion_logprobs(tokens: Sequence[TokenLogprob], text_offset: Sequence[int]) -> dict[str, Any]:
    """In the form of /v1/completions."""
    return {
        "tokens": [each.text for each in tokens],
        "token_logprobs": [each.logprob for each in tokens],
        "top_logprobs": [_by_text(each) for each in tokens],
        "text_offset": list(text_offset),
    }


def _by_text(token: TokenLogprob) -> dict[str, float] | None:
    """The most probable tokens and the drawn one; of several with one text the most probable."""
    if token.logprob is None:
        return None
    return {token.text: token.logprob} | dict(reversed(token.top))


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """In the form of /v1/chat/completions."""
    return {
        "content": [
            {
                **_one(each.text, each.logprob),
                "top_logprobs": [_one(text, value) for text, value in each.top],
            }
            for each in tokens
        ],
        "refusal": None,
    }


def _one(text: str, logprob: float | None) -> dict[str, Any]:
    as_bytes = bytes.fromhex(text[len(BYTES) :].replace("\\x", "")) if text.startswith(BYTES) else text.encode("utf-8")
    return {"token": text, "logprob": logprob, "bytes": [*as_bytes]}


@dataclass
class Choice:
    """
    A completion as far as it has come.

    Attributes:
        echo: the prompt's text, before the completion's; and its tokens' log-probabilities.
        text: without `echo`.
        token_lambda: the λ that the request's rule or schedule gave each token; empty without one.
        message: what a chat's text was parsed as, with "tool_calls"; None for the text itself.
    """

    index: int
    echo: str = ""
    echo_logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    token_lambda: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    message: dict[str, Any] | None = None

    def finish(self) -> str:
        if self.message is not None and self.message.get("tool_calls"):
            return "tool_calls"
        return FINISH.get(self.finish_reason or "", "stop")


class CompletionForm:
    """`/v1/completions`."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, choice: Choice) -> dict[str, Any]:
        logprobs = None
        if choice.logprobs is not None:
            places = offsets(choice.echo_logprobs, 0) + offsets(choice.logprobs, len(choice.echo))
            logprobs = completion_logprobs([*choice.echo_logprobs, *choice.logprobs], places)
        return {
            "index": choice.index,
            "text": choice.echo + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish(),
        }

    def first(self, choice: Choice) -> list[dict[str, Any]]:
        """Chunks before the first token's."""
        return [self._piece(choice, choice.echo, None)] if choice.echo else []

    def piece(self, choice: Choice, text: str, tokens: list[TokenLogprob]) -> dict[str, Any]:
        """A chunk with `text` and `tokens`, the newest of the choice's."""
        logprobs = None
        if choice.logprobs is not None:
            before = choice.logprobs[: len(choice.logprobs) - len(tokens)]
            first = len(choice.echo) + sum(each.length for each in before)
            logprobs = completion_logprobs(tokens, offsets(tokens, first))
        return self._piece(choice, text, logprobs)

    def last(self, choice: Choice) -> dict[str, Any]:
        return {**self._piece(choice, "", None), "finish_reason": choice.finish()}

    def _piece(self, choice: Choice, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": None}


class ChatForm:
    """`/v1/chat/completions`."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text} if choice.message is None else choice.message
        return {
            "index": choice.index,
            "message": {"refusal": None, **message},
            "logprobs": None if choice.logprobs is None else chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish(),
        }

    def first(self, choice: Choice) -> list[dict[str, Any]]:
        return [self._piece(choice, {"role": "assistant", "content": ""}, None)]

    def piece(self, choice: Choice, text: str, tokens: list[TokenLogprob]) -> dict[str, Any]:
        logprobs = None if choice.logprobs is None else chat_logprobs(tokens)
        return self._piece(choice, {"content": text}, logprobs)

    def last(self, choice: Choice) -> dict[str, Any]:
        delta = {}
        if choice.message is not None:  # it was held back, until it could be parsed as a whole
            delta = {name: value for name, value in choice.message.items() if name != "role" and value}
            if calls := delta.get("tool_calls"):
                delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
        return {**self._piece(choice, delta, None), "finish_reason": choice.finish()}

    def _piece(self, choice: Choice, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


Form = CompletionForm | ChatForm
