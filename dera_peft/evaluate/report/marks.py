"""How arms are marked in the pictures of a sweep: colours, markers, stars, labels, the legend, and the front."""

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.typing import LineStyleType

from dera_peft.decoding.lambdas import Lambda, NamedLambda
from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.analysis.best import BestArm
from dera_peft.evaluate.analysis.recommend import Recommendation
from dera_peft.evaluate.analysis.resamples import Estimate

Legend = dict[str, Artist]  # what a mark stands for -> the mark

INK, MUTED, PAPER = "#1f2328", "#6e7681", "#ffffff"
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
USUAL_ROWS = 3  # of the legend
# Okabe and Ito's palette (jfly.uni-koeln.de/color), which the colour-blind can tell apart, and two of Tol's muted
# colours (personal.sron.nl/~pault); each arm has a marker too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<")
STAR: dict[str, Any] = {
    "marker": "*",
    "markersize": 15,
    "color": "#f0e442",
    "markeredgecolor": INK,
    "linestyle": "none",
}
HOLLOW = {**STAR, "color": PAPER}
FRONT: dict[str, Any] = {"color": MUTED, "alpha": 0.3, "linewidth": 6, "drawstyle": "steps-post", "zorder": 0}
LABELLED = 2  # arms of which every λ is written at its point; of more only some are
DASHES: LineStyleType = (0, (4, 2.5))
POINT: LineStyleType = "none"
LEVEL: LineStyleType = (0, (6, 1.5, 1, 1.5))


@dataclass(frozen=True)
class Star:
    """What is recommended, as a mark: at its own numbers, also where the line passes by, which is made from more."""

    name: str  # in the legend
    arm: str
    lam: Lambda | None
    value: float
    kl: float
    style: Mapping[str, Any]

    def draw(self, panel: Axes, x: float | None, y: float, legend: Legend) -> None:
        """At `x`; at the right end of the panel where it has no place on the axis."""
        if x is None:
            panel.plot([0.985], [y], zorder=5, transform=panel.get_yaxis_transform(), clip_on=False, **self.style)
        else:
            panel.plot([x], [y], zorder=5, **self.style)
        legend[self.name] = Line2D([], [], **self.style)


def stars_of(recommendation: Recommendation | None, best: BestArm | None, reward: str | None) -> list[Star]:
    """The best of all arms, and if that is another one the best plain λ too; nothing for another reward."""
    stars = []
    if recommendation is not None and recommendation.reward == reward:
        is_best = best is None or best.is_plain
        name = ("recommended" if is_best else "best plain λ") + _of_prompts(recommendation.rule, recommendation.group)
        places = recommendation.lam, recommendation.value.mean, recommendation.kl.mean
        stars.append(Star(name, LOGITS, *places, STAR if is_best else HOLLOW))
    if best is not None and not best.is_plain and best.reward == reward:
        name = "recommended" + _of_prompts(best.rule.name, best.best.group)
        stars.append(Star(name, best.best.arm, best.best.lam, best.best.value.mean, best.best.kl.mean, STAR))
    return stars


def _of_prompts(rule: str, group: str | None) -> str:
    if group is not None:
        return " (its worst group)"
    return " (worst reweighting)" if rule == "robust" else ""


def draw_front(panel: Axes, places: Iterable[tuple[float, float]], legend: Legend) -> list[tuple]:
    """The (KL, reward) that no other one beats in both, as steps; returns them."""
    front: list[tuple[float, float]] = []
    for kl, reward in sorted(places, key=lambda place: (place[0], -place[1])):
        if not front or reward > front[-1][1]:
            front.append((kl, reward))
    panel.plot(*zip(*front, strict=True), **FRONT) if front else None
    legend["Pareto front"] = Line2D([], [], **{name: value for name, value in FRONT.items() if name != "zorder"})
    return front


