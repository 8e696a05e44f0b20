"""`dera score`: prompts and completions in, what each completion is worth at each λ out."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dera_peft.cli.score_rows import Key, ScoreSettings, score_rows, strengths
from dera_peft.decoding.completions import read_completions
from dera_peft.decoding.lambdas import Lambda
from dera_peft.decoding.rows import ScoredRow
from dera_peft.lock import hold

if TYPE_CHECKING:
    from rich.table import Table


def score(settings: ScoreSettings) -> None:
    """Say how probable given completions are at many λ, from one pass: total, per token, perplexity, KL; in nats.

    Of preference pairs (--pairs): at which λ the implicit reward, β·log(π_λ/π_ref), tells chosen from rejected, with
    margin, accuracy and log-loss, and a picture of their calibration.

    The tokens of a completion that dera generate has drawn are those that were drawn. Another one is split into tokens
    by itself and put behind its prompt's.

    **Examples**

    `dera score --adapter ./dpo --completions out.jsonl --lambda 0,0.25,0.5,0.75,1`

    `dera score --adapter ./dpo --completions chats.jsonl --chat --end --lambda 0,1 --output scores.jsonl`

    `dera score --adapter ./dpo --completions out.jsonl --lambda 2 --combine kl:0.05 --tokens --json`

    `dera score --adapter ./dpo --pairs held-out.jsonl --lambda 0.5,1,2 --plot calibration.png`

    `dera score --adapters helpful=./a --adapters harmless=./b --completions out.jsonl
    --lambda helpful=0.7,harmless=0.3`
    """
    settings.check_paths()
    with hold(settings.output, "--output"):
        if settings.completions is None:
            from dera_peft.cli.score_pairs import score_pairs

            score_pairs(settings)
            return
        from rich.console import Console

        completions = read_completions(settings.completions)
        lambdas = strengths(settings)
        rows = score_rows(settings, completions, lambdas)
        if not settings.json:
            Console().print(table(lambdas, rows))


def table(lambdas: Sequence[Lambda], rows: Mapping[Key, ScoredRow]) -> "Table":
    """For each λ the means over the completions, and over all of their tokens."""
    from rich.table import Table

    result = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("λ", "completions", "tokens", "log p", "per token", "perplexity", "KL (nats)"):
        result.add_column(name, justify="right", no_wrap=True)
    for lam in lambdas:
        of = [row for (_, each), row in rows.items() if each == lam]
        tokens = sum(row.num_tokens for row in of)
        total = sum(-math.inf if row.log_p is None else row.log_p for row in of)  # by a rule, a token may be left out
        divergence = sum(_value(row.kl) for row in of)
        per_token = total / tokens if tokens else math.nan
        result.add_row(
            f"{lam:g}",
            str(len(of)),
            str(tokens),
            f"{total / len(of):.2f}",
            f"{per_token:.4f}",
            f"{_exp(-per_token):.4g}",
            f"{divergence / len(of):.2f}",
        )
    return result


def _value(number: float | None) -> float:
    return math.nan if number is None else number


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
