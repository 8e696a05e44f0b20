"""What `dera sweep` prints: tables that a narrow terminal does not cut, and why something is not there."""

import io

import pytest
from rich.console import Console

from dera_peft.cli import sweep as command
from dera_peft.cli.sweep_tables import further_columns, main_columns, tables
from dera_peft.evaluate import run
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.summary import summarise
from dera_peft.evaluate.result import SweepResult

NAMES = (
    "first",
    "exact_match:answer",
    "rewards/a_long_path.py:politeness",
    "perplexity",
    "distinct-2",
    "[/x]",
    "length",
)
LAMBDAS = (-0.25, 0.0, 0.125, 1.0, 1.0625)


@pytest.fixture(scope="module")
def summaries():
    return summarise(
        [
            {
                "arm": "logits", "lambda": lam, "prompt_index": index, "sample": 0, "num_tokens": 400,
                "finish_reason": "eos",
                "kl": 60 * lam * lam, "columns": {"kind": "a group of a long name" if index else "b"},
                "rewards": dict.fromkeys(NAMES, 1234.5678 * lam),
                # λ=1 comes first, as at a λ that is compared with it alone
                "judged": {against: 1 for against in ("1", "0") if lam != float(against)},
            }
            for lam in LAMBDAS
            for index in range(3)
        ],
        group="kind",
    )  # fmt: skip


def shown(columns, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    for table in tables([f"{lam:g}" for lam in LAMBDAS], columns, width):
        console.print(table)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [50, 80, 200])
def test_nothing_is_cut(summaries, width):
    columns = further_columns(summaries)
    assert [heading for heading, _ in columns[-3:]] == ["worst group", "wins against λ=0", "wins against λ=1"]
    lines = shown(columns, width)
    text = "\n".join(lines)
    assert "…" not in text
    assert max(map(len, lines)) <= width
    for _, cells in columns:
        assert all(cell in text for cell in cells)
    # each table has its λ in front
    heads = [line for line in lines if line.split()[:1] == ["λ"]]
    for lam in LAMBDAS:
        assert [line.split()[0] for line in lines].count(f"{lam:g}") == len(heads)
    assert len(heads) > 1 if width < 200 else len(heads) == 1
    for name in ("perplexity", "distinct-2", "[/x]", "length"):
        assert name in text


def test_the_main_table_is_one_at_80_columns(summaries):
    assert len(tables([f"{lam:g}" for lam in LAMBDAS], main_columns(summaries), 80)) == 1
    assert "KL per token" in shown(main_columns(summaries), 80)[0]


def test_no_further_columns():
    rows = [
        {
            "arm": "logits", "lambda": lam, "prompt_index": 0, "sample": 0, "num_tokens": 4, "finish_reason": "eos",
            "kl": lam,
            "rewards": {"r": None},
        }
        for lam in LAMBDAS
    ]  # fmt: skip
    assert tables([], further_columns(summarise(rows)), 80) == []


def test_what_is_too_wide_alone_is_wrapped():
    lines = shown([("group", [f"g{'o' * 30}up +{lam:g}" for lam in LAMBDAS])], 24)
    assert max(map(len, lines)) <= 24
    text = "".join("".join(lines).split())
    for lam in LAMBDAS:
        assert f"up+{lam:g}" in text
    assert text.count("o") == 30 * len(LAMBDAS) + 1


def test_why_there_is_no_curve_and_no_recommendation(summaries, monkeypatch, capsys):
    result = SweepResult(
        summaries=summaries,
        curve=Curve(reason="greedy decoding draws no samples"),
        recommendation=None,
        no_recommendation="the reward '[/x]' has no value at any λ.",
        best=None,
        command=None,
        rows=[{"arm": "logits", "prompt_index": 0, "prompt": "p", "lambda": 0.0, "sample": 0, "completion": "c"}],
        reused=0,
        failed=0,
        files=["report.html"],
    )
    monkeypatch.setattr(run, "sweep", lambda config, progress: result)
    command.sweep(command.SweepSettings(prompts=["p"], output_dir="[/out]"))
    *_, curve, reason, _, files = capsys.readouterr().out.splitlines()
    assert curve == "Between the decoded λ nothing is estimated: greedy decoding draws no samples."
    assert reason == "No λ is recommended: the reward '[/x]' has no value at any λ."
    assert files == "written to [/out]: report.html"
