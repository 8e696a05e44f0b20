"""bitsandbytes: what `quantization=` stands for, and what it can't do on this machine."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from dera_peft.errors import DeRaError


def quantized_to(
    config: PreTrainedConfig, quantization: str | None, base_arguments: Mapping[str, Any]
) -> tuple[str | None, bool]:
    """
    What a base is quantized to when it is loaded, and whether its checkpoint is so already.

    Args:
        quantization: that is asked for.
        base_arguments: of `from_pretrained`, of which a `quantization_config` may ask for one.
    """
    stored = quantization_name(vars(config).get("quantization_config"))
    if stored is not None:
        return stored, True
    return quantization or quantization_name(base_arguments.get("quantization_config")), False


def choose_quantization(
    named: str,
    config: PreTrainedConfig,
    skeleton: PreTrainedModel,
    quantization: str | None,
    given: Any,
    dtype: torch.dtype | str,
    device_map: Any,
) -> Any:
    """
    The `quantization_config` to load a base with; None for the one that its checkpoint has, or none at all.

    Args:
        named: the base, for messages.
        quantization: "nf4", "fp4" or "int8", where asked for.
        given: the caller's own `quantization_config`, or None.
        dtype: see `quantization_config`.

    Raises:
        DeRaError: two say how the base is quantized, or it can't be quantized so here.
    """
    if quantization is not None and given is not None:
        raise DeRaError("give quantization or quantization_config, not both.")
    asked = quantization or quantization_name(given)
    stored, is_stored = quantized_to(config, None, {})
    if is_stored and asked is not None and _kind(asked) != _kind(stored):
        argument = "quantization_config" if quantization is None else "quantization"
        raise DeRaError(
            f"{argument}: {asked} is asked for, and {named} is a checkpoint in {stored}, which stays as it is: leave "
            f"{argument} out, or name the unquantized base."
        )
    needed = quantization if stored is None else stored
    if _kind(needed) in ("nf4", "fp4", "int8"):
        kind = str(_kind(needed))
        verdict = f"is quantized to {kind}, which can't run" if is_stored else f"can't be quantized to {kind}"
        _check_runs(kind, f"{named} {verdict} on this CPU", skeleton, device_map)
    if stored is not None:
        return given
    return given if quantization is None else quantization_config(quantization, dtype, config)


def compute_in(model: PreTrainedModel, dtype: torch.dtype | str) -> None:
    """Makes 4-bit layers compute in `dtype`; "auto" leaves what their checkpoint says, which transformers keeps."""
    if dtype == "auto" or not getattr(model, "is_loaded_in_4bit", False):
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def _check_runs(quantization: str, verdict: str, skeleton: PreTrainedModel, device_map: Any) -> None:
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
                f"{verdict}: {name!r} has {module.in_features} "
                f"inputs and {module.out_features} outputs, and bitsandbytes' kernel needs multiples of 64 and 32. "
                "Take the base without quantization, or use a GPU."
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


def _kind(name: str | None) -> str | None:
    """A quantization's name without its details."""
    return None if name is None else name.split()[0]


def _runs_on_cpu(device_map: Any) -> bool:
    devices = set(map(str, device_map.values())) if isinstance(device_map, dict) else {str(device_map)}
    return not torch.accelerator.is_available() or "cpu" in devices
