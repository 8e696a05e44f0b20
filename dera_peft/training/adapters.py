"""The adapters of training: below the one that is trained, continued, merged, copied."""

import shutil
from functools import partial
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from dera_peft.checkpoint.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from dera_peft.checkpoint.merging import save_merged
from dera_peft.engine.adapter_kinds import check_adapter_kind, check_keeps_biases
from dera_peft.engine.lora import find_adapted
from dera_peft.errors import DeRaError
from dera_peft.training.sft_model import SFTModel

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
FROZEN = "frozen_adapter"


class FrozenLora(nn.Module):
    """
    The delta of a frozen LoRA layer, s·B(A(x)), that is added to what the layer below it gives.

    It belongs to the base as the trainer sees it: an adapter on top of the layer, switched off, leaves the SFT model.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: LoraLayer, adapter: str):
        super().__init__()
        lora_a, lora_b = cast("nn.Linear", layer.lora_A[adapter]), cast("nn.Linear", layer.lora_B[adapter])
        bias = None if lora_b.bias is None else lora_b.bias.detach()
        for name, tensor in (("down", lora_a.weight.detach()), ("up", lora_b.weight.detach()), ("bias", bias)):
            self.register_buffer(name, tensor, persistent=False)  # no part of what is trained, saved or broadcast
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
    deltas, replaced = {}, {}
    for adapted in find_adapted(peft_model.get_base_model(), [name]):
        layer = adapted.module
        if isinstance(layer, AuxiliaryTrainingWrapper):
            replaced[adapted.name] = _trained_weights(layer, name)
            continue
        if not (adapted.scales and isinstance(layer, LoraLayer) and name in layer.lora_A):
            raise DeRaError(
                f"sft_adapter={adapter!r}: {adapted.name!r} has DoRA, or an adapter on embeddings; training on top of "
                "a frozen adapter needs plain LoRA on linear layers. Merge it into the base, or continue it "
                "(continue_sft_adapter)."
            )
        deltas[adapted.name] = FrozenLora(layer, name)
    model = peft_model.unload()
    for path, weights in replaced.items():
        # not in place: the module may be tied to one that the adapter leaves alone
        model.get_submodule(path).load_state_dict(weights, assign=True)
    for path, delta in deltas.items():
        linear = model.get_submodule(path)
        linear.add_module(FROZEN, delta)
        linear.register_forward_hook(delta.add)
    return model


def _trained_weights(wrapper: AuxiliaryTrainingWrapper, adapter: str) -> dict[str, torch.Tensor]:
    """The weights that an adapter brings for a whole module: of modules_to_save, or with its trained tokens."""
    if isinstance(wrapper, ModulesToSaveWrapper):
        return {name: tensor.detach() for name, tensor in wrapper.modules_to_save[adapter].state_dict().items()}
    layer = cast("TrainableTokensWrapper", wrapper).token_adapter
    others = {name: tensor.detach() for name, tensor in layer.get_base_layer().state_dict().items()}
    return {**others, "weight": layer.get_merged_weights([adapter]).detach()}


def leave_out_embeddings(model: PeftModel) -> None:
    """
    Makes a model save its adapter alone. PEFT would add the embeddings where they have other rows than the base's, as
    those that a frozen adapter brings; that adapter has them.
    """
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)


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
        DeRaError: an adapter that is to be trained has more than LoRA factors, or biases that take the place of the
            base's.
    """
    check_keeps_biases(adapter, config, argument)
    # a second copy of these would have to follow the reference through continued training, which TRL's does not
    for option in ("modules_to_save", "trainable_token_indices"):
        if value := getattr(config, option):
            raise DeRaError(
                f"{argument}={adapter!r} has {option}={value!r}: DPO trains LoRA factors alone. Such an SFT adapter "
                "can be the reference of a new adapter (continue_sft_adapter: false)."
            )


def check_tokens_train(model: nn.Module) -> None:
    """Raises `DeRaError` where TRL trains added tokens in embeddings that are tied to the head, which PEFT can't."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper) and isinstance(
            module.token_adapter.base_layer, ModulesToSaveWrapper
        ):
            raise DeRaError(
                "chat_template_path adds tokens, and the base's embeddings are tied to its head: PEFT can't train the "
                "new rows of both. Add the tokens to the base, save that and train on it; or give a template (a .jinja "
                "file) of tokens that the base has."
            )


def merge_and_save(model: SFTModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """
    Merges an SFT model's adapter into its unquantized base, and saves that and the tokenizer; whole, or not at all. It
    is read back, and compared with the base and its adapter on a few tokens, before it takes its place.

    What is in `folder` before is kept, as `folder.old` at the last, until the new one is in its place.

    Raises:
        DeRaError: they differ by more than rounding.
    """
    unfinished, old = folder.with_name(f"{folder.name}.unfinished"), folder.with_name(f"{folder.name}.old")
    way_out = "Leave merge_adapter out: dera dpo takes the adapter as it is."
    try:
        save_merged(model.load_unquantized(), unfinished, f"merge_adapter: {str(folder)!r}", way_out)
    except DeRaError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
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
