"""The SFT model as what samples: loaded for inference, quantized where asked for, with the adapter that makes it."""

from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_quantization_config

from dera_peft.checkpoint.adapters import check_adapter
from dera_peft.checkpoint.loading import QUANTIZATIONS, check_quantization, load_config
from dera_peft.errors import DeRaError, first_line
from dera_peft.training.models import Source


def load_sft_model(
    source: Source, quantization: str | None = None, dtype: str = "auto", device_map: Any = None
) -> PreTrainedModel:
    """
    The SFT model, in evaluation mode.

    Args:
        source: from `find_source`. Its adapter, if it has one, is loaded by PEFT into the base, and not merged.
        quantization: None, "nf4" or "fp4" (with double quantization, as QLoRA trains), or "int8".
        dtype: of the weights, by name; "auto" is that of the checkpoint.
        device_map: as in transformers.

    Raises:
        DeRaError: the adapter does not fit the base, or the base can't be loaded or quantized here.
    """
    config = load_config(source.base, revision=source.revision)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    if source.adapter is not None:
        check_adapter(source.adapter, source.base, skeleton)
    if quantization is not None:
        if quantization not in QUANTIZATIONS:
            raise DeRaError(f"quantization={quantization!r} is not known; choose one of {QUANTIZATIONS}, or none.")
        check_quantization(quantization, source.base, skeleton, device_map)
    quantized = ModelConfig(
        load_in_4bit=quantization in ("nf4", "fp4"),
        load_in_8bit=quantization == "int8",
        bnb_4bit_quant_type="fp4" if quantization == "fp4" else "nf4",
        use_bnb_nested_quant=True,
        dtype=config.dtype if dtype == "auto" else dtype,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.base,
            revision=source.revision,
            dtype=dtype,
            device_map=device_map,
            quantization_config=get_quantization_config(quantized),
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise DeRaError(f"model_name_or_path={source.base!r} can't be loaded: {first_line(error)}") from error
    if source.adapter is not None:
        model = PeftModel.from_pretrained(model, source.adapter).get_base_model()
    return model.eval()
