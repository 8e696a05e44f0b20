"""What training starts from: the SFT model, which is a base, or a base and an adapter over it."""

import os
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dera_peft.checkpoint.adapter_file import CONFIG_FILE, base_of, check_named, has_file, read_adapter_config
from dera_peft.checkpoint.base import load_base, read_dtype
from dera_peft.checkpoint.check import Checked, check
from dera_peft.checkpoint.fingerprint import cached_revision, file_fingerprint, weights_fingerprint
from dera_peft.checkpoint.loading import end_as_trained
from dera_peft.checkpoint.quantization import quantization_config
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.resolve import resolve
from dera_peft.checkpoint.source import ModelSource
from dera_peft.checkpoint.tokenizers import load_tokenizer
from dera_peft.engine.adapter_kinds import check_keeps_biases
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.names import ALIGNED, REFERENCE
from dera_peft.engine.plan import WITHOUT_ADAPTERS
from dera_peft.engine.quantized import keep_trainable
from dera_peft.errors import DeRaError
from dera_peft.training.program import OutputFolder
from dera_peft.training.tokens import pad_within
from dera_peft.user_code import is_object_path, load_object

if TYPE_CHECKING:
    from trl import ModelConfig

BASE, ADAPTER = "model_name_or_path", "sft_adapter"  # what the programs call them
ADAPTER_NAME = "default"  # in a PeftModel
TRLS_LOADING = ("model_revision", "attn_implementation", "dtype")
TRLS_QUANTIZATION = (
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant",
)  # fmt: skip


@dataclass(frozen=True)
class SFTModel(ModelSource):
    """
    The SFT model, by name; from `find_sft_model`.

    `base` may also be a function that returns a new model and its tokenizer, as path.py:name. `adapter` is the LoRA
    adapter over the base that makes it the SFT model; None if the base is that.
    """

    if TYPE_CHECKING:
        base: str  # there always

    @property
    def is_function(self) -> bool:
        return is_object_path(self.base)

    @cached_property
    def _record(self) -> Record:
        return Record(self.base, {}, {REFERENCE: []}) if self.adapter is None else resolve(self.base, self.adapter)

    def fingerprint(self) -> dict[str, str]:
        """Of local weights, or of the program that makes them; of a hub model its name and commit."""
        if self.is_function:
            return {"model": file_fingerprint(self.base.rpartition(":")[0])}
        known = {"model": weights_fingerprint(self.base) or f"{self.base}@{self.revision}"}
        if self.adapter is not None:
            known[ADAPTER] = weights_fingerprint(self.adapter) or self.adapter
        return known

    def with_storage(self, dtype: torch.dtype) -> "SFTModel":
        """This one, quantized to 4 bits that are stored as a float `dtype`, several in each: the same weights."""
        config = deepcopy(self.base_arguments.get("quantization_config"))
        if self.quantization is not None:
            config = quantization_config(self.quantization, read_dtype(self.dtype), self.config)
        assert config is not None  # it is quantized
        config.bnb_4bit_quant_storage = dtype
        return replace(self, quantization=None, base_arguments={**self.base_arguments, "quantization_config": config})

    def check(self) -> Checked:
        """
        Checks that base and adapter are there and fit each other.

        Raises:
            DeRaError: one of them can't be read, or does not fit the other.
        """
        return check(self._record, self.load_arguments(), base_argument=BASE, adapter_argument=ADAPTER)

    def load_to_sample(self) -> MixtureModel:
        """The SFT model in evaluation mode: a mixture whose branches are the same, so that it decodes without λ."""
        checked = self.check()
        base = self._load_base(checked)
        end_as_trained(base, self._record, self.load_arguments())
        if self.adapter is None:
            return MixtureModel(base.eval(), WITHOUT_ADAPTERS)
        branches = [replace(branch, adapters=(ADAPTER_NAME,)) for branch in WITHOUT_ADAPTERS]
        return MixtureModel(self._attach(base, checked).eval(), branches)

    def load_to_train(self, trainable: bool = False) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """
        The SFT model, as a PeftModel if it has an adapter, and its tokenizer.

        Args:
            trainable: whether the adapter is trained on.
        """
        if self.is_function:
            model, tokenizer = load_object(self.base)()
            keep_trainable(model)
            return model, tokenizer
        checked = self.check()
        model = self._load_base(checked)
        keep_trainable(model)
        tokenizer = self.own_tokenizer()
        pad_within(model, tokenizer)
        return (model if self.adapter is None else self._attach(model, checked, trainable)), tokenizer

    def load_unquantized(self) -> PeftModel:
        """The base without quantization, with the adapter, on the CPU, where there is more room."""
        checked = self.check()
        arguments = {key: value for key, value in self.load_arguments().items() if key != "quantization_config"}
        base = load_base(self.base, checked.config, None, self.dtype, "cpu", argument=BASE, **arguments)
        end_as_trained(base, self._record, self.load_arguments())
        return self._attach(base, checked)

    def own_tokenizer(self) -> PreTrainedTokenizerBase:
        """As it is saved, where `tokenizer` is ready to decode."""
        adapters = [] if self.adapter is None else [self.adapter]
        return load_tokenizer(*adapters, self.base, base_arguments=self.load_arguments(), padding_side=None)

    def _load_base(self, checked: Checked) -> PreTrainedModel:
        base_arguments = self.load_arguments()
        self._record.check_quantization(*self.quantized_to())
        return load_base(
            self.base, checked.config, self.quantization, self.dtype, self.device_map, skeleton=checked.skeleton,
            argument=BASE, **base_arguments,
        )  # fmt: skip

    def _attach(self, model: PreTrainedModel, checked: Checked, trainable: bool = False) -> PeftModel:
        return cast("PeftModel", checked.attach(model, dtype=torch.float32, trainable=trainable))  # there is an adapter


