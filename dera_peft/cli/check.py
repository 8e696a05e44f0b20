"""`dera sweep --check`: what a quick look shows, as a table and in words."""

from rich.console import Console
from rich.table import Table

from dera_peft.evaluate.check import Check
from dera_peft.evaluate.check import check as run_check
from dera_peft.evaluate.config import SweepConfig
from dera_peft.progress import show_progress


def check(config: SweepConfig) -> None:
    """See `dera sweep --help`."""
    found = run_check(config, show_progress)
    if found is None:  # of several processes the first one tells
        return
    console = Console()
    console.print(check_table(found))
    console.print()
    console.print(found.text(), highlight=False, soft_wrap=True)


def check_table(found: Check) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("λ", "KL per token", "perplexity", "repetition", "as the reference's", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found.lambdas:
        table.add_row(
            f"{each.lam:g}",
            f"{each.kl_per_token:.2g}",
            f"{each.perplexity:.4g}",
            f"{each.repetition:.2f}",
            f"{each.same:.0%}",
            "falls apart" if each.falls_apart else "",
        )
    return table
