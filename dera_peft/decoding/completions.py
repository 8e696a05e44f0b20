"""Given completions: rows of a file, and the token ids that they are scored as."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dera_peft.decoding.chats import CONTEXT
from dera_peft.decoding.jsonl import parse_row
from dera_peft.decoding.prompts import Prompt, is_utf8
from dera_peft.errors import DeRaError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ENDS: dict[str | None, bool] = {"eos": True, "length": False}  # whether the model ended it, by a row's "finish_reason"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """
    A completion to be scored. What its row does not say is None.

    Attributes:
        finish_reason: "eos" or "length", as in the rows of `dera generate`.
        end_token_id: the token that ended it.
        token_ids: as it was drawn, with the end token.
    """

    prompt: Prompt
    completion: str
    finish_reason: str | None = None
    end_token_id: int | None = None
    token_ids: list[int] | None = None


def read_completions(file: str) -> list[Given]:
    """
    The rows of a .jsonl file, each with a "prompt" (a text or chat messages) and a "completion" (a text), and perhaps
    what the prompt is rendered with (`chats.CONTEXT`), by itself or in "columns" as `dera generate` writes it.

    Raises:
        DeRaError: no such file, or a row that is malformed, with its line.
    """
    given = []
    try:
        with Path(file).open(encoding="utf-8-sig") as stream:  # a byte order mark is no part of the first row
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    given.append(_read_row(line, len(given), f"{file}, line {number}"))
    except FileNotFoundError:
        raise DeRaError(f"--completions: {file!r}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeRaError(f"--completions: {file!r} can't be read: {error}") from None
    if not given:
        raise DeRaError(f"--completions: {file!r} has no rows in it.")
    return given


def _read_row(line: str, index: int, source: str) -> Given:
    row = parse_row(line, source)
    for key in ("prompt", "completion"):
        if key not in row:
            raise DeRaError(f"{source}: has no key {key!r}; its keys are {sorted(row)}.")
    if not isinstance(row["completion"], str):
        raise DeRaError(f"{source}: a completion must be a text; got {row['completion']!r}.")
    if not is_utf8(row["completion"]):
        raise DeRaError(f"{source}: the completion is not valid UTF-8.")
    if "finish" in row and "finish_reason" not in row:
        raise DeRaError(
            f"{source}: 'finish' is what an earlier version called 'finish_reason': rename the key, or make the "
            "completions again."
        )
    end_token_id, token_ids = row.get("end_token_id"), row.get("token_ids")
    if end_token_id is not None and not _is_token(end_token_id):
        raise DeRaError(f"{source}: end_token_id must be the id of a token; got {end_token_id!r}.")
    if token_ids is not None and not (isinstance(token_ids, list) and all(map(_is_token, token_ids))):
        raise DeRaError(f"{source}: token_ids must be a list of ids of tokens; got {token_ids!r}.")
    columns = row.get("columns")  # in the rows of `dera generate`
    columns = columns if isinstance(columns, dict) else row
    prompt = Prompt(index, row["prompt"], source, columns={name: columns[name] for name in CONTEXT if name in columns})
    return Given(prompt, row["completion"], row.get("finish_reason"), end_token_id, token_ids)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def encode_completions(
    given: Sequence[Given],
    prompts: Sequence[Sequence[int]],
    tokenizer: "PreTrainedTokenizerBase",
    config: "PreTrainedConfig",
    ends: Sequence[int],
    end: bool | None,
) -> list[list[int]]:
    """
    Token ids of each completion: those that it was drawn as, where its row has them; else its text by itself, as
    decoding makes a text of its tokens by themselves. Warns where a row's tokens are those of another text.

    Args:
        prompts: token ids of the prompts, with which they must fit into the context.
        ends: the tokens that end a completion, see `end_tokens`; the first one stands for an end that no row names.
        end: whether an end token follows each completion; None asks its row.

    Raises:
        DeRaError: a completion is too long, a row's "finish_reason" is not known, or there is no end token.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    result, others = [], 0
    for each, prompt in zip(given, prompts, strict=True):
        source = each.prompt.source
        if end is None and each.finish_reason not in (None, *ENDS):
            raise DeRaError(
                f"{source}: finish_reason={each.finish_reason!r} is neither 'eos' nor 'length': say with --end or "
                "--no-end whether the end token is part of the completions."
            )
        if (drawn := _drawn(each, tokenizer, ends)) is not None:
            ids, own_end = drawn
        else:
            others += each.token_ids is not None
            ids, own_end = list(tokenizer(each.completion, add_special_tokens=False)["input_ids"]), None
        has_end = own_end is not None or ENDS.get(each.finish_reason, False) if end is None else end
        is_written_out = own_end is None and ids[-1:] != [] and ids[-1] in ends
        if has_end and not is_written_out:
            found = [token for token in (own_end, each.end_token_id, *ends) if token is not None]
            if not found:
                raise DeRaError(f"{source}: neither the tokenizer nor the base has an end token; pass --no-end.")
            ids.append(found[0])
        length = len(ids) if config.is_encoder_decoder else len(prompt) + len(ids)
        if context is not None and length > context:
            raise DeRaError(
                f"{source}: prompt and completion have {len(prompt)} and {len(ids)} tokens, which is more than the "
                f"model's context of {context}; shorten them."
            )
        result.append(ids)
    if others:
        logger.warning(
            f"{others} of {len(given)} completions have token_ids of another text or tokenizer: their texts are scored "
            "as the tokenizer splits them"
        )
    return result


def _drawn(
    given: Given, tokenizer: "PreTrainedTokenizerBase", ends: Sequence[int]
) -> tuple[list[int], int | None] | None:
    """The tokens that a completion was drawn as, and the one that ended it; None where they are not of its text."""
    if given.token_ids is None:
        return None
    ids, own_end = list(given.token_ids), None
    if ids and given.finish_reason != "length" and (ids[-1] == given.end_token_id or ids[-1] in ends):
        own_end = ids.pop()
    return (ids, own_end) if tokenizer.decode(ids, skip_special_tokens=True) == given.completion else None
