"""The rules that choose λ, on numbers worked out by hand."""

import json
import math
from dataclasses import replace

import numpy
import pytest

from dera_peft import DeRaError
from dera_peft.evaluate.analysis.curve import Curve, Gap, Point
from dera_peft.evaluate.analysis.recommend import recommend
from dera_peft.evaluate.analysis.resamples import RESAMPLES, Estimate
from dera_peft.evaluate.analysis.summary import summarise

PROMPTS = 12


def summaries(rewards: dict[float, float], kl: dict[float, float] | None = None, noise=None, **columns):
    """A sweep with the mean rewards given, and KL of λ² nats; `noise(lam, index)` is 0 on average."""
    return summarise(
        [
            {
                "arm": "logits", "lambda": lam, "prompt_index": index, "sample": 0, "num_tokens": 4,
                "finish_reason": "eos",
                "kl": (kl or {}).get(lam, lam * lam),
                "rewards": {"r": mean + (noise(lam, index) if noise else 0.0)},
                "columns": {name: value(index) for name, value in columns.items()},
            }
            for lam, mean in rewards.items()
            for index in range(PROMPTS)
        ],
        group=next(iter(columns), None),
    )  # fmt: skip


def level(mean: float, se: float = 0.1, seed: int = 0) -> Estimate:
    draws = mean + se * numpy.random.default_rng(seed).normal(size=RESAMPLES)
    left_out = mean + se * numpy.random.default_rng(seed + 1).normal(size=RESAMPLES)
    return Estimate(mean, se, mean - 2 * se, mean + 2 * se, draws, left_out)


def point(lam: float, mean: float, kl: float, se: float = 0.1) -> Point:
    return Point(lam, 100.0, 1.0, level(kl, 0.0), {"r": level(mean, se)})


REWARDS = {0.0: 0.0, 0.5: 2.0, 1.0: 1.5, 2.0: -1.0}


def test_the_highest_mean_and_its_beta():
    found = recommend(summaries(REWARDS), None, "reward", "r", beta=0.1)
    assert (found.lam, found.beta, found.value.mean, found.kl.mean) == (0.5, 0.2, 2.0, 0.25)
    assert (found.difference.mean, found.distinguishable) == (0.5, True)
    assert (found.at_edge, found.estimated, found.between, found.notes) == (False, False, False, ())
    assert (found.lam_low, found.lam_high) == (0.5, 0.5)
    said = found.text()
    assert "λ* = 0.5 by the rule 'reward', the highest mean reward, among the measured λ (0, 0.5, 1, 2)." in said
    assert "There 'r' is +2.000 (95 % interval over prompts: +2.000 to +2.000), at a KL of 0.25 nats." in said
    assert "Other prompts would put it there as well (95 % of resamples)." in said
    assert "Against λ=1, the adapter as trained, that is +0.500" in said
    assert "a difference that these prompts show" in said
    assert "β* = β/λ* = 0.1/0.5 = 0.2." in said


def test_the_best_may_be_another_with_other_prompts():
    """λ=0.5 is better by 0.2 on average, and very different from prompt to prompt; λ=1 is the same for all."""
    swing = summaries(
        {0.0: 0.0, 0.5: 1.2, 1.0: 1.0, 2.0: 0.0}, noise=lambda lam, index: 2 * (-1) ** index if lam == 0.5 else 0.0
    )
    assert recommend(swing, None, "reward", "r").lam == 0.5
    # and the mean's lead of 0.2 is within the error of 2/√11 ≈ 0.6
    found = recommend(swing, None, "reward", "r")
    assert found.difference.mean == pytest.approx(0.2)
    assert found.difference.se == pytest.approx(2 / math.sqrt(11))
    assert found.distinguishable is False
    assert "these prompts can't tell the two apart" in found.text()
    assert (found.lam_low, found.lam_high) == (0.5, 1.0), "in other resamples λ=1 is the best"
    assert "Other prompts would put λ* between 0.5 and 1 (95 % of resamples)." in found.text()


def test_a_kl_budget():
    sweep = summaries({0.0: 0.0, 0.5: 1.0, 1.0: 2.0, 2.0: 3.0})  # KL 0, 0.25, 1, 4
    found = recommend(sweep, None, "kl_budget", "r", kl_budget=1.0)
    assert (found.lam, found.at_edge) == (1.0, False)
    assert "'kl_budget', the highest mean reward within the KL budget of 1 nats" in found.text()
    assert "That is the adapter as it was trained." in found.text()
    assert recommend(sweep, None, "kl_budget", "r", kl_budget=0.9).lam == 0.5
    assert recommend(sweep, None, "kl_budget", "r", kl_budget=0.0).lam == 0.0
    # between λ=1 and 2 the curve reaches 1.4 nats at 1.2, and 2.2 nats at 1.5
    curve = Curve(points=[point(1.2, 2.2, 1.4), point(1.5, 2.5, 2.2)])
    assert recommend(sweep, curve, "kl_budget", "r", kl_budget=2.0).lam == 1.2
    with pytest.raises(DeRaError, match=r"kl_budget=0.1: no λ has a KL so small; the least is 0.25 nats, at λ=0.5"):
        recommend(sweep[1:], None, "kl_budget", "r", kl_budget=0.1)


