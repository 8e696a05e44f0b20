"""One PEFT adapter: is it LoRA that can be kept to a branch, does its file fit the base; and its way into the model."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from dera_peft.engine.adapter_kinds import check_adapter_kind, check_one_has_biases
from dera_peft.engine.biases import drop_biases, keep_biases
from dera_peft.engine.quantized import keep_packed
from dera_peft.errors import DeRaError, first_line

# Modules whose output is the sum of their bias and something else, so that a branch's bias can be added behind them.
BIASED = (nn.Linear, Conv1D, nn.LayerNorm)
PREFIX = "base_model.model."
# What trainers that save without PEFT leave around a module's name: DDP's and torch.compile's wrappers.
WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod)\.")
FACTORS = re.compile(
    r"(?P<module>.+)\.(lora_(?P<factor>A|B|embedding_A|embedding_B)|lora_(?P<magnitude>magnitude_vector))"
    r"(\.(?!weight$|bias$)[^.]+)?(\.(?P<kind>weight|bias))?"
)


def read_adapter_config(adapter: str, argument: str = "adapter") -> LoraConfig:
    """
    An adapter's config, of a kind that can be kept to a branch.

    Args:
        argument: what names the adapter for the user, for messages.

    Raises:
        DeRaError: there is no such adapter, its config can't be read, or it is of another kind.
    """
    check_exists(argument, adapter)
    if os.path.isdir(adapter) and not is_adapter(adapter):
        raise DeRaError(f"{argument}={adapter!r} is a folder without an adapter_config.json, not a PEFT adapter.")
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError, KeyError, HFValidationError) as error:
        raise DeRaError(
            f"{argument}={adapter!r}: its adapter_config.json can't be read: {first_line(error)}"
        ) from error
    return check_adapter_kind(adapter, config, argument)


def check_adapter(adapter: str, base: str | None, skeleton: PreTrainedModel, argument: str = "adapter") -> set[str]:
    """
    Checks an adapter's config, and each of its tensors against the base's modules, from the file's header.

    Args:
        argument: what names the adapter for the user, for messages.

    Returns:
        The names of the modules that it adapts by LoRA.

    Raises:
        DeRaError: not a readable safetensors LoRA adapter, or one for another base.
    """
    config = read_adapter_config(adapter, argument)
    named, shapes = f"{argument}={adapter!r}", _tensor_shapes(adapter, argument)
    modules = dict(skeleton.named_modules())
    factors: dict[str, set[str]] = {}
    others: set[str] = set()
    biases: set[str] = set()
    for key, shape in shapes.items():
        found = FACTORS.fullmatch(_module_key(key))
        if found is None and config.bias != "none" and key.endswith(".bias"):
            biases.add(_check_bias(named, base, key, shape, modules))
            continue
        if found is None:
            others.add(_check_other_weight(named, base, key, config, skeleton))
            continue
        name = found["module"]
        if name not in modules:
            raise DeRaError(f"{named} is for another base: {base!r} has no module {name!r}.")
        features = _features(modules[name])
        if features is None:
            kind = type(modules[name]).__name__
            raise DeRaError(f"{named} adapts {name!r}, a {kind}; linear layers and embeddings are supported.")
        factor = found["factor"]
        if factor is None or found["kind"] == "bias":
            continue
        side = "inputs" if factor.endswith("A") else "outputs"
        expected, width = features[0 if side == "inputs" else 1], shape[1 if side == "inputs" else 0]
        if width != expected:
            raise DeRaError(
                f"{named} is for another base: its {name!r} has {width} {side}, in {base!r} it has {expected}."
            )
        factors.setdefault(name, set()).add(f"lora_{factor}")
    for name, found in factors.items():
        if len(found) < 2:
            raise DeRaError(f"{named} is incomplete: of {name!r} it holds only {found.pop()}.")
    if config.bias != "none":
        expected = {name.removesuffix(".bias") for name, _ in skeleton.named_parameters() if name.endswith(".bias")}
        if missing := sorted((expected if config.bias == "all" else expected & set(factors)) - biases):
            raise DeRaError(f"{named} with bias={config.bias!r} is incomplete: no bias of {missing[0]!r}.")
    for part in config.modules_to_save or ():
        if not any(_is_in(name, part) for name in others):
            raise DeRaError(
                f"{named} is incomplete: its config has modules_to_save={config.modules_to_save!r}, and "
                f"its file has no weights for {part!r}."
            )
    if config.trainable_token_indices and not any("trainable_tokens_delta" in key for key in shapes):
        raise DeRaError(f"{named} is incomplete: its config has trainable_token_indices, and its file no such tokens.")
    return set(factors)


def attach_adapter(
    model: PreTrainedModel | PeftModel,
    adapter: str,
    name: str,
    modules: set[str],
    *,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
) -> PeftModel:
    """
    Loads an adapter that `check_adapter` passed into a base, or into a PeftModel that has others.

    Args:
        adapter: hub id or folder.
        name: its name in the PeftModel.
        modules: what `check_adapter` returned.
        dtype: of its weights, where its layers run on an accelerator; the base's unless given.
        trainable: whether it is to be trained on.
    """
    base = cast("PreTrainedModel", model.get_base_model()) if isinstance(model, PeftModel) else model
    config = _read_config(adapter)
    _check_copies(base, adapter, config)
    others = cast("Iterable[LoraConfig]", model.peft_config.values()) if isinstance(model, PeftModel) else ()
    check_one_has_biases(adapter, [config, *others])
    trained = {} if config.bias == "none" else _read_biases(adapter)
    # weights that live on disk or are moved in and out are not there to put an adapter beside
    offloaded = any(parameter.is_meta for parameter in base.parameters())
    if offloaded and trained:
        raise DeRaError(
            f"adapter={adapter!r} holds biases of the base's own modules; where layers are offloaded that is not "
            "supported."
        )
    arguments = {"adapter_name": name, "low_cpu_mem_usage": offloaded, "is_trainable": trainable}
    with _device_map_hidden(base), keep_biases(base, name, trained), keep_packed(base):
        if isinstance(model, PeftModel):
            peft_model = model
            peft_model.load_adapter(adapter, **arguments)
        else:
            peft_model = PeftModel.from_pretrained(model, adapter, **arguments)
        if any(key != PREFIX + _module_key(key) for key in _tensor_shapes(adapter)):
            tensors = _read_tensors(adapter)
            set_peft_model_state_dict(peft_model, tensors, adapter_name=name, low_cpu_mem_usage=offloaded)
    # PEFT leaves a layer that its config targets and its file lacks at random values: refuse that
    created = {path for path, module in base.named_modules() if isinstance(module, LoraLayer) and name in module.r}
    if missing := sorted(created - modules):
        raise DeRaError(
            f"adapter={adapter!r} is incomplete: its config targets {missing[0]!r}, and its file has no factors for it."
        )
    if offloaded:
        _materialize(base, name, adapter)
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


def _materialize(base: PreTrainedModel, name: str, adapter: str) -> None:
    """PEFT moves an adapter to its layer's device, which is "meta" where the layer is offloaded: reads it again."""
    tensors = _read_tensors(adapter)
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
                f"adapter={adapter!r}: {path!r} adapts a layer that is offloaded; there only plain LoRA on linear "
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
            module.modules_to_save[name].to(dtype)
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


