"""
Aligns an SFT model with a LoRA adapter, by TRL's DPOTrainer. The reference is the SFT model.

    dera dpo --config configs/tiny/dpo.yaml
    dera dpo --config configs/tiny/dpo.yaml --beta 0.05 --output_dir runs/beta-0.05
    torchrun --nproc_per_node 4 -m dera_peft.cli dpo --config configs/tiny/dpo.yaml

The SFT model, and with it the reference, is one of

    model_name_or_path: M                   a model of its own, or one that an adapter was merged into
    model_name_or_path: B, sft_adapter: A   a base B and a LoRA adapter A over it, which stays as it is; or, with
                                            continue_sft_adapter: true, of which a copy is trained on

In place of B and A, model_name_or_path may be A alone, which names its base. With `quantization: nf4` the base is
quantized (QLoRA).

Every key of the config is a key of this program, of TRL's DPOConfig or of its ModelConfig, and can be set on
the command line, which comes first. Run again, it reuses a finished adapter, and goes on from the last checkpoint of an
unfinished one.
The folder gets a PEFT adapter, and a dera.json that names base, reference and β: `dera generate --adapter FOLDER` needs
no more.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dera_peft.checkpoint.source import ModelSource, Quantization
from dera_peft.errors import DeRaError
from dera_peft.messages import is_main_process
from dera_peft.settings import nearest, setting, setting_like
from dera_peft.training.program import (
    DataSettings,
    OutputFolder,
    check_files,
    check_not_pushed,
    check_processes,
    given_settings,
    hold_folder,
    log,
    run_by,
    settings_of,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

# TRL's, which it names in no place but the error of its first step
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
KEEPS_BETA = {"sigmoid", "robust"}  # losses whose optimum is π_ref·exp(r/β)/Z, on which DeRa's β/λ stands


@dataclass(frozen=True)
class DPOSettings(DataSettings):
    """The data, the base's quantization, and the SFT adapter."""

    dataset_name: str | None = setting(
        None,
        "Preferences: a hub id, a folder, a .jsonl/.csv/.parquet file, or path.py:function. Columns: chosen and "
        "rejected, as texts or as chats, and prompt, or another column of prompts, unless it is in both of them.",
        metavar="DATA",
    )
    quantization: Quantization | None = setting_like(ModelSource, "quantization")
    sft_adapter: str | None = setting(
        None,
        "LoRA adapter (hub id or folder) that makes the base the SFT model, where it is not merged. It is part of the "
        "reference, and stays as it is.",
        metavar="LORA",
    )
    continue_sft_adapter: bool = setting(
        False,
        "Train a copy of the SFT adapter on, instead of a new adapter on top of it. The reference is the base with the "
        "SFT adapter all the same; r, alpha and modules are the SFT adapter's.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Raises:
        DeRaError: an argument is not known or can't be, or the training fails in a way that a user can mend.
    """
    check_files(arguments)
    with ExitStack() as held:
        align(arguments, held)


def align(arguments: Sequence[str] | None, held: ExitStack) -> None:
    """Trains, in a folder that `held` keeps other programs out of."""

    from dera_peft.checkpoint.card import write_card
    from dera_peft.training.adapters import (
        check_decodable,
        copy_adapter,
        freeze_adapter,
        leave_out_embeddings,
        remove_copy_of_reference,
        train_in_float32,
    )
    from dera_peft.training.data import dataset_fingerprint, read_splits
    from dera_peft.training.parser import Parser
    from dera_peft.training.preference_rows import CHOSEN, REJECTED, PreferenceReader
    from dera_peft.training.record import adapter_record, quantization_of, training_record
    from dera_peft.training.rows import check_data, check_tokenizer, read_rows
    from dera_peft.training.sft_model import find_sft_model_to_train
    from dera_peft.training.sharding import check_sharding, shard_quantized
    from dera_peft.training.tokenized_rows import check_tokens
    from dera_peft.training.trainer import DPOConfig, DPOTrainer, ModelConfig, build, lora_config, run, save

    parser = Parser("dera dpo", __doc__, DPOSettings, DPOConfig, ModelConfig)
    settings, training_args, model_args = parser.read(arguments)
    check_arguments(settings, training_args, model_args)
    held.enter_context(hold_folder(training_args.output_dir))
    processes = check_processes(settings.num_processes)
    sharding = check_sharding(training_args)
    rows, held_out = read_splits(settings)
    sft_model = find_sft_model_to_train(
        model_args, settings.quantization, training_args.model_init_kwargs, settings.sft_adapter
    )
    if sft_model.is_function:
        raise DeRaError(
            f"model_name_or_path={sft_model.base!r} has no weights that dera.json could name: save it first."
        )
    if sharding is not None:
        sft_model = shard_quantized(sft_model, training_args)
    if settings.continue_sft_adapter:
        if sft_model.adapter is None:
            raise DeRaError("continue_sft_adapter=True needs the adapter: set sft_adapter.")
        check_lora_settings(model_args, sft_model.adapter)
    groups, watching = (settings, training_args, model_args), training_args.watching()
    output = OutputFolder(
        training_args.output_dir,
        {**settings_of(*groups, ignore=watching), **run_by(processes, sharding)},
        {**sft_model.fingerprint(), "dataset": dataset_fingerprint(rows)},
        settings.overwrite,
        given_settings(parser.given, *groups, ignore=watching),
    )
    if output.is_complete:
        output.log_reused()
        return

    name, reader = settings.dataset_name, PreferenceReader(rows.column_names, sft_model.own_tokenizer())
    check_data(name, rows, (CHOSEN, REJECTED))
    usable, count = read_rows(name, rows, reader, training_args.dataset_num_proc)
    check_tokenizer(name, usable, reader.tokenizer, reader.tokenizer.eos_token)
    count.check(settings.max_bad_rows)
    held_out_count = None
    if held_out is not None:
        held_out, held_out_count = read_rows(
            f"{name}, to evaluate on", held_out, reader, training_args.dataset_num_proc
        )
        held_out_count.check(settings.max_bad_rows)
    if note := reader.note():
        log(f"{name}: {note}")

    training_args.model_init_kwargs = None
    model, tokenizer = sft_model.load_to_train(settings.continue_sft_adapter)
    if sft_model.adapter is not None and not settings.continue_sft_adapter:
        model = freeze_adapter(cast("PeftModel", model), sft_model.adapter)
    trainer = build(
        DPOTrainer,
        model=model,
        args=training_args,
        train_dataset=usable,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=None if settings.continue_sft_adapter else lora_config(model_args),
    )
    trained = cast("PeftModel", trainer.model)  # of a new adapter, or the one that is continued
    leave_out_embeddings(trained)
    check_decodable(trained)
    if quantization_of(trained) is not None and not trainer.is_deepspeed_enabled:
        train_in_float32(trained)
    prepared = cast("Dataset", trainer.train_dataset)
    trainer.train_dataset = check_tokens(prepared, usable, tokenizer, count, training_args)
    count.tell()
    count.check(settings.max_bad_rows)
    if held_out is not None and held_out_count is not None:
        prepared = cast("Dataset", trainer.eval_dataset)
        trainer.eval_dataset = check_tokens(prepared, held_out, tokenizer, held_out_count, training_args)
        held_out_count.tell()
        held_out_count.check(settings.max_bad_rows)

    metrics = run(trainer)
    save(trainer)
    if is_main_process():
        training = {
            "method": "dpo",
            "beta": training_args.beta,
            "loss_type": training_args.loss_type,
            **training_record(trainer, settings.dataset_name, output.record["inputs"]["dataset"], count, metrics),
        }
        folder = Path(training_args.output_dir)
        if sft_model.adapter is not None:
            copy_adapter(sft_model.adapter, folder / "sft")
            remove_copy_of_reference(folder)
        record = adapter_record(sft_model, folder, settings.continue_sft_adapter, training)
        record.save(folder)
        write_card(record, folder)
    output.complete()


def check_arguments(settings: DPOSettings, training_args, model_args) -> None:
    """
    Warns where λ can no longer be read as β/λ.

    Raises:
        DeRaError: something is missing, or would have no effect.
    """
    if not settings.dataset_name or not model_args.model_name_or_path:
        raise DeRaError("dataset_name and model_name_or_path must be set, in the config or on the command line.")
    if not model_args.use_peft:
        raise DeRaError("use_peft=False: DeRa needs the aligned model as a LoRA adapter; set use_peft: true.")
    check_not_pushed(training_args)
    losses = set(training_args.loss_type)
    if unknown := sorted(losses - set(LOSSES)):
        raise DeRaError(f"loss_type={unknown[0]!r} is not one of TRL's; {nearest(unknown[0], LOSSES)}")
    if training_args.label_smoothing and not losses & {"robust", "exo_pair", "aot", "aot_unpaired"}:
        raise DeRaError(
            f"label_smoothing={training_args.label_smoothing} has no effect on loss_type={training_args.loss_type}: "
            "DPO with label smoothing is loss_type: robust."
        )
    others = [f"loss_type={name}" for name in sorted(losses - KEEPS_BETA)]
    if training_args.f_divergence_type != "reverse_kl":
        others.append(f"f_divergence_type={training_args.f_divergence_type}")
    others += [
        f"{name}={getattr(training_args, name)}"
        for name in ("ld_alpha", "use_weighting")
        if getattr(training_args, name)
    ]
    if others:
        log(
            f"with {', '.join(others)} the trained model is not the optimum that DeRa's mixture starts from: "
            "λ still dials the strength, but that it stands for β/λ is only a heuristic.",
            logging.WARNING,
        )


def check_lora_settings(model_args, adapter: str) -> None:
    """
    Raises:
        DeRaError: a setting of LoRA asks for something else than the adapter that is continued has.
    """
    from dera_peft.checkpoint.adapter_file import read_adapter_config
    from dera_peft.training.adapters import check_trains
    from dera_peft.training.trainer import ModelConfig

    config, default = read_adapter_config(adapter, "sft_adapter"), ModelConfig()
    check_trains(adapter, config, "sft_adapter")
    found: dict[str, Any] = {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_target_modules": config.target_modules,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    for name, value in found.items():
        asked = getattr(model_args, name)
        same = set(asked) == set(value) if isinstance(asked, list) else asked == value
        if asked != getattr(default, name) and not same:
            raise DeRaError(
                f"{name}={asked!r}, but sft_adapter={adapter!r}, which is continued, has {value!r}: leave it out, or "
                "train a new adapter on top (continue_sft_adapter: false)."
            )
