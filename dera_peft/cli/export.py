"""`dera export`: one plain PEFT adapter at a fixed λ, and how far it is from DeRa."""

import json
import math
from collections.abc import Sequence

from rich.console import Console

from dera_peft.checkpoint.export import NEW_TOKENS, describe
from dera_peft.checkpoint.loading import load, load_config, load_tokenizer, resolve
from dera_peft.decoding.prompts import encode, from_file, from_texts, is_lambda
from dera_peft.errors import DeRaError


def read_lam(text: str) -> float | dict[str, float]:
    """`"0.6"` -> 0.6; `"helpful=0.7,harmless=0.2"` -> a dict by adapter."""
    named: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not is_lambda(number) or (not equals and "," in text):
            raise DeRaError(f"--lambda: {text!r} is not a number, nor name=number for each adapter with commas.")
        if not equals:
            return number
        named[name.strip()] = number
    return named


def export(
    base: str | None,
    adapter: str | None,
    quantization: str | None,
    dtype: str | None,
    device_map: str | None,
    lam: str,
    folder: str,
    texts: Sequence[str],
    prompts_file: str | None,
    chat: bool,
    as_json: bool,
) -> None:
    """See `dera export --help`."""
    strength = read_lam(lam)
    if texts and prompts_file:
        raise DeRaError("give --prompt or --prompts, not both.")
    prompts = from_file(prompts_file) if prompts_file else from_texts(texts)
    tokens = []
    if prompts:
        record = resolve(base, adapter)
        config = load_config(record.base, revision=record.base_revision)
        tokens = encode(prompts, load_tokenizer(base, adapter), config, NEW_TOKENS, chat)
    model = load(base, adapter, quantization=quantization, dtype=dtype, device_map=device_map)
    fit = model.export(strength, folder, tokens)
    if as_json:
        print(json.dumps({"folder": folder, "lambda": strength, **fit}, ensure_ascii=False))
        return
    console = Console()
    console.print(f"written to {folder}: a plain LoRA adapter at λ={lam}", highlight=False, soft_wrap=True)
    console.print(describe(fit), highlight=False)
