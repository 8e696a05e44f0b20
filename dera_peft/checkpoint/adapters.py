"""One PEFT adapter's way into a model, and out of it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from dera_peft.checkpoint.adapter_check import CheckedAdapter
from dera_peft.checkpoint.adapter_file import PREFIX, AdapterFile, is_bias, module_of
from dera_peft.checkpoint.vocabulary import own_tokens_alone
from dera_peft.engine.adapter_kinds import check_one_has_biases
from dera_peft.engine.biases import drop_biases, keep_biases
from dera_peft.engine.quantized import keep_packed
from dera_peft.engine.wrapped import own_module
from dera_peft.errors import DeRaError


def attach_adapter(
    model: PreTrainedModel | PeftModel,
    checked: CheckedAdapter,
    name: str,
    *,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    own_tokens: int | None = None,
) -> PeftModel:
    """
    Loads an adapter that `check_adapter` passed into a base, or into a PeftModel that has others.

    Args:
        name: its name in the PeftModel.
        dtype: of its weights, where its layers run on an accelerator; the base's unless given.
        trainable: whether it is to be trained on.
        own_tokens: how many rows of the base's embeddings its checkpoint has; all of them unless given.

    Raises:
        DeRaError: its weights are not finite, or it would change the base.
    """
    base = cast("PreTrainedModel", model.get_base_model()) if isinstance(model, PeftModel) else model
    file, tensors = checked.file, checked.file.tensors()
    _take_copies(base, checked, tensors, own_tokens)
    others = cast("Iterable[LoraConfig]", model.peft_config.values()) if isinstance(model, PeftModel) else ()
    check_one_has_biases(file.adapter, [file.config, *others])
    trained = {} if file.config.bias == "none" else _biases(tensors)
    # weights that live on disk or are moved in and out are not there to put an adapter beside
    offloaded = any(parameter.is_meta for parameter in base.parameters())
    if offloaded and trained:
        raise DeRaError(
            f"{file.named} holds biases of the base's own modules; where layers are offloaded that is not supported."
        )
    config = replace(file.config, inference_mode=not trainable)
    with _device_map_hidden(base), keep_biases(base, name, trained), keep_packed(base):
        if isinstance(model, PeftModel):
            peft_model = model
            peft_model.add_adapter(name, config, low_cpu_mem_usage=offloaded)
            if trainable:
                peft_model.set_requires_grad(name)
        else:
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(cast("str", config.task_type), PeftModel)
            peft_model = kind(model, config, name, low_cpu_mem_usage=offloaded)
        with own_tokens_alone(peft_model):
            set_peft_model_state_dict(peft_model, tensors, name, low_cpu_mem_usage=offloaded)
    if offloaded:
        _materialize(base, name, file, tensors)
    place_adapter(base, name, dtype or base.dtype)
    peft_model.eval()
    return peft_model


def detach_adapter(peft_model: PeftModel, name: str) -> None:
    """Takes an adapter that `attach_adapter` loaded out of the model again."""
    drop_biases(peft_model.get_base_model(), name)
    peft_model.delete_adapter(name)
    if peft_model.active_adapter not in peft_model.peft_config:  # saving looks up the config of the active one
        peft_model.active_adapter = next(iter(peft_model.peft_config))


@contextmanager
def _device_map_hidden(base: PreTrainedModel) -> Iterator[None]:
    """PEFT would spread an offloaded base anew, by a map of its own, when the first adapter comes."""
    device_map = vars(base).pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            base.hf_device_map = device_map


def _materialize(base: PreTrainedModel, name: str, file: AdapterFile, tensors: Mapping[str, torch.Tensor]) -> None:
    """PEFT moves an adapter to its layer's device, which is "meta" where the layer is offloaded: puts it in again."""
    for path, module in base.named_modules():
        if not isinstance(module, LoraLayer) or name not in module.lora_A:
            continue
        for part, linear in (("lora_A", module.lora_A[name]), ("lora_B", module.lora_B[name])):
            for kind, parameter in list(linear.named_parameters()):
                if parameter.is_meta:
                    tensor = tensors[f"{PREFIX}{path}.{part}.{kind}"]
                    setattr(linear, kind, nn.Parameter(tensor, requires_grad=False))
    for path, parameter in base.named_parameters():
        if parameter.is_meta and f".{name}" in path and ".lora_" in path:
            raise DeRaError(
                f"{file.named}: {path!r} adapts a layer that is offloaded; there only plain LoRA on linear "
                "layers is supported."
            )


def place_adapter(base: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
    """
    Puts the adapter where its layers run, and casts it once, instead of its activations up and down at every layer: to
    the base's dtype. On a CPU its factors stay in fp32: products of so few columns are slower in bf16, and an adapter
    is small.
    """
    for module in base.modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            own = next(cast("nn.Module", module.original_module).parameters())  # what it takes the place of
            module.modules_to_save[name].to(own.dtype)
        if not isinstance(module, LoraLayer) or name not in module.r:
            continue
        hook = getattr(module.get_base_layer(), "_hf_hook", None)  # accelerate's, of a layer that is moved in and out
        device = None if hook is None else hook.execution_device
        runs_on = next(module.get_base_layer().parameters()).device if device is None else torch.device(device)
        factors_dtype = torch.float32 if runs_on.type == "cpu" else dtype
        for parts in (module.lora_A, module.lora_B, module.lora_magnitude_vector):
            if name in parts:
                parts[name].to(device=device, dtype=factors_dtype)
        for factors in (module.lora_embedding_A, module.lora_embedding_B):
            if name in factors:
                factors[name].data = factors[name].data.to(device=device, dtype=factors_dtype)


def _biases(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trained biases of the base's own modules, by their names."""
    return {module_of(key.removeprefix(PREFIX)): tensor for key, tensor in tensors.items() if is_bias(key)}


def _take_copies(
    base: PreTrainedModel, checked: CheckedAdapter, tensors: dict[str, torch.Tensor], own_tokens: int | None
) -> None:
    """
    Takes the base's own embeddings, which PEFT saves where they are adapted, out of an adapter's tensors. They must
    agree with the base's; rows for tokens that the base's checkpoint does not have become the base's.
    """
    for key in checked.copies:
        module = base.get_submodule(module_of(key.removeprefix(PREFIX)))
        weight = getattr(own_module(module), key.rpartition(".")[2])
        copy = tensors.pop(key).to(weight.device, weight.dtype)
        if copy.shape != weight.shape or not torch.equal(copy[:own_tokens], weight[:own_tokens]):
            raise DeRaError(
                f"{checked.file.named} holds weights for the base's own {module_of(key.removeprefix(PREFIX))!r} that "
                "differ from the base's, so they would change the reference too; train them as modules_to_save, or "
                "save without them (save_embedding_layers=False)."
            )
        weight.data.copy_(copy)