def _module_key(key: str) -> str:
    """A tensor's name as PEFT writes it, without `base_model.model.` and what trainers' wrappers add."""
    key = WRAPPERS.sub(r"\1", key).removeprefix(PREFIX)
    if (found := FACTORS.fullmatch(key)) and found["module"] is not None:
        part = f"lora_{found['factor'] or found['magnitude']}"
        key = ".".join(filter(None, (found["module"], part, found["kind"])))
    return key


def _check_other_weight(named: str, base: str | None, key: str, config: LoraConfig, skeleton: PreTrainedModel) -> str:
    """
    A tensor that is no LoRA factor: of a module in modules_to_save, of trainable tokens, or a copy of the base's
    embeddings. Returns the module's name.
    """
    name, _, parameter = _module_key(key).rpartition(".")
    name = name.removesuffix(".token_adapter").removesuffix(".base_layer")
    modules = dict(skeleton.named_modules())
    is_saved = any(_is_in(name, part) for part in config.modules_to_save or ())
    is_token = parameter == "trainable_tokens_delta" and config.trainable_token_indices
    if not (is_saved or is_token or (name in modules and modules[name] in _embeddings(skeleton))):
        raise DeRaError(f"{named} holds {key!r}, which is not a LoRA factor; not supported.")
    if name not in modules:
        raise DeRaError(f"{named} is for another base: {base!r} has no module {name!r}.")
    return name


