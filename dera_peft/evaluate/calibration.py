"""A picture of margins by λ: are the implicit reward's predictions right as often as they say?"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.margins import Margins
from dera_peft.evaluate.report.marks import MUTED, STYLE, bars, color_of
from dera_peft.files import told_if_unwritable

CURVES = 6  # λ of which the calibration is drawn


def plot_calibration(found: Sequence[Margins], beta: float, file: Path) -> None:
    """
    Writes a picture, by the ending of its name.

    Left: observed against predicted, in bins of pairs; on the diagonal predictions are right, below it the margins are
    too large. Right: accuracy and log-loss against λ.

    Raises:
        DeRaError: it can't be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle=":", label="right as often as predicted")
        # at λ=0 nothing is predicted
        shown = [each for each in found if each.margin.mean != 0 or each.margin.se != 0]
        step = max(1, -(-len(shown) // CURVES))
        for number, each in enumerate(shown[::-1][::step][::-1]):
            left.errorbar(
                [part.predicted for part in each.bins], [part.observed.mean for part in each.bins],
                yerr=bars([part.observed for part in each.bins]), color=color_of(number), marker="o", markersize=3.5,
                linewidth=1.2, elinewidth=0.8, capsize=2, label=f"λ={each.lam:g}",
            )  # fmt: skip
        left.set_xlabel("predicted: σ(|margin|)")
        left.set_ylabel("observed: share told rightly")
        left.legend(fontsize=8, loc="lower right")
        lams = [each.lam for each in found]
        numeric = all(isinstance(lam, float) for lam in lams)
        places = lams if numeric else list(range(len(lams)))
        other = right.twinx()
        for panel, name, number in ((right, "accuracy", 0), (other, "log_loss", 1)):
            values: list[Estimate] = [getattr(each, name) for each in found]
            panel.errorbar(
                places, [value.mean for value in values], yerr=bars(values), color=color_of(number), marker="o",
                markersize=4, linewidth=1.4, elinewidth=0.9, capsize=2,
            )  # fmt: skip
            panel.set_ylabel("log-loss (nats)" if name == "log_loss" else name, color=color_of(number))
        right.set_xlabel("λ")
        if not numeric:
            right.set_xticks(places, [f"{lam:g}" for lam in lams], rotation=30, ha="right", fontsize=7)
        first = found[0]
        figure.suptitle(
            f"Implicit reward, β={beta:g}: {first.pairs} pairs of {first.prompts} prompts; bars: 95 % over prompts",
            fontsize=11,
        )
        with told_if_unwritable(file):
            figure.savefig(file, format=file.suffix[1:], dpi=160)
