"""Axes on which a few far values do not press all others together: beyond a break they are drawn closer."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dera_peft.evaluate.report.marks import MUTED, Legend

FAR = 4  # a λ is far whose distance from the median exceeds the next smaller distance by so many times that
SHARE = 0.12  # of the axis, for what lies beyond a break
APART = 0.09  # of the axis, between the values that are written
SHADED = "beyond the break: axis compressed"


def near_range(values: Iterable[float]) -> tuple[float, float]:
    """The least and the greatest of the values that are not far from the others; fewer than half of them are far."""
    known = np.unique([value for value in values if math.isfinite(value)])
    if not len(known):
        return math.nan, math.nan
    distances = np.sort(np.abs(known - np.median(known)))
    reach = distances[-1]
    for count in range(1, (len(known) - 1) // 2 + 1):
        if distances[-count] - distances[-count - 1] > FAR * distances[-count - 1]:
            reach = distances[-count - 1]
    near = known[np.abs(known - np.median(known)) <= reach]
    return float(near[0]), float(near[-1])


def root(x: np.ndarray) -> np.ndarray:
    """Square root, of what is below 0 with its sign."""
    return np.sign(x) * np.sqrt(np.abs(x))


def square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


def same(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=float)


@dataclass(frozen=True)
class Broken:
    """
    A scale with breaks: between `low` and `high` as it is, and beyond them by a slope. In units of `forward`, which is
    the identity or `root`.
    """

    low: float
    high: float
    slope_low: float
    slope_high: float
    forward: Callable[[np.ndarray], np.ndarray] = same
    inverse: Callable[[np.ndarray], np.ndarray] = same

    def to_axis(self, values: np.ndarray) -> np.ndarray:
        x = self.forward(np.asarray(values, dtype=float))
        inside = np.clip(x, self.low, self.high)
        return inside + (x - inside) * np.where(x < self.low, self.slope_low, self.slope_high)

    def from_axis(self, places: np.ndarray) -> np.ndarray:
        x = np.asarray(places, dtype=float)
        inside = np.clip(x, self.low, self.high)
        return self.inverse(inside + (x - inside) / np.where(x < self.low, self.slope_low, self.slope_high))


def set_scale(
    panel: Axes,
    which: str,
    near: Iterable[float],
    far: Iterable[float],
    legend: Legend,
    is_root: bool = False,
) -> None:
    """
    The scale of the axis "x" or "y", plain or, for `is_root`, of square roots; with a break where values of `far` lie
    beyond those of `near`. Call it when all is drawn, before labels are placed.
    """
    axis, set_axis_scale, set_limits, shade = (
        (panel.xaxis, panel.set_xscale, panel.set_xlim, panel.axvspan)
        if which == "x"
        else (panel.yaxis, panel.set_yscale, panel.set_ylim, panel.axhspan)
    )
    forward, inverse = (root, square) if is_root else (same, same)
    start, end = forward(np.asarray(axis.get_data_interval())).tolist()
    start = min(start, 0.0) if is_root else start  # what is so drawn is a distance from 0
    inside, beyond = (
        [value for value in forward(np.array([*values], dtype=float)).tolist() if math.isfinite(value)]
        for values in (near, far)
    )
    if not inside or not math.isfinite(end - start):
        return
    least, greatest = min(inside), max(inside)
    reach = greatest - least
    beyond = [value for value in beyond if max(least - value, value - greatest) > reach > 0]
    if not beyond and not is_root:
        return
    low = least - 0.08 * reach if any(value < least for value in beyond) else min(start, least)
    high = greatest + 0.08 * reach if any(value > greatest for value in beyond) else max(end, greatest)
    room = SHARE / (1 - SHARE) * (high - low)
    slopes = [room / length if length > 0 else 1.0 for length in (low - start, end - high)]
    scale = Broken(low, high, slopes[0], slopes[1], forward, inverse)
    set_axis_scale("function", functions=(scale.to_axis, scale.from_axis))
    first, last = scale.to_axis(inverse(np.array([start, end]))).tolist()
    margin = 0.06 * (last - first)
    first = -0.1 * margin if is_root and start >= 0 else first - margin  # 0 stands near the axis
    bounds = scale.from_axis(np.array([first, last + margin])).tolist()
    set_limits(*bounds)
    ticks = _ticks(scale, bounds, is_root, inverse(np.array(beyond)).tolist())
    axis.set_ticks(ticks, [f"{tick:.3g}".replace("-", "\N{MINUS SIGN}") for tick in ticks])
    for is_broken, edge, bound in ((start < low, low, bounds[0]), (high < end, high, bounds[1])):
        if is_broken:
            shade(float(inverse(np.array(edge))), bound, color=MUTED, alpha=0.13, linewidth=0, zorder=0)
            legend[SHADED] = Patch(color=MUTED, alpha=0.25, linewidth=0)


def _ticks(scale: Broken, bounds: Sequence[float], is_root: bool, far: Sequence[float]) -> list[float]:
    """Round numbers between the breaks, and the far values themselves, none too close to another."""
    low, high = scale.inverse(np.array([scale.low, scale.high])).tolist()
    if is_root:
        steps = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
        wanted = [0.0, *(sign * step for step in steps for sign in (1, -1))]
    else:
        wanted = [*MaxNLocator(5).tick_values(low, high)]
    start, end = scale.to_axis(np.array(bounds)).tolist()
    ticks: list[float] = []
    for tick in [*far, *(tick for tick in wanted if low <= tick <= high)]:
        if bounds[0] <= tick <= bounds[1]:
            places = scale.to_axis(np.array([*ticks, tick]))
            if not ticks or np.abs(places[:-1] - places[-1]).min() >= APART * (end - start):
                ticks.append(tick)
    return sorted(ticks)
