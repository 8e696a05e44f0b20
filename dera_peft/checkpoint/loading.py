"""Base + quantization + adapters, checked against each other before anything large is loaded; and back to a folder."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dera_peft.checkpoint.adapters import add_to, check_adapter, check_exists, is_adapter
from dera_peft.checkpoint.fingerprint import base_fingerprint, cached_revision, weights_fingerprint
from dera_peft.checkpoint.record import LOGITS, Record
from dera_peft.engine.biases import biases_at
from dera_peft.engine.plan import ALIGNED, REFERENCE, Branch, make_branches
from dera_peft.errors import DeRaError, first_line
from dera_peft.model import DeRaModel

QUANTIZATIONS = ("nf4", "fp4", "int8")
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")
Source = str | os.PathLike


def load(
    base: Source | None = None,
    adapter: Source | None = None,
    *,
    adapters: Mapping[str, Source] | None = None,
    reference: Source | Sequence[Source] = (),
    stacked: bool | None = None,
    quantization: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    lam: float | Mapping[str, float] | None = None,
    mixing: str | None = None,
    **kwargs,
) -> DeRaModel:
    """`DeRaModel.from_pretrained`; see there."""
    record = resolve(base, adapter, adapters, reference, stacked)
    base, folders = record.base, record.adapters
    if record.base_revision is not None:
        kwargs.setdefault("revision", record.base_revision)
    config = load_config(base, **{name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
    skeleton = _skeleton(config, kwargs.get("trust_remote_code"))
    modules = {name: check_adapter(folder, base, skeleton) for name, folder in folders.items()}
    if quantization is not None:
        if quantization not in QUANTIZATIONS:
            raise DeRaError(f"quantization={quantization!r} is not known; choose one of {QUANTIZATIONS}, or None.")
        if "quantization_config" in kwargs:
            raise DeRaError("give quantization or quantization_config, not both.")
        check_quantization(quantization, base, skeleton, device_map)
        kwargs["quantization_config"] = _quantization_config(quantization, dtype, config)
    del skeleton
    revision = kwargs.get("revision")
    record.check_base(revision)
    quantized = kwargs.get("quantization_config", vars(config).get("quantization_config"))
    record.check_quantization(quantization_name(quantized))

    model = _load_base(config, base, dtype=_dtype(dtype), device_map=device_map, **kwargs)
    record.check_base(revision)  # again: a hub model's weights may be here only now
    for name, folder in folders.items():
        model = add_to(model, folder, name, modules[name])
    branches = [Branch(name, tuple(names)) for name, names in record.branches.items()]
    lam, mixing = record.lam if lam is None else lam, record.mixing if mixing is None else mixing
    dera_model = DeRaModel(model, branches, lam, mixing)
    dera_model.record = replace(
        record, base_fingerprint=base_fingerprint(base, revision), base_revision=cached_revision(base, revision)
    )
    return dera_model


def load_adapter(model: DeRaModel, name: str, adapter: str, stacked: bool | None = None) -> bool:
    """
    Loads a further adapter into a model, as `name`, with the checks of `load`.

    Returns:
        Whether it comes on top of the reference's adapters.
    """
    base = model.config.name_or_path
    check_exists("adapter", adapter)
    known = {} if model.record is None else model.record.adapters
    under = [known.get(reference) for reference in model.branches[0].adapters]
    adapter, stacked, record = _own_adapter(adapter, under, stacked)
    if record is not None and base:
        record.with_base(base).check_base(None if model.record is None else model.record.base_revision)
    modules = check_adapter(adapter, base, _skeleton(model.config, None))
    add_to(model.peft_model, adapter, name, modules)
    return stacked


def resolve(
    base: Source | None,
    adapter: Source | None = None,
    adapters: Mapping[str, Source] | None = None,
    reference: Source | Sequence[Source] = (),
    stacked: bool | None = None,
) -> Record:
    """
    What the arguments of `DeRaModel.from_pretrained` name, as a record with the folders (or hub ids) to load.

    Raises:
        DeRaError: they don't say which base or which adapter, or say it twice.
    """
    base = None if base is None else os.fspath(base)
    if base is not None:
        check_exists("base", base)
    if adapters is not None and adapter is not None:
        raise DeRaError("give adapter or adapters, not both.")
    reference = [reference] if isinstance(reference, (str, os.PathLike)) else list(reference)
    if adapters is not None:
        return _resolve_several(base, adapters, reference, stacked)
    if reference:
        if adapter is None:
            raise DeRaError("reference= needs the aligned adapter too: adapter=.")
        return _resolve_several(base, {ALIGNED: adapter}, reference, stacked)
    return _resolve_one(base, None if adapter is None else os.fspath(adapter))


def _resolve_one(base: str | None, adapter: str | None) -> Record:
    if adapter is None:
        if base is None:
            raise DeRaError("no model is named: give a base and an adapter, or a folder with a dera.json.")
        if Record.is_in(base):
            return Record.load(base)
        raise DeRaError(f"base={base!r} has no dera.json, so the adapter must be named too: adapter=.")
    check_exists("adapter", adapter)
    if Record.is_in(adapter):
        record = Record.load(adapter)
        return record if base is None else record.with_base(base)
    if base is None:
        raise DeRaError(f"adapter={adapter!r} has no dera.json that names its base: give the base too.")
    return Record(base, {"default": adapter}, {REFERENCE: [], ALIGNED: ["default"]})


def _resolve_several(
    base: str | None, adapters: Mapping[str, Source], reference: Sequence[Source], stacked: bool | None
) -> Record:
    """Several aligned adapters over one reference, which their records, where they have one, must agree on."""
    references = {f"{REFERENCE}_{index}": os.fspath(folder) for index, folder in enumerate(reference, 1)}
    for folder in references.values():
        check_exists("reference", folder)
    folders: dict[str, str] = {}
    on_top: dict[str, bool] = {}
    records: dict[str, Record] = {}
    for name, adapter in adapters.items():
        if not name.isidentifier():
            raise DeRaError(f"adapters: {name!r} can't be a name; use letters, digits and underscores.")
        adapter = os.fspath(adapter)
        check_exists("adapter", adapter)
        folders[name], on_top[name], record = _own_adapter(adapter, list(references.values()), stacked)
        if record is not None:
            records[name] = record
    if len(set(on_top.values())) > 1:
        raise DeRaError(
            f"adapters: {[name for name in on_top if on_top[name]]} come on top of the reference's adapters and the "
            "others replace them; load one kind, and bring the other with add_adapter()."
        )
    known_bases = records | {name: Record.load(folder) for name, folder in references.items() if Record.is_in(folder)}
    first = next(iter(known_bases.values()), None)
    if base is None and first is None:
        raise DeRaError(f"adapters={list(adapters)} have no dera.json that names their base: give the base too.")
    for name, record in known_bases.items():
        known = None not in (record.base_fingerprint, first.base_fingerprint)
        same = record.base_fingerprint == first.base_fingerprint if known else record.base == first.base
        if not same and (known or base is None):
            raise DeRaError(f"adapter {name!r} is of another base ({record.base!r}) than the others ({first.base!r}).")
    if taken := set(references) & set(folders):
        raise DeRaError(f"{taken.pop()!r} is a name for the reference's adapters; give the aligned one another.")
    branches = make_branches(list(references), {name: name for name in folders}, all(on_top.values()))
    # one number says enough only for one aligned model, whose own record may name it
    own = [record.lam for record in records.values() if isinstance(record.lam, (int, float))] or [1.0]
    lam = own[0] if len(folders) == 1 else dict.fromkeys(folders, 1.0 / len(folders))
    found = first or Record(base, {}, {})
    return replace(
        found if base is None else found.with_base(base),
        adapters={**references, **folders},
        branches={branch.name: list(branch.adapters) for branch in branches},
        lam=lam,
        mixing=LOGITS,
        training=next(iter(records.values())).training if len(folders) == len(records) == 1 else {},
    )


def _own_adapter(
    adapter: str, references: Sequence[str | None], stacked: bool | None
) -> tuple[str, bool, Record | None]:
    """
    The folder of an aligned adapter, whether it comes on top of the reference's adapters, and its record, if any.

    Args:
        references: the folders (or hub ids) of the reference's adapters; None for one that is not known.
        stacked: what the caller says; None to take it from the record, and True without one.

    Raises:
        DeRaError: the record tells of another reference, or of another place on it.
    """
    if not Record.is_in(adapter):
        return adapter, stacked is not False, None
    record = Record.load(adapter)
    if len(record.branches) != 2:
        raise DeRaError(f"adapter={adapter!r} is a record of {len(record.branches) - 1} aligned models; name one.")
    under = record.branches[REFERENCE]
    names = next(names for branch, names in record.branches.items() if branch != REFERENCE)
    own = names[-1]
    if names not in ([own], [*under, own]):
        raise DeRaError(
            f"adapter={adapter!r}: its record's aligned model is {names}, more than one adapter of its own."
        )
    recorded = [record.adapters[name] for name in under]
    if under and not references:
        raise DeRaError(
            f"adapter={adapter!r} was trained against the reference adapters {recorded}: name them with reference=."
        )
    if not _have_same_weights(references, recorded):
        trained = f"the reference adapters {recorded}" if recorded else "the base alone"
        raise DeRaError(
            f"adapter={adapter!r} was trained against {trained}, and the reference's adapters here are "
            f"{list(references)}, with other weights: name those that it was trained against."
        )
    if under and stacked not in (None, len(names) > 1):
        place = "on top of" if len(names) > 1 else "from a copy of"
        raise DeRaError(
            f"stacked={stacked}: by its record adapter={adapter!r} was trained {place} the reference's adapters; leave "
            "stacked out."
        )
    return record.adapters[own], len(names) > 1 if under else stacked is not False, record


def _have_same_weights(references: Sequence[str | None], recorded: Sequence[str]) -> bool:
    """Whether two lists of adapters are the same, as far as it can be told: of hub ids only their number is known."""
    if len(references) != len(recorded):
        return False
    found = [None if folder is None else weights_fingerprint(folder) for folder in (*references, *recorded)]
    return None in found or sorted(found[: len(references)]) == sorted(found[len(references) :])


def load_config(base: str, **hub_arguments) -> PreTrainedConfig:
    """The base's config. Raises `DeRaError` where there is no such base."""
    check_exists("base", base)
    if os.path.isdir(base) and not os.path.isfile(os.path.join(base, "config.json")):
        hint = " It holds an adapter: pass it as the adapter." if is_adapter(base) else ""
        raise DeRaError(f"base={base!r} is a folder without a config.json, not a transformers model.{hint}")
    try:
        return AutoConfig.from_pretrained(base, **hub_arguments)
    except (OSError, ValueError, HFValidationError) as error:
        raise DeRaError(f"base={base!r} can't be loaded: {first_line(error)}") from error


