"""What a training program starts from: a base, and maybe the adapter that makes it the SFT model."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from trl import ModelConfig, get_quantization_config

from dera_peft.checkpoint.fingerprint import cached_revision, file_fingerprint, weights_fingerprint
from dera_peft.checkpoint.record import Record
from dera_peft.engine.adapter_kinds import check_adapter_kind, check_keeps_biases
from dera_peft.engine.lora import find_adapted
from dera_peft.engine.quantized import keep_trainable
from dera_peft.errors import DeRaError, first_line
from dera_peft.training.program import OutputFolder
from dera_peft.user_code import is_object_path, load_object

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
FROZEN = "frozen_adapter"


@dataclass(frozen=True)
class Source:
    """
    The SFT model, by name.

    Attributes:
        base: a hub id, a folder, or a function as path.py:name that returns a new model and its tokenizer.
        adapter: hub id or folder of the LoRA adapter over it that makes it the SFT model; None if the base is that.
        revision: of a hub base.
    """

    base: str
    adapter: str | None = None
    revision: str | None = None

    @property
    def is_function(self) -> bool:
        return is_object_path(self.base)

    def fingerprint(self) -> dict[str, str]:
        """Of local weights, or of the program that makes them; of a hub model its name and commit."""
        if self.is_function:
            return {"model": file_fingerprint(self.base.rpartition(":")[0])}
        known = {"model": weights_fingerprint(self.base) or f"{self.base}@{self.revision}"}
        if self.adapter is not None:
            known["sft_adapter"] = weights_fingerprint(self.adapter) or self.adapter
        return known


def find_source(model_args: ModelConfig, adapter: str | None = None) -> Source:
    """
    What `model_name_or_path` names. An adapter there is understood as the SFT model, over the base that it names.

    Args:
        adapter: the SFT adapter, where it is named separately.

    Raises:
        DeRaError: one of them does not exist, is unfinished, or is not what it should be.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if is_object_path(name):
        return Source(name)
    if _holds("model_name_or_path", name, ADAPTER_FILES[0]):
        if _holds("model_name_or_path", name, "config.json"):
            raise DeRaError(
                f"model_name_or_path={name!r} holds a model and an adapter; move the adapter into a folder of its own."
            )
        if adapter is not None:
            raise DeRaError(
                f"model_name_or_path={name!r} is an adapter, and sft_adapter={adapter!r} another: merge one of them "
                "into its base first (training.sft with merge_adapter: true), or name the base."
            )
        adapter, name = name, _base_of(name)
        revision = Record.load(adapter).base_revision if Record.is_in(adapter) else None
    if adapter is not None:
        if not _holds("sft_adapter", adapter, ADAPTER_FILES[0]):
            raise DeRaError(f"sft_adapter={adapter!r} is not an adapter: it has no {ADAPTER_FILES[0]}.")
        check_adapter(adapter)
        if Record.is_in(adapter):
            record = Record.load(adapter)
            if record.branches["aligned"] != ["default"] or record.branches["reference"]:
                raise DeRaError(
                    f"sft_adapter={adapter!r} stands on other adapters ({record.branches}), not on a base alone: merge "
                    "what it stands on into the base first."
                )
            replace(record, base=name).check_base()
    try:
        AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, HFValidationError) as error:
        raise DeRaError(f"model_name_or_path={name!r} can't be loaded: {first_line(error)}") from error
    for argument, folder in (("model_name_or_path", name), ("sft_adapter", adapter)):
        if folder is not None and OutputFolder.is_unfinished(folder):
            raise DeRaError(
                f"{argument}={folder!r} is unfinished: the program that makes it was stopped. Run it to its end first."
            )
    return Source(name, adapter, None if os.path.isdir(name) else cached_revision(name, revision) or revision)


