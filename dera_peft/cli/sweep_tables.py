"""What `dera sweep` prints: tables that a narrow terminal does not cut, and two prompts' texts."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from dera_peft.cli.console import printable, side_by_side
from dera_peft.decoding.chats import text_of
from dera_peft.decoding.lambdas import Lambda, values_of
from dera_peft.evaluate.analysis.summary import GUARDS, LambdaSummary, RewardSummary, number
from dera_peft.evaluate.points import anchors, is_of_several
from dera_peft.evaluate.result import SweepResult

SHOWN_PROMPTS = 2
HEADING = 16  # characters; a longer heading is wrapped
GAP = 2  # characters between columns

logger = logging.getLogger(__name__)


def tell(console: Console, text: str) -> None:
    """As it is: what the user named may look like markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def tell_failures(result: SweepResult) -> None:
    failures = Counter(name for row in result.rows for name in row.get("errors", {}))
    for name, count in failures.items():
        example = next(row["errors"][name] for row in result.rows if name in row.get("errors", {}))
        logger.warning(f"{name}: failed on {count} of {len(result.rows)} completions, as: {example}")
    logger.warning(
        "those are left out of the numbers above and marked in samples.jsonl; the same command tries them again"
    )


def main_columns(summaries: Sequence[LambdaSummary]) -> list[tuple[str, list[str]]]:
    """The reward that λ is chosen by, and what it costs: headings, and a cell for each λ."""
    (name, *_) = summaries[0].rewards
    rewards = [s.rewards[name].level for s in summaries]
    return [
        (name, [number(reward.mean, "+.3f") for reward in rewards]),
        ("± SE", [number(reward.se) for reward in rewards]),
        ("KL (nats)", [f"{s.kl.mean:.2f}" for s in summaries]),
        ("± SE", [number(s.kl.se) for s in summaries]),
        ("KL per token", [f"{s.kl_per_token:.3f}" for s in summaries]),
        ("tokens", [f"{s.tokens:.1f}" for s in summaries]),
        ("ended", [f"{s.ended:.0%}" for s in summaries]),
    ]


def further_columns(summaries: Sequence[LambdaSummary]) -> list[tuple[str, list[str]]]:
    """The other rewards, the guards, the worst group by the first one, and the judge's win rates."""
    first, *others = summaries[0].rewards
    columns = [(name, [_short(s.rewards[name].level.mean) for s in summaries]) for name in others]
    for name in GUARDS:
        found = [s.perplexity if name == "log_perplexity" else s.guards.get(name) for s in summaries]
        if any(found):
            means = ["-" if estimate is None else _short(estimate.mean) for estimate in found]
            columns.append((f"guard: {name.removeprefix('log_')}", means))
    if summaries[0].rewards[first].groups:
        columns.append(("worst group", [_worst_group(s.rewards[first]) for s in summaries]))
    for lam in sorted({lam for summary in summaries for lam in summary.judged}):
        rates = [number(s.judged[lam].rate.mean, ".0%") if lam in s.judged else "" for s in summaries]
        columns.append((f"wins against λ={lam:g}", rates))
    return columns


def tables(lambdas: Sequence[str], columns: Sequence[tuple[str, list[str]]], width: int) -> list[Table]:
    """
    The columns (a heading, and a cell for each λ) in as many tables as it takes for none to be wider than `width`.

    Each table begins with the λ. Long headings are wrapped, a cell only where it alone is too wide, and nothing is cut.
    """
    lam_width = max(map(cell_len, ("λ", *lambdas)))
    parts: list[list[tuple[str, list[str], int]]] = []
    room = 0
    for heading, cells in columns:
        own = max(min(cell_len(heading), HEADING), *map(cell_len, cells))
        own = max(1, min(own, width - lam_width - 2 * GAP))
        if own + GAP > room:
            parts.append([])
            room = width - lam_width - GAP
        parts[-1].append((heading, cells, own))
        room -= own + GAP
    return [_table(lambdas, part, lam_width) for part in parts]


def _table(lambdas: Sequence[str], columns: Sequence[tuple[str, list[str], int]], lam_width: int) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="bold")
    table.add_column("λ", justify="right", width=lam_width, no_wrap=True)
    for heading, _, width in columns:
        table.add_column(printable(heading), justify="right", width=width, overflow="fold")
    for row in zip(lambdas, *(cells for _, cells, _ in columns), strict=True):
        table.add_row(*map(printable, row))
    return table


def _worst_group(reward: RewardSummary) -> str:
    worst = reward.worst_group
    return "-" if worst is None else f"{worst} {reward.groups[worst].mean:+.3f}"


def _short(value: float) -> str:
    return number(value, ".3f" if math.isnan(value) or abs(value) < 1000 else ".3g")


def show_samples(console: Console, rows: Sequence[dict]) -> None:
    """
    The first sample of two prompts at a few λ: the least, 0, 1 and the greatest where they are there; of several
    adapters the reference and each adapter alone.
    """
    lambdas = sorted({row["lambda"] for row in rows}, key=values_of)
    if is_of_several(lambdas):
        wanted = anchors(lambdas) or [lambdas[0], lambdas[-1]]
    else:
        wanted = sorted({lam for lam in (0.0, 0.5, 1.0) if lam in lambdas} | {lambdas[-1]} | {lambdas[0]})
    texts: dict[int, dict[Lambda, list[str]]] = defaultdict(dict)
    for row in rows:
        if row["sample"] == 0 and row["lambda"] in wanted:
            texts[row["prompt_index"]][row["lambda"]] = [row["completion"]]
    titles = {row["prompt_index"]: row["prompt"] for row in rows}
    for index in list(texts)[:SHOWN_PROMPTS]:
        side_by_side(console, text_of(titles[index]), {lam: texts[index][lam] for lam in wanted if lam in texts[index]})
