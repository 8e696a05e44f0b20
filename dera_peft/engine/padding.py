"""Token sequences of other lengths as one batch, and which tokens a model has a row for."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from transformers import PreTrainedModel

from dera_peft.engine.wrapped import own_module
from dera_peft.errors import DeRaError

NAMED = 5  # tokens, in a message


def pad(sequences: Sequence[Sequence[int]], value: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Token ids and attention mask, both `[B, S]` int64 on the CPU, S the longest sequence's length.

    Args:
        value: the token id that fills up.
        left: pad on the left, so that all sequences end in the last column; else on the right.
    """
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), value)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), None) if left else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask


def num_rows(model: PreTrainedModel) -> int:
    """How many tokens the model's input embedding has a row for."""
    # of the base's own module: PEFT's wrapper of trained tokens would make the whole weight anew to tell its shape
    return len(cast("torch.Tensor", own_module(model.get_input_embeddings()).weight))


def check_have_rows(model: PreTrainedModel, tokens: Iterable[int], name: Callable[[int], str] | None = None) -> None:
    """
    Raises `DeRaError` for tokens that the model has no row for. On a GPU the embedding would end the process instead.

    Args:
        name: the text of a token, for the message.
    """
    rows = num_rows(model)
    missing = sorted({token for token in tokens if not 0 <= token < rows})
    if not missing:
        return
    named = ", ".join(str(token) if name is None else f"{name(token)!r} ({token})" for token in missing[:NAMED])
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    raise DeRaError(
        f"the base has no row for the token{'s' if len(missing) > 1 else ''} {named}{more}: its embedding has {rows}. "
        "Use a tokenizer that fits the base, or an adapter that was saved with the rows of the tokens added to it."
    )


def padding_id(model: PreTrainedModel, wanted: int | None) -> int:
    """
    A token id to pad with: `wanted` or else the config's, if the model has a row for it, or 0. Padding is masked; but
    some bases count positions by the id of their own padding token.
    """
    rows = num_rows(model)
    candidates = (wanted, model.config.get_text_config(decoder=True).pad_token_id)
    return next((token for token in candidates if token is not None and 0 <= token < rows), 0)


def fill_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | dict | None, rows: int) -> torch.Tensor:
    """
    `input_ids` (`[B, S]`) with 0 in place of masked ids without a row in an embedding of `rows` of them, as a padding
    token that was added to a tokenizer has. It does not wait for a GPU.

    Args:
        attention_mask: `[B, S]`; one of another shape is left aside, or one for each type of layers.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
        return input_ids
    return input_ids.masked_fill((attention_mask == 0) & (input_ids >= rows), 0)


def readable(
    model: PreTrainedModel, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """
    The inputs of `generate` as the model's embedding can read them: `fill_padding`, where it is needed. It waits for a
    GPU once.

    Raises:
        DeRaError: a token that is not masked has no row.
    """
    if input_ids is None or input_ids.is_floating_point() or input_ids.dim() != 2:
        return input_ids
    rows = num_rows(model)
    if not ((input_ids < 0) | (input_ids >= rows)).any():
        return input_ids
    filled = fill_padding(input_ids, attention_mask, rows)
    check_have_rows(model, filled.unique().tolist())
    return filled
