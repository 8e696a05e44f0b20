"""A base: its config, its modules without weights, and its weights."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from dera_peft.checkpoint.adapter_file import is_adapter
from dera_peft.checkpoint.quantization import choose_quantization, compute_in
from dera_peft.engine.padding import num_rows
from dera_peft.errors import DeRaError, first_line
from dera_peft.files import check_exists

QUANTIZED = "quant_state"  # of a bitsandbytes weight: four bits each, which may be stored as floats
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")


def load_config(base: str, base_arguments: Mapping[str, Any] = {}, argument: str = "base") -> PreTrainedConfig:
    """
    The base's config.

    Args:
        base_arguments: of `from_pretrained`; those that say where on the hub it is are read.

    Raises:
        DeRaError: there is no such base.
    """
    check_exists(argument, base)
    folder = os.path.join(base, base_arguments.get("subfolder") or "")
    if os.path.isdir(base) and not os.path.isfile(os.path.join(folder, "config.json")):
        hint = " It holds an adapter: pass it as the adapter." if is_adapter(base) else ""
        raise DeRaError(f"{argument}={folder!r} is a folder without a config.json, not a transformers model.{hint}")
    try:
        return AutoConfig.from_pretrained(
            base, **{name: base_arguments[name] for name in HUB_ARGUMENTS if base_arguments.get(name) is not None}
        )
    except (OSError, ValueError, HFValidationError) as error:
        missing = "" if os.path.isdir(base) else "there is no such folder, and on the hub: "
        raise DeRaError(f"{argument}={base!r} can't be loaded: {missing}{first_line(error)}") from error


def load_base(
    base: str,
    config: PreTrainedConfig,
    quantization: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    *,
    skeleton: PreTrainedModel | None = None,
    argument: str = "base",
    **base_arguments,
) -> PreTrainedModel:
    """
    A plain causal (or encoder-decoder) language model, in evaluation mode.

    Args:
        config: from `load_config`.
        quantization: "nf4", "fp4" or "int8"; in its place `base_arguments` may hold a `quantization_config`. A
            checkpoint that is quantized already stays as it is.
        dtype: of the weights; the checkpoint's own unless given.
        skeleton: from `make_skeleton`, where it is there already.
        argument: what names the base for the user, for messages.
        base_arguments: of transformers' `from_pretrained`.

    Raises:
        DeRaError: it can't be loaded or quantized, or does not fit into memory.
    """
    dtype = read_dtype(dtype)
    if skeleton is None:
        skeleton = make_skeleton(config, base_arguments.get("trust_remote_code"), argument)
    chosen = choose_quantization(
        f"{argument}={base!r}", config, skeleton, quantization, base_arguments.pop("quantization_config", None), dtype,
        device_map,
    )  # fmt: skip
    if chosen is not None:  # None would be taken for no quantization, in place of the checkpoint's own
        base_arguments["quantization_config"] = chosen
    try:
        model = _auto_class(config).from_pretrained(
            base, dtype=dtype, device_map=device_map, **{"use_safetensors": True, **base_arguments}
        )
    except SafetensorError as error:
        raise DeRaError(f"{argument}={base!r}: a safetensors file is corrupt: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise DeRaError(
            f"{argument}={base!r} does not fit into the device's memory: quantize it (quantization), or take another "
            f"device or a smaller model. {first_line(error)}"
        ) from error
    except (OSError, ValueError, ImportError, TypeError, RuntimeError, HFValidationError) as error:
        # a quantized checkpoint may need another package, or an accelerator
        raise DeRaError(f"{argument}={base!r} can't be loaded: {first_line(error)}") from error
    compute_in(model, dtype)
    _check_finite(model, f"{argument}={base!r}")
    return model


def _check_finite(model: PreTrainedModel, named: str) -> None:
    """
    Raises `DeRaError` where weights are NaN or inf, as where a training diverged. Their sums tell, for one reading of
    the weights and one answer of each device; quantized and offloaded weights are left out.
    """
    sums: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta and QUANTIZED not in vars(weight):
            sums.setdefault(weight.device, {})[name] = weight.detach().sum(dtype=torch.float32)
    for each in sums.values():
        for name, is_finite in zip(each, torch.stack(list(each.values())).isfinite().tolist(), strict=True):
            if not is_finite:
                raise DeRaError(f"{named} is broken: its {name!r} has values that are not finite (NaN or inf).")


def make_skeleton(
    config: PreTrainedConfig, trust_remote_code: bool | None = None, argument: str = "base"
) -> PreTrainedModel:
    """The base's modules without its weights, on the meta device."""
    arguments = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    try:
        with torch.device("meta"):
            return _auto_class(config).from_config(config, **arguments)
    except ValueError as error:
        raise DeRaError(
            f"{argument}={config.name_or_path!r} is not a language model that generates: {first_line(error)}"
        ) from error


def has_added_tokens(model: PreTrainedModel, base: str) -> bool:
    """Whether a model's embeddings have other rows than those of the base that it was loaded from, if that is there."""
    try:
        return load_config(base).get_text_config().vocab_size != num_rows(model)
    except DeRaError:
        return False


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    """A torch dtype by its name; "auto" for None, the checkpoint's own."""
    if dtype is None:
        return "auto"
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise DeRaError(f"dtype={dtype!r} is not a torch dtype; use float32, bfloat16 or float16.")
        return found
    return dtype


def _auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
