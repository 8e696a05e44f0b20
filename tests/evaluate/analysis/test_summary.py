"""The statistics of a sweep, on numbers worked out by hand."""

import csv
import math

import numpy
import pytest

from dera_peft import DeRaError
from dera_peft.evaluate.analysis.resamples import RESAMPLES, Resamples
from dera_peft.evaluate.analysis.summary import number, summarise
from dera_peft.evaluate.analysis.table import check_names, write_csv


def row(lam, index, reward, sample=0, arm="logits", kl=0.0, tokens=4, finish="eos", judged=None, **columns) -> dict:
    rewards = reward if isinstance(reward, dict) else {"r": reward}
    return {
        "arm": arm, "lambda": lam, "prompt_index": index, "sample": sample, "rewards": rewards, "kl": kl,
        "num_tokens": tokens,
        "finish_reason": finish, "columns": columns, **({} if judged is None else {"judged": judged}),
    }  # fmt: skip


# two prompts of two samples each at λ=0.5: prompt means 1 and 3, so mean 2 and standard error sqrt(2)/sqrt(2) = 1
ROWS = [
    row(0.5, 0, 0.0, kl=1.0, tokens=2),
    row(0.5, 0, 2.0, sample=1, kl=3.0, tokens=6, finish="length"),
    row(0.5, 1, 3.0, kl=2.0),
    row(0.5, 1, 3.0, sample=1, kl=2.0),
    row(0.0, 0, -1.0),
]


def test_standard_errors_are_over_prompts():
    zero, half = summarise(ROWS)
    assert (zero.arm, zero.lam, zero.prompts, zero.samples) == ("logits", 0.0, 1, 1)
    assert (half.prompts, half.samples) == (2, 4)
    level = half.rewards["r"].level
    assert (level.mean, level.se) == (2.0, 1.0)
    assert (half.kl.mean, half.kl.se) == (2.0, 0.0)
    assert half.kl_per_token == 8 / 16
    assert (half.tokens, half.ended) == (4.0, 0.75)
    # two prompts are drawn as 1 1, 1 3, 3 1, 3 3: the ends are each drawn in a quarter of the resamples
    assert (level.low, level.high) == (1.0, 3.0)
    assert numpy.mean(level.draws == 1.0) == pytest.approx(0.25, abs=0.05)


def test_a_single_prompt_has_a_mean_and_no_error():
    zero = summarise(ROWS)[0].rewards["r"].level
    assert zero.mean == -1.0
    assert math.isnan(zero.se)
    assert math.isnan(zero.low)
    assert math.isnan(zero.high)
    assert not zero.excludes_zero
    assert number(zero.se) == "-"
    assert number(zero.mean, "+.2f") == "-1.00"


