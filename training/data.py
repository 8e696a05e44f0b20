"""Datasets by name: a hub id, a local file or folder, or a Python function."""

from pathlib import Path

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset
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
        split: of a dataset that has several; or a part of one, as train[:95%]. A file's rows are the split train, and
            so are those of a function that returns a single Dataset.
        config: of a hub dataset that has several.

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
                raise DeRaError(f"dataset={name!r}: there is no such file.")
            dataset = load_dataset(FORMATS[path.suffix], data_files=str(path), split=split)
        else:
            dataset = load_dataset(name, config, split=split)
    except DatasetNotFoundError as error:
        raise DeRaError(f"dataset={name!r} is neither a file, a folder, nor on the hub: {error}") from error
    except DeRaError:
        raise
    except Exception as error:  # datasets raises errors of many kinds on a file that it can't parse
        raise DeRaError(f"dataset={name!r}, split={split!r}: {type(error).__name__}: {error}") from error
    if not isinstance(dataset, Dataset):
        raise DeRaError(f"dataset={name!r} gave a {type(dataset).__name__}, not a datasets.Dataset.")
    if len(dataset) == 0:
        raise DeRaError(f"dataset={name!r} is empty.")
    return dataset


def _select(splits: dict[str, Dataset], split: str) -> Dataset:
    """The part of these splits that `load_dataset` would read of a file's; ValueError if there is no such split."""
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def read_splits(script_args) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those to evaluate on if there are any, as a program's arguments name them."""
    name, config = script_args.dataset_name, script_args.dataset_config
    rows = read_dataset(name, script_args.dataset_train_split, config)
    held_out = script_args.dataset_test_split
    return rows, None if held_out is None else read_dataset(name, held_out, config)


def dataset_fingerprint(dataset: Dataset) -> str:
    """Twelve hex digits of a dataset's columns, its length, and a thousand of its rows spread over it."""
    step = max(1, len(dataset) // 1000)
    rows = [dataset[index] for index in range(0, len(dataset), step)]
    return settings_fingerprint([dataset.column_names, len(dataset), rows])