def load_model(
    source: Source, model_args: ModelConfig, init_kwargs: dict | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The base and its tokenizer (else the adapter's), the model on its device and quantized where that is asked for.

    Args:
        init_kwargs: further arguments of `from_pretrained`; TRL's `model_init_kwargs`.
    """
    if source.is_function:
        return load_object(source.base)()
    processes = PartialState()
    is_alone_on_accelerator = processes.num_processes == 1 and processes.device.type not in ("cpu", "mps")
    arguments = {
        "revision": source.revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        # one device: spread over several, each would wait for the others
        "device_map": processes.device if is_alone_on_accelerator else None,
        "use_safetensors": True,
        **(init_kwargs or {}),
    }
    try:
        model = AutoModelForCausalLM.from_pretrained(source.base, **arguments)
    except torch.OutOfMemoryError as error:
        raise DeRaError(
            f"model_name_or_path={source.base!r} does not fit into the memory of {processes.device}: load it in 4 bits "
            f"(load_in_4bit: true), or a smaller one. {first_line(error)}"
        ) from error
    except (OSError, ValueError) as error:
        raise DeRaError(f"model_name_or_path={source.base!r} can't be loaded: {first_line(error)}") from error
    keep_trainable(model)
    return model, load_tokenizer(source)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The SFT model's: that of its adapter, which may have a chat template of its own, else the base's."""
    errors = []
    for name, revision in ((source.adapter, None), (source.base, source.revision)):
        if name is not None:
            try:
                return AutoTokenizer.from_pretrained(name, revision=revision)
            except (OSError, ValueError, HFValidationError) as error:
                errors.append(f"{name!r}: {first_line(error)}")
    raise DeRaError("no tokenizer can be loaded: " + "; ".join(errors))


class FrozenLora(nn.Module):
    """
    The delta of a frozen LoRA layer, s·B(A(x)), that is added to what the layer below it gives.

    It belongs to the base as the trainer sees it: an adapter on top of the layer, switched off, leaves the SFT model.
    """

    def __init__(self, layer: LoraLayer, adapter: str):
        super().__init__()
        lora_b = layer.lora_B[adapter]
        self.register_buffer("down", layer.lora_A[adapter].weight.detach())
        self.register_buffer("up", lora_b.weight.detach())
        self.register_buffer("bias", None if lora_b.bias is None else lora_b.bias.detach())
        self.scaling = layer.scaling[adapter]

    def add(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].to(self.down.dtype)
        delta = functional.linear(functional.linear(x, self.down), self.up, self.bias)
        return (output + delta * self.scaling).to(output.dtype)


def freeze_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """
    The model with a LoRA adapter under it that can be neither switched off nor trained: the SFT model.

    The adapter is not merged, so that the base may be quantized and stays as it is.

    Raises:
        DeRaError: the adapter is of a kind whose delta can't be added so.
    """
    peft_model = PeftModel.from_pretrained(model, adapter, adapter_name=FROZEN)
    deltas = {}
    for adapted in find_adapted(peft_model.get_base_model(), [FROZEN]):
        if not adapted.scales or FROZEN not in adapted.module.lora_A:
            raise DeRaError(
                f"sft_adapter={adapter!r}: {adapted.name!r} has DoRA, or an adapter on embeddings; training on top of "
                "a frozen adapter needs plain LoRA on linear layers. Merge it into the base, or continue it "
                "(continue_sft_adapter)."
            )
        deltas[adapted.name] = FrozenLora(adapted.module, FROZEN)
    model = peft_model.unload()
    for name, delta in deltas.items():
        linear = model.get_submodule(name)
        linear.add_module(FROZEN, delta)
        linear.register_forward_hook(delta.add)
    return model


def continue_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    """The model with an adapter to train on; TRL keeps a frozen copy of it, "ref", as the reference."""
    return PeftModel.from_pretrained(model, adapter, adapter_name="default", is_trainable=True)


def train_in_float32(model: PeftModel) -> None:
    """
    Makes a quantized model's adapters float32, as PEFT does; TRL rounds the one that is trained to bfloat16.

    In bfloat16 the updates of a small learning rate are lost, and an adapter that is continued would no longer be its
    reference at the first step.
    """
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    if "ref" in model.peft_config:
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.data.copy_(model.get_parameter(name.replace(".default.", ".ref.")))


def check_decodable(model: PeftModel) -> None:
    """Raises `DeRaError` where the adapter is of a kind that DeRa can't decode, or these programs can't train."""
    _check_config("default", model.peft_config["default"])
    find_adapted(model.get_base_model(), ["default"])


def merge(source: Source, adapter: Path, dtype: str | None, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """
    Merges an adapter into the base as it is without quantization, on the CPU, and saves model and tokenizer; whole, or
    not at all.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    base = AutoModelForCausalLM.from_pretrained(
        source.base, revision=source.revision, dtype=dtype, use_safetensors=True, device_map="cpu"
    )
    PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def copy_adapter(adapter: str, folder: Path) -> None:
    """Copies an adapter's two files, so that what is trained on it can be moved and published as one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ADAPTER_FILES:
        shutil.copyfile(cached_file(adapter, file), folder / file)


def check_adapter(adapter: str) -> PeftConfig:
    """The config of an adapter. Raises `DeRaError` where DeRa can't decode with it, or training can't use it."""
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DeRaError(f"sft_adapter={adapter!r} can't be read: {first_line(error)}") from error
    _check_config(adapter, config)
    return config


def _check_config(adapter: str, config: PeftConfig) -> None:
    check_adapter_kind(adapter, config)
    check_keeps_biases(adapter, config)
    # a second copy of these would have to follow the reference through continued training, which TRL's does not
    for option in ("modules_to_save", "trainable_token_indices"):
        if value := getattr(config, option):
            raise DeRaError(f"adapter={adapter!r} has {option}={value!r}: these programs train LoRA factors alone.")


def _holds(argument: str, name: str, file: str) -> bool:
    """Whether a folder or a hub repository has a file."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, file))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DeRaError(f"{argument}={name!r} can't be loaded: there is no such folder.")
    try:
        return cached_file(name, file) is not None
    except (OSError, HFValidationError):
        return False


def _base_of(adapter: str) -> str:
    """The base that an adapter names: its `dera.json`, or else what PEFT wrote down."""
    if Record.is_in(adapter):
        return Record.load(adapter).base
    base = check_adapter(adapter).base_model_name_or_path
    if not base:
        raise DeRaError(
            f"model_name_or_path={adapter!r} is an adapter that does not name its base: give the base as "
            "model_name_or_path and the adapter as sft_adapter."
        )
    return base
