"""Between texts and tokens: what a tokenizer adds to a text, and the text of drawn tokens."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "a"  # a text that is no special token


def num_closing_tokens(tokenizer: "PreTrainedTokenizerBase") -> int:
    """
    How many tokens the tokenizer puts behind a text of its own accord. One that was saved with `add_eos_token` puts an
    end token there, which would close a prompt before it is continued.
    """
    ids, own = tokenizer(PROBE)["input_ids"], tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    starts = range(len(ids) - len(own) + 1)
    return next((len(ids) - start - len(own) for start in starts if ids[start : start + len(own)] == own), 0)
