"""A sweep over the λ of two adapters, against three models that are loaded one by one."""

import json

import pytest
import torch
from tiny_models import make_adapter, make_tokenizer
from two_models import load_two

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.record import Record
from dera_peft.decoding import decoder
from dera_peft.evaluate import SweepConfig, sweep
from dera_peft.evaluate.check import check

TEXTS = ["Rain fell on the market", "A fox crossed", "My sister"]
ANCHORS = [{"helpful": 0, "harmless": 0}, {"helpful": 1, "harmless": 0}, {"helpful": 0, "harmless": 1}]
POINTS = [*ANCHORS, {"helpful": 0.5, "harmless": 0.25}]


pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def other(tiny_base, tmp_path_factory):
    return make_adapter(tiny_base, tmp_path_factory.mktemp("other"), seed=5)


def judge(prompts, pairs):
    return [0 if len(a) > len(b) else 1 if len(b) > len(a) else -1 for a, b in pairs]


def vowels(prompts, completions, **columns) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def settings(base, adapter, other, output, **more) -> SweepConfig:
    return SweepConfig(
        prompts=TEXTS, base=str(base), adapters={"helpful": str(adapter), "harmless": str(other)}, rewards=[vowels],
        judge=judge, samples=2, max_new_tokens=5, output_dir=str(output), lambdas=POINTS, **more,
    )  # fmt: skip


def test_a_sweep_over_points(tiny_base, tiny_adapter, other, tmp_path, monkeypatch):
    config = settings(tiny_base, tiny_adapter, other, tmp_path / "out", arms=[{"mixing": "weights"}])
    result = sweep(config)
    models = (*load_two(tiny_base, tiny_adapter), load_two(tiny_base, other)[1])
    tokenizer = make_tokenizer()
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(POINTS) * len(TEXTS) * 2
    own = [row for row in rows if row["arm"] == "logits"]
    assert [lam for lam in POINTS if lam in [row["lambda"] for row in own]] == POINTS
    for row, in_memory in zip(own, [row for row in result.rows if row["arm"] == "logits"], strict=True):
        prompt, completion = tokenizer(row["prompt"])["input_ids"], row["token_ids"]
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *completion]])
            z = [model(ids).logits[0, len(prompt) - 1 : -1].double() for model in models]
        a, b = row["lambda"].values()
        log_p = ((1 - a - b) * z[0] + a * z[1] + b * z[2]).log_softmax(-1)
        kl = (log_p.exp() * (log_p - z[0].log_softmax(-1))).sum().item()
        assert row["kl"] == pytest.approx(kl, abs=1e-3)
        own_place = result.curve.points.index(next(p for p in result.curve.points if p.lam == row["lambda"]))
        drawn = log_p[range(len(completion)), completion].sum().item()
        assert in_memory["log_p"][own_place] == pytest.approx(drawn, abs=1e-3)
    assert max(row["kl"] for row in own) > 0.1

    for summary in result.summaries:
        assert list(summary.rewards["vowels"].versus) == ANCHORS, "the arm of the weights is compared with them too"
        others = [lam for lam in ANCHORS if summary.arm != "logits" or lam != summary.lam]
        assert list(summary.judged) == others
    assert result.recommendation.lam in [point.lam for point in result.curve.points]
    assert result.command is None
    table = result.summary_to_pandas()
    assert list(table["lambda_harmless"][:4]) == [0, 1, 0.25, 0]
    assert {"lambda helpful", "lambda harmless", "judge helpful=1,harmless=0"} <= {*result.to_pandas()}

    monkeypatch.setattr(decoder, "decode", None)  # nothing is decoded again
    again = sweep(config)
    assert (again.reused, again.recommendation.lam) == (len(rows), result.recommendation.lam)

    model = DeRaModel.from_pretrained(config.base, adapters=config.adapters)
    inputs = tokenizer("Rain", return_tensors="pt", return_token_type_ids=False)
    at_point = model(**inputs, lam=result.recommendation.lam).logits
    model.lam = result.recommendation.lam
    assert torch.equal(model(**inputs).logits, at_point)
    model.save_pretrained(tmp_path / "saved")
    assert Record.load(tmp_path / "saved").lam == dict(result.recommendation.lam)


def test_the_check_looks_at_each_adapter(tiny_base, tiny_adapter, tmp_path):
    nothing = make_adapter(tiny_base, tmp_path / "nothing", scale=0.0)
    found = check(settings(tiny_base, tiny_adapter, nothing, tmp_path / "out", max_prompts=1))
    assert not found.responds
    assert list(found.rays()) == ["helpful", "harmless"]
    assert list(found.rays()["helpful"]) == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 8]
    said = found.text()
    assert "The adapter 'helpful' responds to λ: at λ=1" in said
    assert "The adapter 'harmless' does not respond to λ: at λ=1" in said
    assert "Of the points of several adapters text falls apart at " in said


def test_what_several_adapters_do_not_have(tiny_base, tiny_adapter, other, tmp_path):
    def error(**more) -> str:
        with pytest.raises(DeRaError) as caught:
            sweep(settings(tiny_base, tiny_adapter, other, tmp_path / "out"), **more)
        return str(caught.value)

    assert "'implicit' is what one adapter itself rewards" in error(rewards=["implicit"])
    assert "arms[0]: combine='aad:0.1' is for one aligned adapter" in error(arms=[{"combine": "aad:0.1"}])
    only = "compares with λ=helpful=0,harmless=0 and λ=helpful=1,harmless=0 and λ=helpful=0,harmless=1"
    assert only in error(lambdas=[{"helpful": 0.5}])
    assert "lambdas: λ=1 is one number" in error(lambdas=[1])
