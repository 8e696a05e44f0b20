"""Running TRL's trainers: from the last whole checkpoint, stopped where the loss goes wrong, measured."""

import json
import re
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import trl
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors import SafetensorError
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import is_torch_bf16_gpu_available

from dera_peft.errors import DeRaError
from dera_peft.training.gradients import GradientCheck
from dera_peft.training.program import log
from dera_peft.training.sharding import is_plain_adapter, keep_precise, trained_weights, whole_weights
from dera_peft.training.tokens import check_tokens

STATE = "trainer_state.json"  # of a checkpoint
# Settings that say how a run is watched and saved, not what comes out of it.
WATCHING = (
    "disable_tqdm", "log_level", "log_level_replica", "logging_dir", "logging_first_step", "logging_nan_inf_filter",
    "logging_steps", "logging_strategy", "project", "report_to", "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint", "run_name", "save_only_model", "save_total_limit", "stop_at_loss", "trackio_space_id",
)  # fmt: skip
# With early stopping these decide which checkpoint is kept; without it they only watch.
WATCHING_UNLESS_STOPPED_EARLY = ("eval_on_start", "eval_steps", "eval_strategy", "save_steps", "save_strategy")


if TYPE_CHECKING:
    from peft import PeftConfig

    Mixed = TrainingArguments
else:
    Mixed = object  # its fields' defaults must not come before TRL's

# What TRL and transformers raise for a setting that can't be, some of it not before the first step.
OF_A_SETTING = (ImportError, KeyError, ValueError, ZeroDivisionError)


def in_one_line(error: Exception) -> str:
    """What an error of another library says."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


@dataclass
class RunArguments(Mixed):
    """Beside TRL's own training arguments; to be mixed into its configs."""

    early_stopping_patience: int = field(
        default=0,
        metadata={
            "help": "Stop after so many evaluations without a better eval_loss (or metric_for_best_model), and keep "
            "the best checkpoint; 0 for never. Evaluates whenever it saves, and needs dataset_test_split."
        },
    )
    stop_at_loss: float = field(
        default=3.0,
        metadata={"help": "Stop where two logged losses in a row exceed the first one by this factor; 0 for never."},
    )

    def __post_init__(self):
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise DeRaError(f"{name}={getattr(self, name)} must be at least 1.")
        # without this accelerate runs torchrun's processes on the CPU each for itself
        if str(self.fsdp).lower() in ("true", "false"):  # as a file or a command line has it
            self.fsdp = cast("Any", str(self.fsdp).lower() == "true")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _has_bf16()
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        if self.early_stopping_patience:
            self.load_best_model_at_end = True
            self.eval_strategy, self.eval_steps = self.save_strategy, self.save_steps
            self.restore_callback_states_from_checkpoint = True
        self.logging_nan_inf_filter = False  # it would log the average of the losses before in place of NaN
        super().__post_init__()
        if self.n_gpu > 1:  # TRL refuses what transformers would do with them in one process
            log(f"{self.n_gpu} GPUs are here, and one process trains on one: torchrun --nproc_per_node N uses N")
            self._n_gpu = 1

    def watching(self) -> tuple[str, ...]:
        """The settings that do not decide what comes out."""
        return WATCHING if self.load_best_model_at_end else (*WATCHING, *WATCHING_UNLESS_STOPPED_EARLY)


def _has_bf16() -> bool:
    """Whether the accelerator computes in bf16 by itself; older CUDA cards only emulate it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available()


@dataclass
class SFTConfig(RunArguments, trl.SFTConfig):
    """TRL's, with what this project adds."""


@dataclass
class DPOConfig(RunArguments, trl.DPOConfig):
    """TRL's, with what this project adds."""


@dataclass
class ModelConfig(trl.ModelConfig):
    """TRL's, with double quantization as in QLoRA, which is also what DeRa decodes with."""

    use_bnb_nested_quant: bool = field(
        default=True, metadata={"help": "Double quantization of a 4-bit base's quantization constants."}
    )

    def __post_init__(self):
        super().__post_init__()
        # TRL makes a text of a list of one, which PEFT takes for a regex of whole names, and finds nothing
        targets = self.lora_target_modules
        if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
            self.lora_target_modules = [targets]


