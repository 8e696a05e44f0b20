"""Branches that differ by system prompts, behind the commands: each against prompts that were put together by hand."""

import json
import sys
from pathlib import Path

import pytest
from tiny_models import make_tokenizer
from transformers import AutoTokenizer

from dera_peft import DeRaModel
from dera_peft.cli import app
from dera_peft.decoding.batching import decode
from dera_peft.decoding.chats import takes_system
from dera_peft.decoding.prompts import encode, from_rows
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.evaluate.analysis.recommend import Recommendation

PRINCIPLE, OTHER, TEXTS = "Name the moon.", "Sell bread.", ["Rain fell on", "A fox crossed the"]
GREEDY = ["--greedy", "--max-new-tokens", 6]


@pytest.fixture
def dera(monkeypatch, capsys, tiny_base):
    """Runs a command on the tiny base alone; returns exit code, stdout and stderr."""

    def dera(command: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dera", command, "--base", *map(str, (tiny_base, *arguments))])
        with pytest.raises(SystemExit) as caught:
            app.main()
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return dera


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return file


def by_hand(base, adapter, aligned: list[str], reference: list[str], lambdas) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = DeRaModel.from_pretrained(base, adapter)
    ids, reference_ids = ([tokenizer(text).input_ids for text in texts] for texts in (aligned, reference))
    requests = [Request(index, lam) for index in range(len(aligned)) for lam in lambdas]
    sampling = Sampling(max_new_tokens=6, temperature=0)
    batches = decode(model, tokenizer, ids, requests, sampling, reference_prompts=reference_ids)
    return {(each.request.index, each.request.lam): each.tokens for batch in batches for each in batch}


@pytest.mark.parametrize(
    ("options", "aligned", "reference"),
    [
        (["--principle", PRINCIPLE], f"{PRINCIPLE}\n\n", ""),
        (["--reference-system", OTHER], "", f"{OTHER}\n\n"),
        (["--principle", PRINCIPLE, "--reference-system", OTHER], f"{PRINCIPLE}\n\n", f"{OTHER}\n\n"),
    ],
    ids=["principle", "reference's", "both"],
)
def test_each_option_is_of_its_own_branch(dera, tiny_base, tiny_adapter, prompts, options, aligned, reference):
    """With an adapter and without one the other branch reads the prompt as it is."""
    sides = [aligned + text for text in TEXTS], [reference + text for text in TEXTS]
    for adapter in (None, tiny_adapter):
        own = [] if adapter is None else ["--adapter", adapter]
        _, out, _ = dera("generate", *own, *options, "--prompts", prompts, "--lambda", "0,1,3", *GREEDY, "--json")
        rows = [json.loads(line) for line in out.splitlines()]
        found = {(row["prompt_index"], row["lambda"]): row["token_ids"] for row in rows}
        assert found == by_hand(tiny_base, adapter, *sides, (0.0, 1.0, 3.0))
        assert {row["prompt"] for row in rows} == set(TEXTS)


def test_it_continues_its_own_rows_alone(dera, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    common = ["--prompts", prompts, "--lambda", "0,2", *GREEDY, "--output", output]
    assert dera("generate", *common, "--principle", PRINCIPLE)[0] == 0
    before = output.read_bytes()
    assert dera("generate", *common, "--principle", PRINCIPLE)[0] == 0
    assert output.read_bytes() == before
    for options in (["--principle", OTHER], ["--principle", PRINCIPLE, "--reference-system", OTHER]):
        code, _, error = dera("generate", *common, *options)
        assert code == 2
        assert "holds the results of other settings" in error


def test_score_and_sweep_and_check(dera, prompts, tmp_path, monkeypatch):
    output, scores, folder = tmp_path / "out.jsonl", tmp_path / "scores.jsonl", tmp_path / "sweep"
    for name in ("plot_sweep", "plot_pareto"):  # they take seconds
        monkeypatch.setattr(f"dera_peft.evaluate.results.{name}", lambda *_, **__: None)
    given = ["--principle", PRINCIPLE]
    sampling = ["--lambda", "0,1,2", "--samples", 1, "--max-new-tokens", 6, "--seed", 3]
    assert dera("generate", *given, "--prompts", prompts, *sampling, "--output", output)[0] == 0
    assert dera("score", *given, "--completions", output, "--lambda", "0,1,2", "--output", scores)[0] == 0
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    assert max(row["kl"] for row in rows if row["lambda"] == 2) > 0.1
    assert {row["kl"] for row in rows if row["lambda"] == 0} == {0}
    code, out, _ = dera("sweep", *given, "--prompts", prompts, *sampling, "--reward", "length", "--output-dir", folder)
    assert code == 0
    assert "β" not in out
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    generated = [json.loads(line) for line in output.read_text().splitlines()]
    assert {(r["prompt_index"], r["lambda"], r["completion"]) for r in samples} == {
        (r["prompt_index"], r["lambda"], r["completion"]) for r in generated
    }
    kl = {(row["lambda"], row["completion"]): row["kl"] for row in rows}
    for row in samples:
        assert row["kl"] == pytest.approx(kl[row["lambda"], row["completion"]], abs=1e-4)
    page = (folder / "report.html").read_text()
    assert PRINCIPLE in page
    assert "system prompt, aligned" in page
    code, out, _ = dera("sweep", *given, "--prompts", prompts, "--max-new-tokens", 4, "--lambda", "0,1", "--check")
    assert "The model responds to λ" in out


def test_without_anything_that_differs(dera, prompts):
    code, _, _ = dera("generate", "--prompts", prompts, *GREEDY)
    assert code == 0
    same = ["--principle", PRINCIPLE, "--reference-system", PRINCIPLE]
    for options in ([], same):
        code, _, error = dera("generate", "--prompts", prompts, "--lambda", "0.5", *options)
        assert code == 2
        assert "or give a principle" in error
    code, _, error = dera("generate", "--prompts", prompts, "--principle", " ")
    assert (code, "not blank" in error) == (2, True)


def encoded(tokenizer, rows, chat: bool) -> list[str]:
    config = type("Config", (), {"is_encoder_decoder": False, "get_text_config": lambda self: self})()
    found = encode(from_rows(rows, "prompts"), tokenizer, config, 1, chat, PRINCIPLE)
    return [tokenizer.decode(ids) for ids in found]


def test_where_the_system_prompt_stands():
    tokenizer = make_tokenizer()
    chat = [{"role": "user", "content": "Hi"}]
    rows = ["Hi", chat, {"prompt": chat, "system": "Own."}]
    assert takes_system(tokenizer)
    assert encoded(tokenizer, rows, chat=True) == [
        f"<s>system: {PRINCIPLE}\nuser: Hi\nassistant:",
        f"<s>system: {PRINCIPLE}\nuser: Hi\nassistant:",
        f"<s>system: {PRINCIPLE}\n\nOwn.\nuser: Hi\nassistant:",
    ]
    assert encoded(tokenizer, ["Hi", {"prompt": "Hi", "system": "Own."}], chat=False) == [
        f"{PRINCIPLE}\n\nHi",
        f"{PRINCIPLE}\n\nOwn.\n\nHi",
    ]
    template = tokenizer.chat_template
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + template
    drops = template.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    for tokenizer.chat_template in (refuses, drops):
        assert not takes_system(tokenizer)
        assert encoded(tokenizer, ["Hi"], chat=True) == [f"<s>user: {PRINCIPLE}\n\nHi\nassistant:"]


def test_a_recommendation_does_not_speak_of_training():
    values = dict.fromkeys(Recommendation.__dataclass_fields__) | {"lam": 2.0, "notes": (), "prompts_differ": True}
    recommendation = Recommendation(**values)
    assert recommendation._retraining() == []
    assert recommendation._trained == "the model with its own prompt"
