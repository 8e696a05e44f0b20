"""From names to models: config, tokenizer, base and adapters, checked before anything large is loaded; and back."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from dera_peft.checkpoint.adapters import attach_adapter, check_adapter, check_exists, is_adapter
from dera_peft.checkpoint.end_tokens import end_tokens, end_with
from dera_peft.checkpoint.fingerprint import base_fingerprint, cached_revision
from dera_peft.checkpoint.quantization import check_quantization, quantization_config, quantization_name
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.resolve import own_adapter
from dera_peft.checkpoint.tokenizers import HUB_ARGUMENTS, copy_tokenizer, find_tokenizer, tokenizer_places
from dera_peft.engine.biases import biases_at
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.plan import check_default_lam
from dera_peft.engine.quantized import keep_packed
from dera_peft.errors import DeRaError, first_line


@dataclass(frozen=True)
class Checked:
    """
    What was read of a base and its adapters to see that they fit each other.

    Attributes:
        skeleton: see `make_skeleton`.
        modules: of each adapter, by its name, what `check_adapter` returned.
    """

    config: PreTrainedConfig
    skeleton: PreTrainedModel
    modules: dict[str, set[str]]


@dataclass(frozen=True)
class Loaded:
    """A base with its adapters, and the record that tells which is which; for `DeRaModel.from_source`."""

    peft_model: PeftModel
    record: Record


def check(
    record: Record,
    base_arguments: Mapping[str, Any] = {},
    *,
    config: PreTrainedConfig | None = None,
    base_argument: str = "base",
    adapter_argument: str = "adapter",
) -> Checked:
    """
    Checks that the base and the adapters of a record are there and fit each other; reads no weights.

    Args:
        base_arguments: of transformers' `from_pretrained`.
        config: from `load_config`, where it is there already.
        base_argument, adapter_argument: what names them for the user, for messages.

    Raises:
        DeRaError: one of them can't be read, or does not fit the other.
    """
    if config is None:
        config = load_config(record.base, base_arguments, base_argument)
    skeleton = make_skeleton(config, base_arguments.get("trust_remote_code"), base_argument)
    modules = {
        name: check_adapter(folder, record.base, skeleton, adapter_argument) for name, folder in record.adapters.items()
    }
    record.check_base(base_arguments.get("revision"))
    return Checked(config, skeleton, modules)


def load(
    record: Record,
    config: PreTrainedConfig,
    quantization: str | None,
    dtype: str | None,
    device_map: Any,
    **base_arguments,
) -> Loaded:
    """
    The base and the adapters of a record.

    Args:
        config: from `load_config`.
        base_arguments: of transformers' `from_pretrained`.

    Raises:
        DeRaError: one of them can't be read, does not fit the other, or can't be quantized here.
    """
    base, revision = record.base, base_arguments.get("revision")
    checked = check(record, base_arguments, config=config)
    record.check_quantization(quantization or configured_quantization(checked.config, base_arguments))
    model: PreTrainedModel | PeftModel = load_base(
        base, checked.config, quantization, dtype, device_map, skeleton=checked.skeleton, **base_arguments
    )
    record.check_base(revision)  # again: a hub model's weights may be here only now
    for name, folder in record.adapters.items():
        model = attach_adapter(model, folder, name, checked.modules[name])
    assert isinstance(model, PeftModel)  # a record has an aligned branch, with an adapter
    end_as_trained(cast("PreTrainedModel", model.get_base_model()), record, base_arguments)
    record = replace(
        record, base_fingerprint=base_fingerprint(base, revision), base_revision=cached_revision(base, revision)
    )
    return Loaded(model, record)


def end_as_trained(model: PreTrainedModel, record: Record, base_arguments: Mapping[str, Any]) -> None:
    """Makes the base's `generate` end at all of `end_tokens`."""
    tokenizer = find_tokenizer(*tokenizer_places(record), base_arguments=base_arguments)
    end_with(model, end_tokens(model.generation_config, tokenizer, record))


