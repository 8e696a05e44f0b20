"""A prompts file may call its columns as the results call their own values; files of an earlier version are refused."""

import json
import sys
from pathlib import Path

import pytest

from dera_peft.cli import app

ROWS = [
    {"prompt": "Rain fell", "index": 7, "reward": 0.5, "run": "x", "columns": 1, "finish_reason": "y"},
    {"prompt": "A fox", "index": 8, "reward": 1.5, "run": "z", "columns": 2, "finish_reason": "w"},
]
REWARD = """
def by_column(prompts, completions, index, reward, run, columns, finish_reason):
    return [10 * i + r + len(c) for i, r, c in zip(index, reward, completions)]
"""


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "reward.py").write_text(REWARD)
    for name in ("plot_sweep", "plot_pareto", "write_report"):  # they take seconds, and have tests of their own
        monkeypatch.setattr(f"dera_peft.evaluate.results.{name}", lambda *_, **__: None)
    return tmp_path


@pytest.fixture
def dera(monkeypatch, capsys, tiny_base, tiny_adapter):
    """Runs a command on the tiny model; returns exit code, stdout and stderr."""

    def dera(command: str, *arguments) -> tuple[int, str, str]:
        model = ["--base", tiny_base, "--adapter", tiny_adapter]
        monkeypatch.setattr(sys, "argv", ["dera", command, *map(str, (*model, *arguments))])
        with pytest.raises(SystemExit) as caught:
            app.main()
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return dera


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def columns_of(index: int) -> dict:
    return {name: value for name, value in ROWS[index].items() if name != "prompt"}


def test_generate_and_score(dera, files):
    output = files / "out.jsonl"
    arguments = ["--prompts", files / "prompts.jsonl", "--lambda", "0,1", "--max-new-tokens", 4, "--output", output]
    code, _, err = dera("generate", *arguments)
    assert code == 0, err
    rows = read(output)
    assert len(rows) == 4
    assert all(row["columns"] == columns_of(row["prompt_index"]) for row in rows)
    assert {row["finish_reason"] for row in rows} <= {"eos", "length"}
    code, _, err = dera("generate", *arguments)
    assert (code, "4 of 4 completions are there already" in err) == (0, True)
    code, out, err = dera("score", "--completions", output, "--lambda", 1, "--json")
    assert code == 0, err
    assert sorted(json.loads(line)["completion"] for line in out.splitlines()) == sorted(r["completion"] for r in rows)
    (files / "prompts.jsonl").write_text("".join(json.dumps({**row, "reward": 9}) + "\n" for row in ROWS))
    code, _, err = dera("generate", *arguments)
    assert code == 2
    assert "holds the results of other columns: 'reward' was" in " ".join(err.split())


def test_a_sweep_gives_them_to_its_rewards(dera, files):
    arguments = [
        "--prompts", files / "prompts.jsonl", "--reward", f"{files}/reward.py:by_column", "--group", "index",
        "--lambda", "0,1", "--samples", 1, "--max-new-tokens", 4, "--output-dir", files / "out",
    ]  # fmt: skip
    code, _, err = dera("sweep", *arguments)
    assert code == 0, err
    rows = read(files / "out" / "samples.jsonl")
    for row in rows:
        own = ROWS[row["prompt_index"]]
        assert row["columns"] == columns_of(row["prompt_index"])
        assert row["rewards"] == {"by_column": 10 * own["index"] + own["reward"] + len(row["completion"])}
    assert "by_column_group_7" in (files / "out" / "summary.csv").read_text().splitlines()[0]
    code, _, err = dera("sweep", *arguments)
    assert "all 4 completions are there already" in err


@pytest.mark.parametrize("name", ["prompts", "completions"])
def test_a_column_that_is_an_argument_of_every_reward_is_refused_before_decoding(dera, files, monkeypatch, name):
    monkeypatch.setattr("dera_peft.evaluate.arms.DeRaModel", None)
    (files / "prompts.jsonl").write_text(json.dumps({"prompt": "Rain", name: "x"}) + "\n")
    arguments = ["--prompts", files / "prompts.jsonl", "--output-dir", files / "out"]
    code, _, err = dera("sweep", *arguments, "--reward", f"{files}/reward.py:by_column")
    assert code == 2
    assert f"column {name!r}: a reward is given the columns by name" in " ".join(err.split())


def test_files_of_an_earlier_version_are_refused_with_the_way_out(dera, files):
    old = {"run": "0123456789abcdef", "index": 0, "prompt": "Rain", "lambda": 0.0, "sample": 0, "completion": " fell"}
    file = files / "old.jsonl"
    file.write_text(json.dumps({**old, "tokens": 2, "finish": "eos"}) + "\n")
    earlier = "line 1, is of an earlier version, whose rows had 'index', 'tokens' and 'finish': move the file away or"
    for arguments in (
        ["generate", "--prompt", "Rain", "--output", file],
        ["score", "--completions", files / "prompts.jsonl", "--output", file],
    ):
        if arguments[0] == "score":
            (files / "prompts.jsonl").write_text('{"prompt": "Rain", "completion": " fell"}\n')
        code, _, err = dera(*arguments)
        assert code == 2
        assert earlier in " ".join(err.replace("│", " ").split())
    code, _, err = dera("score", "--completions", file)
    assert code == 2
    assert "'finish' is what an earlier version called 'finish_reason'" in " ".join(err.replace("│", " ").split())
    parts = files / "out" / "parts"
    parts.mkdir(parents=True)
    old_part = {**old, "line": "logits", "ids": [3, 4], "finish": "eos"}
    (parts / "completions.0.jsonl").write_text(json.dumps(old_part) + "\n")
    code, _, err = dera(
        "sweep", "--prompts", files / "prompts.jsonl", "--reward", "length", "--output-dir", files / "out"
    )
    assert code == 2
    assert earlier in " ".join(err.replace("│", " ").split())
