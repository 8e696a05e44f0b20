"""The SFT model as what samples: loaded for inference, quantized where asked for, with the adapter that makes it."""

from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_quantization_config

from dera_peft.errors import DeRaError
from dera_peft.loading import QUANTIZATIONS, check_adapter, check_quantization, load_config


def load_sft_model(
    name: str, adapter: str | None = None, quantization: str | None = None, dtype: str = "auto", device_map: Any = None
) -> PreTrainedModel:
    """
    The SFT model, in evaluation mode.

    Args:
        name: hub id or folder of the model, or of the base of `adapter`.
        adapter: hub id or folder of a LoRA adapter; PEFT loads it into the base, where it is active and not merged.
        quantization: None, "nf4" (with double quantization, as QLoRA trains) or "int8".
        dtype: of the weights, by name; "auto" is that of the checkpoint.
        device_map: as in transformers.

    Raises:
        DeRaError: one of them does not exist or can't be read, or does not fit the other, or can't be quantized here.
    """
    config = load_config(name)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    if adapter is not None:
        check_adapter(adapter, name, skeleton)
    if quantization is not None:
        if quantization not in QUANTIZATIONS:
            raise DeRaError(f"quantization={quantization!r} is not known; choose one of {QUANTIZATIONS}, or none.")
        check_quantization(quantization, name, skeleton, device_map)
    compute = config.dtype if dtype == "auto" else dtype
    model_config = ModelConfig(
        load_in_4bit=quantization == "nf4",
        load_in_8bit=quantization == "int8",
        use_bnb_nested_quant=True,
        dtype=compute,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map=device_map,
            quantization_config=get_quantization_config(model_config),
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise DeRaError(f"model_name_or_path={name!r} can't be loaded: {first_line}") from error
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).get_base_model()
    return model.eval()
