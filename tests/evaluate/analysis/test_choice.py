"""The one-standard-error rule, what knows that λ was chosen, guards, groups and a gold reward, against other code."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from dera_peft import DeRaError
from dera_peft.evaluate.analysis.choice import Rule, candidates, choose
from dera_peft.evaluate.analysis.gold import gold_result
from dera_peft.evaluate.analysis.guards import limits_of
from dera_peft.evaluate.analysis.recommend import recommend
from dera_peft.evaluate.analysis.resamples import MIN_GROUPS, left_out_estimate
from dera_peft.evaluate.analysis.summary import summarise

LAMBDAS = (0.0, 0.5, 1.0, 1.5, 2.0)


def sweep(rewards, lambdas=LAMBDAS, guards=None, groups=None, name="r", arm="logits"):
    """Summaries of rewards by prompt and λ, `[P, L]`, or by name of several; KL is λ²."""
    rewards = rewards if isinstance(rewards, dict) else {name: rewards}
    prompts = len(next(iter(rewards.values())))
    rows = [
        {
            "arm": arm, "lambda": lam, "prompt_index": index, "sample": 0, "num_tokens": 4, "finish_reason": "eos",
            "kl": lam * lam, "rewards": {name: float(values[index][place]) for name, values in rewards.items()},
            "columns": {} if groups is None else {"kind": groups[index]},
            **({} if guards is None else {"guards": guards[lam]}),
        }
        for place, lam in enumerate(lambdas)
        for index in range(prompts)
    ]  # fmt: skip
    return summarise(rows, None if groups is None else "kind")


# -- one standard error -----------------------------------------------------------------------------------------------


def test_one_standard_error_by_all_resamples_of_four_prompts():
    """Of four prompts there are 256 resamples: the corrected lead and its error, from all of them."""
    rewards = np.array([[0.0, 1, 3], [0, 2, 1], [0, 3, 2], [0, 2, 4]])  # means 0, 2, 2.5
    drawn = np.array([rewards[list(places)].mean(0) for places in itertools.product(range(4), repeat=4)])
    optimism = np.mean([means.max() - rewards.mean(0)[means.argmax()] for means in drawn])
    errors = (drawn.max(1, keepdims=True) - drawn).std(0)
    assert 0 < optimism < 0.5
    assert 2.5 - optimism - 2.0 < errors[1], "λ=1 is within one standard error of λ=2"
    assert 2.5 - optimism > errors[0], "and λ=0 is not"
    summaries = sweep(rewards, (0.0, 1.0, 2.0))
    choice = choose(candidates(summaries, None, Rule("reward"), "r"), Rule("reward"), "r")
    assert (choice.best.lam, choice.chosen.lam) == (2.0, 1.0)
    assert choice.lead.mean == pytest.approx(0.5 - optimism, abs=0.03)
    assert choice.lead.se == pytest.approx(errors[1], rel=0.06)
    said = recommend(summaries, None, "reward", "r").text()
    assert "It is the smallest that is within one standard error of the best, λ=2 (+2.500 at 4.00 nats)" in said
    few = (0.5 - optimism) / errors[1] * 0.8
    assert recommend(summaries, None, "reward", "r", standard_errors=few).lam == 2.0, "not within so few"
    highest = recommend(summaries, None, "reward", "r", standard_errors=0)
    assert (highest.lam, highest.lead) == (2.0, None)
    assert "smallest" not in highest.text()


def test_differences_are_paired():
    """λ=1 is lower by 0.2 on every prompt, and prompts differ by far more: the pairs tell the two apart."""
    common = np.linspace(-5, 5, 24)[:, None]
    certain = recommend(sweep(common + np.array([0.0, 1.0, 1.2]), (0.0, 1.0, 2.0)), None, "reward", "r")
    assert certain.lam == 2.0
    assert certain.out_of_bag_difference.mean == pytest.approx(0.2)
    assert certain.distinguishable
    assert certain.value.se > 0.5


def test_a_budget_and_other_arms_go_by_one_standard_error_too():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(40, 1)) + np.array([0, 1.0, 2.0, 2.02, 2.03]) + 0.3 * rng.normal(size=(40, 5))
    assert recommend(sweep(rewards), None, "reward", "r", standard_errors=0).lam > 1
    assert recommend(sweep(rewards), None, "reward", "r").lam == 1.0
    assert recommend(sweep(rewards), None, "kl_budget", "r", kl_budget=0.5).lam == 0.5
    other = candidates(sweep(rewards, arm="jsd"), None, Rule("reward"), "r")
    assert choose(other, Rule("reward"), "r").chosen.lam == 1.0


def test_what_knows_of_the_choice_covers_the_truth_and_what_does_not_falls_short():
    """
    Sweeps of a plateau: λ=1, as trained, is as good as all beyond it. The one that is best by chance is compared with
    it, where the truth is 0.
    """
    rng = np.random.default_rng(1)
    truth = np.array([0.0, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6])
    lambdas = (0.0, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5)
    naive, aware, count = 0, 0, 80
    leads: list[tuple[float, float]] = []
    for _ in range(count):
        found = recommend(
            sweep(truth + rng.normal(size=(1, 1)) + rng.normal(size=(24, 8)), lambdas), None, "reward", "r",
            standard_errors=0,
        )  # fmt: skip
        true = truth[lambdas.index(found.lam)] - 0.6
        naive += found.difference.low <= true <= found.difference.high
        aware += found.out_of_bag_difference.low <= true <= found.out_of_bag_difference.high
        leads.append((found.difference.mean, found.out_of_bag_difference.mean))
    assert naive / count < 0.9, "a λ that was chosen for its value looks better than it is"
    assert stats.binomtest(aware, count, 0.95, alternative="less").pvalue > 0.01, aware / count
    by_chance, left_out = np.mean(leads, axis=0)
    assert by_chance > 0.1 > 2 * abs(left_out), "on average there is no lead"


def test_what_is_left_out_has_the_mean_of_all_and_a_larger_error():
    """Of a choice that is always the same: (1-f)/f of the variance of the mean, with f = (1 - 1/50)^50 left out."""
    values = np.random.default_rng(2).normal(size=(50, 2)) + np.array([0.0, 9.0])
    found = recommend(sweep(values, (0.0, 1.0)), None, "reward", "r")
    assert found.lam == 1
    assert found.out_of_bag_value.mean == pytest.approx(values[:, 1].mean(), abs=0.02)
    share = (1 - 1 / 50) ** 50
    expected = stats.sem(values[:, 1]) * math.sqrt((1 - share) / share)
    assert found.out_of_bag_value.se == pytest.approx(expected, rel=0.1)
    interval = stats.bootstrap((values[:, 1],), np.mean, method="percentile", rng=np.random.default_rng(0))
    low, high = interval.confidence_interval
    assert found.out_of_bag_value.low < low < high < found.out_of_bag_value.high
    assert (found.value.low, found.value.high) == pytest.approx((low, high), abs=0.04)
    assert math.isnan(left_out_estimate(np.full(1000, np.nan)).mean)


# -- groups -----------------------------------------------------------------------------------------------------------


def test_prompts_of_a_group_are_drawn_together():
    """A reward that is a group's, on each of its prompts: there are as many draws as groups, and not as prompts."""
    groups = [f"g{index % 12}" for index in range(48)]
    of_group = np.random.default_rng(3).normal(size=12)
    rewards = np.array([[0.0, of_group[index % 12]] for index in range(48)])
    by_group = sweep(rewards, (0.0, 1.0), groups=groups)[1].rewards["r"].level
    assert by_group.se == pytest.approx(stats.sem(of_group))
    assert by_group.draws.std() == pytest.approx(of_group.std() / math.sqrt(12), rel=0.1)
    alone = sweep(rewards, (0.0, 1.0))[1].rewards["r"].level
    assert alone.se == pytest.approx(stats.sem(np.tile(of_group, 4)))
    found = recommend(sweep(rewards, (0.0, 1.0), groups=groups), None, "reward", "r")
    assert found.clusters == ("groups", 12)
    assert "95 % interval over groups" in found.text()
    few = sweep(rewards, (0.0, 1.0), groups=[f"g{index % (MIN_GROUPS - 1)}" for index in range(48)])
    assert few[1].clusters == ("prompts", 48), "too few to be drawn"
    # a group's own mean is over its prompts all the same
    assert by_group.se > sweep(rewards, (0.0, 1.0), groups=groups)[1].rewards["r"].groups["g0"].se == 0


