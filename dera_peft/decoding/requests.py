"""What is decoded, and what comes of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """
    One completion to be made.

    Attributes:
        index: of its prompt, from 0.
        lam: λ; None for a model without one.
        sample: its number among the completions of its prompt and λ, from 0.
    """

    index: int
    lam: float | None
    sample: int = 0


@dataclass(frozen=True)
class Completion:
    """
    What a request gave.

    Attributes:
        tokens: the new token ids, with the end token if the model gave one.
        text: their text, without special tokens.
        finish_reason: "eos" if the model ended it, "length" if the limit of tokens did.
    """

    request: Request
    tokens: list[int]
    text: str
    finish_reason: str
