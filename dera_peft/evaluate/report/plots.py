"""The pictures of a sweep: reward and KL against λ, and reward against KL."""

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.typing import LineStyleType

from dera_peft.engine.names import LOGITS, WEIGHTS
from dera_peft.evaluate.analysis.curve import Curve, through_points
from dera_peft.evaluate.analysis.recommend import Recommendation
from dera_peft.evaluate.analysis.summary import Estimate, LambdaSummary
from dera_peft.files import write_atomically

INK, MUTED, PAPER = "#1f2328", "#6e7681", "#ffffff"
# Okabe and Ito's palette (jfly.uni-koeln.de/color), which the colour-blind can tell apart; each arm has a marker too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "D", "^", "v", "P")
STAR: dict[str, Any] = {
    "marker": "*",
    "markersize": 15,
    "color": "#f0e442",
    "markeredgecolor": INK,
    "linestyle": "none",
}
DASHES: LineStyleType = (0, (4, 2.5))
NAMES = {LOGITS: "DeRa (logits mixed)", WEIGHTS: "adapter's weights scaled by λ"}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "text.parse_math": False,  # a "$" in a name is a "$"
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dera",  # the same picture is the same file
}
STEPS = 400  # in which the lines between measured points are drawn


def plot_sweep(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    recommendation: Recommendation | None,
    reward: str | None,
    file: str | os.PathLike,
    title: str = "",
    models: Mapping[str, float | None] | None = None,
) -> None:
    """Writes `sweep_picture` into a file, in the format that its ending tells, as .png or .svg."""
    picture = sweep_picture(summaries, curve, recommendation, reward, title, models, Path(file).suffix[1:])
    write_atomically(file, picture)


def plot_pareto(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    recommendation: Recommendation | None,
    reward: str,
    file: str | os.PathLike,
    title: str = "",
    models: Mapping[str, float | None] | None = None,
) -> None:
    """Writes `pareto_picture` into a file, in the format that its ending tells, as .png or .svg."""
    picture = pareto_picture(summaries, curve, recommendation, reward, title, models, Path(file).suffix[1:])
    write_atomically(file, picture)


def sweep_picture(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    recommendation: Recommendation | None,
    reward: str | None,
    title: str = "",
    models: Mapping[str, float | None] | None = None,
    format: str = "svg",
) -> bytes:
    """
    A reward and the KL against λ: each arm's measured points with their intervals, and what is between them.

    Args:
        curve: what was estimated between the measured λ of DeRa; None or an empty one where that is off.
        recommendation: is marked if it is of this reward.
        reward: its name; None draws the KL alone.
        models: further models among the arms: the λ that each stands for, or None where that isn't known; those are
            left to the other picture.
    """
    models = models or {}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4) if reward else (5, 4), layout="constrained")
        panels = figure.subplots(1, 2 if reward else 1, squeeze=False)[0]
        panels[0].set_ylabel(f"mean reward: {reward}")
        panels[-1].set_ylabel("KL to the reference (nats)")
        arms = _by_arm(summaries)
        legend = _legend({arm: models.get(arm, 0.0) is not None for arm in arms}, models)
        for number, (arm, points) in enumerate(arms.items()):
            if models.get(arm, 0.0) is None:
                continue
            quantities = [_reward(points, curve, reward), _kl(points, curve)] if reward else [_kl(points, curve)]
            for panel, quantity in zip(panels, quantities, strict=True):
                _draw_over_lam(panel, quantity, number, legend, shift=models.get(arm))
        if recommendation and recommendation.reward == reward:
            for panel, at_best in zip(panels, (recommendation.value, recommendation.kl), strict=True):
                _draw_star(panel, recommendation.lam, at_best.mean, recommendation, legend)
        for panel in panels:
            panel.set_xlabel("λ")
            panel.margins(y=0.12)
            _mark_ends(panel)
        return _drawn(figure, legend, title, format, columns=3)


