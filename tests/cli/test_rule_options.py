"""Rules at a token on the command line: rows, their continuation, and scores, against two whole models."""

import json
from collections import Counter

import pytest
import torch
from tiny_models import make_tokenizer
from two_models import combined_by_hand, load_two

from dera_peft import DeRaError, DeRaModel
from dera_peft.decoding.scoring import score

TEXTS = ["The old lighthouse", "Rain fell on"]
NEW = 8


@pytest.fixture
def model(tiny_base, tiny_adapter) -> list[str]:
    return ["--base", str(tiny_base), "--adapter", str(tiny_adapter)]


@pytest.fixture(scope="module")
def two(tiny_base, tiny_adapter):
    return load_two(tiny_base, tiny_adapter)


@torch.no_grad()
def along(two, text: str, tokens: list[int] | None, rule: str, schedule: dict[int, float]):
    """Greedy tokens, or those given: their ids, log p under the rule, KL and λ."""
    tokenizer = make_tokenizer()
    ids = tokenizer(text)["input_ids"]
    start, left, values = len(ids), float((rule + ":0").split(":")[1]), []
    for place in range(NEW if tokens is None else len(tokens)):
        z_ref, z_aligned = (model(torch.tensor([ids])).logits[0, -1] for model in two)
        lam = next(value for at, value in sorted(schedule.items(), reverse=True) if place >= at)
        logits, chosen, spent = combined_by_hand(rule, z_ref, z_aligned, lam, left)
        left -= spent
        ids.append(int(logits.argmax()) if tokens is None else tokens[place])
        values.append((float(logits.log_softmax(-1)[ids[-1]]), spent, chosen))
        if tokens is None and ids[-1] == tokenizer.eos_token_id:
            break
    return ids[start:], *map(list, zip(*values, strict=True))


def rows_of(text: str) -> list[dict]:
    """In the order of the prompts; they are written in that of their lengths."""
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda row: row["prompt_index"])


CASES = [  # options, the rule, λ, and what rows say
    (["--lambda", "2", "--combine", "kl:0.20"], "kl:0.2", {0: 2.0}, {"combine": "kl:0.2"}),
    (["--combine", "aad:0.3"], "aad:0.3", {0: 1.0}, {"combine": "aad:0.3"}),
    (
        ["--lambda-schedule", "0:2,3:0.5", "--combine", "kl_total:4"],
        "kl_total:4",
        {0: 2.0, 3: 0.5},
        {"combine": "kl_total:4", "lambda_schedule": {"0": 2.0, "3": 0.5}},
    ),
    (["--lambda-schedule", "0:2,3:0.5"], "linear", {0: 2.0, 3: 0.5}, {"lambda_schedule": {"0": 2.0, "3": 0.5}}),
]


@pytest.mark.parametrize(
    ("options", "rule", "schedule", "said"), CASES, ids=lambda case: str(case) if isinstance(case, str) else ""
)
def test_generate_and_score(dera, model, two, tmp_path, options, rule, schedule, said):
    prompts = [each for text in TEXTS for each in ("--prompt", text)]
    code, out, _ = dera("generate", *model, *options, *prompts, "--greedy", "--max-new-tokens", NEW, "--json")
    assert code == 0
    (tmp_path / "out.jsonl").write_text(out)
    scored = dera("score", *model, *options, "--completions", tmp_path / "out.jsonl", "--tokens", "--json")[1]
    # the tokens of another strength, of which a rule may leave some out
    dera("generate", *model, "--lambda=-1", *prompts, "--max-new-tokens", NEW, "--output", tmp_path / "other.jsonl")
    other = (tmp_path / "other.jsonl").read_text()
    assert not {"combine", "lambda_schedule", "token_lambda"} & rows_of(other)[0].keys()
    others = dera("score", *model, *options, "--completions", tmp_path / "other.jsonl", "--tokens", "--json")[1]
    left_out = 0
    for text, row, by_row, plain, by_plain in zip(TEXTS, *map(rows_of, (out, scored, other, others)), strict=True):
        tokens, log_p, kl, lam = along(two, text, None, rule, schedule)
        assert row["token_ids"] == tokens
        near = 0.02 if rule == "kl_total:4" else 1e-3  # 1e-5 of the budget is kept back, and shows at its end
        assert by_row["token_log_p"] == pytest.approx(log_p, abs=near)
        assert by_row["token_kl"] == pytest.approx(kl, rel=1e-3, abs=1e-4)
        assert by_row["kl"] == pytest.approx(sum(kl), rel=1e-3, abs=1e-4)
        assert row["lambda"] == by_row["lambda"] == schedule[0]
        for each in (row, by_row):
            assert {name: each[name] for name in ("combine", "lambda_schedule") if name in each} == said
            if rule == "aad:0.3":
                assert "token_lambda" not in each
            else:
                assert each["token_lambda"] == pytest.approx(lam, abs=0.03)
        _, log_p, _, _ = along(two, text, plain["token_ids"], rule, schedule)
        left_out += log_p.count(float("-inf"))
        log_p = [None if value == float("-inf") else pytest.approx(value, abs=near) for value in log_p]
        assert by_plain["token_log_p"] == log_p
        assert (by_plain["log_p"] is None) == (None in log_p)
    assert (left_out > 0) == rule.startswith("aad")


