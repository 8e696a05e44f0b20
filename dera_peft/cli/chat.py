"""`dera chat`: a conversation in a terminal, with a dial."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.lambdas import is_lambda, read_lambda
from dera_peft.decoding.sampling import Sampling
from dera_peft.errors import DeRaError
from dera_peft.serve.settings import EngineSettings, ServeSettings
from dera_peft.settings import Check, part, setting, setting_like


@dataclass(frozen=True, kw_only=True)
class ChatSettings(Sampling, EngineSettings):
    """The settings of `dera chat`."""

    lam: float | Mapping[str, float] | None = setting(
        None,
        "Strength to begin with; of several adapters name=λ,name=λ. The one that dera.json names unless given, else 1.",
        option="--lambda",
        parse=read_lambda,
        check=Check(lambda lam: all(map(is_lambda, lam.values() if isinstance(lam, Mapping) else [lam])), "finite"),
        metavar="λ",
        panel="Prompts",
    )
    lambda_range: tuple[float, ...] = setting_like(
        ServeSettings, "lambda_range", help="The λ that can be dialled.", panel="Prompts"
    )
    system: str | None = setting(None, "The chat's system message.", metavar="TEXT", panel="Prompts")
    plain: bool = setting(
        False,
        "Continue texts, without the chat template; so it is for a model that has none.",
        panel="Prompts",
        has_no=False,
    )


def chat(settings: ChatSettings) -> None:
    """Talk to the model in a terminal, and turn λ meanwhile: /lambda 0.7, /compare 0, /save FILE; /help shows all.

    **Examples**

    `dera chat --adapter ./dpo --lambda 0.6`

    `dera chat --adapter runs/tiny/dpo --temperature 0 --max-new-tokens 60`
    """
    settings.check_paths()
    from dera_peft.decoding.lambdas import for_adapters
    from dera_peft.model import DeRaModel
    from dera_peft.serve.engine import Engine
    from dera_peft.serve.terminal import Terminal, shown

    source: ModelSource = settings.source.placed()
    tokenizer = source.tokenizer()
    model = DeRaModel.from_source(source)
    wanted = model.lam if settings.lam is None else settings.lam
    lam = None
    if model.branches_differ:
        (lam,) = for_adapters([wanted], model.aligned)
    elif settings.lam is not None:
        raise DeRaError("--lambda: this model has no adapter, so λ would change nothing: leave it away.")
    is_chat = bool(tokenizer.chat_template) and not settings.plain
    with Engine(model, tokenizer, **settings.engine_arguments()) as engine:
        terminal = Terminal(
            engine, tokenizer, part(settings, Sampling), lam, is_chat, settings.system, sys.stdout,
            settings.lambda_range,
        )  # fmt: skip
        if sys.stdin.isatty():
            kind = "a chat" if is_chat else "texts are continued"
            print(f"{shown(lam)}, {kind}; /help shows the commands", file=sys.stderr)
        terminal.run(_lines())


def _lines() -> Iterator[str]:
    """What is typed, with the line's editing of the terminal; or the lines of standard input."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 # for `input`

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
