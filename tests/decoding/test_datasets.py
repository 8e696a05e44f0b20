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
