"""Datasets by name: what is told of one that can't be read."""

import pytest

from dera_peft import DeRaError
from dera_peft.decoding.datasets import read_dataset


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "rows.jsonl', line 3: not valid JSON"),
        ("[1]", "rows.jsonl', line 3: a row must be a JSON object"),
    ],
)
def test_a_malformed_row_is_told_with_its_line(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n' + line + '\n{"prompt": "c"}\n')
    with pytest.raises(DeRaError, match=message):
        read_dataset(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("content", ["", "\n", " \r\n"])
def test_an_empty_file_is_called_so(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DeRaError, match=rf"^dataset_name='.*{name}' (is empty\.|has no )"):
        read_dataset(str(tmp_path / name))


def test_what_a_reader_raises_is_told_with_its_own_words(tmp_path):
    (tmp_path / "rows.parquet").write_text("no parquet")
    (tmp_path / "rows.json").write_text("[]")
    for name, words in (("rows.parquet", "Parquet"), ("rows.json", "no data")):
        with pytest.raises(DeRaError, match=rf"{name}', split='train' can't be read: .*{words}"):
            read_dataset(str(tmp_path / name))
