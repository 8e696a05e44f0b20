"""The pictures of a sweep: reward and KL against λ, and reward against KL."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.typing import LineStyleType

from dera_peft.decoding.lambdas import Lambda, NamedLambda
from dera_peft.evaluate.analysis.best import BestArm
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.recommend import Recommendation
from dera_peft.evaluate.analysis.summary import Estimate, LambdaSummary
from dera_peft.evaluate.points import anchors, is_of_several
from dera_peft.evaluate.report.maps import map_picture
from dera_peft.evaluate.report.marks import (
    DASHES,
    LABELLED,
    LEVEL,
    MUTED,
    POINT,
    STYLE,
    as_image,
    bars,
    color_of,
    draw_front,
    label,
    legend_of,
    mark_ends,
    point_style,
    stars_of,
)
from dera_peft.evaluate.report.quantities import Quantity, kl_of, reward_of
from dera_peft.files import write_atomically


def plot_sweep(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    recommendation: Recommendation | None,
    reward: str | None,
    file: str | os.PathLike,
    title: str = "",
    models: Mapping[str, float | None] | None = None,
    best: BestArm | None = None,
) -> None:
    """Writes `sweep_picture` into a file, in the format that its ending tells, as .png or .svg."""
    picture = sweep_picture(summaries, curve, recommendation, reward, title, models, best, Path(file).suffix[1:])
    write_atomically(file, picture)


def plot_pareto(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    recommendation: Recommendation | None,
    reward: str,
    file: str | os.PathLike,
    title: str = "",
    models: Mapping[str, float | None] | None = None,
    best: BestArm | None = None,
) -> None:
    """Writes `pareto_picture` into a file, in the format that its ending tells, as .png or .svg."""
    picture = pareto_picture(summaries, curve, recommendation, reward, title, models, best, Path(file).suffix[1:])
    write_atomically(file, picture)


def sweep_picture(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    recommendation: Recommendation | None,
    reward: str | None,
    title: str = "",
    models: Mapping[str, float | None] | None = None,
    best: BestArm | None = None,
    format: str = "svg",
) -> bytes:
    """
    A reward and the KL against λ: each arm's measured points with their intervals, and what is between them. An arm
    that knows no λ is a level line. Of several adapters it is `maps.map_picture`.

    Args:
        curve: what was estimated between the measured λ of DeRa; None or an empty one where that is off.
        recommendation: is marked if it is of this reward.
        reward: its name; None draws the KL alone.
        models: the arms of other adapters: the λ that their λ=1 stands for, or None where that isn't known; those are
            left to the other picture.
        best: of all arms, if there are several; is marked likewise.
    """
    models = models or {}
    if is_of_several(summary.lam for summary in summaries):
        return map_picture(summaries, curve, recommendation, reward, title, best, format)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4) if reward else (5, 4), layout="constrained")
        panels = figure.subplots(1, 2 if reward else 1, squeeze=False)[0]
        panels[0].set_ylabel(f"mean reward: {reward}")
        panels[-1].set_ylabel("KL to the reference (nats)")
        arms = _by_arm(summaries)
        scales = {arm: models.get(arm, 1.0) for arm in arms}
        lines = _lines(arms, models, level=LEVEL)
        legend = legend_of({arm: lines[arm] for arm, scale in scales.items() if scale is not None}, _numbers(arms))
        for number, (arm, points) in enumerate(arms.items()):
            if (scale := scales[arm]) is None:
                continue
            quantities = [reward_of(points, curve, reward), kl_of(points, curve)] if reward else [kl_of(points, curve)]
            for panel, quantity in zip(panels, quantities, strict=True):
                if None in quantity.measured:
                    _draw_level(panel, quantity.measured[None], number)
                else:
                    _draw_over_lam(panel, quantity, number, legend, scale)
        for star in stars_of(recommendation, best, reward):
            scale = scales.get(star.arm, 1.0)
            x = None if star.lam is None or scale is None else cast("float", star.lam) * scale
            for panel, y in zip(panels, (star.value, star.kl), strict=True):
                star.draw(panel, x, y, legend)
        for panel in panels:
            panel.set_xlabel("λ")
            panel.margins(y=0.12)
            mark_ends(panel)
        return as_image(figure, legend, title, format, columns=3)


def pareto_picture(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    recommendation: Recommendation | None,
    reward: str,
    title: str = "",
    models: Mapping[str, float | None] | None = None,
    best: BestArm | None = None,
    format: str = "svg",
) -> bytes:
    """
    A reward against the KL that it costs, on a square-root scale (a KL grows as the square of what moves it), with λ at
    the points, and of several arms, or several adapters, the Pareto front. Arguments as in `sweep_picture`.
    """
    models = models or {}
    with matplotlib.rc_context(STYLE):
        arms = _by_arm(summaries)
        is_crowded = len(arms) > LABELLED
        figure = Figure(figsize=(9, 5) if is_crowded else (5.4, 4), layout="constrained")
        panel = figure.subplots()
        panel.set_xscale("function", functions=(_root, _square))
        lines = _lines(arms, models, level=POINT)
        legend = legend_of(lines, _numbers(arms))
        stars = stars_of(recommendation, best, reward)
        labels: list[tuple[int, Lambda, tuple[float, float]]] = []  # arm, λ, place
        measured: list[tuple[float, float]] = []
        for number, (arm, points) in enumerate(arms.items()):
            drawn = [point for point in points if math.isfinite(point.kl.mean)]
            y = reward_of(drawn, curve, reward)
            x = kl_of([point for point in drawn if point.lam in y.measured], curve)
            places = {lam: (x.measured[lam].mean, y.measured[lam].mean) for lam in y.measured}
            measured += places.values()
            if lines[arm] != POINT:
                estimated = np.isfinite(x.estimated) & np.isfinite(y.estimated)
                _draw_pieces(panel, x.value, y.value, estimated, color_of(number), legend)
                labels += [
                    (number, lam, place)
                    for lam, place in places.items()
                    if lam is not None and (lam != 0 or number == 0)  # all arms begin at the reference
                ]
            panel.errorbar(
                [kl for kl, _ in places.values()], [value for _, value in places.values()],
                xerr=bars(x.measured[lam] for lam in y.measured), yerr=bars(y.measured.values()),
                **point_style(number),
            )  # fmt: skip
        adapters = next((list(lam) for _, lam, _ in labels if isinstance(lam, NamedLambda)), None)
        if len(arms) > 1 or adapters:
            front = draw_front(panel, measured, legend)
            if adapters:
                known = anchors(lam for _, lam, _ in labels)
                labels = [each for each in labels if each[2] in front or (each[1] in known and each[0] == 0)]
                legend[f"labels: λ of {', '.join(adapters)}"] = Line2D([], [], linestyle="none")
            elif is_crowded:
                last = {number: place for number, _, place in labels}
                labels = [each for each in labels if each[2] in front or each[2] == last[each[0]]]
        for star in stars:
            star.draw(panel, star.kl, star.value, legend)
        panel.set_xlim(left=-0.005 * panel.get_xlim()[1])  # room beside the axis for what is near 0
        panel.set_xticks(ticks := _root_ticks(panel.get_xlim()[1]), [f"{tick:g}" for tick in ticks])
        panel.set_xlabel("KL to the reference (nats, square-root scale)")
        panel.set_ylabel(f"mean reward: {reward}")
        panel.margins(y=0.12)
        label(panel, labels, [(star.kl, star.value) for star in stars])
        return as_image(figure, legend, title, format, columns=3 if is_crowded else 2)


def _by_arm(summaries: Sequence[LambdaSummary]) -> dict[str, list[LambdaSummary]]:
    arms: dict[str, list[LambdaSummary]] = {}
    for summary in summaries:
        arms.setdefault(summary.arm, []).append(summary)
    return arms


def _lines(
    arms: Mapping[str, Sequence[LambdaSummary]], models: Mapping[str, float | None], level: LineStyleType
) -> dict[str, LineStyleType]:
    """The kind of each arm's line: `level` without λ, none where it is a point, as another adapter as trained is."""
    return {
        arm: level if points[0].lam is None else POINT if arm in models and len(points) == 1 else "-"
        for arm, points in arms.items()
    }


