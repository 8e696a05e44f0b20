"""TRL's distillation with DeRa as the teacher, over the base that the student is trained on: one base in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import trl
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from dera_peft.checkpoint.adapter_check import CheckedAdapter
from dera_peft.checkpoint.adapter_file import AdapterFile
from dera_peft.checkpoint.adapters import attach_adapter
from dera_peft.checkpoint.export import export
from dera_peft.checkpoint.fingerprint import base_fingerprint
from dera_peft.checkpoint.fit import compare
from dera_peft.checkpoint.loading import load
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.source import ModelSource
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.names import ALIGNED, REFERENCE
from dera_peft.engine.plan import Branch
from dera_peft.engine.quantized import keep_trainable
from dera_peft.errors import DeRaError
from dera_peft.training.adapters import copy_adapter
from dera_peft.training.trainer import GuardedTrainer, RunArguments

STUDENT = "default"  # the adapter that PEFT saves into a folder itself


@dataclass
class DistillationConfig(RunArguments, trl.DistillationConfig):
    """TRL's, with what this project adds, and defaults for an adapter that starts near its teacher."""

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to disable dropout in the student."})


class DistillationTrainer(GuardedTrainer, trl.DistillationTrainer):
    """TRL's, guarded."""


def load_teacher(source: ModelSource) -> tuple[PeftModel, list[Branch]]:
    """
    The base with the teacher's adapters, and the branches of its reference and its aligned model.

    Raises:
        DeRaError: one of them does not exist, can't be read, or does not fit the other.
    """
    record = source.resolve()
    names = {name: f"teacher_{name}" for name in record.adapters}  # the student's name is taken otherwise
    record = replace(
        record,
        adapters={names[name]: folder for name, folder in record.adapters.items()},
        branches={branch: [names[name] for name in adapters] for branch, adapters in record.branches.items()},
    )
    loaded = load(
        record, source.config, source.quantization, source.dtype, source.device_map, **source.load_arguments()
    )
    model = cast("PeftModel", loaded.model)  # it has an adapter
    keep_trainable(model)
    return model, [Branch(branch, tuple(adapters)) for branch, adapters in record.branches.items()]


class Teacher(nn.Module):
    """
    DeRa at one λ as TRL's trainers take a teacher: a backbone (itself), which gives the states before the LM head, and
    that head. A mixture of logits is the head of a mixture of these states.

    It computes over the student's own PeftModel, which it wraps for a forward pass and then leaves as it was. It
    registers none of its modules: what is done to the teacher (`eval`, moving it) is not done to the student.

    Args:
        branches: of the teacher.

    Raises:
        DeRaError: the head is not linear, or is adapted.
    """

    def __init__(self, student: PeftModel, branches: Sequence[Branch], lam: float):
        super().__init__()
        self._student, self.branches, self.lam = (student,), tuple(branches), lam
        self.config = student.config
        mixture = MixtureModel(student, branches, lam)
        joins_before_head = mixture.joins_before_head
        mixture.unwrap()
        if not joins_before_head:
            raise DeRaError(
                "the base's LM head is adapted, soft-capped or in int8: TRL's distillation compares what stands before "
                "the head, which mixes as the logits do only where the head is linear and the same for all branches."
            )

    @property
    def base_model(self) -> nn.Module:
        return self

    def get_output_embeddings(self) -> nn.Module:
        (student,) = self._student
        head = cast("PreTrainedModel", student.get_base_model()).get_output_embeddings()
        assert head is not None  # the base is a language model
        return head

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options) -> BaseModelOutput:
        (student,) = self._student
        was_training, states = student.training, []

        def keep(head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            states.append(args[0])
            return (args[0][:, :1],)  # its logits are not wanted

        student.eval()  # no dropout
        mixture = MixtureModel(student, self.branches, self.lam)
        hook = self.get_output_embeddings().register_forward_pre_hook(keep)  # behind the join's
        try:
            mixture(input_ids, attention_mask, **options)
        finally:
            hook.remove()
            mixture.unwrap()
            student.train(was_training)
        return BaseModelOutput(last_hidden_state=states[0])


def add_student(model: PeftModel, branches: Sequence[Branch], lam: float) -> None:
    """
    Adds the adapter that is trained, and makes it the active one: the aligned adapter with its weights scaled by λ, as
    `dera export` writes it, over the base alone.

    Raises:
        DeRaError: the adapters are of a kind that does not scale, or have more than LoRA factors.
    """
    for name in {name for branch in branches for name in branch.adapters}:
        config = model.peft_config[name]
        for option, plain in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None)):
            if (value := getattr(config, option)) != plain and value:
                raise DeRaError(f"an adapter has {option}={value!r}: dera distill trains LoRA factors alone.")
    mixture = MixtureModel(model, branches, lam)
    try:
        with TemporaryDirectory() as folder:
            export(mixture, lam, folder)
            file = AdapterFile.read(folder, "the adapter scaled by λ")
            tensors = CheckedAdapter(file, frozenset())  # `export` has checked it
            mixture.unwrap()
            attach_adapter(model, tensors, STUDENT, dtype=torch.float32, trainable=True)
    finally:
        if mixture.base is not None:
            mixture.unwrap()
    model.set_adapter(STUDENT)
    # PEFT would save the teacher's adapters too
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=[STUDENT], save_embedding_layers=False)


def distance(
    model: PeftModel, branches: Sequence[Branch], lam: float, prompts: Sequence[Sequence[int]]
) -> dict[str, float]:
    """How far the student is from DeRa at λ: see `fit.compare`."""
    was_training = model.training
    model.eval()
    mixture = MixtureModel(model, (*branches, Branch(STUDENT, (STUDENT,))))
    aligned, student = mixture.aligned
    try:
        return compare(mixture, {aligned: lam, student: 0.0}, {aligned: 0.0, student: 1.0}, prompts)
    finally:
        mixture.unwrap()
        model.train(was_training)


def distilled_record(source: ModelSource, folder: Path, training: dict[str, Any]) -> Record:
    """
    The record of the student in `folder`: the aligned model over the teacher's reference, of which it gets a copy. It
    is over the base alone, and takes the place of the reference's adapters.
    """
    teacher, adapters = source.resolve(), {STUDENT: str(folder)}
    reference = [f"sft_{number}" for number, _ in enumerate(teacher.branches[REFERENCE], start=1)]
    for name, own in zip(reference, teacher.branches[REFERENCE], strict=True):
        copy_adapter(teacher.adapters[own], folder / "sft" / name)
        adapters[name] = str(folder / "sft" / name)
    revision = source.fingerprint()["revision"]
    return Record(
        teacher.base,
        adapters,
        {REFERENCE: reference, ALIGNED: [STUDENT]},
        base_fingerprint=base_fingerprint(teacher.base, revision),
        base_revision=revision,
        training=training,
    )
