"""`ModelSource`: the model that a user points at, resolved and checked once for whatever is done with it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dera_peft.checkpoint.fingerprint import cached_revision
from dera_peft.errors import DeRaError
from dera_peft.files import check_exists
from dera_peft.settings import Setting, Settings, setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from dera_peft.checkpoint.loading import Loaded
    from dera_peft.checkpoint.record import Record

PANEL = "Model"
Quantization = Literal["nf4", "fp4", "int8"]  # bitsandbytes' kinds, 4 bits with double quantization
ACCESS = ("token", "cache_dir", "local_files_only")  # arguments that say how to get at files, not which
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class ModelSource(Settings):
    """
    A base and its adapters, by name. Nothing is read before it is asked for.

    Raises:
        DeRaError: a value has another type; or, when it is resolved or loaded, what it names does not exist, can't be
            read or does not fit.
    """

    instead: ClassVar[tuple[tuple[str, ...], ...]] = (("adapter", "adapters"),)

    base: str | None = setting(
        None,
        "Base model: hub id or folder. Not needed where the adapter's dera.json or adapter_config.json names it.",
        metavar="MODEL",
        panel=PANEL,
    )
    adapter: str | None = setting(
        None, "LoRA adapter of the aligned model: hub id or folder, in PEFT's format.", metavar="LORA", panel=PANEL
    )
    adapters: Mapping[str, str] | None = setting(
        None, "Several aligned models in place of --adapter: a name and an adapter each.", metavar="NAME=LORA",
        panel=PANEL,
    )  # fmt: skip
    reference: tuple[str, ...] = setting(
        (),
        "Adapters that make the reference (the SFT model) of the base. The adapter's dera.json names its own.",
        metavar="LORA",
        panel=PANEL,
    )
    stacked: bool | None = setting(
        None,
        "Whether the aligned adapters were trained on top of the reference's (yes unless their dera.json says no), or "
        "continue a copy of them.",
        panel=PANEL,
    )
    subfolder: str | None = setting(
        None,
        "Folder within the adapter's folder or hub repository that holds it; within the base's, where it is there too.",
        metavar="FOLDER",
        panel=PANEL,
    )
    revision: str | None = setting(
        None, "Commit, branch or tag of a base on the hub; the one that dera.json names, or the newest.",
        metavar="REVISION", panel=PANEL,
    )  # fmt: skip
    quantization: Quantization | None = setting(
        None, "Load the base in 4 bits (nf4, fp4) or 8 bits (int8) with bitsandbytes.", metavar="KIND", panel=PANEL
    )
    dtype: Dtype | None = setting(
        None, "float32, bfloat16, float16 or float64; auto, the base's own, by default.", metavar="DTYPE", panel=PANEL
    )
    device_map: Any = setting(
        None,
        "As in transformers: auto, cpu, cuda:0. By default the accelerator, if there is one.",
        metavar="DEVICE",
        panel=PANEL,
    )
    trust_remote_code: bool | None = setting(
        None, "Run the Python code that a base on the hub brings with it.", panel=PANEL, has_no=False
    )
    capture: bool | None = setting(
        None,
        "Record decoding steps as CUDA graphs and replay them, which is several times as fast for small batches; on a "
        "GPU it is done wherever it can be, unless switched off.",
        panel=PANEL,
    )
    base_arguments: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "setting": Setting("Further arguments of transformers' from_pretrained.", on_command_line=False)
        },
    )  # fmt: skip

    def __post_init__(self):
        if self.dtype is not None and not isinstance(self.dtype, str):  # a torch.dtype
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        super().__post_init__()

    @property
    def name(self) -> str:
        """What names the aligned model: an adapter, or a folder with a dera.json."""
        several = (self.adapters or {}).values()
        return str(self.adapter or next(iter(several), None) or self.base)

    @property
    def folders(self) -> dict[str, str]:
        """Field -> what the user named there: folders or hub ids. Of several adapters of one field each has its own."""
        named = {"base": self.base, "adapter": self.adapter}
        named |= {f"adapters[{name!r}]": adapter for name, adapter in (self.adapters or {}).items()}
        named |= {f"reference[{place}]": adapter for place, adapter in enumerate(self.reference)}
        return {argument: name for argument, name in named.items() if name is not None}

    def check_paths(self) -> None:
        """
        Checks that the folders that are named are there, without importing torch, which takes seconds.

        Raises:
            DeRaError: one is not.
        """
        for argument, name in self.folders.items():
            check_exists(argument, name)

    def resolve(self) -> "Record":
        """
        Which base, adapters and branches are meant, from the names and the records beside them; read once.

        Raises:
            DeRaError: they don't say which base or which adapter, or say it twice.
        """
        return self._record

    def check_has_adapter(self, command: str, prompts_differ: bool | None = None) -> None:
        """
        Raises `DeRaError` where a base is named alone, and `command` needs more: an adapter, or prompts that differ.

        Args:
            prompts_differ: between the branches; None where they can't.
        """
        if self.resolve().branches_differ or prompts_differ:
            return
        by_prompt = "" if prompts_differ is None else ", or give a principle (or a reference_system)"
        raise DeRaError(
            f"{command} needs an adapter, and {self.name!r} is a base alone: name one with adapter={by_prompt}."
        )

    def resolve_one(self, command: str, way_out: str, prompts_differ: bool | None = None) -> "Record":
        """
        The record of a model with one aligned adapter.

        Args:
            command: who takes only one, for the message.
            way_out: what to do with several.
            prompts_differ: see `check_has_adapter`.

        Raises:
            DeRaError: it has several, or none; or see `resolve`.
        """
        record = self.resolve()
        self.check_has_adapter(command, prompts_differ)
        if len(record.branches) > 2:
            found = "adapters has" if self.adapters else f"adapter={self.name!r} is a record of"
            raise DeRaError(f"{command} takes one aligned model, and {found} {list(record.branches)[1:]}: {way_out}")
        return record

    @cached_property
    def _record(self) -> "Record":
        from dera_peft.checkpoint.resolve import resolve, resolve_in_subfolder

        if self.subfolder is None:
            return resolve(self.base, self.adapter, self.adapters, self.reference, self.stacked)
        return resolve_in_subfolder(
            self.subfolder, self.base, self.adapter, self.adapters, self.reference, self.stacked
        )

    @cached_property
    def config(self) -> "PreTrainedConfig":
        """The base's config."""
        from dera_peft.checkpoint.base import load_config

        return load_config(self.resolve().base, self.load_arguments())

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """
        The adapter's tokenizer, which may have a chat template of its own, or else the base's. It pads on the left,
        with the end token if it has no padding token.

        Raises:
            DeRaError: neither has one, or the adapter's can't be loaded.
        """
        from dera_peft.checkpoint.tokenizers import load_tokenizer, tokenizer_places

        tokenizer = load_tokenizer(*tokenizer_places(self.resolve()), base_arguments=self.load_arguments())
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def end_tokens(self) -> list[int]:
        """
        The ids of the tokens that end a completion, see `end_tokens.end_tokens`; read without loading weights.

        Raises:
            DeRaError: the tokenizer does not have one of them.
        """
        from dera_peft.checkpoint.end_tokens import end_tokens
        from dera_peft.checkpoint.tokenizers import find_tokenizer, load_generation_config, tokenizer_places

        record, arguments = self.resolve(), self.load_arguments()
        generation_config = load_generation_config(record.base, self.config, arguments)
        tokenizer = find_tokenizer(*tokenizer_places(record), base_arguments=arguments)
        return end_tokens(generation_config, tokenizer, record)

    def load(self) -> "Loaded":
        """
        The base with its adapters, checked against each other before anything large is loaded.

        Raises:
            DeRaError: one of them does not exist, can't be read, or does not fit the other.
        """
        from dera_peft.checkpoint.loading import load

        arguments = self.load_arguments()
        return load(self.resolve(), self.config, self.quantization, self.dtype, self.device_map, **arguments)

    def quantized_to(self) -> tuple[str | None, bool]:
        """What the base is quantized to, by its name, and whether its checkpoint is so already."""
        from dera_peft.checkpoint.quantization import quantized_to

        return quantized_to(self.config, self.quantization, self.load_arguments())

    def fingerprint(self) -> dict[str, Any]:
        """
        Which weights are meant, and how they are loaded, as a JSON-like value.

        Raises:
            DeRaError: the base, or its config where it is of the hub, can't be read.
        """
        arguments = {name: str(value) for name, value in self.base_arguments.items() if name not in ACCESS}
        return {
            **self.resolve().weights(),
            "revision": self._commit(),
            "quantization": self.quantization,
            "dtype": self.dtype,
            "base_arguments": arguments,
        }

    def placed(self) -> "ModelSource":
        """
        The source on a device that is here: the accelerator, if there is one and no device is named.

        Raises:
            DeRaError: `device_map` names neither a strategy nor a device that is here.
        """
        from dera_peft.checkpoint.devices import read_device_map

        return replace(self, device_map=read_device_map(self.device_map))

    @property
    def _revision(self) -> str | None:
        return self.revision or self.resolve().base_revision

    def _commit(self) -> str | None:
        """The commit of a hub base that is loaded, or the revision if it isn't known; None for a folder."""
        base, arguments = self.resolve().base, self.load_arguments()
        if os.path.isdir(base):
            return None
        _ = self.config  # the hub's client then has the commit in its cache that it loads the model of
        revision = arguments.get("revision")
        return cached_revision(base, revision, arguments.get("cache_dir")) or revision

    def load_arguments(self) -> dict[str, Any]:
        """What the base and its tokenizer are loaded with: where on the hub they are, and `base_arguments`."""
        named = {"revision": self._revision, "trust_remote_code": self.trust_remote_code, **self.base_arguments}
        base = self.resolve().base
        if self.subfolder is not None and not os.path.isdir(base):
            from dera_peft.checkpoint.adapter_file import has_file

            if has_file(base, "config.json", subfolder=self.subfolder, revision=self._revision):
                named = {"subfolder": self.subfolder, **named}
        return {name: value for name, value in named.items() if value is not None}
