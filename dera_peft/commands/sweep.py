"""`dera sweep`: a sweep over λ, with its table, what it recommends, and two prompts' texts."""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.table import Table

from dera_peft.commands.common import progress, side_by_side
from dera_peft.devices import join_processes
from dera_peft.evaluate.config import SweepConfig
from dera_peft.evaluate.result import SweepResult
from dera_peft.evaluate.statistics import LambdaSummary, number
from dera_peft.evaluate.sweeping import sweep as run_sweep
from dera_peft.record import LOGITS

SHOWN_PROMPTS = 2
FAILED = 1  # the exit code where a reward or the judge failed on some rows


def sweep(config: SweepConfig) -> None:
    """See `dera sweep --help`."""
    result = run_sweep(config, progress=progress)
    join_processes().destroy_process_group()
    if result is None:  # of several processes the first one tells
        return
    console = Console()
    lines: dict[str, list[LambdaSummary]] = defaultdict(list)
    for summary in result.summaries:
        lines[summary.line].append(summary)
    for line, summaries in lines.items():
        if len(lines) > 1:
            console.print(line, style="bold cyan", highlight=False)
        console.print(main_table(summaries))
        console.print()
        if has_more(summaries[0]):
            console.print(further_table(summaries))
            console.print()
    show_samples(console, [row for row in result.rows if row["line"] == LOGITS])
    if result.recommendation is not None:
        console.print(result.recommendation.text(), highlight=False, soft_wrap=True)
    if result.command is not None:
        console.print(f"To train there: {result.command}", highlight=False, soft_wrap=True, markup=False)
    console.print()
    console.print(f"written to {config.output_dir}: {', '.join(result.files)}", highlight=False, soft_wrap=True)
    if result.failed:
        tell_failures(result)
        raise typer.Exit(FAILED)


def tell_failures(result: SweepResult) -> None:
    failures = Counter(name for row in result.rows for name in row.get("errors", {}))
    for name, count in failures.items():
        example = next(row["errors"][name] for row in result.rows if name in row.get("errors", {}))
        print(f"{name}: failed on {count} of {len(result.rows)} completions, as: {example}", file=sys.stderr)
    print(
        "those are left out of the numbers above and marked in samples.jsonl; the same command tries them again",
        file=sys.stderr,
    )


def main_table(summaries: Sequence[LambdaSummary]) -> Table:
    """The reward that λ is chosen by, and what it costs."""
    (reward, *_) = summaries[0].rewards
    table = _table(("λ", reward, "± SE", "KL (nats)", "± SE", "KL per token", "tokens", "ended"))
    for s in summaries:
        level = s.rewards[reward].level
        table.add_row(
            f"{s.lam:g}",
            number(level.mean, "+.3f"),
            number(level.se),
            f"{s.kl.mean:.2f}",
            number(s.kl.se),
            f"{s.kl_per_token:.3f}",
            f"{s.tokens:.1f}",
            f"{s.ended:.0%}",
        )
    return table


def has_more(summary: LambdaSummary) -> bool:
    first = next(iter(summary.rewards.values()))
    return len(summary.rewards) > 1 or bool(summary.judged) or bool(first.groups)


def further_table(summaries: Sequence[LambdaSummary]) -> Table:
    """The other rewards, the worst group by the first one, and the judge's win rates."""
    reward, *others = summaries[0].rewards
    columns = ["λ", *others]
    if summaries[0].rewards[reward].groups:
        columns.append("worst group")
    against = list(dict.fromkeys(lam for summary in summaries for lam in summary.judged))
    columns += [f"wins against λ={lam:g}" for lam in against]
    table = _table(columns)
    for s in summaries:
        cells = [_short(s.rewards[name].level.mean) for name in others]
        groups = s.rewards[reward].groups
        if groups:
            worst = s.rewards[reward].worst_group
            cells.append("-" if worst is None else f"{worst} {groups[worst].mean:+.3f}")
        cells += [number(s.judged[lam].rate.mean, ".0%") if lam in s.judged else "" for lam in against]
        table.add_row(f"{s.lam:g}", *cells)
    return table


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=len(columns) <= 8)
    return table


def _short(value: float) -> str:
    return number(value, ".3f" if math.isnan(value) or abs(value) < 1000 else ".3g")


def show_samples(console: Console, rows: Sequence[dict]) -> None:
    """The first sample of two prompts at a few λ: the least, 0, 1 and the greatest where they are there."""
    lambdas = sorted({row["lambda"] for row in rows})
    wanted = sorted({lam for lam in (0.0, 0.5, 1.0) if lam in lambdas} | {lambdas[-1]} | {lambdas[0]})
    texts: dict[int, dict[float, list[str]]] = defaultdict(dict)
    for row in rows:
        if row["sample"] == 0 and row["lambda"] in wanted:
            texts[row["index"]][row["lambda"]] = [row["completion"]]
    titles = {row["index"]: row["prompt"] for row in rows}
    for index in list(texts)[:SHOWN_PROMPTS]:
        title = titles[index] if isinstance(titles[index], str) else titles[index][-1]["content"]
        side_by_side(console, title, dict(sorted(texts[index].items())))
