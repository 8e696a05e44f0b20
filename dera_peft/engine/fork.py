"""Where the rows of a batch fork into branches and are joined again, and how what a layer is given is forked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dera_peft.engine.lora import Adapted
from dera_peft.engine.plan import BatchPlan, Branch
from dera_peft.errors import DeRaError

# Their outer forward counts rows between the layers (mpt's position bias has no batch dimension, gpt_bigcode restores
# the input's shape), or hands what one layer made of its rows to the next beside them (zaya's router); so their rows
# can only fork at the input.
FORKS_AT_INPUT = ("gpt_bigcode", "mpt", "zaya")


def own_adapters(branches: Sequence[Branch]) -> set[str]:
    """The adapters that not all branches share."""
    common = set.intersection(*(set(branch.adapters) for branch in branches))
    return {name for branch in branches for name in branch.adapters} - common


def find_layers(base: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """The decoder's layers and their name, or None where they can't be told."""
    depth = base.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in base.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == depth
            and isinstance(module[0], GradientCheckpointingLayer)
        ):
            return name, module
    return None


def find_fork_layer(base: PreTrainedModel, branches: Sequence[Branch], adapted: Sequence[Adapted]) -> int:
    """The first decoder layer with an adapter that not all branches share; 0 (the input) if that can't be told."""
    found = None if base.config.is_encoder_decoder else find_layers(base)
    # a flex attention mask is no tensor and can't be forked between layers
    if (
        found is None
        or base.config._attn_implementation == "flex_attention"
        or base.config.model_type in FORKS_AT_INPUT
    ):
        return 0
    prefix, layers = found[0] + ".", found[1]
    own = own_adapters(branches)
    head = base.get_output_embeddings()
    first = len(layers)
    for module in adapted:
        if not own & module.adapters or module.module is head:
            continue
        if not module.name.startswith(prefix):
            return 0
        first = min(first, int(module.name.removeprefix(prefix).split(".")[0]))
    # with nothing but the head adapted the rows still have to fork before it
    return min(first, len(layers) - 1)


def is_head_linear(base: PreTrainedModel, adapted: Sequence[Adapted]) -> bool:
    """
    Whether mixing the head's inputs mixes the logits.

    A scale behind the head or a bias does no harm, since a sequence's weights sum to one. Soft-capping bends the
    logits, an adapted head (be it by its bias alone) differs between the branches, and LLM.int8()'s head is not linear
    in its input.
    """
    soft_cap = getattr(base.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    head = base.get_output_embeddings()
    return type(head) is nn.Linear and soft_cap is None and all(module.module is not head for module in adapted)


def fork_inputs(inputs: Any, plan: BatchPlan, heads: int, forked: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """
    Forks every tensor with a batch dimension in a nest of tuples, lists and dicts.

    Args:
        heads: the number of attention heads: ALiBi's biases may be given as `[B·heads, ...]`.
        forked: collects (tensor, its rows), so that what all layers are given (masks, rotary embeddings) is forked
            once.

    Raises:
        DeRaError: there is a flex attention's mask among them.
    """
    if isinstance(inputs, torch.Tensor):
        folded = inputs.ndim == 3 and inputs.shape[0] == plan.batch_size * heads and heads > 1
        if plan.is_identity or inputs.ndim < 2 or not (inputs.shape[0] == plan.batch_size or folded):
            return inputs
        for tensor, rows in forked:
            if tensor is inputs:
                return rows
        rows = plan.fork(inputs.unflatten(0, (-1, heads))).flatten(0, 1) if folded else plan.fork(inputs)
        forked.append((inputs, rows))
        return rows
    if isinstance(inputs, BlockMask) and not plan.is_identity:
        raise DeRaError(
            "flex attention's masks can't be forked into branches, and with a static cache they are made for the "
            'sequences: use another cache, or load the base with attn_implementation="sdpa".'
        )
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(fork_inputs(value, plan, heads, forked) for value in inputs)
    if type(inputs) is dict:
        return {name: fork_inputs(value, plan, heads, forked) for name, value in inputs.items()}
    return inputs
