"""The files of a PEFT adapter: its config, and its tensors by the names that PEFT's loader takes them by."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file

from dera_peft.engine.adapter_kinds import check_adapter_kind
from dera_peft.errors import DeRaError, first_line
from dera_peft.files import check_exists
from dera_peft.messages import warn_once

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# What trainers that save without PEFT leave around a module's name: DDP's and torch.compile's wrappers.
WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod)\.")
FACTORS = re.compile(
    r"(?P<module>.+)\.(lora_(?P<factor>A|B|embedding_A|embedding_B)|lora_(?P<magnitude>magnitude_vector))"
    r"(\.(?!weight$|bias$)[^.]+)?(\.(?P<kind>weight|bias))?"
)
# Children of the modules that PEFT puts in the place of a base's, which hold the base's own or the trained weights.
HOLDERS = re.compile(r"(\.(token_adapter|base_layer|original_module|modules_to_save))+$")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterFile:
    """
    An adapter's config and the header of its file.

    Attributes:
        adapter: hub id or folder.
        argument: what names the adapter for the user, for messages.
        shapes: of each tensor, by the name that PEFT gives it.
        keys: the name of each tensor in the file, by the name that PEFT gives it.
    """

    adapter: str
    argument: str
    config: LoraConfig
    shapes: Mapping[str, tuple[int, ...]]
    keys: Mapping[str, str]

    @classmethod
    def read(cls, adapter: str, argument: str = "adapter") -> "AdapterFile":
        """
        Raises:
            DeRaError: not a readable safetensors LoRA adapter of a kind that can be kept to a branch.
        """
        config = read_adapter_config(adapter, argument)
        with _open(adapter, argument) as tensors:
            found = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        keys = {PREFIX + plain_name(key): key for key in found}
        return cls(adapter, argument, config, {name: found[key] for name, key in keys.items()}, keys)

    @property
    def named(self) -> str:
        """The adapter for messages."""
        return f"{self.argument}={self.adapter!r}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        The tensors by the names that PEFT gives them, on the CPU.

        Raises:
            DeRaError: one holds values that are not finite.
        """
        with _open(self.adapter, self.argument) as file:
            found = {name: file.get_tensor(key) for name, key in self.keys.items()}
        for name, tensor in found.items():
            if not tensor.isfinite().all():
                raise DeRaError(
                    f"{self.named} is broken: its {self.keys[name]!r} has values that are not finite (NaN or inf), as "
                    "where its training diverged."
                )
        return found

    def in_names_of(self, base: PreTrainedModel) -> "AdapterFile":
        """
        The same by the names that the base's modules have here. As transformers renames the weights of a checkpoint,
        so are renamed here: the names of an older version, and those of a whole multimodal model of which the base is
        the text model. What is of the other parts of such a model is left out.
        """
        modules = {name for name, _ in base.named_modules()}
        renamings = [each for each in get_model_conversion_mapping(base) if isinstance(each, WeightRenaming)]
        others = [re.compile(pattern) for pattern in base._keys_to_ignore_on_load_unexpected or ()]
        names: dict[str, str] = {}
        left_out = []
        for name in self.keys:
            own = name.removeprefix(PREFIX)
            if module_of(own) in modules:
                names[name] = name
                continue
            renamed, _ = rename_source_key(own, renamings, [])
            if module_of(renamed) in modules:
                names[name] = PREFIX + renamed
            elif any(pattern.search(own) for pattern in others):
                left_out.append(module_of(own))
            else:
                names[name] = name
        if left_out:
            warn_once(
                logger,
                f"{self.named}: {len(set(left_out))} of its modules, as {left_out[0]!r}, are of parts of the model "
                "that are not loaded to decode texts; they are left out.",
            )
        moved = {
            module_of(name.removeprefix(PREFIX)): module_of(new.removeprefix(PREFIX)) for name, new in names.items()
        }
        return replace(
            self,
            config=_renamed(self.config, moved) if any(old != new for old, new in moved.items()) else self.config,
            shapes={new: self.shapes[name] for name, new in names.items()},
            keys={new: self.keys[name] for name, new in names.items()},
        )


def read_adapter_config(adapter: str, argument: str = "adapter") -> LoraConfig:
    """
    An adapter's config, of a kind that can be kept to a branch.

    Args:
        argument: what names the adapter for the user, for messages.

    Raises:
        DeRaError: there is no such adapter, its config can't be read, or it is of another kind.
    """
    return check_adapter_kind(adapter, _read_config(adapter, argument), argument)


def base_of(adapter: str, argument: str = "adapter") -> str | None:
    """
    The base that an adapter's config names: a hub id or a folder, or None.

    Raises:
        DeRaError: see `read_adapter_config`.
    """
    return _read_config(adapter, argument).base_model_name_or_path or None