def _numbers(arms: Mapping[str, Sequence[LambdaSummary]]) -> dict[str, int]:
    return {arm: number for number, arm in enumerate(arms)}


def _draw_over_lam(panel: Axes, quantity: Quantity, number: int, legend: dict[str, Artist], scale: float) -> None:
    """An arm, whose λ stand for others by a factor where it is of another adapter."""
    color, lam = color_of(number), quantity.lam * scale
    estimated = np.isfinite(quantity.estimated)
    if estimated.any():
        panel.fill_between(lam, quantity.low, quantity.high, color=color, alpha=0.2, linewidth=0)
        legend["95 % band of the estimate"] = Patch(color=MUTED, alpha=0.3)
    _draw_pieces(panel, lam, quantity.value, estimated, color, legend)
    panel.errorbar(
        [value * scale for value in quantity.measured if value is not None],
        [value.mean for value in quantity.measured.values()],
        yerr=bars(quantity.measured.values()),
        **point_style(number),
    )


def _draw_level(panel: Axes, level: Estimate, number: int) -> None:
    """An arm that knows no λ, over the whole width, with its interval."""
    panel.axhline(level.mean, color=color_of(number), linewidth=1.6, linestyle=LEVEL, zorder=2)
    if math.isfinite(level.low) and math.isfinite(level.high):
        panel.axhspan(level.low, level.high, color=color_of(number), alpha=0.12, linewidth=0, zorder=0)


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
