"""λ* between the decoded λ is decoded in its turn; the commands that use it are ones that run."""

import json
import shlex
import sys
from dataclasses import replace

import pytest

from dera_peft import DeRaError
from dera_peft.cli import app
from dera_peft.decoding import decoder
from dera_peft.decoding.lambdas import NamedLambda
from dera_peft.decoding.prompts import from_texts
from dera_peft.evaluate import SweepConfig, results, sweep
from dera_peft.evaluate.arms import make_arms
from dera_peft.evaluate.use import commands

pytestmark = pytest.mark.usefixtures("without_pictures")

PROMPTS = ["Rain fell on the market", "A fox crossed", "My sister"]
COMMON = {"prompts": PROMPTS, "rewards": ["length", "distinct-1"], "lambdas": [0, 1], "samples": 2, "max_new_tokens": 4}


@pytest.fixture
def chosen(monkeypatch):
    """Makes the recommendation λ=0.4, as if that had been estimated to be the best; the λ that it was made among."""
    recommend, among = results.recommend, []

    def recommended(summaries, *arguments, **options):
        among.append([summary.lam for summary in summaries])
        return replace(recommend(summaries, *arguments, **options), lam=0.4, estimated=True)

    monkeypatch.setattr(results, "recommend", recommended)
    return among


def test_the_chosen_lambda_is_decoded_once(chosen, monkeypatch, tmp_path, tiny_base, tiny_adapter):
    model = {"base": str(tiny_base), "adapter": str(tiny_adapter), "output_dir": str(tmp_path)}
    decoded, decode = [], decoder.decode

    def noted(model, tokenizer, tokens, requests, *rest, **options):
        decoded.extend(request.lam for request in requests)
        return decode(model, tokenizer, tokens, requests, *rest, **options)

    monkeypatch.setattr(decoder, "decode", noted)
    result = sweep(**COMMON, **model)
    assert chosen[0] == [0, 1]
    assert sorted(set(decoded)) == [0, 0.4, 1]
    assert [summary.lam for summary in result.summaries] == [0, 0.4, 1]
    own = [row for row in result.rows if row["lambda"] == 0.4]
    assert len(own) == len(PROMPTS) * 2
    found = result.recommendation
    assert (found.lam, found.measured) == (0.4, (0.0, 1.0)), "the choice stays as it was made"
    lengths = [row["rewards"]["length"] for row in own]
    assert found.decoded.value.mean == pytest.approx(sum(lengths) / len(lengths))
    at_1 = [row["rewards"]["length"] for row in result.rows if row["lambda"] == 1]
    assert found.decoded.difference.mean == pytest.approx((sum(lengths) - sum(at_1)) / len(lengths))
    assert f"Decoded there, it is {found.decoded.value.mean:+.3f}" in found.text()
    saved = json.loads((tmp_path / "recommendation.json").read_text())
    assert saved["recommendation"] == json.loads(json.dumps(found.to_dict()))
    assert any(json.loads(line)["lambda"] == 0.4 for line in (tmp_path / "samples.jsonl").read_text().splitlines())
    decoded.clear()
    again = sweep(**COMMON, **model)
    assert decoded == [], "all of it is there already"
    assert again.recommendation.decoded == found.decoded
    assert chosen[2] == [0, 1], "and no part of what is chosen among"


def test_commands_that_run(tiny_base, tiny_adapter, tmp_path, monkeypatch, capsys):
    config = SweepConfig(**COMMON, base=str(tiny_base), adapter=str(tiny_adapter), top_k=5, dtype="float32")
    (arm,) = make_arms(config)
    made = commands(config, arm, 0.45, from_texts(["two\nlines", "It's $HOME"]))
    model = f"--base {tiny_base} --adapter {tiny_adapter} --dtype float32"
    assert made == {
        "generate": f"""dera generate {model} --lambda 0.45 --max-new-tokens 4 --top-k 5 --prompt 'It'"'"'s $HOME'""",
        "export": f"dera export {model} --lambda 0.45 --output {tiny_adapter}-lambda-0.45",
        "serve": f"dera serve {model} --model-lambdas 0.45",
    }
    made["export"] = made["export"].replace(f"{tiny_adapter}-lambda-0.45", str(tmp_path / "exported"))
    for name in ("generate", "export"):
        monkeypatch.setattr(sys, "argv", shlex.split(made[name]))
        with pytest.raises(SystemExit) as caught:
            app.main()
        assert not caught.value.code, capsys.readouterr().err
    assert (tmp_path / "exported" / "adapter_config.json").exists()
    several = NamedLambda({"a": 0.5, "b": 1.0})
    assert "--lambda a=0.5,b=1 " in commands(config, arm, several, from_texts(["x"]))["generate"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"gold": "length"},
            "gold='length' must be the name of a reward that is compared with the first one",
        ),
        ({"gold": "nothing"}, r"further rewards are \['distinct-1', 'perplexity'\]"),
        ({"choose_by": "nothing"}, "choose_by='nothing' is not the name of a reward"),
        ({"choose_by": "perplexity"}, "choose_by: a high perplexity is no merit"),
    ],
)
def test_rewards_that_are_not_there(values, message, tiny_base, tiny_adapter, tmp_path):
    keys = {**COMMON, "rewards": [*COMMON["rewards"], "perplexity"], **values}
    with pytest.raises(DeRaError, match=message):
        sweep(**keys, base=str(tiny_base), adapter=str(tiny_adapter), output_dir=str(tmp_path))
