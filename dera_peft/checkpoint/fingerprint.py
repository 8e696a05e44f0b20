"""Short hashes that tell one set of settings, or one set of weights, from another."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dera_peft.errors import DeRaError

if TYPE_CHECKING:
    from torch import Tensor

DIGITS = 12
SAMPLE = 4096  # bytes read of each tensor
MAX_HEADER = 100_000_000  # bytes; the format allows no more
WEIGHTS = ("model.safetensors.index.json", "model.safetensors")
BASE_FILES = "model*.safetensors"  # what transformers loads; a hub repository may hold other formats beside them


def settings_fingerprint(values: Any) -> str:
    """Twelve hex digits of a JSON-like value."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:DIGITS]


def file_fingerprint(file: str | os.PathLike) -> str:
    """Twelve hex digits of a file's contents."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:DIGITS]


def weights_fingerprint(name: str | os.PathLike, files: str = "*.safetensors") -> str | None:
    """
    Twelve hex digits of the safetensors `files` in a local folder; None where it has none, and for a hub id, whose name
    and revision tell.

    Of each tensor its name, type, shape and its first 4 KiB count. That takes milliseconds for a large model too, tells
    trained weights apart, and does not depend on how the tensors are spread over files; weights that differ only
    further inside of every tensor look alike.

    Raises:
        DeRaError: a file is not a whole safetensors file.
    """
    folder = Path(name)
    if not folder.is_dir():
        return None
    tensors: list[tuple[str, str, str]] = []
    for file in folder.glob(files):
        tensors += _sampled_tensors(file)
    return settings_fingerprint(sorted(tensors)) if tensors else None


def tensors_fingerprint(tensors: "Iterable[tuple[str, Tensor]]") -> str:
    """As `weights_fingerprint`, of named tensors; of those that are offloaded the name, type and shape alone count."""
    import torch

    found = []
    for name, tensor in tensors:
        start = tensor.detach().flatten()[: max(1, SAMPLE // tensor.element_size())]
        content = b"" if tensor.is_meta else start.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        found.append((name, f"{tensor.dtype}{list(tensor.shape)}", hashlib.sha256(content).hexdigest()[:DIGITS]))
    return settings_fingerprint(sorted(found))


def base_fingerprint(name: str, revision: str | None = None) -> str | None:
    """
    `weights_fingerprint` of a base: of a local folder, or of a hub model whose weights are in the hub's local cache.

    The same weights give the same fingerprint from either. Nothing is downloaded: it is None where a hub model's
    weights are not here yet.
    """
    snapshot = Path(name) if Path(name).is_dir() else cached_snapshot(name, revision, WEIGHTS)
    return None if snapshot is None else weights_fingerprint(snapshot, BASE_FILES)


def cached_revision(name: str, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """The commit of a hub model in the hub's local cache; None for a folder, or where it is not there."""
    snapshot = None if Path(name).is_dir() else cached_snapshot(name, revision, ("config.json",), cache_dir)
    return None if snapshot is None else snapshot.name


def cached_snapshot(
    name: str, revision: str | None, files: tuple[str, ...], cache_dir: str | None = None
) -> Path | None:
    """The cache's folder of one commit of a hub model, if it holds one of `files`."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in files:
        try:
            found = try_to_load_from_cache(name, file, cache_dir, revision)
        except HFValidationError:  # not a hub id
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _sampled_tensors(file: Path) -> list[tuple[str, str, str]]:
    """(name, type and shape, hash of the first bytes) of each tensor; the format is safetensors' own README."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = []
            for name, tensor in header.items():
                begin, end = tensor["data_offsets"]
                stream.seek(8 + length + begin)
                sample = hashlib.sha256(stream.read(min(SAMPLE, end - begin))).hexdigest()[:DIGITS]
                tensors.append((name, f"{tensor['dtype']}{tensor['shape']}", sample))
            return tensors
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeRaError(f"{str(file.parent)!r}: {file.name} is corrupt: not a safetensors file ({error}).") from error
