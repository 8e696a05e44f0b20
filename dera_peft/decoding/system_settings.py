"""System prompts by which the branches differ, as options: the aligned model's principle, and one of the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dera_peft.decoding.prompt_settings import PANEL
from dera_peft.decoding.prompts import Prompt, encode
from dera_peft.settings import Check, Settings, setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

NOT_BLANK = Check(lambda text: bool(text.strip()), "a text that is not blank")
Tokens = list[list[int]]


@dataclass(frozen=True)
class SystemSettings(Settings):
    """
    Each is of its own branch, with an adapter and without: a branch whose option is left out reads the prompt as it is.
    """

    principle: str | None = setting(
        None,
        "A system prompt that the aligned model alone reads, so that λ is its strength; before a text it stands with a "
        "blank line. Needs no adapter.",
        check=NOT_BLANK,
        metavar="TEXT",
        panel=PANEL,
    )
    reference_system: str | None = setting(
        None, "A system prompt that the reference alone reads.", check=NOT_BLANK, metavar="TEXT", panel=PANEL
    )

    @property
    def prompts_differ(self) -> bool:
        """Whether the reference reads other prompts than the aligned model."""
        return self.principle != self.reference_system

    def system_prompts(self) -> dict[str, str]:
        """Those that are given: a part of a run's fingerprint."""
        both = {"principle": self.principle, "reference_system": self.reference_system}
        return {name: text for name, text in both.items() if text is not None}

    def encode(
        self,
        prompts: Sequence[Prompt],
        tokenizer: "PreTrainedTokenizerBase",
        config: "PreTrainedConfig",
        max_new_tokens: int,
        chat: bool,
    ) -> tuple[Tokens, Tokens | None]:
        """
        Token ids of each prompt as the aligned model reads it, and as the reference does; None where that is the same.
        """
        own = encode(prompts, tokenizer, config, max_new_tokens, chat, self.principle)
        if not self.prompts_differ:
            return own, None
        return own, encode(prompts, tokenizer, config, max_new_tokens, chat, self.reference_system)
