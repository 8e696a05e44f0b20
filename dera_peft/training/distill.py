"""
Bakes DeRa at one λ into a LoRA adapter of its own, by TRL's DistillationTrainer.

    dera distill --adapter runs/tiny/dpo --lambda 1.5 --prompts prompts.jsonl --output_dir runs/tiny/distilled
    dera distill --config configs/tiny/distill.yaml
    torchrun --nproc_per_node 4 -m dera_peft.cli distill --config configs/tiny/distill.yaml

The teacher is DeRa at λ: the logits of reference and aligned model, mixed. The student is a LoRA adapter over the same
base, which is in memory once for both. It starts as `dera export --lambda` makes it, the adapter with its weights
scaled by λ; it samples completions of the prompts, and is trained to give the teacher's distribution at each token.
Its KL to DeRa on held-out prompts is told before and after.

Every key of the config is a key of this program or of TRL's DistillationConfig, and can be set on the command line,
which comes first. Run again, it reuses a finished adapter, and goes on from the last checkpoint of an unfinished one.
The folder gets a PEFT adapter, and a dera.json. At λ=1 that adapter is what DeRa was at the λ that was distilled.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dera_peft.checkpoint.source import Dtype, ModelSource, Quantization
from dera_peft.decoding.lambdas import is_lambda
from dera_peft.decoding.prompt_settings import PromptSettings
from dera_peft.errors import DeRaError
from dera_peft.messages import is_main_process
from dera_peft.settings import AT_LEAST_1, Check, setting, setting_like
from dera_peft.training.program import (
    DataSettings,
    OutputFolder,
    ProgramSettings,
    check_files,
    check_not_pushed,
    check_processes,
    given_settings,
    hold_folder,
    log,
    settings_of,
)

if TYPE_CHECKING:
    from peft import PeftModel

    from dera_peft.decoding.prompts import Prompt

MODEL = ("base", "adapter", "reference", "stacked", "subfolder", "revision", "quantization", "dtype")
OF_ANOTHER_TEACHER = ("model_init_kwargs", "teacher_model_name_or_path", "teacher_model_revision")


@dataclass(frozen=True)
class DistillSettings(ProgramSettings):
    """The adapter and its λ, and the prompts."""

    adapter: str | None = setting_like(ModelSource, "adapter")
    base: str | None = setting_like(ModelSource, "base")
    reference: tuple[str, ...] = setting_like(ModelSource, "reference")
    stacked: bool | None = setting_like(ModelSource, "stacked")
    subfolder: str | None = setting_like(ModelSource, "subfolder")
    revision: str | None = setting_like(ModelSource, "revision")
    quantization: Quantization | None = setting_like(ModelSource, "quantization")
    dtype: Dtype | None = setting_like(ModelSource, "dtype")
    lam: float | None = setting(
        None, "The teacher's λ.", metavar="λ", option="--lambda", check=Check(is_lambda, "a finite number")
    )
    prompts: str | None = setting(
        None,
        "Prompts to sample on: .txt (one a line), .jsonl or .csv (rows), path.py:function, or a dataset (hub id or "
        "folder).",
        metavar="SOURCE",
    )
    split: str = setting("train", "Split of a dataset.", metavar="SPLIT")
    subset: str | None = setting(None, "Subset (configuration) of a hub dataset that has several.", metavar="SUBSET")
    prompt_column: str = setting(
        "prompt",
        "The column with the prompts, texts or chats. One that is not called prompt may hold whole chats, of which the "
        "prompt is what stands before the last answer.",
        metavar="COLUMN",
    )
    chat: bool = setting_like(PromptSettings, "chat")
    max_bad_rows: float = setting_like(
        DataSettings, "max_bad_rows", help="Stop where a larger share of the prompts can't be used."
    )
    held_out_prompts: str | None = setting(
        None,
        "Prompts to measure the KL on, and to evaluate on, like prompts. The last tenth of the prompts unless they or "
        "held_out_split are given.",
        metavar="SOURCE",
    )
    held_out_split: str | None = setting(
        None, "Their split, where that is another one, of their dataset or that of prompts.", metavar="SPLIT"
    )
    held_out: int = setting(64, "How many of them, at most.", check=AT_LEAST_1, metavar="N")


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Raises:
        DeRaError: an argument is not known or can't be, or the training fails in a way that a user can mend.
    """
    check_files(arguments)
    with ExitStack() as held:
        distill(arguments, held)