def find_sft_model(name: str, adapter: str | None = None, revision: str | None = None, **loading: Any) -> SFTModel:
    """
    The SFT model that `model_name_or_path` names, checked. An adapter there is the SFT model, over the base that it
    names.

    Args:
        adapter: the SFT adapter, where it is named separately.
        revision: of a hub base.
        loading: further fields of `ModelSource`; what is no field of it goes to transformers' `from_pretrained`.

    Raises:
        DeRaError: one of them does not exist, is unfinished, or is not what it should be; or a function makes the
            model, and something is asked for that it alone decides.
    """
    if is_object_path(name):
        _check_of_function(name, sft_adapter=adapter, revision=revision, **loading)
        return SFTModel(base=name)
    known = {each.name for each in fields(ModelSource)} - {"subfolder"}  # of the base, as for transformers
    arguments = {key: value for key, value in loading.items() if key not in known and value is not None}
    loading = {key: value for key, value in loading.items() if key in known}
    if _holds(BASE, name, CONFIG_FILE):
        if _holds(BASE, name, "config.json"):
            raise DeRaError(f"{BASE}={name!r} holds a model and an adapter; move the adapter into a folder of its own.")
        if adapter is not None:
            raise DeRaError(
                f"{BASE}={name!r} is an adapter, and {ADAPTER}={adapter!r} another: merge one of them into its base "
                "first (dera sft with merge_adapter: true), or name the base."
            )
        adapter, name, revision = name, _base_of(name), None
    elif adapter is not None and not _holds(ADAPTER, adapter, CONFIG_FILE):
        raise DeRaError(f"{ADAPTER}={adapter!r} is not an adapter: it has no {CONFIG_FILE}.")
    if adapter is not None:
        check_keeps_biases(adapter, read_adapter_config(adapter, ADAPTER), ADAPTER)
        _check_stands_alone(adapter)
    for argument, folder in ((BASE, name), (ADAPTER, adapter)):
        if folder is not None and OutputFolder.is_unfinished(folder):
            raise DeRaError(
                f"{argument}={folder!r} is unfinished: the program that makes it was stopped. Run it to its end first."
            )
    model = SFTModel(base=name, adapter=adapter, revision=revision, base_arguments=arguments, **loading)
    model.check()
    if os.path.isdir(name):
        return replace(model, revision=None)
    return replace(model, revision=cached_revision(name, model._revision) or model._revision)


