"""Prompts in the form in which TRL samples on them, which must be the tokens that decoding makes of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from dera_peft.decoding.chats import whole_prompt
from dera_peft.decoding.prompts import Prompt, PromptTooLong, encode
from dera_peft.training.rows import RowCount

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedConfig, PreTrainedTokenizerBase

TOO_LONG = "are too long for the model's context with max_completion_length"
OTHER_TOKENS = "become other tokens in TRL than in decoding (a prefilled answer, tools, or an end token behind a text)"


def read_prompt_rows(
    name: str,
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    config: "PreTrainedConfig",
    new_tokens: int,
    chat: bool,
    template_arguments: Mapping[str, Any] = {},
) -> tuple[list[dict[str, Any]], list[list[int]], RowCount]:
    """
    Args:
        name: of the prompts, for messages.
        new_tokens: that have to fit behind each.
        chat: whether texts become chats.
        template_arguments: what TRL gives the chat template besides.

    Returns:
        A row with the column `prompt`, a text or a chat, and the token ids, for each prompt that can be used; and the
        count of the others.

    Raises:
        DeRaError: there is no chat template, or it refuses a chat.
    """
    rows, tokens, count = [], [], RowCount(name, len(prompts))
    for number, prompt in enumerate(prompts, start=1):
        content = whole_prompt(prompt.content, prompt.columns, chat)
        try:
            (ids,) = encode([prompt], tokenizer, config, new_tokens, chat)
        except PromptTooLong:
            count.leave_out(number, TOO_LONG)
            continue
        if ids != _as_trl(tokenizer, content, template_arguments):
            count.leave_out(number, OTHER_TOKENS)
            continue
        rows.append({"prompt": content})
        tokens.append(ids)
    return rows, tokens, count


def _as_trl(
    tokenizer: "PreTrainedTokenizerBase", content: str | list[dict[str, Any]], arguments: Mapping[str, Any]
) -> list[int]:
    """What TRL's DistillationTrainer makes of a prompt."""
    if isinstance(content, str):
        return list(tokenizer(text=content)["input_ids"])
    rendered = tokenizer.apply_chat_template(content, add_generation_prompt=True, return_dict=True, **arguments)
    return list(cast("BatchEncoding", rendered)["input_ids"])
