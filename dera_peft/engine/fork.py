"""Where the rows of a batch fork into branches and are joined again, and how what a layer is given is forked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
from transformers.modeling_layers import GradientCheckpointingLayer

from dera_peft.engine.lora import Adapted
from dera_peft.engine.plan import BatchPlan, Branch
from dera_peft.errors import DeRaError

# Their outer forward counts rows between the layers (mpt's position bias has no batch dimension, gpt_bigcode restores
# the input's shape, the Qwen3-VL family adds image features to some rows' tokens), or hands what one layer made of its
# rows to the next beside them (zaya's router, the indexers of sparse attention), or the rows are not a layer's first
# dimension (Gemma 3n); so they can only fork at the input.
FORKS_AT_INPUT = (
    "gpt_bigcode", "mpt", "zaya", "gemma3n", "gemma3n_text", "glm_moe_dsa", "hy_v4", "mistral_large4",
    "qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker", "granite4_vision",
)  # fmt: skip
GRIDS = ("image_grid_thw", "video_grid_thw")
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")  # in a config


def own_adapters(branches: Sequence[Branch]) -> set[str]:
    """The adapters that not all branches share."""
    common = set.intersection(*(set(branch.adapters) for branch in branches))
    return {name for branch in branches for name in branch.adapters} - common


def find_layers(base: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """The text decoder's layers and their name, or None where they can't be told."""
    depth = base.config.get_text_config(decoder=True).num_hidden_layers
    decoder = base.get_decoder()
    inside = set((base if decoder is None else decoder).modules())  # a vision tower may be as deep
    for name, module in base.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == depth
            and isinstance(module[0], GradientCheckpointingLayer)
            and module in inside
        ):
            return name, module
    return None


def has_text_part(base: PreTrainedModel) -> bool:
    """Whether the text decoder is a part of the base, beside those for images or sounds."""
    return not base.config.is_encoder_decoder and base.config.get_text_config(decoder=True) is not base.config


def find_fork_layer(base: PreTrainedModel, branches: Sequence[Branch], adapted: Sequence[Adapted]) -> int | None:
    """The first decoder layer with an adapter that not all branches share; None where rows must fork at the input."""
    own = own_adapters(branches)
    found = None if base.config.is_encoder_decoder or not own else find_layers(base)
    # a flex attention mask is no tensor and can't be forked between layers
    if (
        found is None
        or base.config._attn_implementation == "flex_attention"
        or base.config.model_type in FORKS_AT_INPUT
    ):
        return None
    prefix, layers = found[0] + ".", found[1]
    head = base.get_output_embeddings()
    first = len(layers)
    for module in adapted:
        if not own & module.adapters or module.module is head:
            continue
        if not module.name.startswith(prefix):
            return None
        first = min(first, int(module.name.removeprefix(prefix).split(".")[0]))
    # with nothing but the head adapted the rows still have to fork before it
    return min(first, len(layers) - 1)


def check_inputs(inputs: dict, plan: BatchPlan, batch_size: int, output_branches: bool) -> None:
    """Raises `DeRaError` where a forward pass is given what is not of its plan's rows."""
    if plan.num_inputs != batch_size:
        raise DeRaError(f"lam is planned for {plan.num_inputs} sequences, and the batch has {batch_size}.")
    if output_branches and not plan.every_branch:
        raise DeRaError("output_branches=True needs a plan made with every_branch=True.")
    if "encoder_outputs" in inputs and inputs["encoder_outputs"][0].shape[0] != plan.num_rows:
        raise DeRaError(
            f"encoder_outputs has {inputs['encoder_outputs'][0].shape[0]} rows, and the branches have "
            f"{plan.num_rows}: each has its own encoder outputs; pass input_ids instead."
        )


def check_media(base: PreTrainedModel, inputs: dict, batch_size: int) -> None:
    """
    Refuses images and sounds that can't be forked at the input: they are counted by themselves, not by sequences.

    Raises:
        DeRaError: a sequence has none or several.
    """
    media = [name for name in (*MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, *GRIDS) if name in inputs]
    places = [value for name, value in vars(base.config).items() if name in PLACEHOLDERS and value is not None]
    ids = inputs.get("input_ids")
    for name in media:
        counts = [0] if ids is None else torch.isin(ids, ids.new_tensor(places)).sum(dim=1).tolist()
        if len(set(counts)) > 1 or 0 in counts or len(inputs[name]) != batch_size:
            raise DeRaError(
                f"{name} does not have one entry for each of the {batch_size} sequences, and this model's rows fork "
                "before images and sounds are read: an adapter changes the layers that see them, or the base adds "
                "their features between its layers. Pass one a sequence, train adapters on the language model's "
                "layers alone, or decode all at λ=0 or all at λ=1."
            )


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
        return {
            # positions in an image have three dimensions, which stand before the batch's
            name: fork_inputs(value.transpose(0, 1), plan, heads, forked).transpose(0, 1)
            if name == "position_ids" and isinstance(value, torch.Tensor) and value.ndim == 3
            else fork_inputs(value, plan, heads, forked)
            for name, value in inputs.items()
        }
    return inputs
