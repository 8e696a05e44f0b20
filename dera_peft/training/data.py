"""The rows that a training program reads."""

from datasets import Dataset

from dera_peft.checkpoint.fingerprint import settings_fingerprint
from dera_peft.decoding.datasets import read_dataset


def read_splits(settings) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those to evaluate on if there are any, as a program's arguments name them."""
    name, config = settings.dataset_name, settings.dataset_config
    rows = read_dataset(name, settings.dataset_train_split, config)
    held_out = settings.dataset_test_split
    return rows, None if held_out is None else read_dataset(name, held_out, config)


def dataset_fingerprint(dataset: Dataset) -> str:
    """Twelve hex digits of a dataset's columns, its length, and a thousand of its rows spread over it."""
    step = max(1, len(dataset) // 1000)
    rows = [dataset[index] for index in range(0, len(dataset), step)]
    return settings_fingerprint([dataset.column_names, len(dataset), rows])