def test_the_worst_group():
    """Group a likes λ more than b dislikes it: the mean rises up to λ=1, and b's falls from λ=0.5 on."""
    gains = {0.0: (0.0, 1.0), 0.5: (1.0, 0.8), 1.0: (3.0, 0.2)}
    sweep = summaries(
        dict.fromkeys(gains, 0.0), noise=lambda lam, index: gains[lam][index % 2], kind=lambda index: "ab"[index % 2]
    )
    assert recommend(sweep, None, "reward", "r").lam == 1.0
    found = recommend(sweep, None, "worst_group", "r", beta=0.3)
    assert (found.lam, found.group, found.beta) == (0.5, "b", 0.6)
    assert found.value.mean == pytest.approx(0.8)
    assert found.difference.mean == pytest.approx(0.6)  # 0.8, b's at λ=0.5, minus 0.2, b's at λ=1
    assert found.out_of_bag_difference.mean == pytest.approx(0.6), "the same in every prompt of the group"
    assert found.distinguishable
    assert json.loads(json.dumps(found.to_dict()))["indifferent"] is False
    assert "There 'r' in the group 'b' is +0.800" in found.text()
    same = summaries(dict.fromkeys(gains, 1.0), kind=lambda index: "ab"[index % 2])
    assert "The worst group's reward is the same at every λ" in recommend(same, None, "worst_group", "r").text()
    # the curve has no groups, and is not asked
    assert recommend(sweep, Curve(points=[point(0.7, 9.0, 1.0)]), "worst_group", "r").lam == 0.5


def test_a_lambda_between_the_measured_ones():
    sweep = summaries(REWARDS)
    unknown = Point(0.6, 3.0, 0.2, None, {"r": None})
    curve = Curve(points=[unknown, point(0.7, 2.5, 0.5), point(3.0, 9.0, 9.0)], gaps=[Gap(1.0, 2.0, 1.4)])
    found = recommend(sweep, curve, "reward", "r", beta=0.14)
    assert (found.lam, found.estimated, found.beta) == (0.7, True, pytest.approx(0.2))
    assert found.lam < 3, "λ=3 lies beyond what was measured"
    assert found.difference.mean == pytest.approx(1.0)
    assert found.difference.se == pytest.approx(0.1, rel=0.1)  # λ=1 is the same in all resamples
    assert found.distinguishable
    assert found.best.lam == 0.7
    said = found.text()
    assert "among the measured λ (0, 0.5, 1, 2) and those estimated between them." in said
    assert "This λ was not decoded: its numbers are estimated" in said
    assert "Between λ = 1 and 2 the samples don't tell what all λ give: add λ = 1.4 to the sweep." in said


@pytest.mark.parametrize(
    ("rewards", "lam", "further"),
    [({0.0: 0.0, 1.0: 1.0, 1.5: 2.0}, 1.5, "2, 2.5"), ({-0.5: 2.0, 0.0: 1.0, 1.0: 0.0}, -0.5, "-1, -1.5")],
)
def test_the_best_at_the_edge(rewards, lam, further):
    found = recommend(summaries(rewards), None, "reward", "r", beta=0.1)
    assert (found.lam, found.at_edge) == (lam, True)
    assert f"Extend the sweep to λ = {further}." in found.text()


def test_where_there_is_no_beta():
    below = recommend(summaries({-0.5: 2.0, 0.0: 1.0, 1.0: 0.0}), None, "reward", "r", beta=0.1)
    assert below.beta is None
    assert "λ* is below 0" in below.text()
    zero = recommend(summaries({-0.5: 0.0, 0.0: 1.0, 1.0: 0.0}), None, "reward", "r", beta=0.1)
    assert zero.beta is None
    assert "there is no β to retrain at" in zero.text()
    assert "holds no β" in recommend(summaries(REWARDS), None, "reward", "r").text()


def test_ties_go_to_the_smallest_lambda():
    found = recommend(summaries({0.0: 0.0, 0.5: 1.0, 1.0: 1.0}, kl={0.5: 3.0}), None, "reward", "r")
    assert found.lam == 0.5, "whatever its KL"
    assert (found.lam_low, found.lam_high) == (0.5, 0.5), "with other prompts as well"
    assert recommend(summaries({-0.5: 1.0, 0.0: 0.0, 1.0: 1.0}), None, "reward", "r").lam == -0.5
    assert "Other prompts would put it there as well" in found.text()
    assert not found.indifferent
    # a difference of rounding is none: λ=0.2 is estimated, and a bit above the measured ones in its last digits
    curve = Curve(points=[point(0.2, 1.0 + 1e-15, 0.04, se=0.0)])
    found = recommend(summaries({0.0: 0.0, 0.1: 1.0, 1.0: 1.0}), curve, "reward", "r")
    assert (found.lam, found.lam_low, found.lam_high) == (0.1, 0.1, 0.1)