def pareto_picture(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    recommendation: Recommendation | None,
    reward: str,
    title: str = "",
    models: Mapping[str, float | None] | None = None,
    format: str = "svg",
) -> bytes:
    """
    A reward against the KL that it costs, on a square-root scale (a KL grows as the square of what moves it), with λ at
    the points; further models are marks of their own. Arguments as in `sweep_picture`.
    """
    models = models or {}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 4), layout="constrained")
        panel = figure.subplots()
        panel.set_xscale("function", functions=(_root, _square))
        arms = _by_arm(summaries)
        legend = _legend(dict.fromkeys(arms, True), models)
        star = recommendation if recommendation and recommendation.reward == reward else None
        labels: list[tuple[int, float, tuple[float, float]]] = []  # arm, λ, place
        for number, (arm, points) in enumerate(arms.items()):
            drawn = [point for point in points if math.isfinite(point.kl.mean)]
            y = _reward(drawn, curve, reward)
            x = _kl([point for point in drawn if point.lam in y.measured], curve)
            color = COLORS[number % len(COLORS)]
            if arm not in models:
                estimated = np.isfinite(x.estimated) & np.isfinite(y.estimated)
                _draw_pieces(panel, x.value, y.value, estimated, color, legend)
                labels += [
                    (number, lam, (x.measured[lam].mean, y.measured[lam].mean))
                    for lam in y.measured
                    if lam != 0 or number == 0  # all arms begin at the reference
                ]
            panel.errorbar(
                [x.measured[lam].mean for lam in y.measured], [level.mean for level in y.measured.values()],
                xerr=_bars(x.measured[lam] for lam in y.measured), yerr=_bars(y.measured.values()),
                **_point_style(number),
            )  # fmt: skip
        if star:
            _draw_star(panel, star.kl.mean, star.value.mean, star, legend)
        panel.set_xlim(left=-0.005 * panel.get_xlim()[1])  # room beside the axis for what is near 0
        panel.set_xticks(ticks := _root_ticks(panel.get_xlim()[1]), [f"{tick:g}" for tick in ticks])
        panel.set_xlabel("KL to the reference (nats, square-root scale)")
        panel.set_ylabel(f"mean reward: {reward}")
        panel.margins(y=0.12)
        _label(panel, labels, (star.kl.mean, star.value.mean) if star else None)
        return _drawn(figure, legend, title, format, columns=2)


@dataclass(frozen=True)
class Quantity:
    """
    One arm's reward or KL.

    Attributes:
        measured: by λ, those that are known.
        lam: fine steps of λ from the least to the greatest measured one, `[N]`.
        smooth: a line through the measured points, `[N]`.
        estimated, low, high: the curve's estimate and its interval, NaN where there is none, `[N]`.
    """

    measured: dict[float, Estimate]
    lam: np.ndarray
    smooth: np.ndarray
    estimated: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, measured: Mapping[float, Estimate], between: Mapping[float, Estimate | None]) -> "Quantity":
        known = {lam: value for lam, value in measured.items() if math.isfinite(value.mean)}
        if not known:
            return cls({}, *[np.empty(0)] * 5)
        means = [value.mean for value in known.values()]
        if len(known) == 1:
            unknown = np.full(1, math.nan)
            return cls(known, np.array(list(known)), np.array(means), unknown, unknown, unknown)
        lam = np.union1d(np.linspace(min(known), max(known), STEPS + 1), list(known))
        smooth = np.asarray(through_points(list(known), means, lam))
        estimates = [
            np.interp(lam, list(between), [math.nan if e is None else getattr(e, name) for e in between.values()])
            if between
            else np.full(len(lam), math.nan)
            for name in ("mean", "low", "high")
        ]
        return cls(known, lam, smooth, *estimates)

    @property
    def value(self) -> np.ndarray:
        return np.where(np.isfinite(self.estimated), self.estimated, self.smooth)


def _kl(points: Sequence[LambdaSummary], curve: Curve | None) -> Quantity:
    between = curve.points if curve and points and points[0].arm == LOGITS else []
    return Quantity.of({p.lam: p.kl for p in points}, {p.lam: p.kl for p in between})


def _reward(points: Sequence[LambdaSummary], curve: Curve | None, reward: str) -> Quantity:
    between = curve.points if curve and points and points[0].arm == LOGITS else []
    return Quantity.of(
        {p.lam: p.rewards[reward].level for p in points if reward in p.rewards},
        {p.lam: p.rewards.get(reward) for p in between},
    )


def _by_arm(summaries: Sequence[LambdaSummary]) -> dict[str, list[LambdaSummary]]:
    arms: dict[str, list[LambdaSummary]] = {}
    for summary in summaries:
        arms.setdefault(summary.arm, []).append(summary)
    return arms


def _draw_over_lam(
    panel: Axes, quantity: Quantity, number: int, legend: dict[str, Artist], shift: float | None
) -> None:
    """An arm, or the one point of a further model, which stands at the λ `shift`."""
    color = COLORS[number % len(COLORS)]
    estimated = np.isfinite(quantity.estimated)
    if estimated.any():
        panel.fill_between(quantity.lam, quantity.low, quantity.high, color=color, alpha=0.2, linewidth=0)
        legend["95 % band of the estimate"] = Patch(color=MUTED, alpha=0.3)
    _draw_pieces(panel, quantity.lam, quantity.value, estimated, color, legend)
    panel.errorbar(
        [lam if shift is None else shift for lam in quantity.measured],
        [value.mean for value in quantity.measured.values()],
        yerr=_bars(quantity.measured.values()),
        **_point_style(number),
    )