# -- guards -----------------------------------------------------------------------------------------------------------


def test_guards_pass_over_text_that_breaks():
    """Reward rises throughout; perplexity 2, 2.2, 2.4 (as trained), 3.1, 2.9, of which 3.0 is the most; and 4-grams."""
    rewards = np.random.default_rng(0).normal(size=(16, 1)) + np.arange(5.0)
    perplexities, repeated = (2.0, 2.2, 2.4, 3.1, 2.9), (0.02, 0.0, 0.01, 0.0, 0.08)
    guards = {
        lam: {"log_perplexity": math.log(p), "repetition": r}
        for lam, p, r in zip(LAMBDAS, perplexities, repeated, strict=True)
    }
    summaries = sweep(rewards, guards=guards)
    assert [s.perplexity.mean for s in summaries] == pytest.approx(perplexities)

    def found(max_perplexity, max_repetition):
        return recommend(summaries, None, "reward", "r", limits=limits_of(summaries, max_perplexity, max_repetition))

    both = found(1.25, 0.05)
    assert both.lam == 1.0
    perplexity, repetition = both.guards
    assert (perplexity.name, perplexity.at, perplexity.limit) == ("perplexity", 1.0, pytest.approx(3.0))
    assert (perplexity.passed_over, repetition.passed_over) == ((1.5,), (2.0,))
    assert (repetition.at, repetition.limit) == (0.0, pytest.approx(0.07)), "the text of λ=0 repeats itself more"
    said = both.text()
    assert (
        "Passed over for its perplexity: λ=1.5 (3.1). Its perplexity under the reference may be 3, 1.25 times" in said
    )
    assert "Passed over for its repetition: λ=2 (0.08). Its share of repeated 4-grams may be 0.07, 0.05 more" in said
    shown = json.loads(json.dumps(both.to_dict(), allow_nan=False))["guards"]
    assert shown[0]["figures"][3] == {"lambda": 1.5, "mean": pytest.approx(3.1)} | {
        name: pytest.approx(value, abs=1e-9) for name, value in (("se", 0.0), ("low", 3.1), ("high", 3.1))
    }
    assert found(1.3, 0.05).lam == 1.5
    assert found(math.inf, math.inf).lam == 2.0
    assert found(math.inf, math.inf).guards == ()
    far = sweep(rewards[:, 3:], (1.5, 2.0), guards=guards)
    assert limits_of(far, 1.25, 0.05) == [], "neither λ=0 nor 1 is there to compare with"
    within = limits_of(summaries, 1.25, 0.05)
    with pytest.raises(DeRaError, match=r"max_perplexity=1\.25 and max_repetition=0\.05: the guards pass over every λ"):
        recommend(far, None, "reward", "r", limits=within)


