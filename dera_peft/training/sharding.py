"""Sharding a model over the processes that train it: FSDP2, as accelerate offers it, and what it can't do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.training_args import OptimizerNames

from dera_peft.checkpoint.devices import is_fsdp_launched, is_set
from dera_peft.errors import DeRaError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from dera_peft.training.sft_model import SFTModel

FSDP2 = "fsdp2"
# bitsandbytes' kernels read the whole of a tensor, of which a process has a part
OF_BITSANDBYTES = {
    OptimizerNames(name)
    for name in (
        "adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit",
        "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
        "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    )
}  # fmt: skip


def is_fsdp_asked(args: "TrainingArguments") -> bool:
    """Whether FSDP is asked for, by the training arguments or by accelerate's launcher."""
    return bool(args.fsdp) or is_fsdp_launched()


def check_sharding(args: "TrainingArguments") -> str | None:
    """
    How the model is sharded: "fsdp2", or None where each process has the whole of it. (DeepSpeed is not looked at.)

    Raises:
        DeRaError: FSDP is asked for, and can't be as it is asked for.
    """
    if not is_fsdp_asked(args):
        return None
    kind = PartialState().distributed_type
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU):  # where accelerate leaves it out, and says nothing
        place = "one process" if kind == DistributedType.NO else "the CPU"
        raise DeRaError(
            f"FSDP shards a model over several accelerators, and this is {place}, where each process would have the "
            "whole model: leave FSDP out, or start it on several GPUs (accelerate launch, with fsdp_version: 2)."
        )
    settings = args.fsdp_plugin_args or {}
    version = int(settings.get("fsdp_version") or os.environ.get("FSDP_VERSION", 1))
    if version != 2:
        raise DeRaError(
            f"fsdp_version={version}: these programs train with FSDP2. Set fsdp_version: 2; accelerate "
            "to-fsdp2 --config_file FILE converts a config."
        )
    if settings.get("activation_checkpointing") or is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise DeRaError(
            "fsdp_activation_checkpointing=true wraps layers, in which PEFT then finds no adapter to save: leave it "
            "out, and set gradient_checkpointing: true, which does the same."
        )
    optimizer = OptimizerNames(args.optim)
    if optimizer in OF_BITSANDBYTES:
        raise DeRaError(
            f"optim={optimizer.value!r} is bitsandbytes', which can't update weights that FSDP shards: set optim: "
            "adamw_torch. Sharded, an adapter's moments take little."
        )
    if getattr(args, "precompute_ref_log_probs", False):  # DPO's
        raise DeRaError(
            "precompute_ref_log_probs=True: the reference would be computed before the model is sharded; leave it out."
        )
    return FSDP2


def shard_quantized(model: "SFTModel", args: "TrainingArguments") -> "SFTModel":
    """
    The SFT model as FSDP can shard it: with 4-bit weights that are stored as floats.

    FSDP shards floats alone, and would let each process keep all bytes. It gathers weights in the dtype of the
    arithmetic, so that this must be the one that they are stored in: a cast would change the packed bits.

    Raises:
        DeRaError: it is quantized in another way.
    """
    name, is_stored = model.quantized_to()
    if name is None:
        return model
    if name.split()[0] not in ("nf4", "fp4"):
        raise DeRaError(f"FSDP can't shard a base in {name}: leave FSDP out, or take it in nf4 (quantization: nf4).")
    if is_stored:
        raise DeRaError(
            f"model_name_or_path={model.base!r} is a checkpoint in {name}, whose bytes FSDP does not shard: name the "
            "unquantized base, with quantization: nf4; or leave FSDP out, and each process has the whole of it."
        )
    return model.with_storage(torch.float16 if args.mixed_precision == "fp16" else torch.bfloat16)


def keep_precise(plugin: FullyShardedDataParallelPlugin) -> None:
    """
    Keeps FSDP's mixed precision from rounding what the loss is computed from, log-probabilities of tokens say, to the
    dtype of the arithmetic; and has gradients summed in float32, as they are without FSDP. accelerate rounds both.
    """
    if plugin.mixed_precision_policy is not None:
        policy = cast("MixedPrecisionPolicy", plugin.mixed_precision_policy)
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def is_plain_adapter(model: Any) -> bool:
    """Whether a model is saved by the weights that are trained alone; of adapted embeddings PEFT saves the base's."""
    if not isinstance(model, PeftModel):
        return False
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return not any(isinstance(each, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for each in embeddings)


def trained_weights(model: nn.Module) -> dict[str, Any]:
    """
    The weights of a sharded model that are trained, on the CPU of the first process; all processes have to call it.

    transformers gathers the base too, to save an adapter: all of it, in the memory of the first process.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


@contextmanager
def whole_weights(plugin: FullyShardedDataParallelPlugin) -> Iterator[None]:
    """Meanwhile a sharded model is saved whole; where checkpoints are sharded, transformers would save none."""
    kind = cast("Any", plugin.state_dict_type).name
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(kind)
