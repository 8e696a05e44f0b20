"""What several commands read: prompts from options, a file or a pipe; λ; a model with one aligned adapter."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dera_peft.errors import DeRaError
from dera_peft.settings import Settings, setting

if TYPE_CHECKING:
    from dera_peft.checkpoint.record import Record
    from dera_peft.checkpoint.source import ModelSource
    from dera_peft.decoding.prompts import Prompt

PANEL = "Prompts"


@dataclass(frozen=True)
class PromptSettings(Settings):
    """Which prompts a command is given."""

    prompt: tuple[str, ...] = setting((), "A prompt; can be repeated.", metavar="TEXT", panel=PANEL)
    prompts: str | None = setting(
        None,
        "A file of prompts: .txt (one a line), .jsonl or .csv (rows with a 'prompt', a text or chat messages, and "
        "perhaps a 'lambda' of their own), or path.py:function.",
        metavar="FILE",
        panel=PANEL,
    )
    chat: bool = setting(False, "Render prompts with the tokenizer's chat template.", panel=PANEL)

    def read_prompts(self) -> "list[Prompt]":
        """From `prompt` or `prompts`; none where both are left out."""
        from dera_peft.decoding.prompts import from_file, from_texts

        if self.prompt and self.prompts:
            raise DeRaError("give --prompt or --prompts, not both.")
        return from_file(self.prompts) if self.prompts else from_texts(self.prompt)

    def read_prompts_or_lines(self) -> "list[Prompt]":
        """From `prompt`, `prompts` or the lines of standard input; at least one."""
        from dera_peft.decoding.prompts import from_lines

        if prompts := self.read_prompts():
            return prompts
        if sys.stdin is None or sys.stdin.isatty():
            raise DeRaError("no prompt: give --prompt TEXT, --prompts FILE, or lines on standard input.")
        prompts = from_lines(sys.stdin, "standard input")
        if not prompts:
            raise DeRaError("no prompt: standard input is empty.")
        return prompts


def resolve_one_aligned(source: "ModelSource", command: str, way_out: str) -> "Record":
    """
    The record of a model with one aligned adapter.

    Raises:
        DeRaError: it has several, which the command does not take.
    """
    record = source.resolve()
    if len(record.branches) > 2:
        raise DeRaError(f"{command} takes one aligned model, and the record has {list(record.branches)[1:]}; {way_out}")
    return record
