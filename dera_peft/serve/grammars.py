"""Text that follows a JSON schema or a regular expression: OpenAI's `response_format`, by llguidance."""

import json
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dera_peft.serve.errors import APIError

PARAM = "response_format"
FORMS = (
    '{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {…}}} or '
    '{"type": "regex", "regex": "…"}'
)


class Grammars:
    """
    Grammars over one tokenizer's tokens. The table that they need of it takes a second, at the first of them.

    Args:
        vocabulary: rows of the model's logits, which may be more than the tokenizer has tokens.
        ends: tokens that end a completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]):
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, list(ends)
        self._table: LLTokenizer | None = None
        self._lock = Lock()

    def read(self, response_format: dict[str, Any] | None) -> str | None:
        """
        The grammar that a request's `response_format` asks for, checked; None where it asks for none.

        Raises:
            APIError: it is not a form of `FORMS`, or llguidance does not take the schema or expression.
        """
        if response_format is None or response_format == {"type": "text"}:
            return None
        grammar = _grammar(response_format)
        with self._lock:
            table = self._tokens()
        if problem := LLMatcher.validate_grammar(grammar, table):
            raise APIError(f"{PARAM}: {problem.strip()}", param=PARAM)
        return grammar

    def mask(self, grammar: str) -> "GrammarMask":
        """A new one, at the start of the text."""
        return GrammarMask(LLMatcher(self._tokens(), grammar), self.vocabulary)

    def _tokens(self) -> LLTokenizer:
        if self._table is None:
            if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
                raise APIError(f"{PARAM}: this model's tokenizer is a slow one, which grammars can't use", param=PARAM)
            self._table = from_tokenizer(self.tokenizer, self.vocabulary, self.ends or None)
        return self._table


class GrammarMask:
    """What may come next, as a `LogitsMask`. Without a token that may come it raises, which ends its request."""

    def __init__(self, matcher: LLMatcher, vocabulary: int):
        self.matcher, self.vocabulary = matcher, vocabulary

    def allowed(self) -> torch.Tensor:
        self._check()
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        places = torch.arange(8, dtype=torch.uint8)
        mask = (bits[:, None] >> places & 1).bool().flatten()[: self.vocabulary]
        if not mask.any():
            raise ValueError("the grammar allows no token that this model has")
        return mask

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)

    def _check(self) -> None:
        if self.matcher.is_error():
            raise ValueError(f"the grammar can't go on: {self.matcher.get_error()}")


def _grammar(response_format: dict[str, Any]) -> str:
    wanted = response_format.get("type")
    if wanted == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"})
    if wanted == "json_schema":
        about = response_format.get("json_schema")
        schema = about.get("schema") if isinstance(about, dict) else None
        if isinstance(schema, (dict, bool)):
            return LLMatcher.grammar_from_json_schema(json.dumps(schema))
    if wanted == "regex" and isinstance(response_format.get("regex"), str):
        return LLMatcher.grammar_from_regex(response_format["regex"])
    raise APIError(f"{PARAM}: must be one of {FORMS}", param=PARAM)
