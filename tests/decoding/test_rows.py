"""Logs of rows: continued, never mixed."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime

import pytest
import torch
from safetensors.torch import save_file

from dera_peft import DeRaError
from dera_peft.checkpoint.fingerprint import settings_fingerprint, weights_fingerprint
from dera_peft.decoding.prompts import Prompt, from_texts
from dera_peft.decoding.requests import Completion, Request
from dera_peft.decoding.rows import (
    GeneratedRow,
    RewardedRow,
    RowLog,
    ScoredRow,
    cut_torn,
    expect_prompts,
    from_json,
    read_rows,
    to_json,
)

ROW = GeneratedRow("run1", 0, "a", {}, 0.5, 0, "b", 3, "eos", [5, 6, 2], 2)


def open_log(file, run="run1", prompts=("a",)) -> RowLog[GeneratedRow]:
    return RowLog(file, GeneratedRow, run, expected=expect_prompts(from_texts(prompts)))


def test_a_column_of_dates_is_written_and_found_again(tmp_path):
    prompts = [Prompt(0, "a", "p", columns={"made": datetime(2024, 1, 2)})]
    for _ in range(2):
        log = RowLog(tmp_path / "out.jsonl", GeneratedRow, "run1", expected=expect_prompts(prompts))
        log.append([replace(ROW, columns=prompts[0].columns)])
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["columns"] == {
        "made": "2024-01-02 00:00:00"
    }


def test_rows_are_found_again_and_a_torn_line_is_dropped(tmp_path):
    file = tmp_path / "new" / "out.jsonl"
    open_log(file).append([ROW, replace(ROW, sample=1)])
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"run": "run1", "prompt_index": 7, "pro')
    log = open_log(file)
    assert {row.request for row in log.rows} == {Request(0, 0.5, 0), Request(0, 0.5, 1)}
    assert file.read_bytes() == whole
    log.append([replace(ROW, sample=2)])
    assert len(open_log(file).rows) == 3


def test_other_settings_other_prompts_and_damage_are_errors_that_change_nothing(tmp_path):
    file = tmp_path / "out.jsonl"
    open_log(file).append([ROW])
    before = file.read_bytes()
    with pytest.raises(DeRaError, match="other settings"):
        open_log(file, "run2")
    with pytest.raises(DeRaError, match="other prompts: 'a', where --prompt 1 is 'z'"):
        open_log(file, prompts=["z"])
    assert file.read_bytes() == before
    for damaged in (b"what?\n", before.replace(b'"run1"', b"3, 4"), before.replace(b'"sample": 0, ', b""), b"[1]\n"):
        file.write_bytes(damaged + before)
        with pytest.raises(DeRaError, match="line 1, is not a row"):
            open_log(file)
        assert file.read_bytes() == damaged + before


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"topic": "y", "weight": float("nan")}, 'other columns: \'topic\' was "x", and p, line 1 has "y"'),
        ({"topic": "x"}, "'weight' was NaN, and p, line 1 has none"),
        ({"topic": "x", "weight": float("nan"), "new": 1}, "'new' was not there, and p, line 1 has 1"),
    ],
)
def test_rows_of_other_columns_are_an_error(tmp_path, columns, message):
    """A reward may have read them."""
    same = {"topic": "x", "weight": float("nan")}
    (prompt,) = [Prompt(0, "a", "p, line 1", columns=same)]
    row = RewardedRow.of("run1", Completion(Request(0, 0.5), [1, 2, 3], "b", 3), prompt, reward=1.0)
    file = tmp_path / "out.jsonl"
    RowLog(file, RewardedRow, "run1").append([row])
    assert len(RowLog(file, RewardedRow, "run1", expected=expect_prompts([prompt])).rows) == 1
    with pytest.raises(DeRaError, match=message):
        RowLog(file, RewardedRow, "run1", expected=expect_prompts([replace(prompt, columns=columns)]))


@pytest.mark.parametrize("text", ["my notes, one line without an end", '{"run": "run2", "ind', '{"prompt": "a"}'])
def test_a_last_line_of_another_kind_is_not_cut(tmp_path, text):
    file = tmp_path / "notes"
    file.write_text(text)
    with pytest.raises(DeRaError, match="does not end with a row of these results"):
        open_log(file)
    assert file.read_text() == text


def test_of_two_readers_of_a_torn_line_one_cuts_it(tmp_path):
    file = tmp_path / "rows.jsonl"
    open_log(file).append([ROW])
    whole = file.read_text()
    file.write_text(whole + '{"run": "run1", "text')
    (_, torn), _ = read_rows(file, GeneratedRow), read_rows(file, GeneratedRow)
    for _ in range(2):
        cut_torn(file, torn, '{"run"')
        assert file.read_text() == whole


def test_each_process_appends_to_its_own_file_and_reads_all(tmp_path):
    """One that writes is no trouble to one that reads: its last line may be half there."""

    def open_log(rank: int) -> RowLog[GeneratedRow]:
        return RowLog(tmp_path / f"rows-{rank}.jsonl", GeneratedRow, "run1", pattern="rows-*.jsonl")

    first, second = open_log(0), open_log(1)
    first.append([ROW])
    second.append([replace(ROW, sample=1)])
    other = tmp_path / "rows-1.jsonl"
    other.write_text(other.read_text() + '{"run": "ru')
    assert [row.sample for row in open_log(0).rows] == [0, 1]
    assert other.read_text().endswith('{"run": "ru'), "that one is another process's to mend"
    assert [row.sample for row in open_log(1).rows] == [0, 1]
    assert other.read_text().endswith("}\n")


def test_a_row_is_its_json(tmp_path):
    """λ is called lambda, columns stand apart from the row's own values, and what was not asked for is left out."""
    row = replace(ROW, columns={"index": 7, "reward": 0.5, "run": "x"})
    assert to_json(row) == {
        "run": "run1", "prompt_index": 0, "prompt": "a", "columns": {"index": 7, "reward": 0.5, "run": "x"},
        "lambda": 0.5, "sample": 0, "completion": "b", "num_tokens": 3, "finish_reason": "eos",
        "token_ids": [5, 6, 2], "end_token_id": 2,
    }  # fmt: skip
    scored = ScoredRow("run1", 0, "a", "b", 0.5, 1, -1.0, -1.0, None, 0.5, token_ids=[3])
    assert to_json(scored).keys() >= {"perplexity", "token_ids"}
    assert "token_kl" not in to_json(scored)
    for each in (row, scored):
        assert from_json(type(each), json.loads(json.dumps(to_json(each)))) == each
    log = open_log(tmp_path / "out.jsonl")
    log.append([row])
    assert RowLog(log.file, GeneratedRow, "run1").rows == [row]


