"""`dera info`: what would run, without running it."""

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dera_peft.checkpoint.source import ModelSource
from dera_peft.formatting import format_bytes
from dera_peft.settings import part, setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dera_peft.model import DeRaModel

ADAPTER_PARTS = ("lora_", ".modules_to_save.", ".trainable_tokens_")  # of parameters' names
EXAMPLES = (0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class InfoSettings(ModelSource):
    """The settings of `dera info`."""

    json: bool = setting(False, "Print the facts as JSON.")


def info(settings: InfoSettings) -> None:
    """Say what would run: branches, fork, join, rows and memory.

    **Examples**

    `dera info --adapter runs/tiny/dpo`

    `dera info --base org/base --adapter ./dpo --quantization nf4 --json`
    """
    settings.check_paths()
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dera_peft.checkpoint.tokenizers import find_tokenizer, tokenizer_places
    from dera_peft.cli.console import print_json
    from dera_peft.model import DeRaModel

    source = part(settings, ModelSource).placed()
    model = DeRaModel.from_source(source)
    tokenizer = find_tokenizer(*tokenizer_places(source.resolve()), base_arguments=source.load_arguments())
    facts = describe_model(model, tokenizer)
    if settings.json:
        print_json(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    branches = "\n".join(f"{name}: {' + '.join(['base', *adapters])}" for name, adapters in facts["branches"].items())
    rows = ", ".join(f"λ={lam}: {count}" for lam, count in facts["rows_per_sequence"].items()) or "1"
    fork = facts["fork_layer"]
    where = "at the input" if fork == 0 else f"at layer {fork} (layers 0 to {fork - 1} run once)"
    cache = facts["cache_bytes_per_token"]
    size = partial(format_bytes, digits=4)
    lines = {
        "base": f"{facts['base']} ({facts['architecture']})",
        "adapter": "\n".join(f"{name}: {folder}" for name, folder in facts["adapters"].items()),
        "branches": branches,
        "fork": f"{where}, of {facts['layers']} layers",
        "join": facts["join"],
        "rows per sequence": rows,
        "default λ": _format_lam(facts["default_lambda"]),
        "ends at": ", ".join(f"{text} ({token})" for token, text in facts["end_tokens"].items()) or "no token",
        "runs on": f"{facts['device']}, {facts['dtype']}",
        "base weights": f"{facts['base_parameters']:,} parameters, {size(facts['base_bytes'])}",
        "adapter weights": f"{facts['adapter_parameters']:,} parameters, {size(facts['adapter_bytes'])}",
        "KV cache per token": f"{size(cache['below_fork_per_sequence'])} a sequence below the fork, "
        f"{size(cache['above_fork_per_row'])} a row above it",
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, Text(value))
    Console().print(table)


def describe_model(model: "DeRaModel", tokenizer: "PreTrainedTokenizerBase | None" = None) -> dict:
    """
    Branches, fork, join, rows, end tokens (their texts by id, from the tokenizer) and memory of a loaded model.

    Bytes of the KV cache are per token of context, for each of a batch's B sequences below the fork and for each of its
    R rows above it; measured on a cache that one token filled.
    """
    import torch
    from transformers import EncoderDecoderCache
    from transformers.cache_utils import CacheLayerMixin

    from dera_peft.checkpoint.end_tokens import configured_end_tokens

    parameters = list(model.parameters())
    lora = [p for name, p in model.named_parameters() if any(part in name for part in ADAPTER_PARTS)]
    lora_parameters, lora_bytes = sum(p.numel() for p in lora), sum(p.nbytes for p in lora)
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    decoder = {"decoder_input_ids": one} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        lam = dict.fromkeys(model.aligned, 0.0) if model.branches_differ else None
        cache = model(one, lam=lam, use_cache=True, **decoder).past_key_values
    layers = cache.self_attention_cache.layers if isinstance(cache, EncoderDecoderCache) else cache.layers
    # a recurrent state does not grow with the context
    per_layer = [
        sum(states.nbytes for states in (layer.keys, layer.values) if states is not None)
        if isinstance(layer, CacheLayerMixin)
        else 0
        for layer in layers
    ]
    return {
        "base": model.config.name_or_path if model.record is None else model.record.base,
        "architecture": type(model.base).__name__,
        "adapters": {} if model.record is None else model.record.adapters,
        "branches": {branch.name: list(branch.adapters) for branch in model.branches},
        "default_lambda": model.lam,
        "end_tokens": {
            token: None if tokenizer is None else tokenizer.decode([token])
            for token in configured_end_tokens(model.generation_config)
        },
        "fork_layer": model.fork_layer,
        "layers": depth,
        "join": "before the head" if model.joins_before_head else "after the head",
        # with several aligned adapters: each at this λ
        "rows_per_sequence": {f"{lam:g}": model.plan(dict.fromkeys(model.aligned, lam), 1).num_rows for lam in EXAMPLES}
        if model.branches_differ
        else {},
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        # transformers counts a packed 4-bit weight as the numbers that it stands for
        "base_parameters": model.base.num_parameters() - lora_parameters,
        "adapter_parameters": lora_parameters,
        "base_bytes": sum(p.nbytes for p in parameters) - lora_bytes,
        "adapter_bytes": lora_bytes,
        "cache_bytes_per_token": {
            "below_fork_per_sequence": sum(per_layer[: model.fork_layer]),
            "above_fork_per_row": sum(per_layer[model.fork_layer :]),
        },
    }


def _format_lam(lam: float | dict[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in lam.items()) if isinstance(lam, dict) else f"{lam:g}"
