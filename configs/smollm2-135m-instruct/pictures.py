"""The pictures of docs/evidence.md."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files only, also where there is no screen
from figures import Figures, level
from matplotlib import pyplot

BLUE, ORANGE, GREY = "#1b6ca8", "#c4572e", "0.45"


def draw_curves(figures: Figures, proxy: str, gold: str, file: Path) -> None:
    """The trained reward and the held-out one over λ; and the trained one against KL, by each way to decode."""
    plain = figures.of("tone")
    if not plain:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained")
    _bars(left, [s.lam for s in plain], [level(s, proxy) for s in plain], BLUE, "tone (trained on)")
    left.set_xlabel("λ")
    left.set_ylabel("tone", color=BLUE)
    second = left.twinx()
    _bars(second, [s.lam for s in plain], [level(s, gold) for s in plain], ORANGE, "relevance (held out)")
    second.set_ylabel("relevance, nats a token", color=ORANGE)
    left.legend(handles=[*left.containers, *second.containers], frameon=False, fontsize=8, loc="lower center")
    for arm, color, label in (("logits", BLUE, "plain λ"), ("plausible:0.1", ORANGE, "plausible:0.1"),
                              ("weights", GREY, "scaled adapter")):  # fmt: skip
        found = [s for s in figures.of("tone", arm) if s.lam >= 0]
        if found:
            _bars(right, [s.kl.mean for s in found], [level(s, proxy) for s in found], color, label)
    _root_axis(right)
    right.set_ylabel("tone")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, [left, right], file)


def draw_retrained(
    figures: Figures, proxy: str, panels: dict[str, tuple[dict[str, str], dict[str, str]]], file: Path
) -> None:
    """
    Reward against KL: plain λ of adapters, and adapters as they were trained.

    Args:
        panels: title -> sweeps whose λ are drawn as a line, and those of which λ=1 is, with their labels.
    """
    drawn = {title: panel for title, panel in panels.items() if any(map(figures.of, panel[0]))}
    if not drawn:
        return
    figure, axes = pyplot.subplots(
        1, len(drawn), figsize=(5.2 * len(drawn), 4.4), layout="constrained", squeeze=False, sharey=True
    )
    for panel, (title, (lines, points)) in zip(axes[0], drawn.items(), strict=True):
        for (name, label), color in zip(lines.items(), (BLUE, ORANGE), strict=False):
            plain = [s for s in figures.of(name) if s.lam >= 0]
            if plain:
                _bars(panel, [s.kl.mean for s in plain], [level(s, proxy) for s in plain], color, label)
            for summary in plain:
                panel.annotate(f"λ={summary.lam:g}", (summary.kl.mean, level(summary, proxy).mean), (4, -11),
                               textcoords="offset points", fontsize=7, color=color)  # fmt: skip
        for (name, label), marker in zip(points.items(), "sDv^<>", strict=False):
            summary = figures.get(name, 1)
            if summary is not None:
                color = GREY if "seed" in name else ORANGE
                _bars(panel, [summary.kl.mean], [level(summary, proxy)], color, label, marker)
        _root_axis(panel)
        panel.set_title(title, fontsize=9)
        panel.legend(frameon=False, fontsize=8, loc="lower right")
    axes[0][0].set_ylabel("tone")
    _save(figure, axes[0], file)


def _bars(panel, x, estimates, color, label, marker="o") -> None:
    means = [e.mean for e in estimates]
    ends = [[e.mean - e.low for e in estimates], [e.high - e.mean for e in estimates]]
    style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.5, "capsize": 2, "elinewidth": 0.8}
    panel.errorbar(x, means, yerr=ends, label=label, **style)


def _root_axis(panel) -> None:
    """A KL grows as the square of what moves it."""
    panel.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    panel.set_xlim(left=0)
    ticks = [tick for tick in (0.5, 2, 5, 10, 20, 50, 100, 200) if tick < panel.get_xlim()[1]]
    panel.set_xticks([0, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
    panel.set_xlabel("KL to the reference (nats per answer, square-root scale)")


def _save(figure, panels, file: Path) -> None:
    for panel in panels:
        panel.spines[["top"]].set_visible(False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
