"""The text of tokens as they come: whole characters, and nothing that a stop string may yet take away."""

from collections.abc import Sequence
from typing import Protocol, cast

INCOMPLETE = "\ufffd"  # what a tokenizer makes of some bytes of a character


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> str | list[str]: ...


class TextStream:
    """
    Makes text of one completion's tokens.

    A few tokens are decoded again with each new one, since a token's text may depend on its neighbours (a space before
    a word, the bytes of a character).

    Attributes:
        stopped: whether a stop string has come.
        length: characters of the tokens so far, without a last one of which a part is yet to come.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        self.length = self._told = 0
        self._tokens: list[int] = []
        self._context = self._read = 0  # tokens before _read are text; those from _context on are decoded again
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The text that can be shown after another token."""
        self._tokens.append(token)
        before = self._decode(self._context, self._read)
        text = self._decode(self._context, len(self._tokens))
        self.length = self._told + max(0, len(text.rstrip(INCOMPLETE)) - len(before))
        if text.endswith(INCOMPLETE) or len(text) <= len(before):
            return ""
        self._context, self._read, self._told = self._read, len(self._tokens), self.length
        return self._show(text[len(before) :])

    def end(self) -> str:
        """What is left at the end: held back, or bytes that did not become a character."""
        if self.stopped:
            return ""
        before = self._decode(self._context, self._read)
        rest = self._show(self._decode(self._context, len(self._tokens))[len(before) :])
        rest, self._held = rest + ("" if self.stopped else self._held), ""
        return rest

    def _decode(self, start: int, stop: int) -> str:
        # of one sequence one text
        return cast("str", self.tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True))

    def _show(self, text: str) -> str:
        text = self._held + text
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
