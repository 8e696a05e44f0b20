"""The pictures of a sweep, by the text in them and the numbers that they draw."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from swept import RULE, curve, swept

from dera_peft.evaluate.analysis.summary import Estimate
from dera_peft.evaluate.report.marks import Star, draw_front, label, point_style
from dera_peft.evaluate.report.plots import _root_ticks, pareto_picture, plot_pareto, plot_sweep, sweep_picture
from dera_peft.evaluate.report.quantities import Quantity

ARMS = ("logits", "weights", "retrained at <β=1>", "of unknown β")
MODELS = {"retrained at <β=1>": 0.5, "of unknown β": None}
PNG = b"\x89PNG"


def texts(svg: bytes) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


def points(svg: bytes, color: str) -> int:
    """How many marks of a arm's colour there are, the legend's included."""
    return len(re.findall(rf'<use [^>]*style="fill: {color}', svg.decode()))


@pytest.fixture(scope="module")
def sweep() -> dict:
    made = swept(arms=ARMS)
    return {name: made[name] for name in ("summaries", "curve", "recommendation")}


def test_pictures_name_what_is_drawn(sweep):
    over_lam = texts(sweep_picture(**sweep, reward="$fun$", title="a title", models=MODELS))
    for text in ("mean reward: $fun$", "λ", "reference", "as trained", "recommended", "DeRa (logits mixed)", "a title"):
        assert text in over_lam
    assert {"estimated between the points", "95 % band of the estimate", "smooth line, no estimate"} <= {*over_lam}
    assert "retrained at &lt;β=1&gt;" in over_lam
    assert "of unknown β" not in over_lam, "it has no place on the axis of λ"
    pareto = texts(pareto_picture(**sweep, reward="$fun$", models=MODELS))
    assert {"λ=0", "λ=0.5", "λ=1", "recommended", "retrained at &lt;β=1&gt;", "of unknown β"} <= {*pareto}


def test_a_further_model_stands_at_its_own_lambda(sweep):
    def places(models) -> set[str]:
        svg = sweep_picture(**sweep, reward="$fun$", models=models).decode()
        return set(re.findall(r'<use [^>]*x="([\d.]+)"[^>]*style="fill: #009e73', svg))

    at_half, at_one = places({**MODELS, ARMS[2]: 0.5}), places({**MODELS, ARMS[2]: 1.0})
    assert len(at_half - at_one) == len(at_one - at_half) == 2, "one mark in each panel has moved"


def test_without_an_estimate_or_a_recommendation(sweep):
    svg = sweep_picture(sweep["summaries"], None, None, "$fun$", models=MODELS)
    assert "smooth line, no estimate" in texts(svg)
    assert not {"estimated between the points", "recommended"} & {*texts(svg)}
    assert "mean reward: None" not in texts(sweep_picture(sweep["summaries"], None, None, None))
    other = texts(sweep_picture(**sweep, reward="length", models=MODELS))
    assert "recommended" not in other, "the recommendation is of another reward"


def test_the_star_is_at_the_recommended_value(sweep, monkeypatch):
    """Which the curve, from all samples, may miss; and that of a worst group is off the line of means."""
    drawn = []
    monkeypatch.setattr(Star, "draw", lambda star, panel, x, y, legend: drawn.append((x, y)))
    best = sweep["recommendation"]
    best = replace(best, lam=0.5, value=replace(best.value, mean=7.0), kl=replace(best.kl, mean=3.0))
    sweep_picture(sweep["summaries"], sweep["curve"], best, "$fun$", models=MODELS)
    pareto_picture(sweep["summaries"], sweep["curve"], best, "$fun$", models=MODELS)
    assert drawn == [(0.5, 7.0), (0.5, 3.0), (3.0, 7.0)]


def test_a_star_of_a_worst_group_is_called_so(sweep):
    best = replace(sweep["recommendation"], group="a")
    for picture in (sweep_picture, pareto_picture):
        assert "recommended (its worst group)" in texts(picture(sweep["summaries"], None, best, "$fun$"))


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
    made = swept(arms=("logits", RULE))
    inputs = {name: made[name] for name in ("summaries", "curve", "recommendation", "best")}
    svg = sweep_picture(**inputs, reward="$fun$")
    level = re.findall(r'd="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n"[^>]*stroke: #d55e00', svg.decode())
    across = [line for line in level if line[1] == line[3] and float(line[2]) - float(line[0]) > 200]
    assert len(across) == 2, "one in each panel"
    assert RULE in texts(svg)
    best, plain = made["best"].best, made["recommendation"]
    assert drawn == [
        ("best plain λ", 1.0, plain.value.mean), ("best plain λ", 1.0, plain.kl.mean),
        ("recommended", None, best.value.mean), ("recommended", None, best.kl.mean),
    ]  # fmt: skip
    pareto = texts(pareto_picture(**inputs, reward="$fun$"))
    assert {RULE, "Pareto front"} <= {*pareto}
    assert "Pareto front" not in texts(pareto_picture(**{**inputs, "summaries": swept()["summaries"]}, reward="$fun$"))


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
    summaries = [replace(s, kl=nan if s.lam in (0.5, 1.0) else s.kl) for s in sweep["summaries"]]
    summaries = [replace(s, rewards={}) if s.lam == 0.0 else s for s in summaries]
    for curve_or_none in (sweep["curve"], None):
        for reward in ("$fun$", "unknown"):
            labels = texts(pareto_picture(summaries, curve_or_none, None, reward, models=MODELS))
            assert ("λ=-0.5" in labels) == (reward == "$fun$")
            assert not {"λ=0", "λ=0.5", "λ=1"} & {*labels}
            sweep_picture(summaries, curve_or_none, None, reward, models=MODELS)
    pareto_picture([replace(s, kl=nan) for s in summaries], None, None, "$fun$")


def test_ticks_of_a_square_root_scale():
    assert _root_ticks(9.0) == [0.0, 0.1, 0.5, 1.0, 2.0, 5.0]
    assert _root_ticks(0.0) == [0.0]


def test_files_are_written_whole_in_the_format_of_their_ending(sweep, tmp_path):
    for plot, name in ((plot_sweep, "sweep"), (plot_pareto, "pareto")):
        for ending in ("png", "svg"):
            plot(**sweep, reward="$fun$", file=tmp_path / f"{name}.{ending}", models=MODELS)
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == PNG
        assert (tmp_path / f"{name}.svg").read_bytes()[:5] == b"<?xml"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["pareto.png", "pareto.svg", "sweep.png", "sweep.svg"]
    before = (tmp_path / "sweep.svg").read_bytes()
    plot_sweep(**sweep, reward="$fun$", file=tmp_path / "sweep.svg", models=MODELS)
    assert (tmp_path / "sweep.svg").read_bytes() == before, "the same picture is the same file"
    with pytest.raises(ValueError, match="not supported"):
        plot_sweep(**sweep, reward="$fun$", file=tmp_path / "sweep.abc")
