"""What ends a completion: one definition, for whatever decodes, scores, trains or describes a model."""

from collections.abc import Iterable

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dera_peft.checkpoint.record import FILE_NAME, Record
from dera_peft.errors import DeRaError


def end_tokens(
    generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None, record: Record
) -> list[int]:
    """
    The ids of the tokens that end a completion: those that the records of the adapters' training name, the tokenizer's
    own, and those of the base's generation config.

    An adapter's training may have ended its texts with a token that the base never ends with (`eos_token` of TRL's
    SFTConfig, or the token that a chat template puts behind an answer). The first id is the one to put behind a text of
    which it is only known that it ended.

    Args:
        tokenizer: the adapter's or else the base's; None if there is none, and then the records' are not known by id.

    Raises:
        DeRaError: the tokenizer does not know a token that a record names.
    """
    ids: list[int] = []
    if tokenizer is not None:
        ids += [_id_of(name, tokenizer) for name in recorded_end_tokens(record)]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return list(dict.fromkeys([*ids, *configured_end_tokens(generation_config)]))


def configured_end_tokens(generation_config: GenerationConfig) -> list[int]:
    """Those of a generation config, which may hold a number, a list or none."""
    found = generation_config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else [int(each) for each in found]


def end_with(model: PreTrainedModel, ids: Iterable[int]) -> None:
    """Makes `generate` end at these tokens too."""
    before = configured_end_tokens(model.generation_config)
    if new := [each for each in ids if each not in before]:
        model.generation_config.eos_token_id = [*before, *new]


def recorded_end_tokens(record: Record) -> list[str]:
    """What `dera.json` of the model, and of each of its adapters that has one, says of its training."""
    own = [Record.load(folder) for folder in record.adapters.values() if Record.is_in(folder)]
    return list(dict.fromkeys(name for each in (record, *own) for name in each.training.get("end_tokens", ())))


def _id_of(name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    found = tokenizer.convert_tokens_to_ids(name)
    if not isinstance(found, int) or tokenizer.convert_ids_to_tokens(found) != name:
        raise DeRaError(
            f"{FILE_NAME} names {name!r} as a token that ends what the adapter was trained on, and the tokenizer of "
            f"{tokenizer.name_or_path!r} does not have it: save the tokenizer that it was trained with into the "
            "adapter's folder."
        )
    return found
