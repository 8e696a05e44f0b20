"""Datasets by name: a hub id, a local file or folder, or a Python function."""

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError

from dera_peft.errors import DeRaError
from dera_peft.fingerprint import settings_fingerprint
from dera_peft.objects import is_object_path, load_object

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_dataset(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """
    Rows of a dataset.

    Args:
        name: a hub id; a folder, or a .json, .jsonl, .csv or .parquet file; or a function that returns a dataset, as
            path.py:name.
        split: of a dataset that has several.
        config: of a hub dataset that has several.

    Raises:
        DeRaError: there is no such dataset or split, or it can't be read.
    """
    path = Path(name)
    try:
        if is_object_path(name):
            dataset = load_object(name)()
        elif path.suffix in FORMATS:
            if not path.is_file():
                raise DeRaError(f"dataset={name!r}: there is no such file.")
            dataset = load_dataset(FORMATS[path.suffix], data_files=str(path))
            if split != "train":
                raise DeRaError(f"dataset={name!r} is one file, with the split 'train' alone; there is no {split!r}.")
        else:
            dataset = load_dataset(name, config)
    except DatasetNotFoundError as error:
        raise DeRaError(f"dataset={name!r} is neither a file, a folder, nor on the hub: {error}") from error
    except DeRaError:
        raise
    except Exception as error:  # datasets raises errors of many kinds on a file that it can't parse
        raise DeRaError(f"dataset={name!r} can't be read: {type(error).__name__}: {error}") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise DeRaError(f"dataset={name!r} has no split {split!r}; it has {list(dataset)}.")
        dataset = dataset[split]
    if not isinstance(dataset, Dataset):
        raise DeRaError(f"dataset={name!r} gave a {type(dataset).__name__}, not a datasets.Dataset.")
    if len(dataset) == 0:
        raise DeRaError(f"dataset={name!r} is empty.")
    return dataset


def dataset_fingerprint(dataset: Dataset) -> str:
    """Twelve hex digits of a dataset's columns, its length, and a thousand of its rows spread over it."""
    step = max(1, len(dataset) // 1000)
    rows = [dataset[index] for index in range(0, len(dataset), step)]
    return settings_fingerprint([dataset.column_names, len(dataset), rows])
