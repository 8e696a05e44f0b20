"""The picture of a sweep over the λ of several adapters: a map for two, parallel axes for more."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dera_peft.decoding.lambdas import NamedLambda
from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.report.findings import Findings
from dera_peft.evaluate.report.marks import INK, MUTED, Legend, Star, stars_of, wrapped

COLORMAP = "cividis"  # the colour-blind see the same order in it
LEVELS = 11

Values = Mapping[NamedLambda, float]  # of a reward, or of the KL, at each point where it is known


def draw_map(panel: Axes, legend: Legend, findings: Findings, reward: str | None, shown: str | None) -> None:
    """
    A reward, or the KL where `shown` is None, over the λ of several adapters, of the arm "logits". Of two it is a map:
    the measured points, those that are estimated between them, and contours, which are no estimates; of more a line for
    each measured point through an axis for each adapter. With the stars of `reward`.
    """
    own = [summary for summary in findings.summaries if summary.arm == LOGITS]
    points = findings.curve.points if findings.curve else []
    if shown is None:
        name = "KL to the reference (nats)"
        measured, estimated = _known({s.lam: s.kl for s in own}), _known({p.lam: p.kl for p in points})
    else:
        name = wrapped(f"{shown} (mean over prompts)")
        measured = _known({s.lam: s.rewards[shown].level for s in own if shown in s.rewards})
        estimated = _known({p.lam: p.rewards.get(shown) for p in points})
    if not measured:
        panel.set_axis_off()
        return
    names = list(next(iter(measured)))
    norm, colors = _scale([*measured.values()])
    draw = _draw_map if len(names) == 2 else _draw_parallel
    draw(panel, names, measured, estimated, norm, colors, legend)
    for star in stars_of(findings.recommendation, findings.best, reward):
        if isinstance(star.lam, NamedLambda):
            _draw_star(panel, list(star.lam.values()), star, legend)
    figure = cast("Figure", panel.figure)
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=panel, label=name, ticks=MaxNLocator(6))
    bar.outline.set_visible(False)


def _known(values: Mapping[Any, Estimate | None]) -> Values:
    return {
        lam: estimate.mean
        for lam, estimate in values.items()
        if isinstance(lam, NamedLambda) and estimate is not None and math.isfinite(estimate.mean)
    }


def _scale(values: Sequence[float]) -> tuple[BoundaryNorm, Colormap]:
    """A colour for each of a few steps between the least and the greatest value, at round numbers."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    colors = matplotlib.colormaps[COLORMAP]
    return BoundaryNorm(MaxNLocator(LEVELS).tick_values(low, high), colors.N), colors


def _draw_map(
    panel: Axes, names: Sequence[str], measured: Values, estimated: Values, norm: Any, colors: Any, legend: Legend
) -> None:
    x, y = np.array([tuple(lam.values()) for lam in measured]).T
    style = {"norm": norm, "cmap": colors, "edgecolors": INK, "zorder": 3}
    if np.linalg.matrix_rank(np.stack([x - x[0], y - y[0]]), tol=1e-9) == 2:  # else the points lie on a line
        panel.tricontourf(x, y, [*measured.values()], levels=norm.boundaries, cmap=colors, alpha=0.45, zorder=0)
        legend["contours between the points, no estimate"] = Line2D([], [], color=MUTED, alpha=0.45, linewidth=8)
    panel.scatter(x, y, c=[*measured.values()], s=70, linewidths=1.0, **style)
    legend["measured"] = Line2D([], [], color=MUTED, marker="o", markeredgecolor=INK, markersize=8, linestyle="none")
    between = {lam: value for lam, value in estimated.items() if lam not in measured}
    if between:
        x, y = np.array([tuple(lam.values()) for lam in between]).T
        panel.scatter(x, y, c=[*between.values()], s=16, linewidths=0.4, **style)
        legend["estimated between"] = Line2D(
            [], [], color=MUTED, marker="o", markeredgecolor=INK, markersize=4, linestyle="none"
        )
    panel.set_xlabel(f"λ of {names[0]}")
    panel.set_ylabel(f"λ of {names[1]}")
    panel.use_sticky_edges = False  # those of the contours would leave no room around the points
    panel.margins(0.07)


def _draw_parallel(
    panel: Axes, names: Sequence[str], measured: Values, estimated: Values, norm: Any, colors: Any, legend: Legend
) -> None:
    """The points of the greatest value lie above the others."""
    for lam, value in sorted(measured.items(), key=lambda item: item[1]):
        panel.plot(range(len(names)), list(lam.values()), color=colors(norm(value)), linewidth=1.6, marker="o", ms=4)
    legend["a measured point"] = Line2D([], [], color=MUTED, linewidth=1.6, marker="o", markersize=4)
    panel.set_xticks(range(len(names)), [f"λ of {name}" for name in names])
    panel.grid(axis="x", color=MUTED, alpha=0.4)
    panel.margins(x=0.08, y=0.08)


def _draw_star(panel: Axes, values: Sequence[float], star: Star, legend: Legend) -> None:
    if len(values) == 2:
        star.draw(panel, values[0], values[1], legend)
        return
    color = star.style["color"]
    panel.plot(range(len(values)), values, color=INK, linewidth=3.4, zorder=4)
    panel.plot(range(len(values)), values, color=color, linewidth=1.8, zorder=5, marker="*", ms=13, mec=INK)
    legend[star.name] = Line2D([], [], **star.style)