def test_differences_are_paired_by_prompt_and_sample():
    """Prompts of very different levels, the same difference: its error is small where those of the levels are large."""
    rewards = {0.0: [0, 1, 10, 12], 1.0: [1, 3, 11, 14], 0.5: [1, 2, 12, 11]}
    rows = [row(lam, i // 2, float(r), sample=i % 2) for lam, values in rewards.items() for i, r in enumerate(values)]
    zero, half, one = (summary.rewards["r"] for summary in summarise(rows))
    # prompt means of λ=1 minus λ=0: (1+2)/2 and (1+2)/2; of λ=0.5 minus λ=0: (1+1)/2 = 1 and (2-1)/2 = 0.5
    difference = one.versus[0.0].difference
    assert (difference.mean, difference.se, difference.low, difference.high) == (1.5, 0.0, 1.5, 1.5)
    assert difference.excludes_zero
    assert one.level.se == pytest.approx(5.25)
    assert (half.versus[0.0].difference.mean, half.versus[0.0].difference.se) == (0.75, 0.25)
    assert (half.versus[0.0].win, half.versus[0.0].tie, half.versus[0.0].loss) == (0.75, 0.0, 0.25)
    # λ=0.5 minus λ=1: 0, -1, 1, -3
    assert (half.versus[1.0].difference.mean, half.versus[1.0].difference.se) == (-0.75, 0.25)
    assert (half.versus[1.0].win, half.versus[1.0].tie, half.versus[1.0].loss) == (0.25, 0.25, 0.5)
    assert (zero.versus[0.0].difference.mean, zero.versus[0.0].tie) == (0.0, 1.0)


def test_other_lines_are_compared_with_the_logits():
    rows = [row(lam, i, lam + i) for lam in (0.0, 1.0) for i in range(3)]
    rows += [row(1.0, i, 3.0 + i, arm="retrained at β=0.2") for i in range(3)]
    rows += [row(0.5, i, 0.5 + i, arm="weights") for i in range(3)]
    summaries = summarise(rows)
    arms = [("logits", 0.0), ("logits", 1.0), ("retrained at β=0.2", 1.0), ("weights", 0.5)]
    assert [(summary.arm, summary.lam) for summary in summaries] == arms
    assert summaries[2].rewards["r"].versus[1.0].difference.mean == 2.0
    assert summaries[3].rewards["r"].versus[0.0].difference.mean == 0.5
    # without λ=0 and λ=1 there is nothing to compare with
    assert summarise([row(0.5, 0, 1.0)])[0].rewards["r"].versus == {}
    assert summarise([]) == []


def test_what_failed_is_left_out_and_counted():
    rows = [row(0.0, i, {"a": float(i), "b": 1.0}) for i in range(4)]
    rows += [row(1.0, i, {"a": None if i == 0 else i + 2.0, "b": None}) for i in range(4)]
    zero, one = summarise(rows)
    assert one.rewards["a"].failed == 1
    assert one.rewards["a"].level.mean == 4.0  # of 3, 4, 5
    assert one.rewards["a"].versus[0.0].difference.mean == 2.0  # of three pairs
    assert (one.rewards["a"].versus[0.0].win, one.rewards["a"].versus[0.0].tie) == (1.0, 0.0)
    assert zero.rewards["a"].failed == 0
    assert zero.rewards["a"].level.mean == 1.5
    assert one.rewards["b"].failed == 4
    assert math.isnan(one.rewards["b"].level.mean)
    assert math.isnan(one.rewards["b"].level.se)
    assert one.samples == 4


def test_groups_and_the_worst():
    rows = [row(0.0, i, float(i), category="maths" if i < 2 else "prose") for i in range(4)]
    rows += [row(1.0, i, float(3 - i), category="maths" if i < 2 else "prose") for i in range(4)]
    zero, one = (summary.rewards["r"] for summary in summarise(rows, group="category"))
    assert {name: (level.mean, level.se) for name, level in zero.groups.items()} == {
        "maths": (0.5, 0.5),
        "prose": (2.5, 0.5),
    }
    assert (zero.worst_group, one.worst_group) == ("maths", "prose")
    assert summarise(rows)[0].rewards["r"].worst_group is None
    with pytest.raises(DeRaError, match="group='language': prompt 0 has no such column"):
        summarise(rows, group="language")


def test_a_judge_that_fails_shows_no_win_rate():
    """Equal texts are ties without a call; where it failed on all others they alone would make up the rate."""

    def judged(*verdicts):
        rows = [row(0.5, index, 0.0, judged={"0": verdict}) for index, verdict in enumerate(verdicts)]
        return summarise(rows)[0].judged[0.0]

    failing = judged(0, 0, None, None, 1)
    assert failing.failed == 2
    assert all(math.isnan(value) for value in (failing.rate.mean, failing.win, failing.tie, failing.loss))
    assert (judged(0, 0, None, 1, 1).rate.mean, judged(0, 0).rate.mean) == (0.75, 0.5)


def test_a_judges_win_rate():
    verdicts = [[1, 1], [1, 0], [-1, 0], [None, 1]]  # by prompt, of two samples
    rows = [
        row(0.5, index, 0.0, sample=sample, judged={"0": verdict})
        for index, of_prompt in enumerate(verdicts)
        for sample, verdict in enumerate(of_prompt)
    ]
    judged = summarise(rows)[0].judged
    assert list(judged) == [0.0]
    # by prompt, a tie for half: 1, 0.75, 0.25, 1
    assert judged[0.0].rate.mean == 0.75
    assert judged[0.0].rate.se == pytest.approx(math.sqrt((0.0625 + 0 + 0.25 + 0.0625) / 3 / 4))
    assert judged[0.0].rate.low <= 0.75 <= judged[0.0].rate.high
    assert (judged[0.0].win, judged[0.0].tie, judged[0.0].loss) == (0.625, 0.25, 0.125)
    assert judged[0.0].failed == 1
    assert summarise(ROWS)[0].judged == {}


def test_intervals_hold_the_mean_as_often_as_they_say():
    generator = numpy.random.default_rng(0)
    resamples = Resamples(50, seed=1)
    estimates = resamples.means({sweep: generator.exponential(size=50) for sweep in range(400)})
    assert numpy.mean([e.low <= 1 <= e.high for e in estimates.values()]) == pytest.approx(0.93, abs=0.03)
    assert numpy.mean([e.draws.std() / e.se for e in estimates.values()]) == pytest.approx(1, abs=0.03)
    assert resamples.counts.shape == (RESAMPLES, 50)
    assert (resamples.counts.sum(1) == 50).all()


def test_the_same_seed_gives_the_same_intervals_and_draws_are_paired():
    rows = [row(lam, i, float(i * i % 7) + lam) for lam in (0.0, 1.0) for i in range(20)]
    zero, one = (summary.rewards["r"] for summary in summarise(rows))
    assert [summary.rewards["r"].level for summary in summarise(rows)] == [zero.level, one.level]
    numpy.testing.assert_allclose(one.level.draws - zero.level.draws, one.versus[0.0].difference.draws, atol=1e-12)
    assert summarise(rows, seed=1)[0].rewards["r"].level.low != zero.level.low


@pytest.mark.parametrize(
    "names", [["kl"], ["a", "tokens"], ["kl_se"], ["judge_lambda_0"], ["a", "a_low"], ["a_win_lambda_1", "a"]]
)
def test_a_reward_has_columns_of_its_own(names):
    with pytest.raises(DeRaError, match=f"rewards: '{max(names, key=len)}' is the name of another column"):
        check_names(names)
    check_names(["a", "a_lowered", "length", "exact_match:kl"])


def test_csv(tmp_path):
    rows = [row(lam, i, lam * i, kind=f"k{i % 2}", judged={"0": 1}) for lam in (0.0, 0.5) for i in range(4)]
    rows += [row(0.5, 0, 9.0, arm="weights", kind="k0")]
    write_csv(summarise(rows, group="kind"), tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open(encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    assert [(row["arm"], float(row["lambda"])) for row in table] == [
        ("logits", 0),
        ("logits", 0.5),
        ("weights", 0.5),
    ]
    half, alone = table[1:]
    expected = {
        "prompts": 4, "samples": 4, "kl": 0, "tokens": 4, "ended": 1, "r": 0.75, "r_se": 0.32274861, "r_failed": 0,
        "r_minus_lambda_0": 0.75, "r_win_lambda_0": 0.75, "r_tie_lambda_0": 0.25, "r_loss_lambda_0": 0,
        "r_group_k0": 0.5, "r_group_k1": 1.0, "judge_lambda_0": 1, "judge_win_lambda_0": 1, "judge_failed_lambda_0": 0,
    }  # fmt: skip
    assert {name: float(half[name]) for name in expected} == expected
    assert float(half["r_low"]) < 0.75 < float(half["r_high"])
    assert (alone["r"], alone["r_se"], alone["r_group_k1"], alone["judge_lambda_0"]) == ("9", "", "", "")
    assert [file.name for file in tmp_path.iterdir()] == ["summary.csv"], "no temporary file is left"
