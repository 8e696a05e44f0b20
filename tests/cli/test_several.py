"""Several aligned adapters on the command line, against three models that are loaded one by one."""

import json
import re

import pytest
import torch
from tiny_models import make_adapter, make_tokenizer
from two_models import load_two

TEXTS = ["The old lighthouse", "Rain fell on"]
POINTS = {  # as they are written, and the weights of the reference, helpful and harmless
    "helpful=0.7,harmless=0.4": (-0.1, 0.7, 0.4),
    "harmless=1.5": (-0.5, 0.0, 1.5),
    "harmless=0.5,helpful=0.5": (0.0, 0.5, 0.5),
    "helpful=0": (1.0, 0.0, 0.0),
}


@pytest.fixture
def dera(dera, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    return dera


@pytest.fixture(scope="module")
def other(tiny_base, tmp_path_factory):
    return make_adapter(tiny_base, tmp_path_factory.mktemp("other"), seed=5)


@pytest.fixture
def model(tiny_base, tiny_adapter, other) -> list[str]:
    return ["--base", str(tiny_base), "--adapters", f"helpful={tiny_adapter}", "--adapters", f"harmless={other}"]


@pytest.fixture(scope="module")
def by_hand(tiny_base, tiny_adapter, other):
    """Weights -> the greedy tokens of three models, and their summed log-probability of given tokens."""
    reference, helpful = load_two(tiny_base, tiny_adapter)
    _, harmless = load_two(tiny_base, other)
    tokenizer = make_tokenizer()

    @torch.no_grad()
    def by_hand(weights, text: str, new: int) -> tuple[list[int], list[float]]:
        ids, log_p = torch.tensor([tokenizer(text)["input_ids"]]), []
        start = ids.shape[1]
        for _ in range(new):
            logits = [model(ids, use_cache=False).logits[:, -1] for model in (reference, helpful, harmless)]
            mixed = sum(weight * each for weight, each in zip(weights, logits, strict=True))
            log_probs = mixed.log_softmax(-1)
            log_p.append(log_probs.max().item())
            ids = torch.cat([ids, log_probs.argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        return ids[0, start:].tolist(), log_p

    return by_hand


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def given(points) -> list[str]:
    return [part for point in points for part in ("--lambda", point)]


def test_generate_and_score_are_those_of_three_models(dera, model, by_hand, tmp_path):
    output, prompts = tmp_path / "out.jsonl", [part for text in TEXTS for part in ("--prompt", text)]
    arguments = ["generate", *model, *given(POINTS), *prompts, "--greedy", "--max-new-tokens", 8]
    code, out, _ = dera(*arguments, "--output", output)
    assert code == 0
    assert all(f"{point}" in out for point in ("helpful=0.7,harmless=0.4", "helpful=0,harmless=1.5"))
    found = {(row["prompt"], tuple(row["lambda"].values())): row["token_ids"] for row in rows(output.read_text())}
    assert all(list(row["lambda"]) == ["helpful", "harmless"] for row in rows(output.read_text()))
    expected = {(text, weights[1:]): by_hand(weights, text, 8)[0] for text in TEXTS for weights in POINTS.values()}
    assert len({tuple(tokens) for tokens in expected.values()}) >= 5, "λ tells them apart"
    assert found == expected

    whole = output.read_text().splitlines()
    output.write_text("\n".join(whole[:3]) + "\n" + whole[3][:30])
    code, out, err = dera(*arguments, "--output", output, "--json", "--batch-size", 1)
    assert code == 0
    assert "3 of 8 completions are there already" in err
    assert sorted(out.splitlines()) == sorted(output.read_text().splitlines()) == sorted(whole)

    scores = tmp_path / "scores.jsonl"
    arguments = ["score", *model, "--completions", output, "--output", scores]
    assert dera(*arguments, "--lambda", "helpful=0.7,harmless=0.4")[0] == 0
    code, out, err = dera(*arguments, *given(POINTS))
    assert code == 0
    assert "8 of 32 scores are there already" in err
    assert "helpful=0.7,harmless=0.4" in out
    for row in rows(scores.read_text()):
        weights = next(weights for weights in POINTS.values() if weights[1:] == tuple(row["lambda"].values()))
        tokens, log_p = by_hand(weights, row["prompt"], 8)
        if row["completion"] == make_tokenizer().decode(tokens, skip_special_tokens=True):
            assert row["log_p"] == pytest.approx(sum(log_p), abs=2e-4)


def test_a_prompts_own_lambda_and_the_default(dera, model, tmp_path):
    own = [
        {"prompt": "Rain", "lambda": {"harmless": 2}},
        {"prompt": "Rain", "lambda": [{"helpful": [0, 1]}, {"harmless": 1.5}]},
        {"prompt": "Rain"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (tmp_path / "p.csv").write_text('prompt,lambda\nRain,"helpful=0.5,harmless=-1"\n')
    options = ["--max-new-tokens", 2, "--json"]

    def lambdas(*arguments) -> list[list]:
        code, out, err = dera("generate", *model, *arguments, *options)
        assert code == 0, err
        found = sorted(rows(out), key=lambda row: row["prompt_index"])
        return [[row["prompt_index"], *row["lambda"].values()] for row in found]

    expected = [[0, 0, 2], [1, 0, 0], [1, 1, 0], [1, 0, 1.5], [2, 0.5, 0.5]]
    assert sorted(lambdas("--prompts", tmp_path / "p.jsonl")) == sorted(expected), "half of each is the default"
    assert lambdas("--prompts", tmp_path / "p.csv") == [[0, 0.5, -1]]
    config = tmp_path / "config.yaml"
    config.write_text("lambdas: {helpful: [0, 1], harmless: 0.5}\nprompt: [Rain]\n")
    assert sorted(lambdas("--config", config)) == [[0, 0, 0.5], [0, 1, 0.5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lambda", "0,1"], "--lambda: λ=0 is one number, and the model has several aligned adapters, ['helpful', "),
        (["--lambda", "helpful=1", "--lambda", "1"], "give each its own by name, as helpful=1,harmless=1."),
        (["--lambda", "helpfull=1"], "--lambda: λ is given for 'helpfull', which is not an aligned adapter"),
        (["--lambda", "helpful=nan"], "'nan' is not finite"),
        (["--prompts", "{folder}/p.jsonl"], "p.jsonl, line 1: λ is given for 'kind', which is not"),
        (["--prompts", "{folder}/q.jsonl"], "q.jsonl, line 1: lambda must be a finite number, an object with one for"),
        (["--config", "{folder}/c.yaml"], "lambdas=[{'helpful': 'much'}] must be finite numbers, as [0, 0.5, 1]; of"),
    ],
)
def test_what_is_no_lambda_of_these_adapters(dera, model, tmp_path, arguments, message):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "lambda": {"kind": 1}}\n')
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "lambda": {"helpful": NaN}}\n')
    (tmp_path / "c.yaml").write_text("lambdas: [{helpful: much}]\n")
    prompt = [] if "--prompts" in arguments else ["--prompt", "Rain"]
    code, out, err = dera("generate", *model, *prompt, *(part.format(folder=tmp_path) for part in arguments))
    assert (code, out) == (2, "")
    assert message in re.sub(r"[\s│]+", " ", err)
