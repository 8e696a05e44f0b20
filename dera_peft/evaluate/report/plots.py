"""The pictures of a sweep: reward and KL against λ, and reward against KL."""

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.typing import LineStyleType

from dera_peft.decoding.lambdas import Lambda, NamedLambda
from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.points import anchors
from dera_peft.evaluate.report.findings import Findings
from dera_peft.evaluate.report.maps import draw_map
from dera_peft.evaluate.report.marks import (
    DASHES,
    LABELLED,
    LEVEL,
    MUTED,
    POINT,
    STYLE,
    Legend,
    bars,
    color_of,
    draw_front,
    label,
    mark_ends,
    mark_of,
    point_style,
    save,
    stars_of,
    with_legend,
    wrapped,
)
from dera_peft.evaluate.report.quantities import Quantity, kl_of, reward_of
from dera_peft.evaluate.report.scales import set_scale
from dera_peft.files import write_atomically

KL = "KL to the reference (nats)"
PANEL = (4.0, 3.3)  # inches: on a phone its text is as large as the page's
CROWDED = (5.2, 4.0)

Draw = Callable[[Axes, Legend], None]  # draws a panel, and adds to the legend


def plot_sweep(findings: Findings, reward: str | None, file: str | os.PathLike, title: str = "") -> None:
    """Writes `sweep_picture` into a file, in the format that its ending tells, as .png or .svg."""
    write_atomically(file, sweep_picture(findings, reward, title, Path(file).suffix[1:]))


def plot_pareto(findings: Findings, reward: str, file: str | os.PathLike, title: str = "") -> None:
    """Writes `pareto_picture` into a file, in the format that its ending tells, as .png or .svg."""
    write_atomically(file, pareto_picture(findings, reward, title, Path(file).suffix[1:]))


def sweep_picture(findings: Findings, reward: str | None, title: str = "", format: str = "svg") -> bytes:
    """
    A reward and the KL against λ: each arm's measured points with their intervals, and what is between them. An arm
    that knows no λ is a level line. Of several adapters it is as in `maps`.

    Args:
        reward: its name; None draws the KL alone.
    """
    with matplotlib.rc_context(STYLE):
        draws = _over_lambda(findings, reward)
        figure = Figure(figsize=(4.6 * len(draws), 4.2), layout="constrained")
        legend: Legend = {}
        for panel, draw in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws.values(), strict=True):
            draw(panel, legend)
        return with_legend(figure, legend, title, format, columns=3)


def pareto_picture(findings: Findings, reward: str, title: str = "", format: str = "svg") -> bytes:
    """
    A reward against the KL that it costs, on a square-root scale (a KL grows as the square of what moves it), with λ at
    the points, and of several arms, or several adapters, the Pareto front.
    """
    is_crowded = len(findings.arms) > LABELLED
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5) if is_crowded else (5.4, 4.2), layout="constrained")
        legend: Legend = {}
        _draw_against_kl(figure.subplots(), legend, findings, reward)
        return with_legend(figure, legend, title, format, columns=3 if is_crowded else 2)


def panels(findings: Findings, reward: str | None, legend: Legend) -> dict[str, bytes]:
    """
    The same for a page, which lays panels out as it has room: what each shows -> its SVG. The KL against λ is beside
    the first reward alone. Adds to the legend.
    """
    draws = _over_lambda(findings, reward)
    if reward is not None:
        if reward != findings.rewards[0]:
            del draws["KL against λ"]
        draws[f"{reward} against KL"] = partial(_draw_against_kl, findings=findings, reward=reward)
    size, font = (CROWDED, 12) if len(findings.arms) > LABELLED else (PANEL, 10)
    pictures = {}
    with matplotlib.rc_context(STYLE | {"font.size": font}):
        for name, draw in draws.items():
            figure = Figure(figsize=size, layout="constrained")
            draw(figure.subplots(), legend)
            pictures[name] = save(figure, "svg")
    return pictures


def _over_lambda(findings: Findings, reward: str | None) -> dict[str, Draw]:
    """What each panel shows -> how it is drawn."""
    draw = draw_map if findings.of_several else _draw_over_lambda
    shown = ([reward] if reward is not None else []) + [None]  # None: the KL
    return {f"{name or 'KL'} against λ": partial(draw, findings=findings, reward=reward, shown=name) for name in shown}