def load_tokenizer(base: str | os.PathLike | None, adapter: str | os.PathLike | None = None) -> PreTrainedTokenizerBase:
    """
    The adapter's tokenizer, which may have a chat template of its own, or else the base's. It pads on the left, with
    the end token if it has no padding token.

    Raises:
        DeRaError: neither has one.
    """
    record = resolve(base, adapter)
    return load_tokenizer_of(*record.adapters.values(), record.base, revision=record.base_revision)


def load_tokenizer_of(*sources: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """
    The tokenizer of the first of `sources` (hub ids or folders) that has one; see `load_tokenizer`.

    Args:
        revision: of the last source, the base, where it is of the hub.
    """
    errors = []
    for source in sources:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, padding_side="left", revision=revision if source == sources[-1] else None
            )
        except (OSError, ValueError, HFValidationError) as error:
            errors.append(f"{source!r}: {first_line(error)}")
            continue
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    raise DeRaError("no tokenizer can be loaded: " + "; ".join(errors))


def check_quantization(quantization: str, base: str, skeleton: PreTrainedModel, device_map: Any) -> None:
    """
    Refuses what bitsandbytes loads and then fails on at the first forward pass.

    Raises:
        DeRaError: names the module.
    """
    try:
        from bitsandbytes.functional import has_avx512bf16  # imported when asked for: it warns where there is no GPU
    except ImportError as error:
        raise DeRaError(f"quantization={quantization!r} needs bitsandbytes: {error}") from error
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


