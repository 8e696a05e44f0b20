"""Tokens that an adapter was trained with and its base does not have: the rows of the embeddings for them."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from dera_peft.checkpoint.adapter_file import FACTORS, PREFIX, AdapterFile, module_of
from dera_peft.engine.padding import num_rows
from dera_peft.errors import DeRaError, first_line

logger = logging.getLogger(__name__)


def find_tokens(files: Iterable[AdapterFile], skeleton: PreTrainedModel) -> int | None:
    """
    How many tokens the adapters were trained with, where it is another number than the base has.

    Their files tell it by the embeddings that they hold (modules_to_save, or the resized base's own), or by the tokens
    that they train.

    Raises:
        DeRaError: two were trained with different numbers.
    """
    modules = dict(skeleton.named_modules())
    own = num_rows(skeleton)
    found: dict[int, AdapterFile] = {}
    for file in files:
        for name, shape in file.in_names_of(skeleton).shapes.items():
            name = name.removeprefix(PREFIX)
            is_weight = name.endswith(".weight") and FACTORS.fullmatch(name) is None
            if is_weight and modules.get(module_of(name)) in embeddings(skeleton):
                found.setdefault(shape[0], file)
        indices = file.config.trainable_token_indices or []
        trained = [token for part in indices.values() for token in part] if isinstance(indices, dict) else indices
        if not any(each is file for each in found.values()) and max(trained, default=0) >= own:
            found.setdefault(max(trained) + 1, file)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise DeRaError(
            f"{first.named} was trained with {one} tokens and {second.named} with {other}: the embeddings of one model "
            "have one number of rows."
        )
    return next((tokens for tokens in found if tokens != own), None)


def resize(model: PreTrainedModel, tokens: int) -> None:
    """
    Gives the embeddings of a base `tokens` rows; new ones are the mean of the others.

    transformers draws new rows around that mean at random; here the same model comes of the same files.

    Raises:
        DeRaError: they can't be resized, as where they are offloaded or quantized.
    """
    before = num_rows(model)
    try:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise DeRaError(
            f"base={model.config.name_or_path!r} has {before} tokens, the adapter was trained with {tokens}, and its "
            f"embeddings can't be resized: {first_line(error)}"
        ) from error
    if tokens <= before:
        return
    for module in embeddings(model):
        for parameter in module.parameters(recurse=False):
            parameter.data[before:] = parameter.data[:before].float().mean(0).to(parameter.dtype)


@contextmanager
def own_tokens_alone(model: nn.Module) -> Iterator[None]:
    """
    Around PEFT's saving and loading of adapters in a model of which one has trained tokens: PEFT asks for such tokens
    of every adapter, and fails at those that have none.
    """
    wrappers = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    for wrapper in wrappers:
        for name in ("adapter_state_dict", "adapter_state_dict_load_map"):
            setattr(wrapper, name, partial(_of_own_adapters, wrapper, getattr(wrapper, name)))
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.adapter_state_dict, wrapper.adapter_state_dict_load_map


def _of_own_adapters(wrapper: TrainableTokensWrapper, method: Callable, adapter: str, *args: Any) -> dict:
    return method(adapter, *args) if adapter in wrapper.token_adapter.token_indices else {}


def embeddings(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    return tuple(m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None)
