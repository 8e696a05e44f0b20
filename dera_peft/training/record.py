"""What a training program writes into `dera.json`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from dera_peft.checkpoint.fingerprint import base_fingerprint
from dera_peft.checkpoint.quantization import quantization_name
from dera_peft.checkpoint.record import Record
from dera_peft.engine.names import ALIGNED, REFERENCE
from dera_peft.training.rows import RowCount
from dera_peft.training.sft_model import SFTModel
from dera_peft.versions import package_versions

ROWS_LOOKED_AT = 8  # for the token that ends them


def training_record(
    trainer: Trainer, settings: Any, dataset_fingerprint: str, count: RowCount, metrics: dict[str, float]
) -> dict[str, Any]:
    """How an adapter was trained, beside its method and loss: see `Record.training`."""
    args = trainer.args
    model = cast("PreTrainedModel | PeftModel", trainer.model)
    return {
        "quantization": quantization_of(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "mixed_precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        "dataset": settings.dataset_name,
        "dataset_fingerprint": dataset_fingerprint,
        "rows": count.as_dict(),
        "steps": trainer.state.global_step,
        "metrics": metrics,
        "processes": args.world_size,
        "end_tokens": trained_end_tokens(trainer),
        "versions": package_versions("trl"),
    }


def trained_end_tokens(trainer: Trainer) -> list[str]:
    """
    The tokens that ended what a model was trained on: the tokenizer's end token, which TRL puts behind texts, and the
    special token that a chat template has put behind the answers.
    """
    tokenizer = cast("PreTrainedTokenizerBase", trainer.processing_class)
    names = [] if tokenizer.eos_token is None else [tokenizer.eos_token]
    max_length = getattr(trainer.args, "max_length", None)
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    rows = cast("Dataset", trainer.train_dataset)
    for row in cast("Iterable[dict]", rows.select(range(min(ROWS_LOOKED_AT, len(rows))))):
        ids = [*row["prompt_ids"], *row["chosen_ids"]] if "chosen_ids" in row else row["input_ids"]
        if max_length is not None and len(ids) >= max_length:
            continue  # it may have been cut
        # a template may have a line break behind it
        last = next((token for token in reversed(ids) if cast("str", tokenizer.decode([token])).strip()), None)
        if last in special:
            names.append(cast("str", tokenizer.convert_ids_to_tokens(last)))
    return list(dict.fromkeys(names))


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
