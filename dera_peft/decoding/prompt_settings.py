"""The settings that name prompts: texts, a file, or standard input."""

import sys
from dataclasses import dataclass
from typing import ClassVar

from dera_peft.decoding.prompts import Prompt, from_file, from_lines, from_texts
from dera_peft.errors import DeRaError
from dera_peft.settings import Settings, setting

PANEL = "Prompts"


@dataclass(frozen=True)
class PromptSettings(Settings):
    """Which prompts a command is given."""

    instead: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt", "prompts"),)

    prompt: tuple[str, ...] = setting((), "A prompt; can be repeated.", metavar="TEXT", panel=PANEL)
    prompts: str | None = setting(
        None,
        "A file of prompts: .txt (one a line), .jsonl or .csv (rows with a 'prompt', a text or chat messages, and "
        "perhaps a 'lambda' of their own), or path.py:function.",
        metavar="FILE",
        panel=PANEL,
    )
    chat: bool = setting(False, "Render prompts with the tokenizer's chat template.", panel=PANEL)

    def read_prompts(self) -> list[Prompt]:
        """From `prompt` or `prompts`; none where both are left out."""
        if self.prompt and self.prompts:
            raise DeRaError("give --prompt or --prompts, not both.")
        return from_file(self.prompts) if self.prompts else from_texts(self.prompt)

    def read_prompts_or_lines(self) -> list[Prompt]:
        """From `prompt`, `prompts` or the lines of standard input; at least one."""
        if prompts := self.read_prompts():
            return prompts
        if sys.stdin is None or sys.stdin.isatty():
            raise DeRaError("no prompt: give --prompt TEXT, --prompts FILE, or lines on standard input.")
        prompts = from_lines(sys.stdin, "standard input")
        if not prompts:
            raise DeRaError("no prompt: standard input is empty.")
        return prompts