def test_a_file_of_an_earlier_version_is_refused_with_the_way_out(tmp_path):
    file = tmp_path / "out.jsonl"
    old = {"run": "run1", "topic": "x", "index": 0, "prompt": "a", "lambda": 0.5, "sample": 0, "completion": "b"}
    file.write_text(json.dumps({**old, "tokens": 3, "finish": "eos"}) + "\n")
    before = file.read_text()
    with pytest.raises(DeRaError) as caught:
        open_log(file)
    assert str(caught.value) == (
        f"'{file}', line 1, is of an earlier version, whose rows had 'index', 'tokens' and 'finish': move the file "
        "away or name another output."
    )
    assert file.read_text() == before


def test_rows_are_read_without_torch():
    program = (
        "import sys, dera_peft.decoding.rows; "
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_fingerprints_tell_settings_and_weights_apart(tmp_path):
    assert settings_fingerprint({"a": 1, "b": 2}) == settings_fingerprint({"b": 2, "a": 1})
    assert settings_fingerprint({"a": 1}) != settings_fingerprint({"a": 2})
    assert weights_fingerprint("org/hub-id") is None
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    first = weights_fingerprint(tmp_path)
    save_file({"a": tensors["a"]}, tmp_path / "model.safetensors")
    assert weights_fingerprint(tmp_path) != first
    save_file({"b": tensors["b"]}, tmp_path / "model-2.safetensors")
    assert weights_fingerprint(tmp_path) == first, "over however many files the tensors are spread"
    for changed in (tensors["b"].double(), tensors["b"].view(1, 5), tensors["b"] + 1e-6):
        save_file({"b": changed}, tmp_path / "model-2.safetensors")
        assert weights_fingerprint(tmp_path) != first
    (tmp_path / "model-2.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(DeRaError, match="is corrupt"):
        weights_fingerprint(tmp_path)


@pytest.mark.parametrize(
    "values",
    [{"lam": "0.5"}, {"sample": 0.5}, {"num_tokens": True}, {"columns": [1]}, {"prompt": None}, {"completion": 3}],
)
def test_a_row_with_a_value_of_another_type_is_no_row(tmp_path, values):
    (tmp_path / "rows.jsonl").write_text(json.dumps(to_json(ROW)) + "\n\n")
    assert read_rows(tmp_path / "rows.jsonl", GeneratedRow) == ([ROW], b""), "a blank line at the end is none either"
    (tmp_path / "rows.jsonl").write_text(json.dumps(to_json(replace(ROW, **values))) + "\n")
    with pytest.raises(DeRaError, match="line 1, is not a row of results"):
        read_rows(tmp_path / "rows.jsonl", GeneratedRow)


def test_a_full_disk_is_one_message():
    with pytest.raises(DeRaError, match="'/dev/full' can't be written: No space left on device"):
        open_log("/dev/full").append([ROW])
