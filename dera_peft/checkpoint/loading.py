"""From names to models: config, tokenizer, base and adapters, checked before anything large is loaded; and back."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from dera_peft.checkpoint.adapter_check import check_adapter
from dera_peft.checkpoint.adapter_file import AdapterFile
from dera_peft.checkpoint.adapters import attach_adapter
from dera_peft.checkpoint.base import has_added_tokens, load_base, make_skeleton
from dera_peft.checkpoint.card import write_card
from dera_peft.checkpoint.check import check
from dera_peft.checkpoint.end_tokens import end_tokens, end_with, recorded_end_tokens
from dera_peft.checkpoint.fingerprint import base_fingerprint, cached_revision
from dera_peft.checkpoint.quantization import quantized_to
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.resolve import own_adapter
from dera_peft.checkpoint.tokenizers import copy_tokenizer, find_tokenizer, tokenizer_places
from dera_peft.checkpoint.vocabulary import find_tokens, own_tokens_alone
from dera_peft.engine.biases import biases_at
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.padding import num_rows
from dera_peft.engine.plan import check_default_lam
from dera_peft.engine.quantized import keep_packed
from dera_peft.errors import DeRaError
from dera_peft.files import check_exists, is_same_folder, told_if_unwritable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A base with its adapters, if any, and the record that tells which is which; for `DeRaModel.from_source`."""

    model: PreTrainedModel | PeftModel
    record: Record


def load(
    record: Record,
    config: PreTrainedConfig,
    quantization: str | None,
    dtype: str | None,
    device_map: Any,
    **base_arguments,
) -> Loaded:
    """
    The base and the adapters of a record.

    Args:
        config: from `load_config`.
        base_arguments: of transformers' `from_pretrained`.

    Raises:
        DeRaError: one of them can't be read, does not fit the other, or can't be quantized here.
    """
    base, revision = record.base, base_arguments.get("revision")
    checked = check(record, base_arguments, config=config)
    record.check_quantization(*quantized_to(checked.config, quantization, base_arguments))
    model = load_base(
        base, checked.config, quantization, dtype, device_map, skeleton=checked.skeleton, **base_arguments
    )
    record.check_base(revision)  # again: a hub model's weights may be here only now
    adapted = checked.attach(model)
    end_as_trained(model, record, base_arguments)
    record = replace(
        record, base_fingerprint=base_fingerprint(base, revision), base_revision=cached_revision(base, revision)
    )
    return Loaded(adapted, record)


def end_as_trained(model: PreTrainedModel, record: Record, base_arguments: Mapping[str, Any]) -> None:
    """Makes the base's `generate` end at all of `end_tokens`."""
    tokenizer = find_tokenizer(*tokenizer_places(record), base_arguments=base_arguments)
    end_with(model, end_tokens(model.generation_config, tokenizer, record))


def load_adapter(
    model: MixtureModel, record: Record | None, name: str, adapter: str, stacked: bool | None
) -> tuple[str, bool]:
    """
    Loads a further adapter into a model, as `name`, with the checks of `load`.

    Args:
        record: of the model, if it was loaded from files.
        stacked: see `resolve.own_adapter`.

    Returns:
        Its folder or hub id, and whether it comes on top of the reference's adapters.
    """
    base = model.config.name_or_path
    check_exists("adapter", adapter)
    known = {} if record is None else record.adapters
    under = [known.get(reference) for reference in model.branches[0].adapters]
    adapter, stacked, own_record = own_adapter(adapter, under, stacked)
    if own_record is not None and base:
        own_record.with_base(base).check_base(None if record is None else record.base_revision)
    file, skeleton = AdapterFile.read(adapter), make_skeleton(model.config)
    if tokens := find_tokens([file], skeleton):
        raise DeRaError(
            f"{file.named} was trained with {tokens} tokens, and this model has {num_rows(skeleton)}: load both "
            "together (DeRaModel.from_pretrained with adapters=)."
        )
    checked = check_adapter(file, base, skeleton, name)
    if base:  # whose tokenizer may be the adapter's too; before it is attached, since a tokenizer may be broken
        end_as_trained(model, Record(base, {name: adapter}, {}), {})
    attach_adapter(model.peft_model, checked, name)
    return adapter, stacked


def save(model: MixtureModel, record: Record | None, folder: str | os.PathLike) -> None:
    """
    Writes a model's adapters (PEFT's format) and `dera.json` into one folder; never the base, which is named there.

    Args:
        record: of the model, if it was loaded from files.

    Raises:
        DeRaError: the base has no name that could be written down, `model.lam` is none, or the folder can't be written
            or is the base's, or one of another adapter of the model.
    """
    peft_model, lam = model.peft_model, check_default_lam(model.lam, model.aligned)
    adapters = sorted({name for branch in model.branches for name in branch.adapters})
    if record is None:
        base = model.config.name_or_path or peft_model.peft_config[adapters[0]].base_model_name_or_path
        if not base:
            raise DeRaError("the base has no name (it was not loaded from a hub or a folder): dera.json can't name it.")
        record = Record(base, {}, {}, base_fingerprint=base_fingerprint(base), base_revision=cached_revision(base))
    folder = Path(folder)
    # PEFT writes the adapter "default" into the folder itself, any other into a folder of its name below it
    paths = {name: str(folder if name == "default" else folder / name) for name in adapters}
    _check_overwrites_no_source(record, folder, paths)
    with told_if_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with biases_at(model.base), keep_packed(model.base), own_tokens_alone(model.base):
            has_added = has_added_tokens(model.base, record.base)
            peft_model.save_pretrained(str(folder), selected_adapters=adapters, save_embedding_layers=has_added)
    branches = {branch.name: list(branch.adapters) for branch in model.branches}
    copy_tokenizer(record, paths[model.branches[-1].adapters[-1]])
    # of the records beside the adapters, which are not copied
    training = {**record.training, **({"end_tokens": ends} if (ends := recorded_end_tokens(record)) else {})}
    record = replace(record, adapters=paths, branches=branches, lam=lam, mixing=model.mixing, training=training)
    record.save(folder)
    write_card(record, folder)


def _check_overwrites_no_source(record: Record, folder: Path, paths: Mapping[str, str]) -> None:
    """Raises `DeRaError` where a file would be written over the base's, or an adapter's over those of another one."""
    places = [("the base", record.base, folder)]
    for name, source in record.adapters.items():
        places += [(f"the adapter {name!r}", source, Path(path)) for other, path in paths.items() if other != name]
    for what, source, path in places:
        if is_same_folder(path, source):
            raise DeRaError(f"save_directory={str(folder)!r}: {str(path)!r} holds {what}: name another folder.")