def distill(arguments: Sequence[str] | None, held: ExitStack) -> None:
    """Trains, in a folder that `held` keeps other programs out of."""
    from datasets import Dataset

    from dera_peft.checkpoint.card import write_card
    from dera_peft.checkpoint.end_tokens import recorded_end_tokens
    from dera_peft.checkpoint.fingerprint import settings_fingerprint
    from dera_peft.checkpoint.fit import NEW_TOKENS
    from dera_peft.checkpoint.tokenizers import load_tokenizer, tokenizer_places
    from dera_peft.training.adapters import check_decodable, train_in_float32
    from dera_peft.training.distillation import (
        DistillationConfig,
        DistillationTrainer,
        Teacher,
        add_student,
        distance,
        distilled_record,
        load_teacher,
    )
    from dera_peft.training.parser import Parser
    from dera_peft.training.prompt_rows import read_prompt_rows
    from dera_peft.training.record import quantization_of, training_record
    from dera_peft.training.sharding import is_fsdp_asked
    from dera_peft.training.tokens import pad_within
    from dera_peft.training.trainer import build, run, save

    parser = Parser("dera distill", __doc__, DistillSettings, DistillationConfig)
    settings, training_args = parser.read(arguments)
    lam = check_arguments(settings, training_args)
    held.enter_context(hold_folder(training_args.output_dir))
    processes = check_processes(settings.num_processes)
    if is_fsdp_asked(training_args) or training_args.deepspeed_plugin is not None:
        raise DeRaError("FSDP and DeepSpeed shard the base that student and teacher share: distil without them.")
    source = model_source(settings, training_args)
    teacher_record = source.resolve_one(
        "dera distill", "export them as one adapter (dera export), and name that.", prompts_differ=None
    )
    prompts, held_out = read_prompts(settings)
    groups, watching = (settings, training_args), training_args.watching()
    output = OutputFolder(
        training_args.output_dir,
        {**settings_of(*groups, ignore=watching), "processes": processes},
        {
            "model": json.loads(json.dumps(source.fingerprint())),  # as it will be read again
            "prompts": settings_fingerprint([[each.content, each.columns] for each in (*prompts, *held_out)]),
        },
        settings.overwrite,
        given_settings(parser.given, *groups, ignore=watching),
    )
    if output.is_complete:
        output.log_reused()
        return

    tokenizer = load_tokenizer(
        *tokenizer_places(teacher_record), base_arguments=source.load_arguments(), padding_side=None
    )
    new_tokens = max(training_args.max_completion_length, NEW_TOKENS)
    template_arguments = training_args.chat_template_kwargs or {}
    rows, _, count = read_prompt_rows(
        str(settings.prompts), prompts, tokenizer, source.config, new_tokens, settings.chat, template_arguments
    )
    count.tell()
    count.check(settings.max_bad_rows)
    per_step = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps * processes
    if len(rows) < per_step:  # of which TRL makes no step, and no error
        raise DeRaError(
            f"{len(rows)} prompts are fewer than one step takes, {per_step}: lower per_device_train_batch_size, or "
            "give more of them."
        )
    evaluated, tokens, held_out_count = read_prompt_rows(
        "held-out prompts", held_out, tokenizer, source.config, new_tokens, settings.chat, template_arguments
    )
    held_out_count.tell()
    held_out_count.check(settings.max_bad_rows)

    model, branches = load_teacher(source)
    pad_within(model, tokenizer)
    teacher = Teacher(model, branches, lam)
    add_student(model, branches, lam)
    trainer = build(
        DistillationTrainer,
        model=model,
        teacher_model=teacher,
        args=training_args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(evaluated),
        processing_class=tokenizer,
    )
    trained = cast("PeftModel", trainer.model)
    check_decodable(trained)
    if quantization_of(trained) is not None:
        train_in_float32(trained)

    scaled = distance(trained, branches, lam, tokens)
    log(f"KL(DeRa at λ={lam:g} ‖ the adapter scaled by it), where the student starts: {kl_text(scaled)}")
    metrics = run(trainer)
    distilled = distance(trained, branches, lam, tokens)
    log(f"KL(DeRa at λ={lam:g} ‖ the distilled adapter): {kl_text(distilled)}; before: {kl_text(scaled)}")
    if distilled["kl"] >= scaled["kl"]:
        log(
            "the distilled adapter is no nearer to DeRa than the scaled one: train longer, or with another "
            "learning rate.",
            logging.WARNING,
        )
    save(trainer)
    if is_main_process():
        beta = teacher_record.training.get("beta")
        training = {
            "method": "distill",
            "beta": beta / lam if beta and lam > 0 else None,
            "lambda": lam,
            "kl": {"scaled": scaled, "distilled": distilled},
            **training_record(trainer, settings.prompts, output.record["inputs"]["prompts"], count, metrics),
            "end_tokens": recorded_end_tokens(teacher_record),
        }
        folder = Path(training_args.output_dir)
        record = distilled_record(source, folder, training)
        record.save(folder)
        write_card(record, folder)
    output.complete()


