"""`dera.json`: which base, which adapters and which branches belong together, and how they were trained."""

import json
import logging
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dera_peft.checkpoint.fingerprint import base_fingerprint, weights_fingerprint
from dera_peft.checkpoint.hub import folder_with
from dera_peft.engine.names import LOGITS, REFERENCE, WEIGHTS
from dera_peft.engine.plan import check_default_lam
from dera_peft.errors import DeRaError
from dera_peft.files import write_atomically
from dera_peft.messages import warn_once

FILE_NAME = "dera.json"
FORMAT = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """
    What has to be known to restore a `DeRaModel` from a folder.

    Attributes:
        base: hub id or folder of the base model.
        adapters: adapter name -> hub id or folder of the PEFT adapter.
        branches: branch name -> the adapters that its rows see; "reference" is always there.
        lam: the default λ; of several aligned branches one each, by name.
        mixing: "logits", or "weights": what λ mixes.
        base_fingerprint: of the base's weights, see `fingerprint.base_fingerprint`; None if unknown.
        base_revision: the commit of a hub base; None for a folder, or if unknown.
        training: how the adapter was trained, empty if unknown. `dera dpo` and `dera sft` write: method, beta,
            loss_type, quantization ("nf4", "int8", another name, or null), dtype, mixed_precision, dataset,
            dataset_fingerprint, rows, steps, metrics, processes, versions, and end_tokens: the tokens, as texts, that
            ended what it was trained on.
    """

    base: str
    adapters: dict[str, str]
    branches: dict[str, list[str]]
    lam: float | dict[str, float] = 1.0
    mixing: str = LOGITS
    base_fingerprint: str | None = None
    base_revision: str | None = None
    training: dict = field(default_factory=dict)

    @staticmethod
    def is_in(folder: str | os.PathLike) -> bool:
        """Whether a folder, or the repository of a hub id, has a record."""
        return folder_with(os.fspath(folder), FILE_NAME) is not None

    @property
    def aligned(self) -> list[str]:
        """The names of the aligned branches, which λ by name are given for."""
        return [name for name in self.branches if name != REFERENCE]

    def with_base(self, base: str) -> "Record":
        """The same adapters over another copy of the base; `check_base` tells whether it is one."""
        return self if base == self.base else replace(self, base=base, base_revision=None)

    @property
    def branches_differ(self) -> bool:
        """Whether they have different adapters."""
        return len(set(map(tuple, self.branches.values()))) > 1

    def weights(self) -> dict[str, Any]:
        """Which weights are named, the local ones by their fingerprints, as a JSON-like value."""
        return {
            "base": (self.base, base_fingerprint(self.base) if Path(self.base).is_dir() else None),
            "adapters": {name: (folder, weights_fingerprint(folder)) for name, folder in self.adapters.items()},
            "branches": self.branches,
            "mixing": self.mixing,
        }

    def check_base(self, revision: str | None = None) -> None:
        """
        Compares the base (of the hub: at `revision`) with the one that the adapters were trained on, where both
        fingerprints are to be had.

        Raises:
            DeRaError: they have other weights.
        """
        found = base_fingerprint(self.base, revision)
        if None not in (found, self.base_fingerprint) and found != self.base_fingerprint:
            raise DeRaError(
                f"base={self.base!r} is not the base that the adapter was trained on: its weights' fingerprint is "
                f"{found}, and {FILE_NAME} names {self.base_fingerprint}. Give the base that it was trained on."
            )

    def check_quantization(self, quantization: str | None, is_stored: bool = False) -> None:
        """
        Warns where the base is quantized in another way than in training, which changes the reference a little.

        Args:
            quantization: of the base that is here, by its name.
            is_stored: whether its checkpoint is quantized so.
        """
        if not self.training.keys() - {"end_tokens"}:  # how it was trained is not known
            return
        trained = self.training.get("quantization")
        if trained != quantization:
            can_be_asked = not is_stored and trained in (None, "nf4", "fp4", "int8")
            way_out = f" (quantization={trained!r} gives them)" if can_be_asked else ""
            warn_once(
                logger,
                f"the adapter was trained on a base {_quantized(trained)}, and this one is {_quantized(quantization)}: "
                f"reference and aligned model differ slightly from those of the training{way_out}.",
            )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `folder/dera.json`, with local folders relative to it, so that the tree can be moved as a whole."""
        folder = Path(folder).resolve()

        def relative(name: str) -> str:
            if not Path(name).is_dir():
                return name  # a hub id
            path = Path(os.path.relpath(Path(name).resolve(), folder)).as_posix()
            return path if path.startswith(".") else f"./{path}"

        values = asdict(
            replace(
                self,
                base=relative(self.base),
                adapters={name: relative(path) for name, path in self.adapters.items()},
            )
        )
        values = {"format": FORMAT, **values}
        values["lambda"] = values.pop("lam")
        values["training"] = values.pop("training")  # the longest comes last
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE_NAME, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Record":
        """
        Reads the `dera.json` of a folder or a hub repository; relative folders in it become paths from here, of a hub
        repository those in the hub's cache.

        Raises:
            DeRaError: the file is missing, is not JSON, or has another format, other keys or values that don't fit.
        """
        folder = folder_with(os.fspath(folder), FILE_NAME) or folder
        file = Path(folder) / FILE_NAME
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DeRaError(f"{str(folder)!r} has no {FILE_NAME}.") from None
        except OSError as error:
            raise DeRaError(f"{str(file)!r} can't be read: {error.strerror}.") from error
        except ValueError as error:
            raise DeRaError(f"{str(file)!r} is not valid JSON: {error}") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise DeRaError(f"{str(file)!r} is not a record of format {FORMAT}, the one that this version reads.")
        values["lam"] = values.pop("lambda", 1.0)
        try:
            record = cls(**values)
        except TypeError as error:
            raise DeRaError(f"{str(file)!r}: {error}") from None
        if problem := record._problem():
            raise DeRaError(f"{str(file)!r}: {problem}.")
        try:
            lam = check_default_lam(record.lam, [branch for branch in record.branches if branch != REFERENCE])
        except DeRaError as error:
            raise DeRaError(f"{str(file)!r}: {error}") from None

        def resolve(name: str) -> str:
            if not name.startswith("."):
                return name
            path = os.path.normpath(Path(folder) / name)
            # one that is not there must not be taken for a hub id
            return path if os.path.isdir(path) or path.startswith((".", "/")) else f"./{path}"

        return replace(
            record,
            lam=lam,
            base=resolve(record.base),
            adapters={name: resolve(path) for name, path in record.adapters.items()},
            branches={REFERENCE: record.branches[REFERENCE], **record.branches},  # the reference is always the first
        )

    def _problem(self) -> str | None:
        """What a file's values have that no record has."""
        if not isinstance(self.base, str) or not self.base:
            return f'"base" must name a model; it is {self.base!r}'
        if not isinstance(self.adapters, dict) or not all(isinstance(path, str) for path in self.adapters.values()):
            return f'"adapters" must map names to folders or hub ids; it is {self.adapters!r}'
        if self.mixing not in (LOGITS, WEIGHTS):
            return f'"mixing" must be {LOGITS!r} or {WEIGHTS!r}; it is {self.mixing!r}'
        if not isinstance(self.training, dict):
            return f'"training" must be an object; it is {self.training!r}'
        ends = self.training.get("end_tokens", [])
        if not isinstance(ends, list) or not all(isinstance(name, str) for name in ends):
            return f'"end_tokens" in "training" must be a list of texts; it is {ends!r}'
        if not isinstance(self.branches, dict) or not all(isinstance(names, list) for names in self.branches.values()):
            return f'"branches" must map names to lists of adapters; it is {self.branches!r}'
        if REFERENCE not in self.branches:
            return f'"branches" has no {REFERENCE!r}; it has {list(self.branches)}'
        if len(self.branches) < 2:
            return '"branches" has no aligned branch beside the reference'
        for branch, names in self.branches.items():
            if unknown := [name for name in names if not isinstance(name, str) or name not in self.adapters]:
                return f"branch {branch!r} names the adapter {unknown[0]!r}, and there are {list(self.adapters)}"
            if branch != REFERENCE and not names:
                return f"branch {branch!r} has no adapter"
        return None


def _quantized(name: str | None) -> str:
    return "unquantized" if name is None else f"quantized to {name}"
