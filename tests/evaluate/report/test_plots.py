"""The pictures of a sweep, by the text in them and the numbers that they draw."""

import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from matplotlib.figure import Figure
from swept import RULE, curve, row, swept

from dera_peft.evaluate.analysis.gold import GoldResult, GoldStep
from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.analysis.summary import summarise
from dera_peft.evaluate.report.findings import Findings
from dera_peft.evaluate.report.marks import Star, draw_front, label, point_style
from dera_peft.evaluate.report.plots import (
    _draw_against_kl,
    _draw_over_lambda,
    pareto_picture,
    plot_pareto,
    plot_sweep,
    sweep_picture,
)
from dera_peft.evaluate.report.quantities import Quantity
from dera_peft.evaluate.report.scales import Broken, near_range, set_scale

ARMS = ("logits", "weights", "retrained at <β=1>", "of unknown β")
MODELS = {"retrained at <β=1>": 0.5, "of unknown β": None}
PNG = b"\x89PNG"


def texts(svg: bytes) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


def points(svg: bytes, color: str) -> int:
    """How many marks of a arm's colour there are, the legend's included."""
    return len(re.findall(rf'<use [^>]*style="fill: {color}', svg.decode()))


@pytest.fixture(scope="module")
def sweep() -> Findings:
    return swept(arms=ARMS, best=None, models=MODELS)[0]


def test_pictures_name_what_is_drawn(sweep):
    over_lam = texts(sweep_picture(sweep, "$fun$", title="a title"))
    for text in ("$fun$ (mean over prompts)", "λ of runs/dpo", "reference", "as trained", "recommended", "a title"):
        assert text in over_lam
    assert {"runs/dpo (DeRa)", "runs/dpo, its weights scaled by λ"} <= {*over_lam}
    assert {"estimated between the points", "95 % band of the estimate", "smooth line, no estimate"} <= {*over_lam}
    assert "retrained at &lt;β=1&gt;" in over_lam
    assert "of unknown β" not in over_lam, "it has no place on the axis of λ"
    pareto = texts(pareto_picture(sweep, "$fun$"))
    assert {"λ=0", "λ=0.5", "λ=1", "recommended", "retrained at &lt;β=1&gt;", "of unknown β"} <= {*pareto}


def test_a_long_name_of_an_adapter_keeps_its_end():
    def short(adapter: str) -> str:
        return Findings([], adapter=adapter).short

    assert short("org/adapter") == "org/adapter"
    assert short("/home/me/experiments-2026/llama-3.1-8b-dpo/checkpoint-1200/") == "…/llama-3.1-8b-dpo/checkpoint-1200"
    assert short("x" * 60) == "…" + "x" * 44


def test_a_further_model_stands_at_its_own_lambda(sweep):
    def places(models) -> set[str]:
        svg = sweep_picture(replace(sweep, models=models), "$fun$").decode()
        return set(re.findall(r'<use [^>]*x="([\d.]+)"[^>]*style="fill: #009e73', svg))

    at_half, at_one = places({**MODELS, ARMS[2]: 0.5}), places({**MODELS, ARMS[2]: 1.0})
    assert len(at_half - at_one) == len(at_one - at_half) == 2, "one mark in each panel has moved"


def test_without_an_estimate_or_a_recommendation(sweep):
    bare = replace(sweep, curve=None, recommendation=None)
    shown = texts(sweep_picture(bare, "$fun$"))
    assert "smooth line, no estimate" in shown
    assert not {"estimated between the points", "recommended"} & {*shown}
    assert not [text for text in texts(sweep_picture(bare, None)) if "None" in text]
    assert "recommended" not in texts(sweep_picture(sweep, "length")), "the recommendation is of another reward"


def test_the_star_is_at_the_recommended_value(sweep, monkeypatch):
    """Which the curve, from all samples, may miss; and that of a worst group is off the line of means."""
    drawn = []
    monkeypatch.setattr(Star, "draw", lambda star, panel, x, y, legend: drawn.append((x, y)))
    best = sweep.recommendation
    best = replace(best, lam=0.5, value=replace(best.value, mean=7.0), kl=replace(best.kl, mean=3.0))
    found = replace(sweep, recommendation=best)
    sweep_picture(found, "$fun$")
    pareto_picture(found, "$fun$")
    assert drawn == [(0.5, 7.0), (0.5, 3.0), (3.0, 7.0)]


def test_a_star_of_a_worst_group_is_called_so(sweep):
    found = replace(sweep, curve=None, recommendation=replace(sweep.recommendation, group="a"))
    for picture in (sweep_picture, pareto_picture):
        assert "recommended (its worst group)" in texts(picture(found, "$fun$"))


