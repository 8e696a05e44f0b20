"""Margins of preference pairs by λ: numbers worked out by hand, and `dera score --pairs` against two whole models."""

import json
import math

import numpy as np
import pytest
import torch
from two_models import load_two

from dera_peft import DeRaError
from dera_peft.checkpoint.record import Record
from dera_peft.cli.score_rows import ScoreSettings
from dera_peft.evaluate.margins import best_margin, margins_of

PAIRS = [
    {"prompt": "Rain fell on", "chosen": " the market and the old sea", "rejected": " the fox"},
    {"prompt": "Rain fell on", "chosen": " a town", "rejected": " the old lighthouse keeper"},
    {"prompt": "A fox crossed", "chosen": " the sea", "rejected": " the market"},
    {"prompt": "A fox crossed", "chosen": " the sea", "rejected": " the sea"},
]
BETA = 0.3


def test_three_pairs_by_hand():
    """At β=0.5 margins of 2, -1 and 0, the first two of one prompt."""
    log_ratios = {0.0: ([0.0] * 3, [0.0] * 3), 1.0: ([3.0, 0.0, 1.0], [-1.0, 2.0, 1.0])}
    none, one = margins_of(log_ratios, ["a", "a", "b"], 0.5)
    assert (none.accuracy.mean, none.log_loss.mean) == (0.5, pytest.approx(math.log(2)))
    assert (one.pairs, one.prompts) == (3, 2)
    assert one.margin.mean == pytest.approx(1 / 3)
    assert one.accuracy.mean == pytest.approx(1.5 / 3), "a margin of 0 is half told"
    loss = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1)) + math.log(2)) / 3
    assert one.log_loss.mean == pytest.approx(loss)
    confidence = (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-1)) + 0.5) / 3
    assert one.overconfidence.mean == pytest.approx(confidence - 0.5)
    assert one.calibration_error == pytest.approx(confidence - 0.5), "of one bin"
    assert none.log_loss_difference.mean == pytest.approx(math.log(2) - loss)
    assert one.log_loss_difference is None
    # prompt a has residuals 2 - 1/3 and -1 - 1/3, b that of 0 - 1/3: 1/3 and -1/3 by prompt
    assert one.margin.se == pytest.approx(math.sqrt(2 * (1 / 9) * 2) / 3)
    # Wilson's interval of 1/2 with two draws, from its quadratic equation
    low, high = np.roots([1 + 3.8415 / 2, -(1 + 3.8415 / 2), 0.25])[::-1]
    assert (one.bins[0].observed.low, one.bins[0].observed.high) == pytest.approx((low, high), abs=1e-4)


def test_calibration_and_the_best_lambda_of_made_up_pairs():
    """Preferences that λ=1 predicts with the right probability: at 4 margins are too large, at 0.25 too small."""
    rng = np.random.default_rng(0)
    margin = 2.0 * rng.normal(size=2000)
    preferred = np.where(rng.random(2000) < 1 / (1 + np.exp(-margin)), margin, -margin)
    ratios = {lam: (lam * preferred, np.zeros(2000)) for lam in (0.25, 1.0, 4.0)}
    small, right, large = margins_of(ratios, range(2000), 1.0)
    assert small.accuracy.mean == right.accuracy.mean == large.accuracy.mean
    assert small.overconfidence.high < 0 < large.overconfidence.low
    assert right.overconfidence.low < 0 < right.overconfidence.high
    assert right.calibration_error < 0.05 < min(small.calibration_error, large.calibration_error)
    assert all(part.observed.low - 0.05 < part.predicted < part.observed.high + 0.05 for part in right.bins)
    assert [part.pairs for part in right.bins] == [200] * 10
    best = best_margin([small, right, large], "log_loss")
    assert (best.lam, best.difference.mean) == (1.0, 0.0)
    assert best_margin([small, large], "log_loss").difference is None
    told = best_margin([small, right, large], "accuracy")
    assert (told.lam, told.difference.excludes_zero) == (0.25, False), "of equal ones the smallest"