def plain_name(key: str) -> str:
    """A tensor's name as PEFT writes it, without `base_model.model.` and what trainers' wrappers add."""
    key = WRAPPERS.sub(r"\1", key).removeprefix(PREFIX)
    if (found := FACTORS.fullmatch(key)) and found["module"] is not None:
        part = f"lora_{found['factor'] or found['magnitude']}"
        key = ".".join(filter(None, (found["module"], part, found["kind"])))
    return key


def module_of(name: str) -> str:
    """The base's module that a tensor is of, by the tensor's name without `base_model.model.`."""
    found = FACTORS.fullmatch(name)
    return HOLDERS.sub("", found["module"] if found else name.rpartition(".")[0])


def is_bias(key: str) -> bool:
    """Whether a tensor is a bias of one of the base's own modules."""
    return key.endswith(".bias") and FACTORS.fullmatch(key) is None


def is_adapter(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, CONFIG_FILE))


def check_named(named_by: str, kind: str, name: str, way_out: str) -> None:
    """
    Raises `DeRaError` where a folder that a file names is not there.

    Args:
        named_by: the file, for messages.
        kind: what it names, "base" or "adapter".
    """
    try:
        check_exists(kind, name)
    except DeRaError:
        raise DeRaError(f"{named_by} names the {kind} {name!r}, and there is no such folder: {way_out}") from None


def in_subfolder(name: str, subfolder: str, file: str) -> str | None:
    """
    The subfolder of a folder, or of a hub repository in the hub's cache, where `file` is in it; None where it is not.
    """
    if not os.path.isdir(name):
        if not has_file(name, file, subfolder=subfolder):
            return None
        name = snapshot_download(name, allow_patterns=f"{subfolder}/*")
    folder = os.path.join(name, subfolder)
    return folder if os.path.isfile(os.path.join(folder, file)) else None


def has_file(name: str, file: str, **where: Any) -> bool:
    """Whether a folder or a hub repository has a file; `where` is of `cached_file`."""
    try:
        return cached_file(name, file, **where) is not None
    except (OSError, HFValidationError):
        return False


def _read_config(adapter: str, argument: str) -> PeftConfig:
    check_exists(argument, adapter)
    if os.path.isdir(adapter) and not is_adapter(adapter):
        raise DeRaError(f"{argument}={adapter!r} is a folder without an {CONFIG_FILE}, not a PEFT adapter.")
    try:
        return PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError, KeyError, HFValidationError) as error:
        missing = "" if os.path.isdir(adapter) else "there is no such folder, and as an adapter on the hub "
        raise DeRaError(
            f"{argument}={adapter!r}: {missing}its {CONFIG_FILE} can't be read: {first_line(error)}"
        ) from error


def _renamed(config: LoraConfig, moved: Mapping[str, str]) -> LoraConfig:
    """
    The config with the base's names.

    Args:
        moved: the modules that the adapter's file has tensors of, by their names there, and their names in the base.
    """
    config = replace(
        config,
        rank_pattern={moved.get(name, name): rank for name, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={moved.get(name, name): alpha for name, alpha in (config.alpha_pattern or {}).items()},
    )
    wanted = sorted({new for old, new in moved.items() if check_target_module_exists(config, old)})
    if all(check_target_module_exists(config, name) for name in wanted):
        return config  # as ends of names are, which the renaming leaves as they are
    return replace(config, target_modules=wanted, layers_to_transform=None, layers_pattern=None, exclude_modules=None)


@contextmanager
def _open(adapter: str, argument: str) -> Iterator:
    """
    The adapter's file.

    Raises:
        DeRaError: it is not there, is of another format, or is corrupt.
    """
    try:
        with safe_open(cached_file(adapter, WEIGHTS_FILE), framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise DeRaError(f"{argument}={adapter!r}: {WEIGHTS_FILE} is corrupt: {error}") from error
    except (OSError, HFValidationError) as error:
        reason = _other_format(adapter) or first_line(error)
        raise DeRaError(f"{argument}={adapter!r} has no {WEIGHTS_FILE} that can be read: {reason}") from error


def _other_format(adapter: str) -> str | None:
    """What an adapter has in place of `WEIGHTS_FILE`, and how to make that of it."""
    if has_file(adapter, PICKLE_FILE):
        return (
            f"it has {PICKLE_FILE}, a pickle, which is not loaded since it may run code. Convert one that you trust: "
            f"safetensors.torch.save_file(torch.load({PICKLE_FILE!r}, weights_only=True), {WEIGHTS_FILE!r})."
        )
    if has_file(adapter, f"{WEIGHTS_FILE}.index.json"):
        return (
            "its weights are split over several files (adapter_model-00001-of-…), which PEFT does not load. Load them "
            f"with safetensors.torch.load_file, and save them as one dict with save_file, as {WEIGHTS_FILE}."
        )
    return None
