"""Which of all arms is best, and against the best plain λ, on numbers worked out by hand."""

import math

import pytest

from dera_peft.evaluate.analysis.best import best_arm
from dera_peft.evaluate.analysis.choice import Rule
from dera_peft.evaluate.analysis.recommend import recommend
from dera_peft.evaluate.analysis.summary import summarise
from dera_peft.evaluate.analysis.table import summary_rows

PROMPTS = 12
SWING = [2.0 * (-1) ** index for index in range(PROMPTS)]
PLAIN = {("logits", lam): [mean] * PROMPTS for lam, mean in ((0.0, 0.0), (1.0, 1.0), (2.0, 0.5))}
KL = {"logits": 1.0, "rule": 0.5, "aad:0.1": 3.0}


def summaries(arms: dict, radius: float | None = None):
    """Arm and λ -> the rewards of the prompts; their KL is that of `KL`, times λ."""
    return summarise(
        [
            {
                "arm": arm, "lambda": lam, "prompt_index": index, "sample": 0, "num_tokens": 4, "finish_reason": "eos",
                "kl": KL[arm] * (1 if lam is None else lam), "rewards": {"r": reward}, "columns": {},
            }
            for (arm, lam), rewards in arms.items()
            for index, reward in enumerate(rewards)
        ],
        radius=radius,
    )  # fmt: skip


def best(arms: dict, rule: str = "reward", **values):
    return best_arm(summaries({**PLAIN, **arms}), None, Rule(rule, **values), "r")


def test_an_arm_that_is_better_on_each_prompt():
    """By 0.5 on average, and the prompts' own swing is in both: the difference has no error."""
    common = {key: [a + b for a, b in zip(rewards, SWING, strict=True)] for key, rewards in PLAIN.items()}
    rule = {("rule", lam): [mean + swing for swing in SWING] for lam, mean in ((1.0, 1.2), (3.0, 1.5))}
    found = best({**common, **rule})
    assert (found.best.arm, found.best.lam, found.plain.lam, found.count) == ("rule", 3.0, 1.0, 5)
    assert (found.difference.mean, found.difference.se) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9))
    assert found.distinguishable
    said = found.text()
    assert "Of all arms rule at λ=3 is the best by the rule 'reward', the highest mean reward: 'r' is +1.500" in said
    assert "at a KL of 1.50 nats" in said
    assert "Against the best plain λ, λ=1 (+1.000 at 1.00 nats), that is +0.500 (95 % interval paired over" in said
    assert "a difference that these prompts show" in said
    assert "does not account for the choice among 5" in said


def test_a_lead_that_may_be_chance():
    found = best({("aad:0.1", None): [1.1 + swing for swing in SWING]})
    assert (found.best.arm, found.best.lam, found.distinguishable) == ("aad:0.1", None, False)
    assert found.difference.se == pytest.approx(2 / math.sqrt(PROMPTS - 1))
    assert "Of all arms aad:0.1 is the best" in found.text()
    assert "these prompts can't tell the two apart" in found.text()
    # where it is less by that plain λ is the better one, and is compared with the best other arm
    less = best({("aad:0.1", None): [0.9 + swing for swing in SWING]})
    assert (less.is_plain, less.name) == (True, "plain λ=1")
    assert "Against the best of the other arms, aad:0.1 (+0.900 at 3.00 nats), that is +0.100" in less.text()


def test_within_a_budget_and_without_a_plain_lambda_that_fits():
    rule = {("rule", 2.0): [0.9] * PROMPTS, ("aad:0.1", None): [5.0] * PROMPTS}
    found = best(rule, "kl_budget", kl_budget=1.0)
    assert found.is_plain, "the others are beyond the budget, or worse"
    assert found.best.lam == 1.0
    no_plain = {("logits", 2.0): [1.0] * PROMPTS, ("rule", 1.0): [0.1] * PROMPTS}
    found = best_arm(summaries(no_plain), None, Rule("kl_budget", 1.0), "r")
    assert (found.best.arm, found.plain, found.difference) == ("rule", None, None)
    assert "No plain λ fits the rule" in found.text()
    assert best_arm(summaries(no_plain), None, Rule("kl_budget", 0.1), "r") is None


def test_prompts_without_a_value_are_left_out_of_the_difference():
    """Of the six that both have, the rule is better by 1; the others would say otherwise."""
    rule = [2.0] * 6 + [None] * 6
    plain = {("logits", 1.0): [1.0] * 6 + [9.0] * 6}
    found = best_arm(summaries({**plain, ("rule", 1.0): rule}), None, Rule("reward"), "r")
    assert found.is_plain
    assert found.difference.mean == 1.0
    nothing = best_arm(summaries({("logits", 1.0): [1.0, None], ("rule", 1.0): [None, 2.0]}), None, Rule("reward"), "r")
    assert "there is no comparison: no prompt has a value of 'r' in both" in nothing.text()


def test_plain_lambda_alone_has_nothing_to_be_compared_with():
    assert best({}) is None


def test_the_worst_reweighting_prefers_what_helps_all():
    """λ=1 is better on average, and at λ=2 no prompt is left behind."""
    uneven = {("logits", 1.0): [3.0] * 9 + [-1.0] * 3, ("logits", 2.0): [1.5] * PROMPTS}
    made = summaries({**uneven, ("rule", 1.0): [1.0] * PROMPTS}, radius=1.0)
    assert recommend(made, None, "reward", "r").lam == 1.0
    found = recommend(made, None, "robust", "r", beta=0.3, radius=1.0)
    assert (found.lam, found.value.mean, found.beta) == (2.0, 1.5, 0.15)
    # q on the three: q·ln 4q + (1-q)·ln(4/3·(1-q)) = 1 at q = 0.9144
    assert made[0].rewards["r"].robust.mean == pytest.approx(3 - 4 * 0.9144, abs=1e-3)
    assert found.difference.mean == pytest.approx(1.5 - made[0].rewards["r"].robust.mean)
    said = found.text()
    assert "'robust', the highest mean reward under the worst reweighting of the prompts within 1 nats, among" in said
    assert "There 'r' under the worst reweighting of the prompts is +1.500" in said
    assert (found.to_dict()["radius"], summary_rows(made)[1]["r_robust"]) == (1.0, 1.5)
    over_all = best_arm(made, None, Rule("robust", radius=1.0), "r")
    assert (over_all.is_plain, over_all.difference.mean) == (True, -0.5)
    assert summary_rows(made)[2]["lambda"] == 1.0
    assert summary_rows(summaries({("aad:0.1", None): [1.0]}))[0]["lambda"] is None
