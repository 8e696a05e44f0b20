"""How to train at the β that a sweep recommends: the adapter's own training, with another β."""

import json
import os
import shlex
from pathlib import Path

import yaml

from dera_peft.checkpoint.record import Record
from dera_peft.engine.plan import REFERENCE
from dera_peft.files import write_atomically

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
    settings = _settings(adapter)
    if settings is None:
        known = " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in {**_known(record), **new}.items())
        return f"dera dpo {known}  # and its other settings, which its record does not hold"
    processes = settings.pop("processes", 1)
    program = "dera" if processes == 1 else f"torchrun --nproc_per_node {processes} -m dera_peft.cli"
    file = folder / FILE_NAME
    command = f"{program} dpo --config {shlex.quote(str(file))}"
    write_atomically(
        file,
        f"# The training of {adapter}, at the β that the sweep in this folder recommends:\n#   {command}\n\n"
        + yaml.safe_dump({**settings, **new}, sort_keys=False, allow_unicode=True),
    )
    return command


def _settings(adapter: str) -> dict | None:
    """What `dera dpo` was told, if its folder still says so."""
    try:
        settings = json.loads((Path(adapter) / "run.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(settings, dict) or "dataset_name" not in settings:
        return None
    return {key: value for key, value in settings.items() if key not in DERIVED and value not in (None, [])}


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
    return {**known, "use_peft": "true"}