def save(model: DeRaModel, folder: str | os.PathLike) -> None:
    """`DeRaModel.save_pretrained`; see there."""
    peft_model = model.peft_model
    adapters = sorted({name for branch in model.branches for name in branch.adapters})
    record = model.record
    if record is None:
        base = model.config.name_or_path or peft_model.peft_config[adapters[0]].base_model_name_or_path
        if not base:
            raise DeRaError("the base has no name (it was not loaded from a hub or a folder): dera.json can't name it.")
        record = Record(base, {}, {}, base_fingerprint=base_fingerprint(base), base_revision=cached_revision(base))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with biases_at(model.base):
        peft_model.save_pretrained(folder, selected_adapters=adapters, save_embedding_layers=False)
    # PEFT writes the adapter "default" into the folder itself, any other into a folder of its name below it
    paths = {name: str(folder if name == "default" else folder / name) for name in adapters}
    branches = {branch.name: list(branch.adapters) for branch in model.branches}
    replace(record, adapters=paths, branches=branches, lam=model.lam, mixing=model.mixing).save(folder)


def _auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _load_base(config: PreTrainedConfig, base: str, **kwargs) -> PreTrainedModel:
    try:
        return _auto_class(config).from_pretrained(base, use_safetensors=True, **kwargs)
    except SafetensorError as error:
        raise DeRaError(f"base={base!r}: a safetensors file is corrupt: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise DeRaError(
            f"base={base!r} does not fit into the device's memory: quantize it (quantization), or name another device "
            f"(device_map). {first_line(error)}"
        ) from error
    except (OSError, ValueError, HFValidationError) as error:
        raise DeRaError(f"base={base!r} can't be loaded: {first_line(error)}") from error


def _skeleton(config: PreTrainedConfig, trust_remote_code: bool | None) -> PreTrainedModel:
    """The base's modules without its weights."""
    arguments = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    try:
        with torch.device("meta"):
            return _auto_class(config).from_config(config, **arguments)
    except ValueError as error:
        raise DeRaError(
            f"base={config.name_or_path!r} is not a language model that generates: {first_line(error)}"
        ) from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None:
        return "auto"
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise DeRaError(f"dtype={dtype!r} is not a torch dtype; use float32, bfloat16 or float16.")
        return found
    return dtype


def _quantization_config(
    quantization: str, dtype: torch.dtype | str | None, config: PreTrainedConfig
) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = _dtype(dtype)
    if compute_dtype == "auto":
        compute_dtype = config.dtype or torch.bfloat16
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