class GuardedTrainer(Trainer):
    """A trainer that stops at a loss that is not finite, and leaves no half-written checkpoint behind."""

    @property
    def output_dir(self) -> str:
        return cast("str", self.args.output_dir)  # transformers sets it where the user does not

    @property
    def fsdp_plugin(self) -> FullyShardedDataParallelPlugin:
        return cast("FullyShardedDataParallelPlugin", self.accelerator.state.fsdp_plugin)  # where FSDP is enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif is_plain_adapter(self.model):
            self._save(output_dir, state_dict=trained_weights(cast("nn.Module", self.model)))
        else:
            with whole_weights(self.fsdp_plugin):
                super().save_model(output_dir, _internal_call)

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:
            # the checkpoint had made the last one: transformers would make one more, where they end within an epoch
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise DeRaError(
                f"the loss is {loss.item()} {self.where(good=self.state.global_step - 1)}. Lower the learning rate, or "
                "look for broken rows."
            )
        return loss

    def _save_checkpoint(self, model, trial) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except torch.OutOfMemoryError:  # which is no fault of the disk's
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            folder = Path(self.output_dir) / f"checkpoint-{self.state.global_step}"
            message = _unsaved(folder, error, self.output_dir, self.state.global_step - 1)
            shutil.rmtree(folder, ignore_errors=True)
            raise DeRaError(message) from error

    def where(self, good: int) -> str:
        """In words: the step that is made, its learning rate, and the last checkpoint up to the step `good`."""
        assert self.lr_scheduler is not None  # it trains
        rate = self.lr_scheduler.get_last_lr()[0]
        step = self.state.global_step + 1
        return f"at step {step}, with the learning rate {rate:.3g}; {_last_good(self.output_dir, good)}"


class SFTTrainer(GuardedTrainer, trl.SFTTrainer):
    """TRL's, guarded."""


class DPOTrainer(GuardedTrainer, trl.DPOTrainer):
    """TRL's, guarded."""


