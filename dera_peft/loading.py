"""Base + quantization + adapters, checked against each other before anything large is loaded; and back to a folder."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from dera_peft.branches import ALIGNED, REFERENCE, Branch
from dera_peft.errors import DeRaError
from dera_peft.fingerprint import base_fingerprint, cached_revision
from dera_peft.model import DeRaModel
from dera_peft.record import Record

QUANTIZATIONS = ("nf4", "int8")
# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base's own
# weights when the adapter is created, so that "adapter off" would not be the reference.
INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")


def load(
    base: str | os.PathLike | None = None,
    adapter: str | os.PathLike | None = None,
    *,
    quantization: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    lam: float | None = None,
    **kwargs,
) -> DeRaModel:
    """`DeRaModel.from_pretrained`; see there."""
    record = resolve(base, adapter)
    base, adapters = record.base, record.adapters
    if record.base_revision is not None:
        kwargs.setdefault("revision", record.base_revision)
    config = load_config(base, **{name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
    skeleton = _skeleton(config, kwargs.get("trust_remote_code"))
    modules = {name: check_adapter(folder, base, skeleton) for name, folder in adapters.items()}
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

    model = _load_base(base, dtype=_dtype(dtype), device_map=device_map, **kwargs)
    record.check_base(revision)  # again: a hub model's weights may be here only now
    peft_model = None
    for name, folder in adapters.items():
        if peft_model is None:
            peft_model = PeftModel.from_pretrained(model, folder, adapter_name=name, autocast_adapter_dtype=False)
        else:
            peft_model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
    for name, folder in adapters.items():
        _check_complete(name, folder, model, modules[name])
    _cast_adapters(peft_model, model.dtype)
    peft_model.eval()
    branches = [Branch(name, tuple(names)) for name, names in record.branches.items()]
    dera_model = DeRaModel(peft_model, branches, record.lam if lam is None else lam)
    dera_model.record = replace(
        record, base_fingerprint=base_fingerprint(base, revision), base_revision=cached_revision(base, revision)
    )
    return dera_model


def resolve(base: str | os.PathLike | None, adapter: str | os.PathLike | None) -> Record:
    """
    What `base` and `adapter` name, as a record with the folders (or hub ids) to load.

    Raises:
        DeRaError: neither says which base or which adapter.
    """
    base = None if base is None else os.fspath(base)
    adapter = None if adapter is None else os.fspath(adapter)
    if base is not None:
        _check_exists("base", base)
    if adapter is None:
        if base is None:
            raise DeRaError("no model is named: give a base and an adapter, or a folder with a dera.json.")
        if Record.is_in(base):
            return Record.load(base)
        raise DeRaError(f"base={base!r} has no dera.json, so the adapter must be named too: adapter=.")
    _check_exists("adapter", adapter)
    if Record.is_in(adapter):
        record = Record.load(adapter)
        return record if base is None else record.with_base(base)
    if base is None:
        raise DeRaError(f"adapter={adapter!r} has no dera.json that names its base: give the base too.")
    return Record(base, {"default": adapter}, {REFERENCE: [], ALIGNED: ["default"]})


def load_config(base: str, **hub_arguments) -> PreTrainedConfig:
    """The base's config. Raises `DeRaError` where there is no such base."""
    _check_exists("base", base)
    if os.path.isdir(base) and not os.path.isfile(os.path.join(base, "config.json")):
        hint = " It holds an adapter: pass it as the adapter." if _is_adapter(base) else ""
        raise DeRaError(f"base={base!r} is a folder without a config.json, not a transformers model.{hint}")
    try:
        return AutoConfig.from_pretrained(base, **hub_arguments)
    except (OSError, ValueError, HFValidationError) as error:
        raise DeRaError(f"base={base!r} can't be loaded: {_first_line(error)}") from error


def load_tokenizer(base: str | os.PathLike | None, adapter: str | os.PathLike | None = None) -> PreTrainedTokenizerBase:
    """
    The adapter's tokenizer, which may have a chat template of its own, or else the base's. It pads on the left, with
    the end token if it has no padding token.

    Raises:
        DeRaError: neither has one.
    """
    record = resolve(base, adapter)
    return load_tokenizer_of(*record.adapters.values(), record.base)