def find_sft_model_to_train(
    model_args: "ModelConfig", quantization: str | None, init_kwargs: dict | None, adapter: str | None = None
) -> SFTModel:
    """
    `find_sft_model`, with TRL's settings of how it is loaded.

    Args:
        quantization: in place of TRL's load_in_4bit and load_in_8bit.
        init_kwargs: further arguments of `from_pretrained`, which come first; TRL's `model_init_kwargs`.

    Raises:
        DeRaError: see `find_sft_model`; or two settings say how the base is quantized, or it has an encoder.
    """
    from trl import get_quantization_config

    if quantization is not None:
        for name in TRLS_QUANTIZATION:
            value = getattr(model_args, name)
            if value != getattr(type(model_args)(), name):
                raise DeRaError(f"quantization={quantization!r} and {name}={value}: give one of the two.")
    assert model_args.model_name_or_path is not None  # checked before
    if is_object_path(model_args.model_name_or_path):
        asked = {name: getattr(model_args, name) for name in (*TRLS_LOADING, *TRLS_QUANTIZATION)}
        changed = {name: value for name, value in asked.items() if value != getattr(type(model_args)(), name)}
        loading = {"quantization": quantization, **changed, **(init_kwargs or {})}
        return find_sft_model(model_args.model_name_or_path, adapter, **loading)
    processes = PartialState()
    device = cast("torch.device", processes.device)  # known from the start
    is_alone_on_accelerator = processes.num_processes == 1 and device.type not in ("cpu", "mps")
    arguments: dict[str, Any] = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization": quantization,
        "quantization_config": get_quantization_config(model_args),
        # one device: spread over several, each would wait for the others
        "device_map": device if is_alone_on_accelerator else None,
        **(init_kwargs or {}),
    }
    model = find_sft_model(model_args.model_name_or_path, adapter, **arguments)
    if model.config.is_encoder_decoder:
        raise DeRaError(f"{BASE}={model.base!r} has an encoder; these programs train models that are a decoder alone.")
    return model


def _check_of_function(name: str, **asked: Any) -> None:
    """Raises `DeRaError` where something is asked for that has no effect on a model that a function makes."""
    for argument, value in asked.items():
        if value is not None and (argument, value) != ("dtype", "auto"):
            raise DeRaError(
                f"{argument}={value!r} has no effect on {BASE}={name!r}, a function, which makes the model as it is: "
                f"leave {argument} out."
            )


def _holds(argument: str, name: str, file: str) -> bool:
    """Whether a folder or a hub repository has a file."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, file))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DeRaError(f"{argument}={name!r} can't be loaded: there is no such folder.")
    return has_file(name, file)


def _base_of(adapter: str) -> str:
    """The base that an adapter names: its `dera.json`, or else what PEFT wrote down."""
    way_out = f"give the base, where it is now, as {BASE} and the adapter as {ADAPTER}."
    if Record.is_in(adapter):
        base, file = Record.load(adapter).base, "dera.json"
    else:
        base, file = base_of(adapter, BASE), CONFIG_FILE
    if not base:
        raise DeRaError(
            f"{BASE}={adapter!r} is an adapter that does not name its base: give the base as {BASE} and the adapter as "
            f"{ADAPTER}."
        )
    check_named(f"{BASE}={adapter!r}: its {file}", "base", base, way_out)
    return base


def _check_stands_alone(adapter: str) -> None:
    """Raises `DeRaError` where an adapter was trained on other adapters, not on a base alone."""
    if Record.is_in(adapter):
        branches = Record.load(adapter).branches
        if branches[REFERENCE] or branches.get(ALIGNED) != ["default"]:
            raise DeRaError(
                f"{ADAPTER}={adapter!r} stands on other adapters ({branches}), not on a base alone: merge what it "
                "stands on into the base first."
            )
