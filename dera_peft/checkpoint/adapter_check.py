"""Does an adapter's file fit a base? PEFT's own loader judges, on the base without its weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dera_peft.checkpoint.adapter_file import FACTORS, PREFIX, AdapterFile, is_bias, module_of
from dera_peft.checkpoint.vocabulary import embeddings
from dera_peft.engine.lora import find_adapted
from dera_peft.errors import DeRaError, first_line

# Modules whose output is the sum of their bias and something else, so that a branch's bias can be added behind them.
BIASED = (nn.Linear, Conv1D, nn.LayerNorm)


@dataclass(frozen=True)
class CheckedAdapter:
    """
    An adapter that fits a base; from `check_adapter`.

    Attributes:
        file: with the names of the base.
        copies: the tensors, by their names in the file, that are the base's own embeddings once more.
    """

    file: AdapterFile
    copies: frozenset[str]


def check_adapter(file: AdapterFile, base: str | None, skeleton: PreTrainedModel, name: str) -> CheckedAdapter:
    """
    Checks an adapter's config and each of its tensors against the base's modules: it is loaded by PEFT, without its
    weights, into the base without its weights.

    Args:
        skeleton: from `loading.make_skeleton`, with as many tokens as the adapter was trained with. It stays as it is.
        name: the adapter's name in a PeftModel.

    Raises:
        DeRaError: it is incomplete, holds more than its config names, or is for another base.
    """
    file = file.in_names_of(skeleton)
    modules, own_embeddings = dict(skeleton.named_modules()), embeddings(skeleton)
    biases = _check_biases(file, base, skeleton, modules)
    with _injected(file, base, skeleton, name) as peft_model:
        saved = _saved_names(file, peft_model, name)
        placed = _place(file, peft_model, name)
        expected = {key: tuple(tensor.shape) for key, tensor in peft_model.state_dict().items()}
        copies = set()
        for key, shape in placed.items():
            own = key.removeprefix(PREFIX)
            module = module_of(own)
            is_adapters = f".{name}." in f"{key}."
            if key in expected and is_adapters:
                _check_shape(file, base, own, shape, expected[key])
            elif own in biases or key in saved:
                pass
            elif modules.get(module) in own_embeddings and not FACTORS.fullmatch(own):
                copies.add(key)
            else:
                raise DeRaError(_unexpected(file, base, own, modules))
        for key in expected.keys() - placed.keys():
            if ".lora_" in key and f".{name}." in f"{key}.":
                module = module_of(key.removeprefix(PREFIX))
                raise DeRaError(
                    f"{file.named} is incomplete: its config targets {module!r}, and its file has no "
                    f"{key.removeprefix(f'{PREFIX}{module}.').replace(f'.{name}', '')} of it."
                )
    # trained weights may stand there a second time: of modules_to_save, and of tokens whose embeddings are tied
    seconds = (".modules_to_save.", ".trainable_tokens_delta")
    return CheckedAdapter(file, frozenset(key for key in copies if not any(second in key for second in seconds)))


@contextmanager
def _injected(file: AdapterFile, base: str | None, skeleton: PreTrainedModel, name: str) -> Iterator[PeftModel]:
    """The skeleton with the adapter's modules, without weights; afterwards it is as before."""
    config = replace(file.config, init_lora_weights=True, inference_mode=True)
    try:
        peft_model = PeftModel(skeleton, config, name, low_cpu_mem_usage=True)
    except ValueError as error:  # its config names modules that the base does not have
        raise DeRaError(_unfitting(file, base, skeleton, error)) from error
    try:
        find_adapted(skeleton, [name])
        yield peft_model
    except DeRaError as error:
        raise error if str(error).startswith(file.named) else DeRaError(f"{file.named}: {error}") from error
    finally:
        peft_model.unload()


def _unfitting(file: AdapterFile, base: str | None, skeleton: PreTrainedModel, error: ValueError) -> str:
    modules = dict(skeleton.named_modules())
    for key in file.keys:
        module = module_of(key.removeprefix(PREFIX))
        if module not in modules:
            return f"{file.named} is for another base: {base!r} has no module {module!r}."
    return f"{file.named}: PEFT can't apply its config to {base!r}: {first_line(error)}"


def _saved_names(file: AdapterFile, peft_model: PeftModel, name: str) -> set[str]:
    """
    The names in the model of what modules_to_save and trainable tokens bring.

    Raises:
        DeRaError: the file lacks some of them.
    """
    saved = set()
    for path, module in peft_model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        for key, own in module.adapter_state_dict_load_map(name).items():
            saved.add(f"{path}.{own}")
            if f"{path}.{key}" not in file.keys:
                option = "trainable_token_indices" if isinstance(module, TrainableTokensWrapper) else "modules_to_save"
                raise DeRaError(
                    f"{file.named} is incomplete: its config has {option}={getattr(file.config, option)!r}, and its "
                    f"file no {key!r} of {path.removeprefix(PREFIX)!r}."
                )
    return saved