def load_tokenizer_of(*sources: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the first of `sources` (hub ids or folders) that has one; see `load_tokenizer`."""
    errors = []
    for source in sources:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        except (OSError, ValueError, HFValidationError) as error:
            errors.append(f"{source!r}: {_first_line(error)}")
            continue
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    raise DeRaError("no tokenizer can be loaded: " + "; ".join(errors))


def check_adapter_config(adapter: str, config: PeftConfig) -> None:
    """
    Refuses adapters for which "adapter off" is not the base, or that are not LoRA.

    Raises:
        DeRaError: names the adapter, the setting and what would work.
    """
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise DeRaError(f"adapter={adapter!r} is of type {kind}; only LoRA is supported.")
    if config.bias != "none":
        raise DeRaError(
            f"adapter={adapter!r} was trained with bias={config.bias!r}, so it changes the base's own biases and "
            "switching it off would not give the reference back; train with bias='none'."
        )
    if config.init_lora_weights not in INITS_THAT_KEEP_THE_BASE:
        raise DeRaError(
            f"adapter={adapter!r} was initialised with {config.init_lora_weights!r}, which changes the base's weights, "
            "so the base alone is not its reference; convert it to plain LoRA when saving (save_pretrained's "
            "path_initial_model_for_weight_conversion)."
        )
    for option in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if getattr(config, option, None):
            raise DeRaError(
                f"adapter={adapter!r} uses {option}={getattr(config, option)!r}, which is not supported yet."
            )


def check_adapter(adapter: str, base: str, skeleton: PreTrainedModel) -> set[str]:
    """
    Checks an adapter's config, and each of its tensors against the base's modules, from the file's header.

    Returns:
        The names of the modules that it adapts.

    Raises:
        DeRaError: not a readable safetensors LoRA adapter, or one for another base.
    """
    _check_exists("adapter", adapter)
    if os.path.isdir(adapter) and not _is_adapter(adapter):
        raise DeRaError(f"adapter={adapter!r} is a folder without an adapter_config.json, not a PEFT adapter.")
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError, KeyError, HFValidationError) as error:
        raise DeRaError(f"adapter={adapter!r}: its adapter_config.json can't be read: {_first_line(error)}") from error
    check_adapter_config(adapter, config)
    shapes = _tensor_shapes(adapter)
    modules = dict(skeleton.named_modules())
    factors: dict[str, set[str]] = {}
    for key, shape in shapes.items():
        name, factor = _parse_key(adapter, key)
        if name not in modules:
            raise DeRaError(f"adapter={adapter!r} is for another base: {base!r} has no module {name!r}.")
        features = _features(modules[name])
        if features is None:
            kind = type(modules[name]).__name__
            raise DeRaError(f"adapter={adapter!r} adapts {name!r}, a {kind}; only linear layers are supported.")
        side, expected = ("inputs", features[0]) if factor == "lora_A" else ("outputs", features[1])
        found = shape[1] if factor == "lora_A" else shape[0]
        if found != expected:
            raise DeRaError(
                f"adapter={adapter!r} is for another base: its {name!r} has {found} {side}, "
                f"in {base!r} it has {expected}."
            )
        factors.setdefault(name, set()).add(factor)
    for name, found in factors.items():
        if len(found) < 2:
            raise DeRaError(f"adapter={adapter!r} is incomplete: of {name!r} it holds only {found.pop()}.")
    return set(factors)


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
    if quantization != "nf4" or not _runs_on_cpu(device_map) or not has_avx512bf16():
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
        record = Record(base, {}, {}, 1.0, base_fingerprint(base), cached_revision(base))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    peft_model.save_pretrained(folder, selected_adapters=adapters, save_embedding_layers=False)
    # PEFT writes the adapter "default" into the folder itself, any other into a folder of its name below it
    paths = {name: str(folder if name == "default" else folder / name) for name in adapters}
    branches = {branch.name: list(branch.adapters) for branch in model.branches}
    replace(record, adapters=paths, branches=branches, lam=model.lam).save(folder)


def _load_base(base: str, **kwargs) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, **kwargs)
    except SafetensorError as error:
        raise DeRaError(f"base={base!r}: a safetensors file is corrupt: {_first_line(error)}") from error
    except (OSError, HFValidationError) as error:
        raise DeRaError(f"base={base!r} can't be loaded: {_first_line(error)}") from error


def _skeleton(config: PreTrainedConfig, trust_remote_code: bool | None) -> PreTrainedModel:
    """The base's modules without its weights."""
    arguments = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **arguments)
    except ValueError as error:
        raise DeRaError(f"base={config.name_or_path!r} is not a causal language model: {_first_line(error)}") from error


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
        bnb_4bit_quant_type="nf4",
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


def _cast_adapters(peft_model: PeftModel, dtype: torch.dtype) -> None:
    """Casts the adapters to the base's dtype once, instead of its activations up and down at every layer."""
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A.to(dtype)
            module.lora_B.to(dtype)


def _check_complete(name: str, adapter: str, model: PreTrainedModel, modules: set[str]) -> None:
    """PEFT leaves a layer that its config targets and its file lacks at random values: refuse that."""
    created = {path for path, module in model.named_modules() if isinstance(module, LoraLayer) and name in module.r}
    if missing := sorted(created - modules):
        raise DeRaError(
            f"adapter={adapter!r} is incomplete: its config targets {missing[0]!r}, and its file has no factors for it."
        )


def _is_adapter(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "adapter_config.json"))


def _check_exists(argument: str, name: str) -> None:
    """A name that can only be a path must be there; any other may be a hub id."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isfile(name) or not name
    if looks_like_path and not os.path.isdir(name):
        raise DeRaError(f"{argument}={name!r}: there is no such folder.")


def _tensor_shapes(adapter: str) -> dict[str, list[int]]:
    try:
        file = cached_file(adapter, "adapter_model.safetensors")
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise DeRaError(f"adapter={adapter!r}: adapter_model.safetensors is corrupt: {error}") from error
    except (OSError, HFValidationError) as error:
        raise DeRaError(
            f"adapter={adapter!r} has no adapter_model.safetensors that can be read ({_first_line(error)}); "
            "other formats are not loaded, since they may run code."
        ) from error


def _parse_key(adapter: str, key: str) -> tuple[str, str]:
    """`base_model.model.<module>.lora_A.weight` -> (module, "lora_A")."""
    name, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
    if rest not in ("A.weight", "B.weight", "B.bias"):
        raise DeRaError(
            f"adapter={adapter!r} holds {key!r}, which is not a LoRA factor of a linear layer; not supported."
        )
    return name, f"lora_{rest[0]}"


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
