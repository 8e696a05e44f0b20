"""A conversation in a terminal, on an engine in this process."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from transformers import PreTrainedTokenizerBase

from dera_peft.decoding.chats import Chat, ChatError
from dera_peft.decoding.lambdas import Lambda, NamedLambda, for_adapters, read_lambda, values_of
from dera_peft.decoding.prompts import token_ids
from dera_peft.decoding.sampling import Sampling
from dera_peft.errors import DeRaError
from dera_peft.files import told_if_unwritable
from dera_peft.serve.engine import Engine
from dera_peft.serve.handle import Handle
from dera_peft.serve.requests import FinishReason, GenerationRequest

HELP = """/lambda 0.7     answer at another λ; of several adapters /lambda helpful=0.7,harmless=0.3
/compare 0      also answer at this λ, with the same random numbers; /compare alone switches it off
/retry          answer the last message again
/new            forget what was said
/save FILE      add the answers to a .jsonl file, as dera score reads it
/quit           end, as Ctrl-D and Ctrl-C do; during an answer Ctrl-C stops that"""


@dataclass(frozen=True)
class Said:
    """An answer, with what it answers: a text, or the messages before it."""

    prompt: str | Chat
    lam: Lambda | None
    text: str
    tokens: list[int]
    finish_reason: FinishReason


@dataclass
class Terminal:
    """
    Args:
        lam: λ to begin with; None for a model without an adapter.
        chat: whether what is typed is a message of a chat; else a text that is continued.
        system: of a chat.
        out: what is shown is written there.
        lambda_range: the least and the greatest λ.

    Attributes:
        messages: of the chat so far. A comparison goes on with the answer at `lam`.
        answers: all that were given.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    lam: Lambda | None
    chat: bool
    system: str | None
    out: TextIO
    lambda_range: Sequence[float]
    messages: Chat = field(default_factory=list)
    answers: list[Said] = field(default_factory=list)
    compared: Lambda | None = None
    last: str | None = None

    def __post_init__(self):
        if self.lam is not None:
            self._check(self.lam)
        self.commands: Mapping[str, Callable[[str], None]] = {
            "/lambda": self._set_lambda,
            "/compare": self._compare,
            "/retry": self._retry,
            "/new": self._new,
            "/save": self._save,
            "/help": lambda _: self._say(HELP),
        }
        self._new("")

    def run(self, lines: Iterable[str]) -> None:
        """Answers line by line; a mistake is told of, and the next line is read."""
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                return
            try:
                if word in self.commands:
                    self.commands[word](rest.strip())
                elif word.startswith("/"):
                    raise DeRaError(f"there is no {word}; /help shows what there is.")
                elif line.strip():
                    self._answer(line.rstrip("\n"))
            except (DeRaError, ChatError) as error:
                self._say(f"error: {error}")
            except KeyboardInterrupt:  # while no answer was shown
                self._say("")

    # -- answers -------------------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        prompt = [*self.messages, {"role": "user", "content": text}] if self.chat else text
        ids = token_ids(self.tokenizer, prompt)
        lambdas = list(dict.fromkeys([self.lam, self.lam if self.compared is None else self.compared]))
        requests = [GenerationRequest(tuple(ids), lam, sampling=self._fitted(len(ids))) for lam in lambdas]
        handles = [self.engine.submit(request) for request in requests]  # all of them run while the first one is shown
        said = []
        try:
            for lam, handle in zip(lambdas, handles, strict=True):
                if len(lambdas) > 1:
                    self._say(shown(lam))
                said.append(self._show(prompt, lam, handle, handles))
        finally:
            for handle in handles:
                handle.cancel()
        self.last = text
        self.answers += said
        if isinstance(prompt, list):
            self.messages = [*prompt, {"role": "assistant", "content": said[0].text}]

    def _show(self, prompt: str | Chat, lam: Lambda | None, handle: Handle, handles: Sequence[Handle]) -> Said:
        """The answer as it comes; Ctrl-C stops it, and those beside it."""
        try:
            for event in handle:
                self.out.write(event.text)
                self.out.flush()
        except KeyboardInterrupt:
            for each in handles:
                each.cancel()
        made = handle.result()
        self._say("" if made.error is None else f"\nerror: {made.error}")
        return Said(prompt, lam, made.text, made.tokens, made.finish_reason)

    def _fitted(self, length: int) -> Sampling:
        """As many new tokens as there is room for."""
        if self.engine.context is None:
            return self.sampling
        room = self.engine.context - length
        if room < 1:
            raise DeRaError(
                f"this has {length} tokens, and the model's context {self.engine.context}: /new starts anew."
            )
        return replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))

    # -- commands ------------------------------------------------------------------------------------------------------

    def _read(self, text: str) -> Lambda:
        if self.lam is None:
            raise DeRaError("this model has no adapter, so λ would change nothing.")
        (lam,) = for_adapters([read_lambda([text])], self.engine.model.aligned, "λ")
        self._check(lam)
        return lam

    def _check(self, lam: Lambda) -> None:
        low, high = self.lambda_range
        if wrong := [value for value in values_of(lam) if not low <= value <= high]:
            raise DeRaError(f"λ={wrong[0]:g} is out of range, {low:g} to {high:g}; --lambda-range sets another.")

    def _set_lambda(self, text: str) -> None:
        self.lam = self._read(text) if text else self.lam
        self._say(shown(self.lam))

    def _compare(self, text: str) -> None:
        self.compared = self._read(text) if text else None
        self._say("one answer" if self.compared is None else f"beside {shown(self.compared)}")

    def _retry(self, _: str) -> None:
        if self.last is None:
            raise DeRaError("/retry: nothing was said yet.")
        self.messages = self.messages[:-2]
        self._answer(self.last)

    def _new(self, _: str) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.last = None

    def _save(self, file: str) -> None:
        if not file:
            raise DeRaError("/save: name a file, as /save chat.jsonl.")
        with told_if_unwritable(file), Path(file).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(_row(said), ensure_ascii=False) + "\n" for said in self.answers)
        self._say(f"{len(self.answers)} answers in {file}")
        self.answers = []

    def _say(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()


def shown(lam: Lambda | None) -> str:
    if lam is None:
        return "no λ"
    return f"λ {lam}" if isinstance(lam, NamedLambda) else f"λ={lam:g}"


def _row(said: Said) -> dict[str, Any]:
    """As `dera generate` writes it, where the model or the limit of tokens ended it."""
    return {
        "prompt": said.prompt,
        "completion": said.text,
        "lambda": dict(said.lam) if isinstance(said.lam, NamedLambda) else said.lam,
        "finish_reason": "eos" if said.finish_reason == "eos" else "length",
        "end_token_id": said.tokens[-1] if said.finish_reason == "eos" else None,
        "token_ids": said.tokens,
    }