def _place(file: AdapterFile, peft_model: PeftModel, name: str) -> dict[str, tuple[int, ...]]:
    """Where PEFT's loader puts the tensors of a file: their names in the model, and their shapes."""
    placed: dict[str, tuple[int, ...]] = {}

    def take(model: nn.Module, state_dict: dict[str, torch.Tensor], *_) -> None:
        placed.update({key: tuple(tensor.shape) for key, tensor in state_dict.items()})
        state_dict.clear()  # nothing is to be loaded

    handle = peft_model.register_load_state_dict_pre_hook(take)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in file.shapes.items()}
    try:
        set_peft_model_state_dict(peft_model, tensors, name, low_cpu_mem_usage=True)
    except ValueError as error:  # transformers' conversion of experts' weights
        raise DeRaError(f"{file.named} can't be read as PEFT does: {first_line(error)}") from error
    finally:
        handle.remove()
    return placed


def _check_shape(
    file: AdapterFile, base: str | None, own: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Raises `DeRaError` where a tensor has another shape than the base's modules and the adapter's config give it."""
    if shape == expected:
        return
    module, found = module_of(own), FACTORS.fullmatch(own)
    if found is None or found["factor"] is None or len(shape) != len(expected) or found["kind"] == "bias":
        raise DeRaError(
            f"{file.named} is for another base: its {own!r} has the shape {list(shape)}, and for {base!r} it would "
            f"have {list(expected)}."
        )
    side, wide, ranked = ("inputs", 1, 0) if found["factor"].endswith("A") else ("outputs", 0, 1)
    if shape[wide] != expected[wide]:
        raise DeRaError(
            f"{file.named} is for another base: its {module!r} has {shape[wide]} {side}, in {base!r} it has "
            f"{expected[wide]}."
        )
    raise DeRaError(
        f"{file.named}: its config says r={expected[ranked]} for {module!r}, and its file has factors of rank "
        f"{shape[ranked]}: they are of different adapters."
    )


def _unexpected(file: AdapterFile, base: str | None, own: str, modules: Mapping[str, nn.Module]) -> str:
    """Why a tensor that has no place in the model is none that can be left out."""
    module = module_of(own)
    if module not in modules:
        return f"{file.named} is for another base: {base!r} has no module {module!r}."
    if FACTORS.fullmatch(own):
        return (
            f"{file.named} holds factors for {module!r}, which its config does not target (target_modules="
            f"{file.config.target_modules!r}): without them it would be another model. Give the config that it was "
            "saved with."
        )
    return f"{file.named} holds {own!r}, which is not a LoRA factor; not supported."


def _check_biases(
    file: AdapterFile, base: str | None, skeleton: PreTrainedModel, modules: Mapping[str, nn.Module]
) -> set[str]:
    """
    Where a config says so, the biases of the base's own modules.

    Returns:
        Their names in the file.

    Raises:
        DeRaError: one is missing, or is of a module that can't have another for some rows alone.
    """
    if file.config.bias == "none":
        return set()
    adapted = {module_of(key.removeprefix(PREFIX)) for key in file.keys if FACTORS.fullmatch(key)}
    biases = {key.removeprefix(PREFIX) for key in file.keys if is_bias(key)}
    for key in biases:
        module, shape = module_of(key), file.shapes[PREFIX + key]
        own = dict(modules[module].named_parameters(recurse=False)).get("bias") if module in modules else None
        if own is None or tuple(own.shape) != shape:
            raise DeRaError(
                f"{file.named} is for another base: {base!r} has no bias of {module!r} with shape {list(shape)}."
            )
        if not isinstance(modules[module], BIASED):
            kind = type(modules[module]).__name__
            raise DeRaError(
                f"{file.named} has a trained bias of {module!r}, a {kind}; those of linear layers and layer norms are "
                "supported. Train with bias='lora_only' or 'none'."
            )
    expected = {name.removesuffix(".bias") for name, _ in skeleton.named_parameters() if name.endswith(".bias")}
    wanted = expected if file.config.bias == "all" else expected & adapted
    if missing := sorted(wanted - {module_of(key) for key in biases}):
        raise DeRaError(f"{file.named} with bias={file.config.bias!r} is incomplete: no bias of {missing[0]!r}.")
    return biases
