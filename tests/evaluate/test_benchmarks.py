"""Benchmarks beside a sweep: which rows are read, and which of them share a line."""

from dataclasses import replace

import pytest

from dera_peft.cli import lm_eval
from dera_peft.cli.app import main
from dera_peft.decoding.rows import to_line
from dera_peft.evaluate.benchmarks import FILE, BenchmarkRow, by_line, read_benchmarks

ROW = BenchmarkRow("run1", "own", 0.0, "mmlu", "acc", "none", 0.4, 0.01, 100, 0, True)


def test_the_newest_row_of_the_own_model_is_read(tmp_path):
    assert read_benchmarks(tmp_path, "own") == []
    rows = [
        replace(ROW, lam=1.0),
        ROW,
        replace(ROW, model="as it was before", value=0.1),
        replace(ROW, task="arc", stderr=None),
        replace(ROW, value=0.5),
    ]
    (tmp_path / FILE).write_text("".join(to_line(row) + "\n" for row in rows))
    assert read_benchmarks(tmp_path, "own") == [rows[4], rows[0], rows[3]]


def test_a_line_is_of_one_task_metric_filter_and_run():
    others = [
        replace(ROW, metric="acc_norm"),
        replace(ROW, filter="strict"),
        replace(ROW, run="run2", num_fewshot=5),
        replace(ROW, run="run3", num_fewshot=5, samples=10),
    ]
    lines = by_line([replace(ROW, lam=2.0), ROW, *others])
    assert lines == {
        "mmlu acc, 0-shot": [ROW, replace(ROW, lam=2.0)],
        "mmlu acc_norm": [others[0]],
        "mmlu acc (strict)": [others[1]],
        "mmlu acc, 5-shot": [others[2]],
        "mmlu acc, 5-shot, run run3": [others[3]],
    }


@pytest.mark.parametrize(
    ("found", "processes", "message"), [(None, "1", "pip install 'dera-peft[lm-eval]'"), (True, "2", "is one process")]
)
def test_without_the_extra_or_in_several_processes_it_is_refused(monkeypatch, capsys, found, processes, message):
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: found)
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(SystemExit) as end:
        main(["lm-eval", "--adapter", "a", "--tasks", "x"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
