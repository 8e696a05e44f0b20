"""Files of results: continued, never mixed."""

import pytest
import torch
from safetensors.torch import save_file

from dera_peft import DeRaError
from dera_peft.checkpoint.fingerprint import settings_fingerprint, weights_fingerprint
from dera_peft.decoding.batching import Request
from dera_peft.decoding.prompts import Prompt, from_texts
from dera_peft.decoding.rows import Results, cut_torn, read_rows

ROW = {"index": 0, "prompt": "a", "lambda": 0.5, "sample": 0, "completion": "b"}


def test_rows_are_found_again_and_a_torn_line_is_dropped(tmp_path):
    file = tmp_path / "new" / "out.jsonl"
    Results(file, "run1").append([ROW, {**ROW, "sample": 1}])
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"run": "run1", "index": 7, "pro')
    results = Results(file, "run1")
    assert set(results.finished(from_texts(["a"]))) == {Request(0, 0.5, 0), Request(0, 0.5, 1)}
    assert file.read_bytes() == whole
    results.append([{**ROW, "sample": 2}])
    assert len(Results(file, "run1").rows) == 3


def test_other_settings_other_prompts_and_damage_are_errors_that_change_nothing(tmp_path):
    file = tmp_path / "out.jsonl"
    Results(file, "run1").append([ROW])
    before = file.read_bytes()
    with pytest.raises(DeRaError, match="other settings"):
        Results(file, "run2")
    with pytest.raises(DeRaError, match="other prompts: 'a', where --prompt 1 is 'z'"):
        Results(file, "run1").finished(from_texts(["z"]))
    assert file.read_bytes() == before
    file.write_bytes(b"what?\n" + before)
    with pytest.raises(DeRaError, match="line 1, is not a row"):
        Results(file, "run1")
    assert file.read_bytes() == b"what?\n" + before


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
    Results(tmp_path / "out.jsonl", "run1").append([{**same, **ROW, "reward": 1.0, "tokens": 3}])
    results = Results(tmp_path / "out.jsonl", "run1")
    assert len(results.finished([Prompt(0, "a", "p, line 1", columns=same)])) == 1
    with pytest.raises(DeRaError, match=message):
        results.finished([Prompt(0, "a", "p, line 1", columns=columns)])


@pytest.mark.parametrize("text", ["my notes, one line without an end", '{"run": "run2", "ind', '{"prompt": "a"}'])
def test_a_last_line_of_another_kind_is_not_cut(tmp_path, text):
    file = tmp_path / "notes"
    file.write_text(text)
    with pytest.raises(DeRaError, match="does not end with a row of these results"):
        Results(file, "run1")
    assert file.read_text() == text


def test_of_two_readers_of_a_torn_line_one_cuts_it(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"run": "r"}\n{"run": "r", "text')
    (_, torn), _ = read_rows(file), read_rows(file)
    for _ in range(2):
        cut_torn(file, torn, '{"run"')
        assert file.read_text() == '{"run": "r"}\n'


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
