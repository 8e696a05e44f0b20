"""The logs of a sweep's rows, of several processes."""

import pytest

from dera_peft import DeRaError
from dera_peft.evaluate.rows import CompletionRow, Key, open_log


def test_a_torn_line_is_made_again_and_a_damaged_file_is_told(tmp_path):
    values = {"prompt": "p", "completion": "c", "token_ids": [3], "finish_reason": "eos"}
    rows = [CompletionRow("a", *Key("logits", 0, 0.0, sample), **values) for sample in range(2)]
    open_log(tmp_path, CompletionRow, 0).append(rows[:1])
    open_log(tmp_path, CompletionRow, 1).append(rows[1:])
    mine, other = (tmp_path / "parts" / f"completions.{rank}.jsonl" for rank in range(2))
    whole = mine.read_text()
    for file in (mine, other):
        file.write_text(file.read_text() + whole[:20])
    assert open_log(tmp_path, CompletionRow, 0).rows == rows
    assert mine.read_text() == whole
    assert other.read_text() != whole, "that one is another process's to mend"
    for damaged in ("what?", whole.strip().replace('"token_ids"', '"ids"')):
        mine.write_text(damaged + "\n")
        with pytest.raises(DeRaError, match="line 1, is not a row of results"):
            open_log(tmp_path, CompletionRow, 1)
