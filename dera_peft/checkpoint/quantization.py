"""bitsandbytes: what `quantization=` stands for, and what it can't do on this machine."""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from dera_peft.errors import DeRaError


def check_quantization(quantization: str, base: str, skeleton: PreTrainedModel, device_map: Any) -> None:
    """
    Refuses what bitsandbytes loads and then fails on at the first forward pass.

    Raises:
        DeRaError: names the module.
    """
    try:
        from bitsandbytes.functional import has_avx512bf16  # imported when asked for: it warns where there is no GPU
    except ImportError as error:
        raise DeRaError(
            f"quantization={quantization!r} needs bitsandbytes (pip install bitsandbytes): {error}"
        ) from error
    if quantization == "int8" or not _runs_on_cpu(device_map) or not has_avx512bf16():
        return
    head = skeleton.get_output_embeddings()
    for name, module in skeleton.named_modules():
        # the packed CPU kernel takes blocks of 32 outputs, and whole quantization blocks of 64 inputs
        if (
            isinstance(module, nn.Linear)
            and module is not head
            and (module.out_features % 32 or module.in_features % 64)
        ):
            raise DeRaError(
                f"base={base!r} can't be quantized to {quantization} on this CPU: {name!r} has {module.in_features} "
                f"inputs and {module.out_features} outputs, and bitsandbytes' kernel needs multiples of 64 and 32. "
                "Leave quantization off, or use a GPU."
            )


def quantization_config(quantization: str, dtype: torch.dtype | str, config: PreTrainedConfig) -> BitsAndBytesConfig:
    """
    4 bits with double quantization, as QLoRA trains and DeRa decodes; or LLM.int8().

    Args:
        dtype: that products are computed in, of 4-bit weights; "auto" is the base's own.
    """
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = (config.dtype or torch.bfloat16) if dtype == "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantization_name(config: BitsAndBytesConfig | dict | None) -> str | None:
    """What `quantization` is called that gives this config; another of bitsandbytes' has a longer name."""
    if config is None:
        return None
    values = config if isinstance(config, dict) else config.to_dict()
    if not values.get("load_in_4bit"):
        return "int8" if values.get("load_in_8bit") else str(values.get("quant_method", "unknown"))
    kind = values.get("bnb_4bit_quant_type", "fp4")
    return kind if values.get("bnb_4bit_use_double_quant") else f"{kind} without double quantization"


def _runs_on_cpu(device_map: Any) -> bool:
    devices = set(map(str, device_map.values())) if isinstance(device_map, dict) else {str(device_map)}
    return not torch.accelerator.is_available() or "cpu" in devices
