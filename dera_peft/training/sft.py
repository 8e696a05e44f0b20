"""
Fine-tunes a base with TRL's SFTTrainer: the model that alignment starts from, and DeRa's reference.

    dera sft --config configs/tiny/sft.yaml
    dera sft --config configs/tiny/sft.yaml --learning_rate 1e-3 --output_dir runs/other
    torchrun --nproc_per_node 4 -m dera_peft.cli sft --config configs/tiny/sft.yaml

All weights are trained, or with use_peft a LoRA adapter, over a quantized base with `quantization: nf4` (QLoRA).
`dera dpo` takes the adapter as it is; merge_adapter: true also merges it into the unquantized base, in
output_dir/merged.

Every key of the config is a key of this program, of TRL's SFTConfig or of its ModelConfig, and can be set on
the command line, which comes first. Run again, it reuses a finished model, and goes on from the last checkpoint of an
unfinished one.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dera_peft.checkpoint.source import ModelSource, Quantization
from dera_peft.errors import DeRaError
from dera_peft.messages import is_main_process
from dera_peft.settings import setting, setting_like
from dera_peft.training.program import (
    DataSettings,
    OutputFolder,
    check_files,
    check_not_pushed,
    check_processes,
    hold_folder,
    log,
    run_by,
    settings_of,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dera_peft.training.sft_model import SFTModel


@dataclass(frozen=True)
class SFTSettings(DataSettings):
    """The data, the base's quantization, and what becomes of an adapter."""

    dataset_name: str | None = setting(
        None,
        "Texts to learn from: a hub id, a folder, a .jsonl/.csv/.parquet file, or path.py:function. Columns as in "
        "TRL's SFTTrainer: text, prompt and completion (texts or chats), messages, or conversations.",
        metavar="DATA",
    )
    quantization: Quantization | None = setting_like(ModelSource, "quantization")
    merge_adapter: bool = setting(
        False, "Merge the trained adapter into the unquantized base, and save that in output_dir/merged."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Raises:
        DeRaError: an argument is not known or can't be, or the training fails in a way that a user can mend.
    """
    check_files(arguments)
    with ExitStack() as held:
        fine_tune(arguments, held)


def fine_tune(arguments: Sequence[str] | None, held: ExitStack) -> None:
    """Trains, in a folder that `held` keeps other programs out of."""

    from dera_peft.checkpoint.card import write_card
    from dera_peft.checkpoint.end_tokens import end_with
    from dera_peft.training.adapters import check_tokens_train, merge_and_save, train_in_float32
    from dera_peft.training.data import dataset_fingerprint, read_splits
    from dera_peft.training.parser import Parser
    from dera_peft.training.record import adapter_record, quantization_of, training_record
    from dera_peft.training.rows import NUMBER, check_data, check_tokenizer, read_rows
    from dera_peft.training.sft_model import find_sft_model_to_train
    from dera_peft.training.sft_rows import LENGTH, SFTReader, columns_to_read
    from dera_peft.training.sharding import check_sharding, shard_quantized
    from dera_peft.training.tokens import trained_end_tokens
    from dera_peft.training.trainer import ModelConfig, SFTConfig, SFTTrainer, build, lora_config, run, save

    parser = Parser("dera sft", __doc__, SFTSettings, SFTConfig, ModelConfig)
    settings, training_args, model_args = parser.read(arguments)
    check_arguments(settings, training_args, model_args)
    held.enter_context(hold_folder(training_args.output_dir))
    processes = check_processes(settings.num_processes)
    sharding = check_sharding(training_args)
    rows, held_out = read_splits(settings)
    base = find_sft_model_to_train(model_args, settings.quantization, training_args.model_init_kwargs)
    if base.adapter is not None:
        raise DeRaError(
            f"model_name_or_path={base.adapter!r} is an adapter: fine-tune a base, or merge it into one first."
        )
    if base.is_function and model_args.use_peft:
        raise DeRaError(
            f"use_peft=True: the adapter's base would be {base.base!r}, which nothing can load again; save the model "
            "that it makes first, or fine-tune all of it."
        )
    check_quantized(settings, model_args, base)
    if sharding is not None and not base.is_function:
        base = shard_quantized(base, training_args)
    output = OutputFolder(
        training_args.output_dir,
        {
            **settings_of(settings, training_args, model_args, ignore=training_args.watching()),
            **run_by(processes, sharding),
        },
        {**base.fingerprint(), "dataset": dataset_fingerprint(rows)},
        settings.overwrite,
    )
    if output.is_complete:
        output.log_reused()
        return

    training_args.model_init_kwargs = None
    model, tokenizer = base.load_to_train()
    name, columns = settings.dataset_name, columns_to_read(rows.column_names, training_args.dataset_text_field)
    check_data(name, rows, columns)
    reader = SFTReader(
        columns,
        with_template(tokenizer, training_args.chat_template_path),
        training_args.eos_token or tokenizer.eos_token,
    )
    usable, count = read_rows(name, rows, reader, training_args.dataset_num_proc)
    check_tokenizer(name, usable, reader.tokenizer, reader.end)
    if is_cut(training_args):
        for number, length in zip(usable[NUMBER], usable[LENGTH], strict=True):
            if length > training_args.max_length:
                count.add_cut(number)
    count.tell()
    count.check(settings.max_bad_rows)
    if held_out is not None:
        held_out, held_out_count = read_rows(
            f"{name}, to evaluate on", held_out, reader, training_args.dataset_num_proc
        )
        held_out_count.tell()
        held_out_count.check(settings.max_bad_rows)

    trainer = build(
        SFTTrainer,
        model=model,
        args=training_args,
        train_dataset=usable,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora_config(model_args),
    )
    trained = cast("PreTrainedModel | PeftModel", trainer.model)
    check_tokens_train(trained)
    quantization = quantization_of(trained)
    if model_args.use_peft and quantization is not None and not trainer.is_deepspeed_enabled:
        train_in_float32(cast("PeftModel", trained))
    metrics = run(trainer)
    if not model_args.use_peft:  # of an adapter, dera.json names them
        own = cast("PreTrainedTokenizerBase", trainer.processing_class)
        ends = [own.convert_tokens_to_ids(name) for name in trained_end_tokens(trainer)]
        end_with(cast("PreTrainedModel", trained), cast("list[int]", ends))
    save(trainer)
    if is_main_process() and model_args.use_peft:
        training = {
            "method": "sft",
            "beta": None,
            "loss_type": training_args.loss_type,
            **training_record(trainer, settings.dataset_name, output.record["inputs"]["dataset"], count, metrics),
        }
        folder = Path(training_args.output_dir)
        record = adapter_record(base, folder, False, training)
        record.save(folder)
        write_card(record, folder)
        if settings.merge_adapter:
            del trainer, model, trained  # the unquantized base may need their memory
            merge_and_save(replace(base, adapter=str(folder)), tokenizer, folder / "merged")
            log(f"merged into {folder / 'merged'}")
            if quantization is not None:
                log(
                    f"the adapter was trained on a base quantized to {quantization}, and is merged into the "
                    "unquantized one: the merged model differs slightly from what was trained. As the start of DPO it "
                    "is the reference all the same; the adapter itself, over the quantized base, is another one.",
                    logging.WARNING,
                )
    output.complete()


def check_arguments(settings: SFTSettings, training_args, model_args) -> None:
    """
    Raises:
        DeRaError: something is missing, or would have no effect.
    """
    if not settings.dataset_name or not model_args.model_name_or_path:
        raise DeRaError("dataset_name and model_name_or_path must be set, in the config or on the command line.")
    if not model_args.use_peft:
        for group, name in ((settings, "quantization"), (model_args, "load_in_4bit"), (model_args, "load_in_8bit")):
            if value := getattr(group, name):
                raise DeRaError(
                    f"{name}={value}: quantized weights can't be trained; set use_peft: true for an adapter."
                )
        if settings.merge_adapter:
            raise DeRaError("merge_adapter=True: there is no adapter; set use_peft: true, or leave it out.")
    else:
        check_not_pushed(training_args)


def check_quantized(settings: SFTSettings, model_args, base: "SFTModel") -> None:
    """
    Raises:
        DeRaError: the base's checkpoint is quantized, and that can't be trained or merged into.
    """
    if base.is_function:
        return
    quantization, is_stored = base.quantized_to()
    if is_stored and not model_args.use_peft:
        raise DeRaError(
            f"model_name_or_path={base.base!r} is a checkpoint in {quantization}: quantized weights can't be trained; "
            "set use_peft: true for an adapter."
        )
    if is_stored and settings.merge_adapter:
        raise DeRaError(
            f"merge_adapter=True: model_name_or_path={base.base!r} is a checkpoint in {quantization}, and an adapter "
            "is merged into unquantized weights; leave merge_adapter out, dera dpo takes the adapter as it is."
        )


def is_cut(training_args) -> bool:
    """Whether a row that is longer than max_length loses what is beyond it."""
    packed_whole = training_args.packing and training_args.packing_strategy in ("bfd_split", "wrapped")
    return training_args.max_length is not None and not packed_whole


def with_template(tokenizer: "PreTrainedTokenizerBase", path: str | None) -> "PreTrainedTokenizerBase":
    """The tokenizer with the template that TRL will train with: a file's, that of another tokenizer, or its own."""
    if path is None:
        return tokenizer
    other = deepcopy(tokenizer)
    other.chat_template = read_template(path)
    return other


def read_template(path: str) -> str | dict | None:
    """
    Raises:
        DeRaError: `path` is neither a template's file nor a tokenizer.
    """
    if Path(path).suffix in (".jinja", ".j2"):
        try:
            return Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise DeRaError(f"chat_template_path={path!r} can't be read: {error}") from None
    from transformers import AutoTokenizer

    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(path)).chat_template
    except (OSError, ValueError) as error:
        raise DeRaError(f"chat_template_path={path!r} is neither a .jinja file nor a tokenizer: {error}") from error