@torch.no_grad()
def by_hand(two, tokenizer, pair: dict, lam: float) -> float:
    """log π_λ/π_ref of chosen minus rejected, each token's distribution with a normalizer of its own."""
    total = 0.0
    for sign, side in ((1, "chosen"), (-1, "rejected")):
        prompt = tokenizer(pair["prompt"])["input_ids"]
        answer = [*tokenizer(pair[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        z_ref, z_aligned = (m(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double() for m in two)
        log_p = ((1 - lam) * z_ref + lam * z_aligned).log_softmax(-1) - z_ref.log_softmax(-1)
        total += sign * log_p[range(len(answer)), answer].sum().item()
    return total


def test_pairs_against_two_models(dera, tiny_base, tiny_adapter, tmp_path):
    from transformers import AutoTokenizer

    Record(
        str(tiny_base), {"default": str(tiny_adapter)}, {"reference": [], "aligned": ["default"]},
        training={"method": "dpo", "beta": BETA},
    ).save(tmp_path)  # fmt: skip
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    common = ["score", "--base", tmp_path, "--pairs", pairs, "--lambda", "0.5,1,3"]
    code, out, err = dera(*common, "--output", tmp_path / "scores.jsonl", "--json")
    assert code == 0, err
    assert "of 4 pairs 1 are left out: 1 have identical chosen and rejected" in err
    two, tokenizer = load_two(tiny_base, tiny_adapter), AutoTokenizer.from_pretrained(tiny_base)
    found = [json.loads(line) for line in out.splitlines()]
    assert [each["lambda"] for each in found] == [0.5, 1.0, 3.0]
    at_1 = [by_hand(two, tokenizer, pair, 1.0) for pair in PAIRS[:3]]
    for each in found:
        margins = [BETA * by_hand(two, tokenizer, pair, each["lambda"]) for pair in PAIRS[:3]]
        assert each["margin"]["mean"] == pytest.approx(np.mean(margins), abs=1e-4)
        assert each["log_loss"]["mean"] == pytest.approx(np.mean(np.logaddexp(0, -np.array(margins))), abs=1e-4)
        assert each["accuracy"]["mean"] == np.mean(np.array(margins) > 0)
        assert (each["pairs"], each["prompts"], each["beta"]) == (3, 2, BETA)
    assert abs(np.mean(margins) - 3 * BETA * np.mean(at_1)) > 0.02, "not three times that at λ=1"
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert {(row["prompt_index"], row["of_pair"]) for row in rows} == {
        (index, ("chosen", "rejected")[index % 2]) for index in range(6)
    }
    # again: nothing is scored, another β is another unit, and the picture goes where it is told
    code, out, err = dera(*common, "--output", tmp_path / "scores.jsonl", "--beta", 0.6, "--plot", tmp_path / "c.svg")
    assert code == 0, err
    assert "24 of 24 scores are there already" in err
    assert f"{2 * found[1]['margin']['mean']:+.3f}" in out
    assert "with β=0.6" in out
    assert "<svg" in (tmp_path / "c.svg").read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give --completions FILE, or --pairs SOURCE"),
        ({"completions": "a", "pairs": "b"}, "give --completions FILE, or --pairs SOURCE"),
        ({"completions": "a", "beta": 0.1}, "beta=0.1 is of pairs"),
        ({"pairs": "a", "combine": "jsd"}, "pairs: margins are those of plain λ; leave out --combine jsd"),
        ({"pairs": "a", "temperature": 0.5}, "pairs: the implicit reward is that at temperature 1"),
        ({"pairs": "a", "plot": "x.pdf"}, r"plot='x.pdf' must end with \.png or \.svg"),
        ({"pairs": "a", "beta": 0}, "beta=0 must be"),
    ],
)
def test_settings_that_do_not_go_together(values, message):
    with pytest.raises(DeRaError, match=message):
        ScoreSettings.read(None, **values)


def test_an_adapter_without_beta(dera, tiny_base, tiny_adapter, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**PAIRS[0], "chosen": "x"}) + "\n")
    arguments = ["score", "--base", tiny_base, "--adapter", tiny_adapter, "--pairs", tmp_path / "pairs.jsonl"]
    code, _, err = dera(*arguments)
    assert code == 2
    assert "--beta is missing" in err