def _draw_over_lambda(panel: Axes, legend: Legend, findings: Findings, reward: str | None, shown: str | None) -> None:
    """`shown`: the reward, or None for the KL, with the stars of the reward."""
    lines = _lines(findings, level=LEVEL)
    near: list[float] = []
    far: list[float] = []
    for number, (arm, points) in enumerate(findings.arms.items()):
        if (scale := findings.models.get(arm, 1.0)) is None:
            continue
        legend[findings.name_of(arm)] = mark_of(number, lines[arm])
        quantity = kl_of(points, findings.curve) if shown is None else reward_of(points, findings.curve, shown)
        for lam, value in quantity.measured.items():
            (far if findings.is_far(arm, lam) else near).append(value.mean)
        if None in quantity.measured:
            _draw_level(panel, quantity.measured[None], number)
        else:
            _draw_line(panel, quantity, number, legend, scale)
    panel.margins(y=0.12)
    places = {(arm, s.lam): findings.place_of(arm, s.lam) for arm, own in findings.arms.items() for s in own}
    placed = {key: place for key, place in places.items() if place is not None}
    far_away = [place for key, place in placed.items() if findings.is_far(*key)]
    set_scale(panel, "x", [place for place in placed.values() if place not in far_away], far_away, legend)
    set_scale(panel, "y", near, far, legend)
    for star in stars_of(findings.recommendation, findings.best, reward):
        star.draw(panel, findings.place_of(star.arm, star.lam), star.kl if shown is None else star.value, legend)
    _mark_gold(panel, findings, shown, legend)
    panel.set_xlabel(wrapped(f"λ of {findings.short}"))
    panel.set_ylabel(KL if shown is None else wrapped(f"{shown} (mean over prompts)"))
    mark_ends(panel)


def _mark_gold(panel: Axes, findings: Findings, shown: str | None, legend: Legend) -> None:
    """Where the trained reward and the held-out one part, in the panels of both."""
    gold = None if findings.recommendation is None else findings.recommendation.gold
    if gold is None or shown not in (gold.proxy, gold.gold) or not isinstance(gold.parts_from, float):
        return
    right = panel.get_xlim()[1]
    panel.axvspan(
        gold.parts_from, right, facecolor="none", edgecolor=MUTED, alpha=0.5, hatch="//", linewidth=0, zorder=0
    )
    panel.set_xlim(right=right)
    name = f"{gold.proxy} (trained) rises, {gold.gold} (gold) falls"
    legend[name] = Patch(facecolor="none", edgecolor=MUTED, alpha=0.5, hatch="//", linewidth=0)


def _draw_against_kl(panel: Axes, legend: Legend, findings: Findings, reward: str) -> None:
    arms = findings.arms
    is_crowded = len(arms) > LABELLED
    lines = _lines(findings, level=POINT)
    stars = stars_of(findings.recommendation, findings.best, reward)
    labels: list[tuple[int, Lambda, tuple[float, float]]] = []  # arm, λ, place
    measured: dict[bool, list[tuple[float, float]]] = {False: [], True: []}  # by whether λ is far
    for number, (arm, points) in enumerate(arms.items()):
        legend[findings.name_of(arm)] = mark_of(number, lines[arm])
        drawn = [point for point in points if math.isfinite(point.kl.mean)]
        y = reward_of(drawn, findings.curve, reward)
        x = kl_of([point for point in drawn if point.lam in y.measured], findings.curve)
        places = {lam: (x.measured[lam].mean, y.measured[lam].mean) for lam in y.measured}
        for lam, place in places.items():
            measured[findings.is_far(arm, lam)].append(place)
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
    panel.margins(y=0.12)
    for axis, number in (("x", 0), ("y", 1)):
        near, far = ([place[number] for place in measured[is_far]] for is_far in (False, True))
        set_scale(panel, axis, near, far, legend, is_root=axis == "x")
    adapters = next((list(lam) for _, lam, _ in labels if isinstance(lam, NamedLambda)), None)
    if len(arms) > 1 or adapters:
        front = draw_front(panel, measured[False] + measured[True], legend)
        if adapters:
            known = anchors(lam for _, lam, _ in labels)
            labels = [each for each in labels if each[2] in front or (each[1] in known and each[0] == 0)]
            legend[f"labels: λ of {', '.join(adapters)}"] = Line2D([], [], linestyle="none")
        elif is_crowded:
            last = {number: place for number, _, place in labels}
            labels = [each for each in labels if each[2] in front or each[2] == last[each[0]]]
    for star in stars:
        star.draw(panel, star.kl, star.value, legend)
    panel.set_xlabel("KL to the reference (nats, √ scale)")
    panel.set_ylabel(wrapped(f"{reward} (mean over prompts)"))
    label(panel, labels, [(star.kl, star.value) for star in stars])


def _lines(findings: Findings, level: LineStyleType) -> Mapping[str, LineStyleType]:
    """The kind of each arm's line: `level` without λ, none where it is a point, as another adapter as trained is."""
    return {
        arm: level if points[0].lam is None else POINT if arm in findings.models and len(points) == 1 else "-"
        for arm, points in findings.arms.items()
    }


def _draw_line(panel: Axes, quantity: Quantity, number: int, legend: Legend, scale: float) -> None:
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


def _draw_pieces(panel: Axes, x: np.ndarray, y: np.ndarray, estimated: np.ndarray, color: str, legend: Legend) -> None:
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