def test_other_prompts_may_agree_on_another_lambda():
    found = replace(recommend(summaries(REWARDS), None, "reward", "r"), lam_low=1.0, lam_high=1.0)
    assert "Other prompts would put λ* at 1 (95 % of resamples)." in found.text()
    assert "as well" not in found.text()


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
@pytest.mark.parametrize("rule", ["reward", "kl_budget"])
def test_a_reward_that_is_the_same_everywhere(value, rule):
    sweep = summaries({-0.5: value, 0.0: value, 1.0: value, 1.5: value})
    curve = Curve(points=[point(0.5, value * (1 + 1e-15), 0.25, se=0.0)])
    found = recommend(sweep, curve, rule, "r", kl_budget=1.0, beta=0.1)
    assert (found.lam, found.indifferent, found.to_dict()["indifferent"]) == (0.0, True, True)
    said = found.text()
    assert "The reward is the same at every λ" in said
    assert "there is nothing to choose by, and the smallest λ was taken" in said
    assert ("within the budget" in said) == (rule == "kl_budget")
    assert "Extend" not in said
    edge = recommend(sweep[1:], None, rule, "r", kl_budget=1.0)
    assert (edge.lam, edge.at_edge) == (0.0, True)
    assert "Extend" not in edge.text(), "beyond the edge it may be the same as well"


def test_no_value_at_lambda_1():
    """It was measured, and no reward is there; or another prompt's."""

    def sweep(at_one):
        values = {0.0: (1.0, 2.0, None), 0.5: (3.0, 4.0, None), 1.0: at_one}
        return summarise(
            [
                {
                    "arm": "logits", "lambda": lam, "prompt_index": index, "sample": 0, "num_tokens": 4,
                    "finish_reason": "eos",
                    "kl": lam, "rewards": {"r": value},
                }
                for lam, own in values.items()
                for index, value in enumerate(own)
            ]
        )  # fmt: skip

    for at_one in ((None, None, None), (None, None, 0.0)):
        said = recommend(sweep(at_one), None, "reward", "r").text()
        assert "There is no comparison with λ=1, the adapter as it was trained: no sample has a value of 'r'" in said
        assert "not measured" not in said
        assert "nan" not in said


def test_little_to_go_by():
    one = [s for s in summaries(REWARDS) if s.lam == 0.5]
    found = recommend(one, None, "reward", "r")
    assert found.difference is found.distinguishable is None
    assert "Only one λ was measured" in found.text()
    assert "was not measured: there is no comparison with it" in found.text()
    single = summarise(
        [
            {
                "arm": "logits", "lambda": lam, "prompt_index": 0, "sample": 0, "num_tokens": 4,
                "finish_reason": "eos", "kl": lam,
                "rewards": {"r": None if lam == 2.0 else reward},
            }
            for lam, reward in REWARDS.items()
        ]
    )  # fmt: skip
    found = recommend(single, None, "reward", "r", beta=0.1)
    assert (found.lam, found.distinguishable) == (0.5, False)
    assert "a single prompt does not tell whether they differ" in found.text()
    assert "no interval with a single prompt" in found.text()
    assert "1 of 4 samples have no 'r' and were left out." in found.text()
    assert "nan" not in found.text()
    as_json = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert as_json["value"] == {"mean": 2.0, "se": None, "low": None, "high": None}
    assert (as_json["lambda"], as_json["beta"], as_json["lambda_low"]) == (0.5, 0.2, None)


@pytest.mark.parametrize(
    ("rule", "reward", "message"),
    [
        (
            "best",
            "r",
            r"rule='best' is not a rule; there are \['reward', 'kl_budget', 'worst_group', 'robust'\]",
        ),
        ("reward", "s", r"reward='s' is not a reward of this sweep; there are \['r'\]"),
        ("kl_budget", "r", "kl_budget=None: the rule 'kl_budget' needs a number of nats"),
        ("worst_group", "r", "group=None: the rule 'worst_group' needs the column that names the groups"),
        ("robust", "r", "radius=None: the rule 'robust' needs summaries that were made with a radius"),
    ],
)
def test_what_a_rule_needs(rule, reward, message):
    with pytest.raises(DeRaError, match=message):
        recommend(summaries(REWARDS), None, rule, reward)


def test_nothing_to_recommend_from():
    with pytest.raises(DeRaError, match="no samples of the arm 'logits'"):
        recommend([], None, "reward", "r")
