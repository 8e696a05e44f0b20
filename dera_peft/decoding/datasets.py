"""Datasets by name: a hub id, a local file or folder, or a Python function."""

from pathlib import Path
from typing import cast

from datasets import (
    Dataset,
    DatasetDict,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError

from dera_peft.decoding.jsonl import parse_row
from dera_peft.errors import DeRaError
from dera_peft.user_code import is_object_path, load_object

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes


def read_dataset(name: str, split: str = "train", config: str | None = None, argument: str = "dataset_name") -> Dataset:
    """
    Rows of a dataset.

    Args:
        name: a hub id; a folder (of files, or as `save_to_disk` writes it); a .json, .jsonl, .csv or .parquet file; or
            a function that returns a dataset, as path.py:name.
        split: of a dataset that has several; or a part of one, as train[:95%]. A file's rows are the split train, and
            so are those of a function that returns a single Dataset.
        config: of a hub dataset that has several.
        argument: what names it for the user, for messages.

    Raises:
        DeRaError: there is no such dataset or split, or it can't be read.
    """
    path = Path(name)
    try:
        if is_object_path(name):
            dataset = load_object(name)()
            if isinstance(dataset, (Dataset, DatasetDict)):
                dataset = _select(dataset if isinstance(dataset, DatasetDict) else {"train": dataset}, split)
        elif path.suffix in FORMATS:
            if not path.is_file():
                raise DeRaError(f"{argument}={name!r}: there is no such file.")
            dataset = load_dataset(FORMATS[path.suffix], data_files=str(path), split=split)
        elif any((path / file).is_file() for file in SAVED):
            dataset = load_from_disk(str(path))
            dataset = _select(dataset if isinstance(dataset, DatasetDict) else {"train": dataset}, split)
        else:
            dataset = load_dataset(name, config, split=split)
    except DatasetNotFoundError as error:
        raise DeRaError(f"{argument}={name!r} is neither a file, a folder, nor on the hub: {error}") from error
    except DeRaError:
        raise
    except Exception as error:  # datasets raises errors of many kinds on a file that it can't parse
        if path.suffix in FORMATS and not path.read_bytes().strip():
            raise DeRaError(f"{argument}={name!r} is empty.") from error
        if path.suffix == ".jsonl":
            _check_rows(path, f"{argument}={name!r}")
        cause = error.__cause__ or error  # of a DatasetGenerationError, which says no more
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}" if str(cause) else type(cause).__name__
        raise DeRaError(f"{argument}={name!r}, split={split!r} can't be read: {reason}") from error
    if not isinstance(dataset, Dataset):
        raise DeRaError(f"{argument}={name!r} gave a {type(dataset).__name__}, not a datasets.Dataset.")
    if len(dataset) == 0:
        raise DeRaError(f"{argument}={name!r} is empty.")
    return dataset


def _check_rows(file: Path, source: str) -> None:
    """Raises `DeRaError` for the first line of a .jsonl file that is no row."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                parse_row(line, f"{source}, line {number}")


def _select(splits: DatasetDict | dict[str, Dataset], split: str) -> Dataset:
    """The part of these splits that `load_dataset` would read of a file's; ValueError if there is no such split."""
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    rows = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return concatenate_datasets(cast("list[Dataset]", rows))  # each is of a Dataset, and so is one
