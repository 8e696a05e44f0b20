"""Tool calls: in messages that clients send back, and in what a model says."""

import json
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dera_peft.messages import warn_once

CALLS = "tool_calls"

logger = logging.getLogger(__name__)


def with_read_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which a call's arguments, which OpenAI writes as JSON, are values: chat templates write them anew."""
    return [
        {**message, CALLS: [_with_read_arguments(call) for call in message[CALLS]]}
        if isinstance(message.get(CALLS), list)
        else message
        for message in messages
    ]


def _with_read_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:  # a template may write it as it is
        return call


def can_parse(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer says how its model writes calls."""
    return getattr(tokenizer, "response_template", None) is not None


def parse_message(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], completion: Sequence[int], tools: list[Any]
) -> dict[str, Any] | None:
    """An answer as OpenAI's message, with its calls, by transformers' parser; None where it has none."""
    try:
        parsed = tokenizer.parse_response(list(completion), prefix=list(prompt), tools=tools)
    except Exception as error:  # the model need not keep to its form, and the parser is a program of the tokenizer's
        warn_once(logger, f"an answer with tools can't be parsed: {error}")
        return None
    if not isinstance(parsed, dict) or not parsed.get(CALLS):
        return None
    calls = []
    for call in parsed[CALLS]:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": function.get("name", ""), "arguments": text},
            }
        )
    return {"role": "assistant", "content": parsed.get("content") or None, CALLS: calls}
