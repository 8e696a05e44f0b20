"""A recommendation and estimates among points of several adapters, on numbers worked out by hand."""

import json

import numpy
import pytest

from dera_peft.decoding.lambdas import NamedLambda
from dera_peft.evaluate.analysis.curve import estimate_curve
from dera_peft.evaluate.analysis.recommend import recommend
from dera_peft.evaluate.analysis.summary import summarise
from dera_peft.evaluate.points import fine_grid

PROMPTS = 12


def lam(helpful: float, harmless: float) -> NamedLambda:
    return NamedLambda({"helpful": helpful, "harmless": harmless})


def row(point: NamedLambda, index: int, reward: float, kl: float, **more) -> dict:
    return {
        "arm": "logits", "lambda": point, "prompt_index": index, "sample": more.pop("sample", 0), "num_tokens": 4,
        "finish_reason": "eos", "kl": kl, "rewards": {"r": reward}, "columns": {}, **more,
    }  # fmt: skip


def summaries(rewards: dict[NamedLambda, float], noise=lambda point, index: 0.0):
    return summarise(
        [
            row(point, index, mean + noise(point, index), sum(value**2 for value in point.values()))
            for point, mean in rewards.items()
            for index in range(PROMPTS)
        ]
    )


REWARDS = {lam(0, 0): 0.0, lam(1, 0): 1.0, lam(0, 1): 1.5, lam(0.5, 0.5): 2.0, lam(1, 1): 1.75}


def test_the_best_point_against_the_best_adapter_alone():
    found = recommend(summaries(REWARDS), None, "reward", "r")
    assert (found.lam, found.value.mean, found.kl.mean) == (lam(0.5, 0.5), 2.0, 0.5)
    assert (found.against, found.difference.mean, found.distinguishable) == (lam(0, 1), 0.5, True)
    assert (found.lam_low, found.lam_high) == (lam(0.5, 0.5), lam(0.5, 0.5))
    assert (found.at_edge, found.beta, found.notes) == (False, None, ())
    assert found.text().splitlines() == [
        "λ*: helpful=0.5,harmless=0.5 by the rule 'reward', the highest mean reward, among the 5 measured points.",
        "There 'r' is +2.000 (95 % interval over prompts: +2.000 to +2.000), at a KL of 0.50 nats.",
        "Other prompts would put it there as well (95 % of resamples).",
        "Against harmless alone, as trained (λ=1), that is +0.500 (95 % interval paired over prompts, the choice "
        "included: +0.500 to +0.500): a difference that these prompts show.",
    ]
    as_json = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (as_json["lambda"], as_json["against"]) == ({"helpful": 0.5, "harmless": 0.5}, {"helpful": 0, "harmless": 1})


def test_the_interval_is_each_adapters_own():
    """Half of the prompts are better at (1, 0.5), the others at (0.5, 0.5): harmless is the same for all."""
    rewards = {lam(0, 0): 0.0, lam(0.5, 0.5): 2.0, lam(1, 0.5): 2.1}
    found = recommend(
        summaries(rewards, lambda point, index: point["helpful"] * (1, -1)[index % 2] * 4), None, "reward", "r",
        standard_errors=0,
    )  # fmt: skip
    assert (found.lam_low, found.lam_high) == (lam(0.5, 0.5), lam(1, 0.5))
    said = found.text()
    assert "Other prompts would put helpful between 0.5 and 1, harmless at 0.5 (95 % of resamples)." in said
    assert "No adapter was measured alone as it was trained, at λ=1: there is no comparison with one." in said
    assert (
        "in the λ of helpful and harmless: it may lie beyond. Extend the sweep to helpful = 1.5, 2; harmless = 1, 1.5"
        in said
    )


def test_an_adapter_that_is_not_used_is_at_no_edge():
    found = recommend(
        summaries({lam(0, 0): 0.0, lam(0.5, 0): 1.0, lam(1, 0): 2.0, lam(0, 1): 0.5}), None, "reward", "r"
    )
    assert found.lam == lam(1, 0)
    assert "That is helpful alone, as trained (λ=1)." in found.text()
    assert "the greatest λ of helpful: it may lie beyond. Extend the sweep to helpful = 1.5, 2." in found.text()


def test_estimates_between_points_are_those_of_the_mixture():
    """Five texts, whose probabilities at every λ are known; rewards of their own."""
    rng = numpy.random.default_rng(0)
    log_ref, helpful, harmless = (numpy.log(rng.dirichlet(numpy.ones(5) * 3)) for _ in range(3))
    rewards = numpy.arange(5.0)

    def probabilities(point: NamedLambda) -> numpy.ndarray:
        a, b = point.values()
        mixed = numpy.exp((1 - a - b) * log_ref + a * helpful + b * harmless)
        return mixed / mixed.sum()

    decoded = [lam(0, 0), lam(1, 0), lam(0, 1)]
    grid = fine_grid(decoded)
    assert len(grid) == 3 + 3 * 4
    log_p = {point: numpy.log(probabilities(point)) for point in grid}
    kl = {point: float(probabilities(point) @ (log_p[point] - log_p[decoded[0]])) for point in grid}
    rows = [
        row(
            point, index, rewards[text], kl[point], sample=sample,
            log_p=[log_p[other][text] for other in grid], kl_grid=[kl[other] for other in grid],
        )
        for point in decoded
        for index in range(50)
        for sample, text in enumerate(rng.choice(5, size=20, p=probabilities(point)))
    ]  # fmt: skip
    curve = estimate_curve(rows, grid, ["r"])
    found = {point.lam: point for point in curve.points}
    between = [point for point in grid if point not in decoded]
    assert len(between) == 12
    for point in between:
        estimate = found[point].rewards["r"]
        expected = probabilities(point) @ rewards
        assert abs(estimate.mean - expected) < 4 * estimate.se, point
        assert found[point].kl.mean == pytest.approx(kl[point])
    assert max(abs(probabilities(point) @ rewards - probabilities(decoded[0]) @ rewards) for point in between) > 0.2

    best = recommend(summarise(rows), curve, "reward", "r")
    assert best.between
    assert best.value.mean == max(
        [found[point].rewards["r"].mean for point in between if found[point].rewards["r"]]
        + [summary.rewards["r"].level.mean for summary in summarise(rows)]
    )


def test_gaps_are_told_once():
    """Decoded so far apart that no sample of one says anything about the other."""
    decoded = [lam(0, 0), lam(1, 0), lam(0, 1)]
    grid = fine_grid(decoded)
    rows = [
        row(
            point, index, 1.0, 1.0,
            log_p=[-200.0 * sum(abs(point[name] - other[name]) for name in point) for other in grid],
            kl_grid=[1.0] * len(grid),
        )
        for point in decoded
        for index in range(4)
    ]  # fmt: skip
    curve = estimate_curve(rows, grid, ["r"])
    assert sorted((gap.low, gap.high) for gap in curve.gaps) == sorted(
        [(lam(0, 0), lam(0, 1)), (lam(0, 0), lam(1, 0)), (lam(0, 1), lam(1, 0))]
    )
    notes = recommend(summarise(rows), curve, "reward", "r").notes
    assert any(note.startswith("Between 3 pairs of neighbouring points the samples don't tell") for note in notes)
