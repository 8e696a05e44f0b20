"""How to train at the β that a sweep recommends: the adapter's own training, with another β."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import yaml

from dera_peft.checkpoint.record import Record
from dera_peft.engine.names import REFERENCE
from dera_peft.files import RUN_FILE, write_atomically

FILE_NAME = "retrain.yaml"
DERIVED = ("accelerator_config",)  # an object that the trainer's arguments make for themselves


def retrain_command(adapter: str, record: Record, beta: float, folder: Path) -> str | None:
    """
    The command that trains again, at `beta`.

    Where the adapter's folder has the settings of its training (`run.json`, which `dera dpo` writes), all of them
    are taken, and written to `folder/retrain.yaml`; else those that its record knows.

    Args:
        adapter: hub id or folder.
        folder: of the sweep.

    Returns:
        None where it was not `dera dpo` that trained it.
    """
    if record.training.get("method") != "dpo":
        return None
    beta = float(f"{beta:.4g}")
    new = {"beta": beta, "output_dir": f"{os.path.normpath(adapter)}-beta-{beta:g}"}
    found = _settings(adapter)
    if found is None:
        known = " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in {**_known(record), **new}.items())
        return f"dera dpo {known}  # and its other settings, which its record does not hold"
    settings, processes = found
    program = "dera" if processes == 1 else f"torchrun --nproc_per_node {processes} -m dera_peft.cli"
    file = folder / FILE_NAME
    command = f"{program} dpo --config {shlex.quote(str(file))}"
    write_atomically(
        file,
        f"# The training of {adapter}, at the β that the sweep in this folder recommends:\n#   {command}\n\n"
        + yaml.safe_dump({**settings, **new}, sort_keys=False, allow_unicode=True),
    )
    return command


def _settings(adapter: str) -> tuple[dict[str, Any], int] | None:
    """What `dera dpo` was told, and by how many processes it ran, if its folder still says so."""
    try:
        record = json.loads((Path(adapter) / RUN_FILE).read_text(encoding="utf-8"))
        settings, given = record["settings"], record.get("given")
        processes = settings.pop("processes", 1)
        if given is None:  # an older folder has only what is not at its default
            given = {key: value for key, value in settings.items() if key not in DERIVED and value != []}
        return (given, processes) if "dataset_name" in given else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _known(record: Record) -> dict[str, str]:
    under = record.branches[REFERENCE]
    aligned = next(names for branch, names in record.branches.items() if branch != REFERENCE)
    known = {"model_name_or_path": record.base}
    if under:
        known["sft_adapter"] = record.adapters[under[0]]
        if under[0] not in aligned:
            known["continue_sft_adapter"] = "true"
    if "dataset" in record.training:
        known["dataset_name"] = record.training["dataset"]
    if dtype := record.training.get("dtype"):
        known["dtype"] = dtype
    return {**known, **_quantization(record.training.get("quantization")), "use_peft": "true"}


def _quantization(name: str | None) -> dict[str, str]:
    """The settings of `dera dpo` that give a base's quantization; none for one that its checkpoint alone has."""
    kind, _, details = (name or "").partition(" ")
    if kind in ("nf4", "fp4") and details:
        return {"load_in_4bit": "true", "bnb_4bit_quant_type": kind, "use_bnb_nested_quant": "false"}
    return {"quantization": kind} if kind in ("nf4", "fp4", "int8") else {}
