"""The adapters of training: below the one that is trained, continued, merged, copied."""

import shutil
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from dera_peft.checkpoint.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from dera_peft.engine.adapter_kinds import check_adapter_kind, check_keeps_biases
from dera_peft.engine.lora import find_adapted
from dera_peft.errors import DeRaError

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
FROZEN = "frozen_adapter"


class FrozenLora(nn.Module):
    """
    The delta of a frozen LoRA layer, s·B(A(x)), that is added to what the layer below it gives.

    It belongs to the base as the trainer sees it: an adapter on top of the layer, switched off, leaves the SFT model.
    """

    def __init__(self, layer: LoraLayer, adapter: str):
        super().__init__()
        lora_a, lora_b = cast("nn.Linear", layer.lora_A[adapter]), cast("nn.Linear", layer.lora_B[adapter])
        self.register_buffer("down", lora_a.weight.detach())
        self.register_buffer("up", lora_b.weight.detach())
        self.register_buffer("bias", None if lora_b.bias is None else lora_b.bias.detach())
        self.scaling = layer.scaling[adapter]

    def add(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].to(self.down.dtype)
        delta = functional.linear(functional.linear(x, self.down), self.up, self.bias)
        return (output + delta * self.scaling).to(output.dtype)


def freeze_adapter(peft_model: PeftModel, adapter: str) -> PreTrainedModel:
    """
    The model with its adapter under it, where it can be neither switched off nor trained: the SFT model.

    The adapter is not merged, so that the base may be quantized and stays as it is.

    Args:
        adapter: where it is from, for messages.

    Raises:
        DeRaError: the adapter is of a kind whose delta can't be added so.
    """
    (name,) = peft_model.peft_config
    deltas = {}
    for adapted in find_adapted(peft_model.get_base_model(), [name]):
        layer = adapted.module
        if not (adapted.scales and isinstance(layer, LoraLayer) and name in layer.lora_A):
            raise DeRaError(
                f"sft_adapter={adapter!r}: {adapted.name!r} has DoRA, or an adapter on embeddings; training on top of "
                "a frozen adapter needs plain LoRA on linear layers. Merge it into the base, or continue it "
                "(continue_sft_adapter)."
            )
        deltas[adapted.name] = FrozenLora(layer, name)
    model = peft_model.unload()
    for path, delta in deltas.items():
        linear = model.get_submodule(path)
        linear.add_module(FROZEN, delta)
        linear.register_forward_hook(delta.add)
    return model


def train_in_float32(model: PeftModel) -> None:
    """
    Makes a quantized model's adapters float32, as PEFT does; TRL rounds the one that is trained to bfloat16.

    In bfloat16 the updates of a small learning rate are lost, and an adapter that is continued would no longer be its
    reference at the first step.
    """
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    if "ref" in model.peft_config:
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.data.copy_(model.get_parameter(name.replace(".default.", ".ref.")))


def check_decodable(model: PeftModel) -> None:
    """Raises `DeRaError` where the adapter is of a kind that DeRa can't decode, or these programs can't train."""
    config = check_adapter_kind("default", model.peft_config["default"])
    check_trains("default", config)
    find_adapted(model.get_base_model(), ["default"])


def check_trains(adapter: str, config: LoraConfig, argument: str = "adapter") -> None:
    """
    Raises:
        DeRaError: the adapter has more than LoRA factors, or biases that take the place of the base's.
    """
    check_keeps_biases(adapter, config, argument)
    # a second copy of these would have to follow the reference through continued training, which TRL's does not
    for option in ("modules_to_save", "trainable_token_indices"):
        if value := getattr(config, option):
            raise DeRaError(f"{argument}={adapter!r} has {option}={value!r}: these programs train LoRA factors alone.")


def merge(base: PreTrainedModel, adapter: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """
    Merges an adapter into a base, and saves that and the tokenizer; whole, or not at all.

    What is in `folder` before is kept, as `folder.old` at the last, until the new one is in its place.
    """
    unfinished, old = folder.with_name(f"{folder.name}.unfinished"), folder.with_name(f"{folder.name}.old")
    PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def copy_adapter(adapter: str, folder: Path) -> None:
    """Copies an adapter's two files, so that what is trained on it can be moved and published as one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ADAPTER_FILES:
        shutil.copyfile(cast("str", cached_file(adapter, file)), folder / file)  # it raises where there is none


def remove_copy_of_reference(folder: Path) -> None:
    """PEFT saves TRL's "ref" too, which is the SFT adapter once more."""
    shutil.rmtree(folder / "ref", ignore_errors=True)
