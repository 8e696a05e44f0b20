"""Tokens of the rows that are trained on: those that the model has no row for, and those that end a completion."""

import logging
from collections.abc import Iterable
from typing import cast

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from dera_peft.engine.padding import check_have_rows, num_rows, padding_id
from dera_peft.training.program import log

TOKEN_COLUMNS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")  # of what TRL prepares
ROWS_LOOKED_AT = 8  # for the token that ends them


def pad_within(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer another padding token where the model has no row for its own. Padding is masked."""
    model, before = cast("PreTrainedModel", model), tokenizer.pad_token
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= num_rows(model):
        tokenizer.pad_token_id = padding_id(model, tokenizer.eos_token_id)
        log(
            f"the base has no row for the tokenizer's padding token {before!r}: padding with {tokenizer.pad_token!r}",
            logging.WARNING,
        )


def check_tokens(trainer: Trainer) -> None:
    """Raises `DeRaError` for tokens of the prepared rows that the model has no row for."""
    model, tokenizer = cast("PreTrainedModel", trainer.model), cast("PreTrainedTokenizerBase", trainer.processing_class)
    dataset = cast("Dataset", trainer.train_dataset)
    for column in (name for name in TOKEN_COLUMNS if name in dataset.column_names):
        tokens = {token for chunk in dataset.data[column].chunks for token in chunk.flatten().unique().to_pylist()}
        check_have_rows(model, tokens, lambda token: cast("str", tokenizer.convert_ids_to_tokens(token)))


def trained_end_tokens(trainer: Trainer) -> list[str]:
    """
    The tokens that ended what a model was trained on: the tokenizer's end token, which TRL puts behind texts, and the
    special token that a chat template has put behind the answers.
    """
    tokenizer = cast("PreTrainedTokenizerBase", trainer.processing_class)
    names = [] if tokenizer.eos_token is None else [tokenizer.eos_token]
    max_length = getattr(trainer.args, "max_length", None)
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    rows = cast("Dataset", trainer.train_dataset)
    for row in cast("Iterable[dict]", rows.select(range(min(ROWS_LOOKED_AT, len(rows))))):
        ids = [*row["prompt_ids"], *row["chosen_ids"]] if "chosen_ids" in row else row.get("input_ids", [])
        if max_length is not None and len(ids) >= max_length:
            continue  # it may have been cut
        # a template may have a line break behind it
        last = next((token for token in reversed(ids) if cast("str", tokenizer.decode([token])).strip()), None)
        if last in special:
            names.append(cast("str", tokenizer.convert_ids_to_tokens(last)))
    return list(dict.fromkeys(names))