@pytest.mark.parametrize("far", [[50.0], [-40.0], [30.0, 50.0]])
def test_a_far_lambda_does_not_flatten_the_axes(far):
    """What is measured near the adapter as trained keeps most of both axes, and the far values have their own ticks."""
    near = [0.0, 0.25, 0.5, 1.0, 1.5]
    assert near_range([*near, *far]) == (0.0, 1.5)
    made = [
        {**row("logits", index, lam, 0, -lam if lam in far else lam / 2 + index / 8), "kl": lam**2}
        for lam in (*near, *far)
        for index in range(3)
    ]
    found = Findings(summarise(made))
    for draw, x_far, y_far in (
        (partial(_draw_over_lambda, reward=None, shown="$fun$"), far, [-lam for lam in far]),
        (partial(_draw_over_lambda, reward=None, shown=None), far, [lam**2 for lam in far]),
        (partial(_draw_against_kl, reward="$fun$"), [lam**2 for lam in far], [-lam for lam in far]),
    ):
        panel = Figure().subplots()
        draw(panel, legend := {}, found)
        assert "beyond the break: axis compressed" in legend
        line = next(line for line in panel.lines if line.get_marker() == "o")
        is_near = [lam in near for lam in sorted([*near, *far])]
        places = panel.transAxes.inverted().transform(panel.transData.transform(line.get_xydata()))
        spread = np.ptp(places[is_near], axis=0)
        assert (spread > 0.6).all(), spread
        assert ((places >= 0) & (places <= 1)).all()
        for axis, values in ((panel.xaxis, x_far), (panel.yaxis, y_far)):
            assert any(np.isclose(axis.get_ticklocs(), value).any() for value in values)


def test_where_proxy_and_gold_part_is_marked(sweep):
    """In the panels of both over λ, and in no other."""
    step = GoldStep(0.5, Estimate(0.2, 0.1, 0.1, 0.3), Estimate(-0.2, 0.1, -0.3, -0.1), False)
    gold = GoldResult("$fun$", "length", 0.0, None, None, (step,), None, None, 1.0)
    found = replace(sweep, recommendation=replace(sweep.recommendation, gold=gold))
    marked = "$fun$ (trained) rises, length (gold) falls"
    for shown, is_there in (("$fun$", True), ("length", True), (None, False)):
        _draw_over_lambda(panel := Figure().subplots(), legend := {}, found, "$fun$", shown)
        assert (marked in legend) == is_there
        spans = [patch.get_x() for patch in panel.patches if patch.get_hatch()]
        assert spans == ([0.5] if is_there else [])
    assert marked not in texts(sweep_picture(sweep, "$fun$"))


def test_an_axis_without_far_values_stays_as_it_is():
    assert near_range([-0.5, 0, 0.25, 0.5, 0.75, 1, 1.5, 2]) == (-0.5, 2)
    assert near_range([1, 2, 4, 8, 16]) == (1, 16)
    panel = Figure().subplots()
    panel.plot([0, 1, 2], [0, 1, 4])
    set_scale(panel, "x", [0, 1, 2], [], legend := {})
    set_scale(panel, "y", [0, 1], [2], legend)
    assert (panel.get_xscale(), panel.get_yscale(), legend) == ("linear", "linear", {})


def test_a_broken_scale_is_inverted_by_its_inverse():
    scale = Broken(0.0, 2.0, 0.1, 0.01)
    assert scale.to_axis(np.array([-1.0, 0.5, 2.0, 12.0])) == pytest.approx([-0.1, 0.5, 2.0, 2.1])
    assert scale.from_axis(np.array([-0.1, 0.5, 2.0, 2.1])) == pytest.approx([-1.0, 0.5, 2.0, 12.0])


def test_a_label_makes_room_for_the_star():
    """It stands right of its point, but where the star is at the point or right beside it."""

    def side(star) -> list[str]:
        panel = Figure().subplots()
        panel.set(xlim=(0, 1), ylim=(0, 1))
        label(panel, [(0, 0.0, (0.1, 0.5)), (0, 1.0, (0.2, 0.5))], [star] if star else [])
        return [text.get_ha() for text in panel.texts]

    assert side(None) == side((0.9, 0.5)) == side((0.15, 0.9)) == ["left", "left"]
    assert side((0.1, 0.5)) == ["right", "left"]
    assert side((0.2, 0.5)) == ["right", "right"]


