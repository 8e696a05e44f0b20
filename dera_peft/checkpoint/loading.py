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
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dera_peft.checkpoint.adapters import attach_adapter, check_adapter, check_exists, is_adapter
from dera_peft.checkpoint.fingerprint import base_fingerprint, cached_revision, cached_snapshot
from dera_peft.checkpoint.quantization import check_quantization, quantization_config, quantization_name
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.resolve import own_adapter
from dera_peft.engine.biases import biases_at
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.plan import check_default_lam
from dera_peft.engine.quantized import keep_packed
from dera_peft.errors import DeRaError, first_line

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


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
    record = replace(
        record, base_fingerprint=base_fingerprint(base, revision), base_revision=cached_revision(base, revision)
    )
    return Loaded(model, record)


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
    except (OSError, ValueError, HFValidationError, ImportError, TypeError) as error:  # the last two: of an argument
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


def load_tokenizer(
    *names: str, base_arguments: Mapping[str, Any] = {}, padding_side: str | None = "left"
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of the first of `names` (hub ids or folders) that has one: an adapter's, which may have a chat
    template of its own, before the base's.

    Args:
        names: adapters, and last the base.
        base_arguments: of `from_pretrained`; those that say where on the hub the base is are read, and for the adapters
            those of them that are not of the base alone.
        padding_side: its own if None.

    Raises:
        DeRaError: none has one, or the first one's can't be loaded.
    """
    of_base = {name: base_arguments[name] for name in HUB_ARGUMENTS if base_arguments.get(name) is not None}
    of_adapters = {name: value for name, value in of_base.items() if name not in ("revision", "subfolder")}
    own_side = {} if padding_side is None else {"padding_side": padding_side}
    errors = []
    for index, name in enumerate(names):
        arguments = of_base if index == len(names) - 1 else of_adapters
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **arguments, **own_side)
            return cast("PreTrainedTokenizerBase", tokenizer)
        except Exception as error:  # a broken file raises whatever its reader does, as KeyError or a bare Exception
            if _has_tokenizer_files(name, arguments):
                raise DeRaError(f"the tokenizer of {name!r} can't be loaded: {first_line(error)}") from error
            if not isinstance(error, (OSError, ValueError, HFValidationError)):
                raise
            errors.append(f"{name!r}: {first_line(error)}")
    raise DeRaError(
        f"no tokenizer can be loaded: {'; '.join(errors)}. Save the base's into its folder, or into the adapter's."
    )


def _has_tokenizer_files(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a folder has them, or the hub's local cache, where they come to if the hub has them."""
    subfolder = arguments.get("subfolder", "")
    if os.path.isdir(name):
        return any(os.path.isfile(os.path.join(name, subfolder, file)) for file in TOKENIZER_FILES)
    files = tuple(f"{subfolder}/{file}" if subfolder else file for file in TOKENIZER_FILES)
    return cached_snapshot(name, arguments.get("revision"), files, arguments.get("cache_dir")) is not None


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
    replace(record, adapters=paths, branches=branches, lam=lam, mixing=model.mixing).save(folder)


def _auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