def _draw_pieces(
    panel: Axes, x: np.ndarray, y: np.ndarray, estimated: np.ndarray, color: str, legend: dict[str, Artist]
) -> None:
    """A solid line where it is estimated, a dashed one where it only runs through the points."""
    pieces: list[tuple[np.ndarray, LineStyleType, str]] = [
        (estimated, "-", "estimated between the points"),
        (~estimated, DASHES, "smooth line, no estimate"),
    ]
    for there, dashes, name in pieces:
        if len(there) > 2 and there.any():
            joined = there | np.append(there[1:], False) | np.append(False, there[:-1])  # one step on: no gap is seen
            panel.plot(np.where(joined, x, math.nan), np.where(joined, y, math.nan), color, linewidth=1.6, ls=dashes)
            legend[name] = Line2D([], [], color=MUTED, linewidth=1.6, linestyle=dashes)


def _draw_star(panel: Axes, x: float, y: float, recommendation: Recommendation, legend: dict[str, Artist]) -> None:
    """At the recommendation's own numbers, also where the line passes by: that is made from all samples and groups."""
    panel.plot([x], [y], zorder=5, **STAR)
    legend["recommended" if recommendation.group is None else "recommended (its worst group)"] = Line2D([], [], **STAR)


def _label(
    panel: Axes, labels: Sequence[tuple[int, float, tuple[float, float]]], star: tuple[float, float] | None
) -> None:
    """Names the λ of points. The arms' labels stand on either side, as their points may lie close together."""
    panel.get_xlim(), panel.get_ylim()  # brings the limits, and with them the transform, up to date
    to_panel = (panel.transScale + panel.transLimits).transform  # from 0 to 1 over the panel
    for number, lam, place in labels:
        offset: dict[str, Any] = {"xytext": (8, -3 if lam == 0 else -11)}
        right, up = to_panel(star) - to_panel(place) if star else (math.inf, math.inf)
        if number % 2 or (-0.03 < right < 0.12 and abs(up) < 0.08):  # the star would lie on a label to the right
            offset = {"xytext": (-3, 7), "ha": "right"}
        panel.annotate(
            f"λ={lam:g}", place, textcoords="offset points", fontsize=8, color=COLORS[number % len(COLORS)], **offset
        )


def _bars(estimates: Iterable[Estimate]) -> np.ndarray:
    """How far the intervals reach below and above the means, `[2, N]`; nowhere, where they are unknown."""
    reach = np.array([(e.mean - e.low, e.high - e.mean) for e in estimates]).reshape(-1, 2).T
    return np.maximum(np.nan_to_num(reach), 0.0)


def _point_style(number: int) -> dict:
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": "none",
        "markersize": 5,
        "capsize": 2.5,
        "elinewidth": 1.2,
        "zorder": 4 - 0.01 * number,  # the first arm lies above the others
    }


def _legend(arms: Mapping[str, bool], models: Mapping[str, float | None]) -> dict[str, Artist]:
    """The entries of the arms, if they are drawn; what else is there adds its own."""
    legend: dict[str, Artist] = {}
    for number, (arm, drawn) in enumerate(arms.items()):
        if drawn:
            style = {name: _point_style(number)[name] for name in ("color", "marker", "markersize")}
            legend[NAMES.get(arm, arm)] = Line2D([], [], linestyle="none" if arm in models else "-", **style)
    return legend


def _mark_ends(panel: Axes) -> None:
    left, right = panel.get_xlim()
    for lam, name in ((0.0, "reference"), (1.0, "as trained")):
        if left <= lam <= right:
            panel.axvline(lam, color=MUTED, alpha=0.6, linewidth=0.9, linestyle=":", zorder=0)
            panel.annotate(
                name, (lam, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                va="bottom", ha="center", fontsize=8, color=MUTED,
            )  # fmt: skip


def _root(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


def _root_ticks(largest: float) -> list[float]:
    """0 and round numbers, at least 0.08 of a square-root scale that ends at `largest` apart."""
    ticks = [0.0]
    for tick in (digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)):
        if tick <= largest and math.sqrt(tick) - math.sqrt(ticks[-1]) >= 0.08 * math.sqrt(largest):
            ticks.append(tick)
    return ticks


def _drawn(figure: Figure, legend: dict[str, Artist], title: str, format: str, columns: int) -> bytes:
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=columns, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    stream = io.BytesIO()
    figure.savefig(stream, format=format, dpi=160, metadata={"Date": None} if format == "svg" else None)
    return stream.getvalue()