def _check_bias(named: str, base: str | None, key: str, shape: Sequence[int], modules: Mapping[str, nn.Module]) -> str:
    """A bias of one of the base's own modules. Returns the module's name."""
    name = _bias_owner(key)
    own = dict(modules[name].named_parameters(recurse=False)).get("bias") if name in modules else None
    if own is None or list(own.shape) != list(shape):
        raise DeRaError(f"{named} is for another base: {base!r} has no bias of {name!r} with shape {list(shape)}.")
    if not isinstance(modules[name], BIASED):
        kind = type(modules[name]).__name__
        raise DeRaError(
            f"{named} has a trained bias of {name!r}, a {kind}; those of linear layers and layer norms are "
            "supported. Train with bias='lora_only' or 'none'."
        )
    return name


def _bias_owner(key: str) -> str:
    return _module_key(key).removesuffix(".bias").removesuffix(".base_layer")


def _read_biases(adapter: str) -> dict[str, torch.Tensor]:
    """The trained biases of the base's own modules, by their names."""
    with _open(adapter) as tensors:
        keys = [key for key in tensors.keys() if key.endswith(".bias")]  # noqa: SIM118
        return {_bias_owner(key): tensors.get_tensor(key) for key in keys if not FACTORS.fullmatch(_module_key(key))}


def _is_in(name: str, part: str) -> bool:
    """Whether a module is one that `part` of modules_to_save names, or below it; PEFT compares ends of names."""
    parts = name.split(".")
    return any(".".join(parts[:depth]).endswith(part) for depth in range(1, len(parts) + 1))


def _check_copies(base: PreTrainedModel, adapter: str, config: LoraConfig) -> None:
    """PEFT saves the base's embeddings where they are adapted, and would load them over the base's: they must agree."""
    names = {name: module for name, module in base.named_modules() if module in _embeddings(base)}
    with _open(adapter) as tensors:
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            name, _, parameter = _module_key(key).rpartition(".")
            name = name.removesuffix(".base_layer")
            # with tied weights a head is saved with the embeddings
            is_saved = config.ensure_weight_tying or any(_is_in(name, part) for part in config.modules_to_save or ())
            is_copy = parameter == "weight" or (parameter == "bias" and config.bias == "none")
            if not is_copy or name not in names or (config.modules_to_save and is_saved):
                continue
            weight = getattr(names[name], parameter)
            copy = tensors.get_tensor(key).to(weight.device, weight.dtype)
            if copy.shape != weight.shape or not torch.equal(copy, weight):
                raise DeRaError(
                    f"adapter={adapter!r} holds weights for the base's own {name!r} that differ from the base's, so "
                    "they would change the reference too; train them as modules_to_save, or save without them "
                    "(save_embedding_layers=False)."
                )


def _embeddings(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    return tuple(m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None)


def _read_config(adapter: str) -> LoraConfig:
    return cast("LoraConfig", PeftConfig.from_pretrained(adapter))  # `check_adapter` passed it


def is_adapter(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "adapter_config.json"))


def check_exists(argument: str, name: str) -> None:
    """A name that can only be a path must be there; any other may be a hub id."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isfile(name) or not name
    if looks_like_path and not os.path.isdir(name):
        raise DeRaError(f"{argument}={name!r}: there is no such folder.")


def _open(adapter: str):
    return safe_open(cached_file(adapter, "adapter_model.safetensors"), framework="pt")


def _tensor_shapes(adapter: str, argument: str = "adapter") -> dict[str, list[int]]:
    try:
        with _open(adapter) as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise DeRaError(f"{argument}={adapter!r}: adapter_model.safetensors is corrupt: {error}") from error
    except (OSError, HFValidationError) as error:
        raise DeRaError(
            f"{argument}={adapter!r} has no adapter_model.safetensors that can be read ({first_line(error)}); "
            "other formats are not loaded, since they may run code."
        ) from error


def _read_tensors(adapter: str) -> dict[str, torch.Tensor]:
    """The tensors by the names that PEFT gives them."""
    with _open(adapter) as tensors:
        return {PREFIX + _module_key(key): tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None