def test_rows_of_several_rules_in_one_file_that_is_continued(dera, model, tmp_path):
    file, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    options = ["--prompt", TEXTS[0], "--max-new-tokens", "6", "--samples", 2]
    jsd = ["--combine", "jsd"]
    for asked in (["--lambda", 2], ["--lambda", 2, *jsd], ["--lambda-schedule", "0:2,2:1", *jsd]):
        assert dera("generate", *model, *options, *asked, "--output", whole)[0] == 0
    kept = whole.read_text().splitlines(keepends=True)
    file.write_text("".join(kept[:3]) + kept[3][:40])  # as an interruption leaves it
    config = tmp_path / "config.yaml"
    config.write_text("lambda_schedule: {0: 2.0, 2: 1.0}\ncombine: jsd\n")
    for asked, done in ((["--combine", "jsd", "--lambda", "2"], True), (["--config", config], False)):
        code, _, err = dera("generate", *model, *options, *asked, "--output", file)
        assert code == 0
        assert ("1 of 2 completions are there" in err) == done
    rows, expected = (sorted(rows_of(each.read_text()), key=lambda row: row["token_ids"]) for each in (file, whole))
    lambdas, of_whole = ([row.pop("token_lambda", []) for row in each] for each in (rows, expected))
    assert rows == expected
    for found, exact in zip(lambdas, of_whole, strict=True):
        assert found == pytest.approx(exact, abs=1e-5)  # its last digits depend on the batch's shape
    assert len({(row.get("combine"), str(row.get("lambda_schedule")), row["sample"]) for row in rows}) == 6
    scores = tmp_path / "scores.jsonl"
    for asked in ([], ["--combine", "jsd"], ["--combine", "jsd"]):
        of = ["--completions", file, "--lambda", "0.5,2", "--output", scores]
        assert dera("score", *model, *of, *asked)[0] == 0
    assert Counter(row.get("combine") for row in rows_of(scores.read_text())) == {None: 12, "jsd": 12}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--combine", "kl"], "combine='kl': write kl:ε with ε at least 0 nats."),
        (["--combine", "min_p:0.1"], "combine='min_p:0.1' is not a rule; there are linear, plausible:α"),
        (["--combine", "aad:0.1", "--lambda", "1,2"], "--lambda: 2, and --combine aad:0.1 knows no λ; leave it out."),
        (["--lambda", "2", "--lambda-schedule", "0:1"], "--lambda-schedule gives λ; leave one of them out."),
        (["--lambda-schedule", "5:1"], "it must start at position 0"),
        (["--combine", "aad:0.1", "--lambda-schedule", "0:1"], "knows no λ: leave --lambda-schedule out."),
    ],
)
def test_what_is_refused(dera, model, options, said):
    code, _, err = dera("generate", *model, "--prompt", "a", *options)
    assert code == 2
    assert said in " ".join(err.split())


def test_a_rule_is_for_one_adapter(dera, tiny_base, tiny_adapter, tmp_path):
    several = ["--base", tiny_base, "--adapters", f"a={tiny_adapter}", "--adapters", f"b={tiny_adapter}"]
    code, _, err = dera("generate", *several, "--prompt", "a", "--combine", "jsd", "--lambda", "a=1")
    assert code == 2
    assert "--combine jsd is for one aligned adapter, and this model has ['a', 'b']." in " ".join(err.split())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "lambda": 2}\n')
    options = ["--base", tiny_base, "--adapter", tiny_adapter, "--prompts", tmp_path / "prompts.jsonl"]
    code, _, err = dera("generate", *options, "--combine", "aad:0.1")
    assert code == 2
    assert "prompts.jsonl" in err
    assert "knows no λ" in err


def test_score_in_python(tiny_base, tiny_adapter):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, lam=0.5)
    given = [[5, 9, 17], [8]], [[20, 21, 22], []]
    scored, empty = score(model, *given, [1.0, 2.0], combine="kl:0.1")
    assert scored.token_lambda.shape == scored.kl.shape == (2, 3)
    assert (scored.kl <= 0.1).all()
    assert empty.token_lambda.shape == (2, 0)
    assert score(model, *given, None, combine="aad:0.1")[0].token_lambda.isnan().all()
    (plain, _), (scheduled, _) = (
        score(model, *given, lam, lambda_schedule=at) for lam, at in ((0.7, None), (None, {0: 0.7, 2: 1.5}))
    )
    assert plain.token_lambda is None
    assert scheduled.log_p[:, :2].tolist()[0] == pytest.approx(plain.log_p[:, :2].tolist()[0], abs=1e-5)
    assert scheduled.log_p[0, 2] == pytest.approx(float(score(model, *given, 1.5)[0].log_p[0, 2]), abs=1e-5)
    with pytest.raises(DeRaError, match=r"lam=2: combine='aad:0.1' knows no λ"):
        score(model, *given, [1.0, 2.0], combine="aad:0.1")
