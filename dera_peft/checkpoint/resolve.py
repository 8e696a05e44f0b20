"""Which base and which adapters a user's words name, and which branches they make."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dera_peft.checkpoint.adapter_file import CONFIG_FILE, base_of, check_named, has_file, in_subfolder
from dera_peft.checkpoint.fingerprint import weights_fingerprint
from dera_peft.checkpoint.record import FILE_NAME, Record
from dera_peft.engine.names import ALIGNED, LOGITS, REFERENCE
from dera_peft.engine.plan import WITHOUT_ADAPTERS, make_branches
from dera_peft.errors import DeRaError
from dera_peft.files import check_exists

WAY_OUT = "name it where it is now, with base=."

logger = logging.getLogger(__name__)


def resolve(
    base: str | None,
    adapter: str | None = None,
    adapters: Mapping[str, str] | None = None,
    reference: Sequence[str] = (),
    stacked: bool | None = None,
) -> Record:
    """
    What the fields of a `ModelSource` name, as a record with the folders (or hub ids) to load.

    Raises:
        DeRaError: they don't say which base or which adapter, or say it twice.
    """
    if base is not None:
        check_exists("base", base)
    if adapters is not None and adapter is not None:
        raise DeRaError(f"give adapter={adapter!r} or adapters={dict(adapters)}, not both.")
    if adapters is not None:
        return _resolve_several(base, adapters, reference, stacked)
    if reference:
        if adapter is None:
            raise DeRaError(f"reference={list(reference)} needs the aligned adapter too: name it with adapter=.")
        return _resolve_several(base, {ALIGNED: adapter}, reference, stacked)
    return _resolve_one(base, adapter, stacked)


def resolve_in_subfolder(
    subfolder: str,
    base: str | None,
    adapter: str | None = None,
    adapters: Mapping[str, str] | None = None,
    *others: Any,
) -> Record:
    """
    `resolve`, of adapters that are in a subfolder of what is named; and of a base that is, where it has one.

    Raises:
        DeRaError: neither is there; or see `resolve`.
    """

    places = {
        name: found
        for name, files in (
            (base if base is not None and os.path.isdir(base) else None, ("config.json", FILE_NAME)),
            *((name, (CONFIG_FILE, FILE_NAME)) for name in (adapter, *(adapters or {}).values())),
        )
        if name is not None
        for file in files
        if (found := in_subfolder(name, subfolder, file))
    }
    is_of_hub = base is not None and not os.path.isdir(base)  # which transformers looks for in its subfolder
    if not places and not (is_of_hub and has_file(base, "config.json", subfolder=subfolder)):
        named = [name for name in (base, adapter, *(adapters or {}).values()) if name is not None]
        raise DeRaError(f"subfolder={subfolder!r} has neither an adapter nor a model in any of {named}.")
    base, adapter = (None if name is None else places.get(name, name) for name in (base, adapter))
    adapters = None if adapters is None else {key: places.get(name, name) for key, name in adapters.items()}
    return resolve(base, adapter, adapters, *others)


def _resolve_one(base: str | None, adapter: str | None, stacked: bool | None) -> Record:
    if adapter is None:
        if base is None:
            raise DeRaError("no model is named: give a base and an adapter, or a folder with a dera.json.")
        if Record.is_in(base):
            record = _load_record(f"base={base!r}", base)
            _check_places(f"base={base!r}", record, stacked)
            return record
        return Record(base, {}, {branch.name: list(branch.adapters) for branch in WITHOUT_ADAPTERS})
    check_exists("adapter", adapter)
    if Record.is_in(adapter):
        record = _load_record(f"adapter={adapter!r}", adapter, base)
        _check_places(f"adapter={adapter!r}", record, stacked)
        return record
    base = _base_of([adapter]) if base is None else base
    return Record(base, {"default": adapter}, {REFERENCE: [], ALIGNED: ["default"]})


def _resolve_several(
    base: str | None, adapters: Mapping[str, str], reference: Sequence[str], stacked: bool | None
) -> Record:
    """Several aligned adapters over one reference, which their records, where they have one, must agree on."""
    references = {f"{REFERENCE}_{index}": folder for index, folder in enumerate(reference, 1)}
    for folder in references.values():
        check_exists("reference", folder)
    folders: dict[str, str] = {}
    on_top: dict[str, bool] = {}
    records: dict[str, Record] = {}
    for name, adapter in adapters.items():
        if not name.isidentifier():
            raise DeRaError(f"adapters: {name!r} can't be a name; use letters, digits and underscores.")
        check_exists("adapter", adapter)
        folders[name], on_top[name], record = own_adapter(adapter, list(references.values()), stacked)
        if record is not None:
            records[name] = record
    if len(set(on_top.values())) > 1:
        raise DeRaError(
            f"adapters: {[name for name in on_top if on_top[name]]} come on top of the reference's adapters and the "
            "others replace them; load one kind, and bring the other with add_adapter()."
        )
    known_bases = records | {name: Record.load(folder) for name, folder in references.items() if Record.is_in(folder)}
    first = next(iter(known_bases.values()), None)
    if first is None:
        first = Record(_base_of(list(adapters.values())) if base is None else base, {}, {})
    for name, record in known_bases.items():
        known = None not in (record.base_fingerprint, first.base_fingerprint)
        same = record.base_fingerprint == first.base_fingerprint if known else record.base == first.base
        if not same and (known or base is None):
            raise DeRaError(f"adapter {name!r} is of another base ({record.base!r}) than the others ({first.base!r}).")
    if taken := set(references) & set(folders):
        raise DeRaError(f"{taken.pop()!r} is a name for the reference's adapters; give the aligned one another.")
    branches = make_branches(list(references), {name: name for name in folders}, all(on_top.values()))
    # one number says enough only for one aligned model, whose own record may name it
    own = [record.lam for record in records.values() if isinstance(record.lam, (int, float))] or [1.0]
    lam = own[0] if len(folders) == 1 else dict.fromkeys(folders, 1.0 / len(folders))
    if base is None:
        check_named(f"the {FILE_NAME} of adapters={list(adapters)}", "base", first.base, WAY_OUT)
    return replace(
        first if base is None else first.with_base(base),
        adapters={**references, **folders},
        branches={branch.name: list(branch.adapters) for branch in branches},
        lam=lam,
        mixing=LOGITS,
        training=next(iter(records.values())).training if len(folders) == len(records) == 1 else {},
    )


def _load_record(named: str, folder: str, base: str | None = None) -> Record:
    """
    The record in a folder, with another copy of its base where one is given.

    Raises:
        DeRaError: it can't be read, or what it names is not there.
    """
    record = Record.load(folder)
    named_by = f"{named}: its {FILE_NAME}"
    if base is None:
        check_named(named_by, "base", record.base, WAY_OUT)
    for adapter in record.adapters.values():
        check_named(named_by, "adapter", adapter, f"put it back, or mend {FILE_NAME}.")
    return record if base is None else record.with_base(base)


def _base_of(adapters: Sequence[str]) -> str:
    """
    The base that the configs of adapters name.

    Raises:
        DeRaError: they name none or several, or one that is not there.
    """
    found = {adapter: base_of(adapter) for adapter in adapters}
    for adapter, base in found.items():
        if base is None:
            raise DeRaError(f"adapter={adapter!r} names no base: give the base too.")
        check_named(f"adapter={adapter!r}: its {CONFIG_FILE}", "base", base, WAY_OUT)
    bases = sorted({str(base) for base in found.values()})
    if len(bases) > 1:
        raise DeRaError(f"the adapters name different bases, {bases}: give the one that they are of.")
    logger.info("the base is %r, which the %s of %r names", bases[0], CONFIG_FILE, adapters[0])
    return bases[0]


def own_adapter(
    adapter: str, references: Sequence[str | None], stacked: bool | None
) -> tuple[str, bool, Record | None]:
    """
    The folder of an aligned adapter, whether it comes on top of the reference's adapters, and its record, if any.

    Args:
        references: the folders (or hub ids) of the reference's adapters; None for one that is not known.
        stacked: what the caller says; None to take it from the record, and True without one.

    Raises:
        DeRaError: the record tells of another reference, or of another place on it.
    """
    if not Record.is_in(adapter):
        return adapter, stacked is not False, None
    record = Record.load(adapter)
    if len(record.branches) != 2:
        raise DeRaError(f"adapter={adapter!r} is a record of {len(record.branches) - 1} aligned models; name one.")
    under = record.branches[REFERENCE]
    names = next(names for branch, names in record.branches.items() if branch != REFERENCE)
    own = names[-1]
    if names not in ([own], [*under, own]):
        raise DeRaError(
            f"adapter={adapter!r}: its record's aligned model is {names}, more than one adapter of its own."
        )
    recorded = [record.adapters[name] for name in under]
    if under and not references:
        raise DeRaError(
            f"adapter={adapter!r} was trained against the reference adapters {recorded}: name them with reference=."
        )
    if not _have_same_weights(references, recorded):
        trained = f"the reference adapters {recorded}" if recorded else "the base alone"
        raise DeRaError(
            f"adapter={adapter!r} was trained against {trained}, and the reference's adapters here are "
            f"{list(references)}, with other weights: name those that it was trained against."
        )
    _check_places(f"adapter={adapter!r}", record, stacked)
    return record.adapters[own], len(names) > 1 if under else stacked is not False, record


def _check_places(named: str, record: Record, stacked: bool | None) -> None:
    """Raises `DeRaError` where `stacked` contradicts a record with reference adapters; without them it says nothing."""
    under = record.branches[REFERENCE]
    if stacked is None or not under:
        return
    for branch, names in record.branches.items():
        on_top = len(names) > 1 and names[: len(under)] == under
        if branch != REFERENCE and stacked != on_top:
            place = "on top of" if on_top else "from a copy of"
            raise DeRaError(
                f"stacked={stacked}: by its record {named} was trained {place} the reference's adapters; leave stacked "
                "out."
            )


def _have_same_weights(references: Sequence[str | None], recorded: Sequence[str]) -> bool:
    """Whether two lists of adapters are the same, as far as it can be told: of hub ids only their number is known."""
    if len(references) != len(recorded):
        return False
    found = [None if folder is None else weights_fingerprint(folder) for folder in (*references, *recorded)]
    known = [fingerprint for fingerprint in found if fingerprint is not None]
    return len(known) < len(found) or sorted(known[: len(references)]) == sorted(known[len(references) :])
