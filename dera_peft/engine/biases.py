"""The biases of the base's own modules that an adapter was trained with: PEFT's bias="lora_only" and bias="all"."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


class TrainedBias(nn.Module):
    """
    The bias that an adapter has in the place of a module's own: a child of that module, which keeps its own.

    Attributes:
        adapter: the adapter's name.
        trained: `[D]`, in the dtype of the module's own bias.
        delta: `[D]` float32, trained - own.
    """

    def __init__(self, adapter: str, trained: torch.Tensor, own: torch.Tensor):
        super().__init__()
        self.adapter = adapter
        self.register_buffer("trained", trained, persistent=False)
        self.register_buffer("delta", trained.float() - own.float(), persistent=False)


def find_bias(module: nn.Module) -> TrainedBias | None:
    """Of a module, or of the base's layer in a LoRA layer."""
    return next((child for child in _base_layer(module).children() if isinstance(child, TrainedBias)), None)


@contextmanager
def keep_biases(base: nn.Module, adapter: str, trained: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """
    Around PEFT's loading of an adapter, which writes its biases over the base's: puts the base's back, and the
    adapter's beside them where they differ.

    Args:
        trained: the adapter's biases, by their module's name in the base.
    """
    own = {name: _base_layer(base.get_submodule(name)).bias.detach().clone() for name in trained}
    try:
        yield
    finally:
        for name, bias in own.items():
            _base_layer(base.get_submodule(name)).bias.data.copy_(bias)
    for name, bias in own.items():
        tensor = trained[name].to(bias.device, bias.dtype)
        if not torch.equal(tensor, bias):
            _base_layer(base.get_submodule(name)).add_module("trained_bias", TrainedBias(adapter, tensor, bias))


@contextmanager
def biases_at(base: nn.Module, weight: float = 1.0) -> Iterator[None]:
    """The base with the biases own + weight·(trained - own), where PEFT looks for those of the adapter."""
    own = [(module, module.bias.detach().clone()) for module, _ in _trained_biases(base)]
    for module, bias in _trained_biases(base):
        module.bias.data.lerp_(bias.trained, weight)  # at 1 exact
    try:
        yield
    finally:
        for module, bias in own:
            module.bias.data.copy_(bias)


def drop_biases(base: nn.Module, adapter: str) -> None:
    """Forgets an adapter's biases; the base keeps its own."""
    for module, bias in _trained_biases(base):
        if bias.adapter == adapter:
            del module.trained_bias


def hand_over_biases(base: nn.Module) -> None:
    """Leaves the base as PEFT's own loading does: with the adapter's biases, its own being lost."""
    for module, bias in _trained_biases(base):
        module.bias.data.copy_(bias.trained)
        del module.trained_bias


def _trained_biases(base: nn.Module) -> list[tuple[nn.Module, TrainedBias]]:
    return [(m, child) for m in base.modules() for child in m.children() if isinstance(child, TrainedBias)]


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module
