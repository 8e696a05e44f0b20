"""The picture of a sweep."""

import os
from collections.abc import Sequence
from pathlib import Path

from dera_peft.evaluate.summary import LambdaSummary

REWARD, DISTANCE = "#1b6ca8", "#c4572e"


def plot_sweep(summaries: Sequence[LambdaSummary], file: str | os.PathLike, title: str = "") -> None:
    """Reward and KL against λ, with bars of one standard error over prompts; the format is told by `file`'s ending."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files only, also where there is no screen
    from matplotlib import pyplot

    lam = [summary.lam for summary in summaries]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    curves = [
        (panels[0], [s.reward for s in summaries], [s.reward_se for s in summaries], "mean reward", REWARD),
        (panels[1], [s.kl for s in summaries], [s.kl_se for s in summaries], "KL to the reference (nats)", DISTANCE),
    ]
    for panel, values, errors, label, color in curves:
        panel.errorbar(lam, values, yerr=errors, color=color, marker="o", markersize=5, capsize=3, linewidth=1.8)
        for mark, name in ((0.0, "reference"), (1.0, "as trained")):
            panel.axvline(mark, color="0.75", linewidth=0.9, linestyle=":", zorder=0)
            panel.annotate(
                name, (mark, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3), textcoords="offset points",
                va="top", fontsize=8, color="0.45",
            )  # fmt: skip
        panel.set_xlabel("λ")
        panel.set_ylabel(label)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.18)
    if title:
        figure.suptitle(title, fontsize=11)
    # the ending stays last: matplotlib tells the format by it
    file = Path(file)
    temporary = file.with_name(f".{file.name}.tmp{file.suffix}")
    figure.savefig(temporary, dpi=160)
    pyplot.close(figure)
    os.replace(temporary, file)
