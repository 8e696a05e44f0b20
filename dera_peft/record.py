"""`dera.json`: which base, which adapters and which branches belong together."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dera_peft.errors import DeRaError

FILE_NAME = "dera.json"
FORMAT = 1


@dataclass(frozen=True)
class Record:
    """
    What has to be known to restore a `DeRaModel` from a folder.

    Attributes:
        base: hub id or folder of the base model.
        adapters: adapter name -> hub id or folder of the PEFT adapter.
        branches: branch name -> the adapters that its rows see; "reference" is always there.
        lam: the default λ; of several aligned branches one each, by name.
        training: how the adapter was trained (β, loss type, data, versions, ...); empty if unknown.
    """

    base: str
    adapters: dict[str, str]
    branches: dict[str, list[str]]
    lam: float | dict[str, float] = 1.0
    training: dict = field(default_factory=dict)

    @staticmethod
    def is_in(folder: str | os.PathLike) -> bool:
        return (Path(folder) / FILE_NAME).is_file()

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
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{FILE_NAME}.tmp"
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, folder / FILE_NAME)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Record":
        """
        Reads `folder/dera.json`; relative folders in it become paths from here.

        Raises:
            DeRaError: the file is missing, is not JSON, or has another format or other keys.
        """
        file = Path(folder) / FILE_NAME
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DeRaError(f"{str(folder)!r} has no {FILE_NAME}.") from None
        except ValueError as error:
            raise DeRaError(f"{str(file)!r} is not valid JSON: {error}") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise DeRaError(f"{str(file)!r} is not a record of format {FORMAT}, the one that this version reads.")
        values["lam"] = values.pop("lambda", 1.0)
        try:
            record = cls(**values)
        except TypeError as error:
            raise DeRaError(f"{str(file)!r}: {error}") from None

        def resolve(name: str) -> str:
            return os.path.normpath(Path(folder) / name) if name.startswith(".") else name

        return replace(
            record,
            base=resolve(record.base),
            adapters={name: resolve(path) for name, path in record.adapters.items()},
        )