def test_an_arm_that_knows_no_lambda_is_a_level_line(monkeypatch):
    drawn = []
    monkeypatch.setattr(Star, "draw", lambda star, panel, x, y, legend: drawn.append((star.name, x, y)))
    found, _ = swept(arms=("logits", RULE))
    svg = sweep_picture(found, "$fun$")
    level = re.findall(r'd="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n"[^>]*stroke: #d55e00', svg.decode())
    across = [line for line in level if line[1] == line[3] and float(line[2]) - float(line[0]) > 200]
    assert len(across) == 2, "one in each panel"
    assert RULE in texts(svg)
    best, plain = found.best.best, found.recommendation
    assert drawn == [
        ("best plain λ", 1.0, plain.value.mean), ("recommended", None, best.value.mean),
        ("best plain λ", 1.0, plain.kl.mean), ("recommended", None, best.kl.mean),
    ]  # fmt: skip
    pareto = texts(pareto_picture(found, "$fun$"))
    assert {RULE, "Pareto front"} <= {*pareto}
    assert "Pareto front" not in texts(pareto_picture(replace(found, summaries=swept()[0].summaries), "$fun$"))


def test_the_front_is_what_no_point_beats_in_both():
    legend, panel = {}, Figure().subplots()
    places = [(2.0, 1.0), (0.0, 0.0), (1.0, 1.0), (3.0, 0.5), (1.0, 0.4), (4.0, 1.5)]
    assert draw_front(panel, places, legend) == [(0.0, 0.0), (1.0, 1.0), (4.0, 1.5)]
    assert list(legend) == ["Pareto front"]


def test_each_arm_has_a_mark_of_its_own():
    styles = [point_style(number) for number in range(24)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 24


def test_a_line_is_estimated_where_the_curve_is_and_smooth_elsewhere():
    measured = {lam: Estimate(10 * lam**2, 0.1, 0.0, 0.0) for lam in (0.0, 0.5, 1.0)}
    quantity = Quantity.of(measured, {point.lam: point.rewards["$fun$"] for point in curve().points})
    known = np.isfinite(quantity.estimated)
    assert (known == (quantity.lam <= 0.5)).all()
    np.testing.assert_allclose(quantity.value[known], 10 * quantity.lam[known])
    np.testing.assert_allclose((quantity.high - quantity.low)[known], 2.0)
    assert np.interp((0.25, 1.0), quantity.lam, quantity.value) == pytest.approx([2.5, 10.0])
    assert 2.5 < np.interp(0.75, quantity.lam, quantity.value) < 10.0


def test_what_is_unknown_is_left_out():
    unknown = Estimate(math.nan, math.nan, math.nan, math.nan)
    assert Quantity.of({0.0: unknown, 1.0: unknown}, {}).measured == {}
    single = Quantity.of({0.0: Estimate(2.0, math.nan, math.nan, math.nan), 1.0: unknown}, {})
    assert list(single.measured) == [0.0]
    assert single.value.tolist() == [2.0]


def test_a_kl_that_is_no_number_and_a_reward_that_an_arm_lacks_are_left_out(sweep):
    """As in the folder of a sweep whose model gave no finite numbers, or by the rows of an earlier version."""
    nan = Estimate(math.nan, math.nan, math.nan, math.nan)
    summaries = [replace(s, kl=nan if s.lam in (0.5, 1.0) else s.kl) for s in sweep.summaries]
    summaries = [replace(s, rewards={}) if s.lam == 0.0 else s for s in summaries]
    for curve_or_none in (sweep.curve, None):
        found = replace(sweep, summaries=summaries, curve=curve_or_none, recommendation=None)
        for reward in ("$fun$", "unknown"):
            labels = texts(pareto_picture(found, reward))
            assert ("λ=-0.5" in labels) == (reward == "$fun$")
            assert not {"λ=0", "λ=0.5", "λ=1"} & {*labels}
            sweep_picture(found, reward)
    pareto_picture(replace(found, summaries=[replace(s, kl=nan) for s in summaries]), "$fun$")


def test_ticks_of_a_square_root_scale():
    panel = Figure().subplots()
    panel.plot([0.0, 9.0], [0.0, 1.0])
    set_scale(panel, "x", [0.0, 9.0], [], {}, is_root=True)
    ticks = panel.get_xticks().tolist()
    assert ticks[0] == 0.0
    assert {1.0, 2.0, 5.0} <= {*ticks}
    assert np.diff(np.sqrt(ticks)).min() >= 0.09 * 3.0


def test_files_are_written_whole_in_the_format_of_their_ending(sweep, tmp_path):
    for plot, name in ((plot_sweep, "sweep"), (plot_pareto, "pareto")):
        for ending in ("png", "svg"):
            plot(sweep, "$fun$", tmp_path / f"{name}.{ending}")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == PNG
        assert (tmp_path / f"{name}.svg").read_bytes()[:5] == b"<?xml"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["pareto.png", "pareto.svg", "sweep.png", "sweep.svg"]
    before = (tmp_path / "sweep.svg").read_bytes()
    plot_sweep(sweep, "$fun$", tmp_path / "sweep.svg")
    assert (tmp_path / "sweep.svg").read_bytes() == before, "the same picture is the same file"
    with pytest.raises(ValueError, match="not supported"):
        plot_sweep(sweep, "$fun$", tmp_path / "sweep.abc")