def label(
    panel: Axes, labels: Sequence[tuple[int, Lambda, tuple[float, float]]], stars: Sequence[tuple[float, float]]
) -> None:
    """Names the λ of points. The arms' labels stand on either side, as their points may lie close together."""
    panel.get_xlim(), panel.get_ylim()  # brings the limits, and with them the transform, up to date
    to_panel = (panel.transScale + panel.transLimits).transform  # from 0 to 1 over the panel
    for number, lam, place in labels:
        offset: dict[str, Any] = {"xytext": (8, -3 if lam == 0 else -11)}
        distances = [to_panel(star) - to_panel(place) for star in stars]
        is_last = to_panel(place)[0] > 0.9
        # a star would lie on a label to the right
        if number % 2 or is_last or any(-0.03 < right < 0.12 and abs(up) < 0.08 for right, up in distances):
            offset = {"xytext": (-3, 7), "ha": "right"}
        text = ", ".join(f"{value:.2g}" for value in lam.values()) if isinstance(lam, NamedLambda) else f"λ={lam:g}"
        panel.annotate(text, place, textcoords="offset points", fontsize="small", color=color_of(number), **offset)


def color_of(number: int) -> str:
    return COLORS[number % len(COLORS)]


def bars(estimates: Iterable[Estimate]) -> np.ndarray:
    """How far the intervals reach below and above the means, `[2, N]`; nowhere, where they are unknown."""
    reach = np.array([(e.mean - e.low, e.high - e.mean) for e in estimates]).reshape(-1, 2).T
    return np.maximum(np.nan_to_num(reach), 0.0)


def point_style(number: int) -> dict:
    return {
        "color": color_of(number),
        "marker": MARKERS[(number + number // len(COLORS)) % len(MARKERS)],  # another one where the colours repeat
        "linestyle": "none",
        "markersize": 5,
        "capsize": 2.5,
        "elinewidth": 1.2,
        "zorder": 4 - 0.01 * number,  # the first arm lies above the others
    }


def mark_of(number: int, line: LineStyleType) -> Artist:
    """An arm's entry in the legend, with the kind of its line."""
    if line == LEVEL:
        return Line2D([], [], color=color_of(number), linewidth=1.6, linestyle=line)
    style: dict[str, Any] = {name: point_style(number)[name] for name in ("color", "marker", "markersize")}
    return Line2D([], [], linestyle=line, **style)


def mark_ends(panel: Axes) -> None:
    """Tells the reference and the adapter as trained on the axis of λ."""
    left, right = panel.get_xlim()
    to_panel = panel.transScale + panel.transLimits
    start, end = (to_panel.transform((lam, 0.0))[0] for lam in (0.0, 1.0))
    sides = ("right", "left") if end - start < 0.3 else ("center", "center")  # beside each other if there is no room
    for lam, name, side in ((0.0, "reference", sides[0]), (1.0, "as trained", sides[1])):
        if left <= lam <= right:
            panel.axvline(lam, color=MUTED, alpha=0.6, linewidth=0.9, linestyle=":", zorder=0)
            shift = {"right": 6, "left": -2, "center": 0}[side]
            panel.annotate(
                name, (lam, 1.0), xycoords=("data", "axes fraction"), xytext=(shift, 2), textcoords="offset points",
                va="bottom", ha=side, fontsize="small", color=MUTED,
            )  # fmt: skip


def wrapped(text: str) -> str:
    """A label of an axis, in lines that a small panel has room for."""
    return textwrap.fill(text, 36)


def save(figure: Figure, format: str) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=format, dpi=160, metadata={"Date": None} if format == "svg" else None)
    return stream.getvalue()


def with_legend(figure: Figure, legend: Legend, title: str, format: str, columns: int) -> bytes:
    """The finished figure, with its title and its legend below, as a file of a format."""
    rows = -(-len(legend) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * max(0, rows - USUAL_ROWS))  # the panels keep their size
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=columns, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return save(figure, format)


def mark_picture(mark: Artist) -> bytes:
    """The mark of an entry in a legend, as an SVG of its own."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.42, 0.22))
        figure.legend([mark], [""], loc="center", borderpad=0, handletextpad=0, handlelength=2.2, fontsize=9)
        return save(figure, "svg")