# -- a gold reward ----------------------------------------------------------------------------------------------------


def test_where_the_gold_falls_while_the_proxy_rises():
    rng = np.random.default_rng(4)
    proxy = np.array([0, 1.0, 2.0, 3.0, 4.0]) + 0.3 * rng.normal(size=(30, 5))
    gold = np.array([0, 0.8, 1.0, 0.99, 0.0]) + 0.3 * rng.normal(size=(30, 5))
    summaries = sweep({"p": proxy, "g": gold})
    found = recommend(summaries, None, "reward", "p", gold=("p", "g"))
    assert (found.lam, found.gold.turn, found.gold.parts_from) == (2.0, 1.0, 2.0)
    step = found.gold.steps[-1]
    assert step.gold.mean == pytest.approx((gold[:, 4] - gold[:, 2]).mean(), abs=0.1)
    assert step.proxy.mean == pytest.approx((proxy[:, 4] - proxy[:, 2]).mean(), abs=0.3)
    assert found.gold.value.mean == pytest.approx(gold[:, 4].mean())
    assert found.gold.difference.mean == pytest.approx((gold[:, 4] - gold[:, 2]).mean())
    said = found.text()
    assert "The gold reward 'g' is highest at λ=1" in said
    assert "From λ=2 on 'p' still rises while 'g' falls: against λ=1" in said
    assert "λ* lies where the two have parted: --choose-by g" in said
    as_json = json.loads(json.dumps(found.to_dict(), allow_nan=False))["gold"]
    assert (as_json["turn"], as_json["parts_from"], len(as_json["steps"])) == (1.0, 2.0, 2)
    by_gold = recommend(summaries, None, "reward", "g", gold=("p", "g"))
    assert by_gold.lam < 2
    assert "have parted" not in by_gold.text()
    rises = recommend(sweep({"p": proxy, "g": proxy}), None, "reward", "p", gold=("p", "g"))
    assert rises.gold.parts_from is None
    assert "further ones would tell where it falls" in rises.text()


def test_a_gold_that_does_not_fall_is_rarely_said_to():
    """The highest of many equal ones is high by chance, and all others lie below it."""
    rng = np.random.default_rng(5)
    count, false, plain = 50, 0, 0
    for _ in range(count):
        proxy, gold = np.arange(5.0) + rng.normal(size=(24, 5)), rng.normal(size=(24, 5))
        found = gold_result(sweep({"p": proxy, "g": gold}), None, "p", "g", 0.0)
        false += found.parts_from is not None
        turn = gold.mean(0).argmax()
        beyond = [stats.ttest_rel(gold[:, turn], gold[:, place]).pvalue < 0.05 for place in range(turn + 1, 5)]
        plain += any(beyond)
    assert false / count <= 0.05
    assert plain / count > 0.1, "tests that do not know of the choice would often say so"
