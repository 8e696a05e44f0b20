"""The base's own modules under what PEFT puts in their place."""

from typing import cast

from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn


def own_module(module: nn.Module) -> nn.Module:
    """The base's module in what PEFT puts in its place."""
    while True:
        if isinstance(module, LoraLayer):
            module = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            module = cast("nn.Module", module.original_module)
        elif isinstance(module, TrainableTokensWrapper):
            module = cast("nn.Module", module.token_adapter.get_base_layer())
        else:
            return module
