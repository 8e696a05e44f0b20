"""What a training program writes into `dera.json`."""

from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from dera_peft.checkpoint.fingerprint import base_fingerprint
from dera_peft.checkpoint.quantization import quantization_name
from dera_peft.checkpoint.record import Record
from dera_peft.engine.names import ALIGNED, REFERENCE
from dera_peft.training.rows import RowCount
from dera_peft.training.sft_model import SFTModel
from dera_peft.training.tokens import trained_end_tokens
from dera_peft.versions import package_versions


def training_record(
    trainer: Trainer, dataset: str | None, dataset_fingerprint: str, count: RowCount, metrics: dict[str, float]
) -> dict[str, Any]:
    """How an adapter was trained, beside its method and loss: see `Record.training`."""
    args = trainer.args
    model = cast("PreTrainedModel | PeftModel", trainer.model)
    return {
        "quantization": quantization_of(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "mixed_precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        "dataset": dataset,
        "dataset_fingerprint": dataset_fingerprint,
        "rows": count.as_dict(),
        "steps": trainer.state.global_step,
        "metrics": metrics,
        "processes": args.world_size,
        "end_tokens": trained_end_tokens(trainer),
        "versions": package_versions("trl"),
    }


def quantization_of(model: PreTrainedModel | PeftModel) -> str | None:
    """nf4, int8, another name, or None for a model that is not quantized."""
    return quantization_name(vars(model.config).get("quantization_config"))


def adapter_record(sft_model: SFTModel, folder: Path, continues: bool, training: dict[str, Any]) -> Record:
    """
    The record of an adapter in `folder` over an SFT model.

    Where that has an adapter of its own, a copy of it is in `folder/sft`, and it is the reference's. The aligned model
    has it too, below the new one; or, where it was continued, has the new one in its place.
    """
    adapters, reference, aligned = {"default": str(folder)}, [], ["default"]
    if sft_model.adapter is not None:
        adapters = {"sft": str(folder / "sft"), **adapters}
        reference, aligned = ["sft"], ["default"] if continues else ["sft", "default"]
    return Record(
        sft_model.base,
        adapters,
        {REFERENCE: reference, ALIGNED: aligned},
        base_fingerprint=base_fingerprint(sft_model.base, sft_model.revision),
        base_revision=sft_model.revision,
        training=training,
    )
