"""Prompts that can't fit into the context, told of before all of them is made into tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dera_peft.serve.errors import APIError

# tokens at the end of a part of a text that may be other ones in the whole: far more than a tokenizer looks ahead
MARGIN = 1000
CHARACTERS = 4  # of a token, about


def check_text(tokenizer: PreTrainedTokenizerBase, text: str, context: int | None, param: str = "prompt") -> None:
    """
    Refuses a text that surely has more tokens than the context. Of it only about as many tokens are made, whatever its
    length; whether a text that passes fits is seen when it is made into tokens.

    Raises:
        APIError: with a number of tokens that it has at least.
    """
    if context is None:
        return
    length = CHARACTERS * (context + MARGIN)
    while length < len(text):
        tokens = tokenizer(text[:length], add_special_tokens=False)["input_ids"]
        if len(tokens) > context + MARGIN:
            raise too_long(len(tokens) - MARGIN, context, param, at_least=True)
        length *= 2


def check_ids(ids: Sequence[int], context: int | None, param: str = "prompt") -> None:
    """Raises `APIError` where there are more of them than the context has."""
    if context is not None and len(ids) > context:
        raise too_long(len(ids), context, param)


def too_long(length: int, context: int, param: str, at_least: bool = False) -> APIError:
    count = f"at least {length}" if at_least else str(length)
    return APIError(
        f"{param}: {count} tokens are more than the model's context of {context}; shorten it",
        param=param,
        code="context_length_exceeded",
    )
