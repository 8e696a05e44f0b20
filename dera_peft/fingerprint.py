"""Short hashes that tell one set of settings, or one set of weights, from another."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dera_peft.record import Record

DIGITS = 12
EDGE = 1 << 20  # bytes read at each end of a file of weights


def settings_fingerprint(values: Any) -> str:
    """Twelve hex digits of a JSON-like value."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def file_fingerprint(file: str | os.PathLike) -> str:
    """Twelve hex digits of a file's contents."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:DIGITS]


def model_fingerprint(record: Record) -> dict[str, Any]:
    """Which weights a record names, as a JSON-like value."""
    return {
        "base": (record.base, weights_fingerprint(record.base)),
        "adapters": {name: (folder, weights_fingerprint(folder)) for name, folder in record.adapters.items()},
        "branches": record.branches,
    }


def weights_fingerprint(name: str | os.PathLike) -> str | None:
    """
    Twelve hex digits of the safetensors files in a local folder; None for a hub id, whose name and revision tell.

    Of each file its name, its size and a megabyte at each end count: enough to tell trained weights apart, and fast for
    a large model too.
    """
    folder = Path(name)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(EDGE))
            stream.seek(max(0, size - EDGE))
            digest.update(stream.read(EDGE))
    return digest.hexdigest()[:DIGITS]
