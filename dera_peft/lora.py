"""A forward pass for PEFT's LoRA layers that touches only its branch's rows."""

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer

from dera_peft.branches import BatchPlan
from dera_peft.errors import DeRaError


class Routing:
    """What the layers of one model share: the plan of the batch that is being computed."""

    def __init__(self):
        self.plan: BatchPlan | None = None


def check_layer(name: str, layer: LoraLayer, adapters: list[str]) -> None:
    """
    Refuses what a row's delta cannot express.

    Raises:
        DeRaError: names the module, the adapter and the reason.
    """
    if layer.merged:
        raise DeRaError(
            f"{name}: the adapter {layer.merged_adapters} is merged into the base; call unmerge_adapter() first."
        )
    for adapter in adapters:
        if adapter in layer.lora_embedding_A:
            raise DeRaError(f"{name}: adapter {adapter!r} adapts an embedding, which is not supported yet.")
        if adapter not in layer.lora_A:
            continue
        if not isinstance(layer.lora_A[adapter], torch.nn.Linear):
            kind = type(layer).__name__
            raise DeRaError(f"{name}: adapter {adapter!r} is a LoRA {kind}; only LoRA on linear layers is supported.")
        if adapter in layer.lora_variant:
            kind = type(layer.lora_variant[adapter]).__name__
            raise DeRaError(f"{name}: adapter {adapter!r} uses the LoRA variant {kind}, which is not supported yet.")


def branch_forward(name: str, layer: LoraLayer, routing: Routing) -> Callable:
    """
    The `forward` of a LoRA layer under a plan: one base product over all rows, whatever the base layer is (quantized or
    not), then y[rows] += B(A(x[rows]))·s in place for the rows of the branches that have the adapter.
    """

    def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        plan = routing.plan
        if x.shape[0] not in (plan.num_rows, plan.batch_size):
            raise DeRaError(
                f"{name} was called with {x.shape[0]} rows in a batch of {plan.num_rows}: its model reorders or folds "
                "the rows before this layer, so an adapter here cannot be kept to its branch."
            )
        y = layer.base_layer(x, *args, **kwargs)
        for adapter, slices in plan.adapter_rows.items():
            if adapter not in layer.lora_A:
                continue
            lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
            dropout, scaling = layer.lora_dropout[adapter], layer.scaling[adapter]
            for rows in slices:
                delta = lora_b(lora_a(dropout(x[rows].to(lora_a.weight.dtype))))
                y[rows].add_(delta, alpha=scaling)
        return y

    return forward
