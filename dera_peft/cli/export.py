"""`dera export`: one adapter, or one model, at a fixed λ, and how far it is from DeRa."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dera_peft.checkpoint.formats import Format
from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.lambdas import NamedLambda, is_lambda, read_lambda
from dera_peft.decoding.prompt_settings import PromptSettings
from dera_peft.files import check_new_folder
from dera_peft.lock import hold
from dera_peft.settings import Check, part, setting

if TYPE_CHECKING:
    from dera_peft.decoding.prompts import Prompt

WRITTEN = {
    "peft": "a plain LoRA adapter",
    "safetensors": "the base with a LoRA adapter merged into it",
    "gguf": "llama.cpp's file of a LoRA adapter",
}


@dataclass(frozen=True, kw_only=True)
class ExportSettings(PromptSettings, ModelSource):
    """The settings of `dera export`."""

    lam: float | Mapping[str, float] = setting(
        help="The strength to export at; of several adapters name=λ,name=λ.",
        metavar="λ",
        option="--lambda",
        parse=read_lambda,
        check=Check(lambda lam: all(map(is_lambda, lam.values() if isinstance(lam, Mapping) else [lam])), "finite"),
    )
    output: str = setting(help="Folder of what is written, a new or an empty one.", metavar="DIR")
    format: Format = setting(
        "peft",
        "peft: a plain LoRA adapter; safetensors: the base with it merged in; gguf: llama.cpp's LoRA file, which its "
        "--lora-scaled scales further, and a Modelfile for Ollama.",
    )
    overwrite: bool = setting(False, "Write into a folder that has something in it, in place of an export there.")
    json: bool = setting(False, "Print what was measured as JSON.")


def export(settings: ExportSettings) -> None:
    """Write an adapter or a model at a fixed λ, for servers that know nothing of DeRa, and measure how near it is.

    It mixes weights where DeRa mixes logits, so it is an approximation. Give prompts to see how good it is; dera
    distill makes a nearer one.

    **Examples**

    `dera export --adapter ./dpo --lambda 0.6 --output ./dpo-0.6 --prompts test.txt`

    `dera export --adapter ./dpo --lambda 0.6 --format safetensors --output ./model-0.6`

    `dera export --adapter ./dpo --lambda 1 --format gguf --output ./gguf`
    """
    settings.check_paths()
    check_new_folder(settings.output, settings.overwrite, settings.folders.values())
    prompts = settings.read_prompts()
    with hold(Path(settings.output), "--output", is_folder=True):
        _export(settings, prompts)


def _export(settings: ExportSettings, prompts: "list[Prompt]") -> None:
    from rich.console import Console

    from dera_peft.checkpoint.fit import NEW_TOKENS, describe_fit
    from dera_peft.cli.console import format_lam, print_json
    from dera_peft.decoding.prompts import encode
    from dera_peft.model import DeRaModel

    source = part(settings, ModelSource).placed()
    source.check_has_adapter("dera export")
    tokens = []
    if prompts:
        base_config, tokenizer = source.config, source.tokenizer()
        tokens = encode(prompts, tokenizer, base_config, NEW_TOKENS, settings.chat)
    fit = DeRaModel.from_source(source).export(
        settings.lam, settings.output, tokens, settings.overwrite, settings.format
    )
    if settings.json:
        print_json(json.dumps({"folder": settings.output, "lambda": settings.lam, **fit}, ensure_ascii=False))
        return
    lam = NamedLambda(settings.lam) if isinstance(settings.lam, Mapping) else settings.lam
    console = Console()
    what = WRITTEN[settings.format]
    console.print(f"written to {settings.output}: {what} at {format_lam(lam)}", highlight=False, soft_wrap=True)
    console.print(describe_fit(fit), highlight=False)
