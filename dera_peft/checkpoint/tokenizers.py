"""Tokenizers: which one is a model's, and the generation config that goes with it."""

import os
from collections.abc import Mapping
from typing import Any, cast

from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from dera_peft.checkpoint.base import HUB_ARGUMENTS
from dera_peft.checkpoint.fingerprint import cached_snapshot
from dera_peft.checkpoint.record import Record
from dera_peft.engine.names import REFERENCE
from dera_peft.errors import DeRaError, first_line

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


class NoTokenizer(DeRaError):
    """Neither the adapters nor the base have a tokenizer."""


def tokenizer_places(record: Record) -> list[str]:
    """Where the tokenizer of a model is looked for: its aligned adapters, those under them, and the base."""
    aligned = [name for branch, names in record.branches.items() if branch != REFERENCE for name in reversed(names)]
    return [*(record.adapters[name] for name in dict.fromkeys([*aligned, *record.adapters])), record.base]


def find_tokenizer(*names: str, **how: Any) -> PreTrainedTokenizerBase | None:
    """`load_tokenizer`, or None where there is none."""
    try:
        return load_tokenizer(*names, **how)
    except NoTokenizer:
        return None


def copy_tokenizer(record: Record, folder: str, with_base: bool = False) -> None:
    """
    Saves the tokenizer of a model's adapters, if they have one of their own, beside a copy of them.

    Args:
        with_base: whether the base's is saved otherwise.
    """
    *adapters, base = tokenizer_places(record)
    places = [*adapters, base] if with_base else adapters
    if (tokenizer := find_tokenizer(*places, padding_side=None)) is not None:
        tokenizer.save_pretrained(folder)


def load_tokenizer(
    *names: str, base_arguments: Mapping[str, Any] = {}, padding_side: str | None = "left"
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of the first of `names` (hub ids or folders) that has one: an adapter's, which may have a chat
    template of its own, before the base's.

    Args:
        names: adapters, and last the base.
        base_arguments: of `from_pretrained`; those that say where on the hub the base is are read, and for the adapters
            those of them that are not of the base alone.
        padding_side: its own if None.

    Raises:
        NoTokenizer: none has one.
        DeRaError: the first one's can't be loaded.
    """
    of_base = {name: base_arguments[name] for name in HUB_ARGUMENTS if base_arguments.get(name) is not None}
    of_adapters = {name: value for name, value in of_base.items() if name not in ("revision", "subfolder")}
    own_side = {} if padding_side is None else {"padding_side": padding_side}
    errors = []
    for index, name in enumerate(names):
        arguments = of_base if index == len(names) - 1 else of_adapters
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **arguments, **own_side)
            return cast("PreTrainedTokenizerBase", tokenizer)
        except Exception as error:  # a broken file raises whatever its reader does, as KeyError or a bare Exception
            if _has_tokenizer_files(name, arguments):
                raise DeRaError(f"the tokenizer of {name!r} can't be loaded: {first_line(error)}") from error
            if not isinstance(error, (OSError, ValueError, HFValidationError)):
                raise
            errors.append(f"{name!r}: {first_line(error)}")
    raise NoTokenizer(
        f"no tokenizer can be loaded: {'; '.join(errors)}. Save the base's into its folder, or into the adapter's."
    )


def _has_tokenizer_files(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a folder has them, or the hub's local cache, where they come to if the hub has them."""
    subfolder = arguments.get("subfolder", "")
    if os.path.isdir(name):
        return any(os.path.isfile(os.path.join(name, subfolder, file)) for file in TOKENIZER_FILES)
    files = tuple(f"{subfolder}/{file}" if subfolder else file for file in TOKENIZER_FILES)
    return cached_snapshot(name, arguments.get("revision"), files, arguments.get("cache_dir")) is not None


def load_generation_config(base: str, config: PreTrainedConfig, base_arguments: Mapping[str, Any]) -> GenerationConfig:
    """The base's generation config as `from_pretrained` gives it to the model, without loading that."""
    if (given := base_arguments.get("generation_config")) is not None:
        return given
    arguments = {name: base_arguments[name] for name in HUB_ARGUMENTS if base_arguments.get(name) is not None}
    try:
        return GenerationConfig.from_pretrained(base, **arguments)
    except OSError:  # it has no such file
        return GenerationConfig.from_model_config(config)