def check_arguments(settings: DistillSettings, training_args) -> float:
    """
    λ.

    Raises:
        DeRaError: something is missing, or would have no effect.
    """
    if settings.lam is None or not settings.prompts or not (settings.adapter or settings.base):
        raise DeRaError("adapter, lam (--lambda) and prompts must be set, in the config or on the command line.")
    if settings.lam in (0.0, 1.0):
        model = "the reference" if settings.lam == 0.0 else "the adapter as it is"
        raise DeRaError(f"lam={settings.lam:g} is {model}: there is nothing to distil.")
    check_not_pushed(training_args)
    if training_args.max_completion_length is None:
        raise DeRaError("max_completion_length must be a number of tokens.")
    if training_args.use_vllm:
        raise DeRaError(
            "use_vllm=True: the student samples over the base that it shares with its teacher; leave it out."
        )
    for name in OF_ANOTHER_TEACHER:
        if value := getattr(training_args, name):
            raise DeRaError(f"{name}={value!r} has no effect: teacher and student are the adapter's; leave it out.")
    return settings.lam


def model_source(settings: DistillSettings, training_args) -> ModelSource:
    """The teacher, on this process's device."""
    import torch
    from accelerate import PartialState

    processes = PartialState()
    given = {name: getattr(settings, name) for name in MODEL}
    device = cast("torch.device", processes.device)
    is_alone_on_accelerator = processes.num_processes == 1 and device.type not in ("cpu", "mps")
    return ModelSource.read(
        **given,
        device_map={"": device} if is_alone_on_accelerator else None,
        trust_remote_code=training_args.trust_remote_code or None,
    )


def read_prompts(settings: DistillSettings) -> "tuple[list[Prompt], list[Prompt]]":
    """
    Those to train on, and those that are held out.

    Raises:
        DeRaError: they can't be read, or are too few for a tenth of them to be held out.
    """
    from dera_peft.decoding import prompts as reader

    name, column = cast("str", settings.prompts), settings.prompt_column
    prompts = reader.read_prompts(name, column, settings.split, settings.subset)
    if settings.held_out_prompts is None and settings.held_out_split is None:
        number = min(settings.held_out, len(prompts) // 10)
        if number == 0:
            raise DeRaError(f"prompts={name!r} has {len(prompts)}, too few to hold a tenth out: set held_out_prompts.")
        return prompts[:-number], prompts[-number:]
    others, split = settings.held_out_prompts or name, settings.held_out_split or settings.split
    return prompts, reader.read_prompts(others, column, split, settings.subset, settings.held_out)


def kl_text(fit: dict) -> str:
    return f"{fit['kl']:.4g} nats a token, at most {fit['max_kl']:.4g} ({fit['tokens']} tokens)"
