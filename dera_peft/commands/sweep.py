"""`dera sweep`: a sweep over λ, with its table and two prompts' texts."""

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack

from rich.console import Console
from rich.table import Table

from dera_peft.commands.common import progress, side_by_side
from dera_peft.evaluate.summary import LambdaSummary
from dera_peft.evaluate.sweep import SweepConfig
from dera_peft.evaluate.sweep import sweep as run_sweep

SHOWN_PROMPTS = 2


def sweep(config: SweepConfig) -> None:
    """See `dera sweep --help`."""
    console = Console()
    with ExitStack() as stack:
        advance = None

        def start(total: int, done: int) -> None:
            nonlocal advance
            if done:
                everything = "all" if done == total else f"{done} of"
                console.print(
                    f"{config.output_dir}: {everything} {total} completions are there already: reusing them.",
                    soft_wrap=True,
                )
            advance = stack.enter_context(progress("sweep", total, done))

        result = run_sweep(config, on_start=start, on_progress=lambda count: advance(count))
    console.print(summary_table(result.summaries))
    console.print()
    show_samples(console, result.samples)
    console.print(
        f"written to {config.output_dir}: samples.jsonl, summary.csv, sweep.png", highlight=False, soft_wrap=True
    )


def summary_table(summaries: Sequence[LambdaSummary]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("λ", "reward", "± SE", "KL (nats)", "± SE", "KL per token", "tokens", "ended"):
        table.add_column(name, justify="right", no_wrap=True)
    for s in summaries:
        table.add_row(
            f"{s.lam:g}",
            f"{s.reward:+.3f}",
            _number(s.reward_se),
            f"{s.kl:.2f}",
            _number(s.kl_se),
            f"{s.kl_per_token:.3f}",
            f"{s.tokens:.1f}",
            f"{s.ended:.0%}",
        )
    return table


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def show_samples(console: Console, samples: Sequence[dict]) -> None:
    """The first sample of two prompts at a few λ: the least, 0, 1 and the greatest where they are there."""
    lambdas = sorted({row["lambda"] for row in samples})
    wanted = sorted({lam for lam in (0.0, 0.5, 1.0) if lam in lambdas} | {lambdas[-1]} | {lambdas[0]})
    texts: dict[int, dict[float, list[str]]] = defaultdict(dict)
    for row in samples:
        if row["sample"] == 0 and row["lambda"] in wanted:
            texts[row["index"]][row["lambda"]] = [row["completion"]]
    titles = {row["index"]: row["prompt"] for row in samples}
    for index in list(texts)[:SHOWN_PROMPTS]:
        title = titles[index] if isinstance(titles[index], str) else titles[index][-1]["content"]
        side_by_side(console, title, dict(sorted(texts[index].items())))