class Watch(TrainerCallback):
    """
    Logs with every checkpoint and at the end, and stops a run that diverges.

    A log's loss is the mean since the log before; with one at each checkpoint, a run that was killed and continued logs
    the same means as one that was not.
    """

    def __init__(self, trainer: GuardedTrainer, stop_at_loss: float):
        self.trainer, self.stop_at_loss = trainer, stop_at_loss

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    def on_epoch_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        control.should_log |= control.should_save

    def on_log(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        losses = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
        if not self.stop_at_loss or not losses:
            return
        first, last = losses[0][1], losses[-1][1]
        bound = self.stop_at_loss * first
        if first > 0 and len(losses) > 2 and min(losses[-2][1], last) > bound:
            good = max(int(step) for step, loss in losses if loss <= bound)
            raise DeRaError(
                f"the loss diverges: it began at {first:.4g} and is {last:.4g} {self.trainer.where(good)}. Lower the "
                "learning rate, or set stop_at_loss: 0 to go on in spite of it."
            )


def build(trainer_class: type[GuardedTrainer], **kwargs) -> GuardedTrainer:
    """
    A trainer, watched.

    Raises:
        DeRaError: the settings, the model and the data don't fit together.
    """
    args: RunArguments = kwargs["args"]
    if args.early_stopping_patience and kwargs["eval_dataset"] is None:
        raise DeRaError(
            f"early_stopping_patience={args.early_stopping_patience} needs rows to evaluate on: set "
            "dataset_test_split (a part of a split will do: train[95%:], with dataset_train_split: train[:95%])."
        )
    try:
        trainer = trainer_class(**kwargs)
    except (RuntimeError, *OF_A_SETTING) as error:
        raise DeRaError(in_one_line(error)) from error
    if trainer.is_fsdp_enabled:
        keep_precise(trainer.fsdp_plugin)
    check_tokens(trainer)
    trainer.add_callback(Watch(trainer, args.stop_at_loss))
    if not trainer.is_deepspeed_enabled:  # which has the gradients elsewhere
        trainer.add_callback(GradientCheck())
    if args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    return trainer


def lora_config(model_args: trl.ModelConfig) -> "PeftConfig | None":
    """
    The adapter that TRL's settings ask for, if they do.

    Raises:
        DeRaError: PEFT refuses one of them.
    """
    try:
        return trl.get_peft_config(model_args)
    except OF_A_SETTING as error:
        raise DeRaError(in_one_line(error)) from error


def run(trainer: GuardedTrainer) -> dict[str, float]:
    """
    Trains to the end, from the last whole checkpoint in the output folder if there is one; tells speed and memory.

    Returns:
        The final metrics: the last of each kind that was logged; first_loss; and train_loss, the mean loss over all
        steps, in whichever runs they were made.

    Raises:
        DeRaError: the loss is not finite or diverges, a LoRA factor gets no gradient, a checkpoint can't be saved, or
            TRL or transformers refuse a setting when they come to use it.
    """
    processes = trainer.args.world_size
    per_step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps * processes
    running = f"{processes} process{'es' if processes > 1 else ''}"
    log(f"training on {running} ({trainer.args.device.type}), {per_step} rows a step")
    checkpoint = last_checkpoint(Path(trainer.output_dir))
    if checkpoint is not None:
        log(f"going on from {checkpoint}")
    was_finished = checkpoint is not None and _is_finished(checkpoint)
    begun = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except DeRaError:
        raise
    except OF_A_SETTING as error:
        raise DeRaError(f"training stopped at step {trainer.state.global_step + 1}: {in_one_line(error)}") from error
    seconds = time.perf_counter() - begun
    metrics = final_metrics(trainer.state.log_history)
    if was_finished:  # no step was made
        return metrics
    memory = peak_memory(trainer.args.device)
    tokens = metrics.get("num_tokens", 0)  # TRL counts those of this run
    log(f"{trainer.state.global_step} steps; {tokens / seconds:,.0f} tokens/s; peak memory {memory / 2**30:.2f} GiB")
    return {**metrics, "tokens_per_second": tokens / seconds, "peak_memory_bytes": memory}


def save(trainer: GuardedTrainer) -> None:
    """
    The final model, into the output folder.

    Raises:
        DeRaError: it can't be written. The checkpoints stay.
    """
    try:
        trainer.save_model()
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        folder = trainer.output_dir
        raise DeRaError(_unsaved(folder, error, folder, trainer.state.global_step)) from error


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole and can be continued; what a killed run had begun to save is left out."""
    for checkpoint in _checkpoints(folder):
        if _is_whole(checkpoint):
            return checkpoint
        log(f"{checkpoint} is not whole: leaving it out")
    return None


def final_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """See `run`. A log's loss counts for the steps since the log before."""
    metrics: dict[str, float] = {}
    total, last_step = 0.0, 0
    for entry in history:
        if "train_runtime" in entry:  # transformers' summary, of the steps since a run was continued
            continue
        metrics.update({key: value for key, value in entry.items() if isinstance(value, (int, float))})
        if "loss" in entry:
            metrics.setdefault("first_loss", entry["loss"])
            total += entry["loss"] * (entry["step"] - last_step)
            last_step = entry["step"]
    if last_step:
        metrics["train_loss"] = total / last_step
    return metrics


def peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator what tensors took at most, on the CPU what the process took at most."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage's, by its manual pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _checkpoints(folder: Path) -> list[Path]:
    """The last one first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _is_whole(checkpoint: Path) -> bool:
    """transformers writes trainer_state.json last; with save_only_model there is no state of the random numbers."""
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(checkpoint.glob("rng_state*.pth"))


def _is_finished(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]


def _unsaved(folder: str | Path, error: Exception, output_dir: str, good: int) -> str:
    """That a folder can't be saved, and what to do; torch's own errors do not speak of the disk."""
    free = shutil.disk_usage(output_dir).free
    return (
        f"{str(folder)!r} can't be saved: {error}. The disk has {free / 2**20:,.1f} MiB left; "
        f"{_last_good(output_dir, good)}. When there is room, the same command goes on from there."
    )


def _last_good(folder: str, step: int) -> str:
    """The last whole checkpoint at or before `step`, in words."""
    for checkpoint in _checkpoints(Path(folder)):
        if int(checkpoint.name.rpartition("-")[2]) <= step and _is_whole(checkpoint):
            return f"the last good checkpoint is {checkpoint}"
    return "there is no good checkpoint yet"
