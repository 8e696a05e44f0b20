"""`dera export`: one plain PEFT adapter at a fixed λ, and how far it is from DeRa."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.lambdas import NamedLambda, is_lambda, read_lambda
from dera_peft.decoding.prompt_settings import PromptSettings
from dera_peft.files import check_new_folder
from dera_peft.lock import hold
from dera_peft.settings import Check, part, setting

if TYPE_CHECKING:
    from dera_peft.decoding.prompts import Prompt


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
    output: str = setting(help="Folder of the new adapter, a new or an empty one.", metavar="DIR")
    overwrite: bool = setting(False, "Write into a folder that has something in it, in place of the adapter there.")
    json: bool = setting(False, "Print what was measured as JSON.")


def export(settings: ExportSettings) -> None:
    """Write a plain LoRA adapter at a fixed λ, for any server that loads LoRA, and measure how far it is from DeRa.

    It mixes weights where DeRa mixes logits, so it is an approximation. Give prompts to see how good it is.

    **Examples**

    `dera export --adapter ./dpo --lambda 0.6 --output ./dpo-0.6 --prompts test.txt`
    """
    settings.check_paths()
    check_new_folder(settings.output, settings.overwrite, settings.folders.values())
    prompts = settings.read_prompts()
    with hold(Path(settings.output), "--output", is_folder=True):
        _export(settings, prompts)


def _export(settings: ExportSettings, prompts: "list[Prompt]") -> None:
    from rich.console import Console

    from dera_peft.checkpoint.export import NEW_TOKENS, describe_fit
    from dera_peft.cli.console import format_lam, print_json
    from dera_peft.decoding.prompts import encode
    from dera_peft.model import DeRaModel

    source = part(settings, ModelSource).placed()
    source.check_has_adapter("dera export")
    tokens = []
    if prompts:
        base_config, tokenizer = source.config, source.tokenizer()
        tokens = encode(prompts, tokenizer, base_config, NEW_TOKENS, settings.chat)
    fit = DeRaModel.from_source(source).export(settings.lam, settings.output, tokens, settings.overwrite)
    if settings.json:
        print_json(json.dumps({"folder": settings.output, "lambda": settings.lam, **fit}, ensure_ascii=False))
        return
    lam = NamedLambda(settings.lam) if isinstance(settings.lam, Mapping) else settings.lam
    console = Console()
    console.print(
        f"written to {settings.output}: a plain LoRA adapter at {format_lam(lam)}", highlight=False, soft_wrap=True
    )
    console.print(describe_fit(fit), highlight=False)