def configured_quantization(config: PreTrainedConfig, base_arguments: Mapping[str, Any]) -> str | None:
    """By its name, the quantization that a `quantization_config` asks for, the caller's or the base's own."""
    return quantization_name(base_arguments.get("quantization_config", vars(config).get("quantization_config")))


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
        quantization: "nf4", "fp4" or "int8"; in its place `base_arguments` may hold a `quantization_config`.
        dtype: of the weights; the checkpoint's own unless given.
        skeleton: from `make_skeleton`, where it is there already.
        argument: what names the base for the user, for messages.
        base_arguments: of transformers' `from_pretrained`.

    Raises:
        DeRaError: it can't be loaded or quantized, or does not fit into memory.
    """
    dtype = read_dtype(dtype)
    if quantization is not None:
        if base_arguments.get("quantization_config") is not None:
            raise DeRaError("give quantization or quantization_config, not both.")
        if skeleton is None:
            skeleton = make_skeleton(config, base_arguments.get("trust_remote_code"), argument)
        check_quantization(quantization, base, skeleton, device_map)
        base_arguments["quantization_config"] = quantization_config(quantization, dtype, config)
    try:
        return _auto_class(config).from_pretrained(
            base, dtype=dtype, device_map=device_map, **{"use_safetensors": True, **base_arguments}
        )
    except SafetensorError as error:
        raise DeRaError(f"{argument}={base!r}: a safetensors file is corrupt: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise DeRaError(
            f"{argument}={base!r} does not fit into the device's memory: quantize it (quantization), or take another "
            f"device or a smaller model. {first_line(error)}"
        ) from error
    except (OSError, ValueError, HFValidationError) as error:
        raise DeRaError(f"{argument}={base!r} can't be loaded: {first_line(error)}") from error


def load_adapter(
    model: MixtureModel, record: Record | None, name: str, adapter: str, stacked: bool | None
) -> tuple[str, bool]:
    """
    Loads a further adapter into a model, as `name`, with the checks of `load`.

    Args:
        record: of the model, if it was loaded from files.
        stacked: see `resolve.own_adapter`.

    Returns:
        Its folder or hub id, and whether it comes on top of the reference's adapters.
    """
    base = model.config.name_or_path
    check_exists("adapter", adapter)
    known = {} if record is None else record.adapters
    under = [known.get(reference) for reference in model.branches[0].adapters]
    adapter, stacked, own_record = own_adapter(adapter, under, stacked)
    if own_record is not None and base:
        own_record.with_base(base).check_base(None if record is None else record.base_revision)
    modules = check_adapter(adapter, base, make_skeleton(model.config))
    attach_adapter(model.peft_model, adapter, name, modules)
    if base:  # whose tokenizer may be the adapter's too
        end_as_trained(model, Record(base, {name: adapter}, {}), {})
    return adapter, stacked


def load_config(base: str, base_arguments: Mapping[str, Any] = {}, argument: str = "base") -> PreTrainedConfig:
    """
    The base's config.

    Args:
        base_arguments: of `from_pretrained`; those that say where on the hub it is are read.

    Raises:
        DeRaError: there is no such base.
    """
    check_exists(argument, base)
    if os.path.isdir(base) and not os.path.isfile(os.path.join(base, "config.json")):
        hint = " It holds an adapter: pass it as the adapter." if is_adapter(base) else ""
        raise DeRaError(f"{argument}={base!r} is a folder without a config.json, not a transformers model.{hint}")
    try:
        return AutoConfig.from_pretrained(
            base, **{name: base_arguments[name] for name in HUB_ARGUMENTS if base_arguments.get(name) is not None}
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise DeRaError(f"{argument}={base!r} can't be loaded: {first_line(error)}") from error


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


def save(model: MixtureModel, record: Record | None, folder: str | os.PathLike) -> None:
    """
    Writes a model's adapters (PEFT's format) and `dera.json` into one folder; never the base, which is named there.

    Args:
        record: of the model, if it was loaded from files.

    Raises:
        DeRaError: the base has no name that could be written down, or `model.lam` is none.
    """
    peft_model, lam = model.peft_model, check_default_lam(model.lam, model.aligned)
    adapters = sorted({name for branch in model.branches for name in branch.adapters})
    if record is None:
        base = model.config.name_or_path or peft_model.peft_config[adapters[0]].base_model_name_or_path
        if not base:
            raise DeRaError("the base has no name (it was not loaded from a hub or a folder): dera.json can't name it.")
        record = Record(base, {}, {}, base_fingerprint=base_fingerprint(base), base_revision=cached_revision(base))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with biases_at(model.base), keep_packed(model.base):
        peft_model.save_pretrained(str(folder), selected_adapters=adapters, save_embedding_layers=False)
    # PEFT writes the adapter "default" into the folder itself, any other into a folder of its name below it
    paths = {name: str(folder if name == "default" else folder / name) for name in adapters}
    branches = {branch.name: list(branch.adapters) for branch in model.branches}
    copy_tokenizer(record, paths[model.branches[-1].adapters[-1]])
    replace(record, adapters=paths, branches=branches, lam=lam, mixing=model.mixing).save(folder)


def _auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
