"""The factors of LoRA adapters by the modules of their base, as PEFT would apply them; and which can be kept apart."""

import math
import re
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from dera_peft.checkpoint.adapter_file import FACTORS, PREFIX, AdapterFile
from dera_peft.checkpoint.check import Checked
from dera_peft.engine.fork import own_adapters
from dera_peft.errors import DeRaError
from dera_peft.vllm.branches import Branches

LAYER = re.compile(r"\.layers\.(\d+)\.")
# What an adapter may bring beside factors of linear layers, and what to do instead.
REFUSED = {
    "use_dora": "DoRA scales the base's own weights: train plain LoRA or rsLoRA",
    "modules_to_save": "modules that are trained as a whole would have to be there twice: train LoRA alone",
    "trainable_token_indices": "trained tokens would have to be there twice: train LoRA alone",
    "target_parameters": "parameters of experts are not forked: train LoRA on linear layers",
    "lora_bias": "biases of LoRA are not added: train without them",
}


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to a module's output: x → x·aᵀ·bᵀ; `a` `[r, inputs]`, `b` `[outputs, r]` with the scale."""

    adapter: str
    a: torch.Tensor
    b: torch.Tensor


def read_deltas(branches: Branches, checked: Checked) -> dict[str, list[Delta]]:
    """
    Module of the base -> what adapters add to it.

    Raises:
        DeRaError: an adapter has something else than factors of the linear layers of decoder layers.
    """
    if checked.tokens != checked.own_tokens:
        raise DeRaError(
            f"the adapter was trained with {checked.tokens} tokens, and the base has {checked.own_tokens}: in vLLM the "
            "base's embeddings stay as they are. Save the base with its embeddings resized, and name that."
        )
    deltas: dict[str, list[Delta]] = {}
    for name, adapter in checked.adapters.items():
        check_plain(adapter.file)
        tensors = adapter.file.tensors()
        for module in sorted({_module(adapter.file, key) for key in tensors}):
            a, b = (tensors[f"{PREFIX}{module}.lora_{factor}.weight"] for factor in "AB")
            scaled = b.float() * scale(adapter.file.config, module, rank=len(a))
            deltas.setdefault(module, []).append(Delta(name, a.float(), scaled))
    return deltas


def check_plain(file: AdapterFile) -> None:
    """Raises `DeRaError` where an adapter is more than plain LoRA on linear layers; names the setting."""
    for name, reason in REFUSED.items():
        if value := getattr(file.config, name):
            raise DeRaError(f"{file.named} has {name}={value!r}, which can't be decoded inside vLLM: {reason}.")
    if file.config.bias != "none":
        raise DeRaError(
            f"{file.named} has bias={file.config.bias!r}, which can't be decoded inside vLLM: the base's biases would "
            "have to be there twice. Train with bias='none'."
        )


def scale(config: LoraConfig, module: str, rank: int) -> float:
    """By what PEFT multiplies the product of a module's factors."""
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def fork_layer(branches: Branches, deltas: dict[str, list[Delta]]) -> int:
    """The first decoder layer with an adapter that not all branches share."""
    own = own_adapters(branches.all)
    return min(layer_of(module) for module, each in deltas.items() if own & {delta.adapter for delta in each})


def layer_of(module: str) -> int:
    found = LAYER.search(f"{module}.")
    assert found is not None  # `_module` has checked it
    return int(found[1])


def _module(file: AdapterFile, key: str) -> str:
    """
    The module that a tensor is of.

    Raises:
        DeRaError: it is none of a decoder layer's linear layers, or the tensor is no factor.
    """
    own = key.removeprefix(PREFIX)
    found = FACTORS.fullmatch(own)
    if found is None or found["factor"] not in ("A", "B") or found["kind"] != "weight":
        raise DeRaError(
            f"{file.named} has {own!r}, which can't be decoded inside vLLM: LoRA on linear layers alone can."
        )
    if LAYER.search(found["module"]) is None:
        raise DeRaError(
            f"{file.named} adapts {found['module']!r}, which can't be decoded inside vLLM: adapters on the linear "
            "layers of decoder layers can."
        )
    return found["module"]
