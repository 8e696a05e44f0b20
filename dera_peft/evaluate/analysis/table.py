"""The summaries of a sweep as a table: summary.csv."""

import csv
import io
import math
import os
import re
from collections.abc import Sequence

from dera_peft.decoding.lambdas import NamedLambda
from dera_peft.errors import DeRaError
from dera_peft.evaluate.analysis.summary import Estimate, LambdaSummary
from dera_peft.files import write_atomically

COLUMNS = ("arm", "lambda", "prompts", "samples", "kl", "kl_per_token", "tokens", "ended")  # of summary.csv
# what stands behind a name in the further columns of its estimates and comparisons
OWN = "_(se|low|high|failed|group_.*|robust.*|(minus|win|tie|loss)_lambda_.*)"


def check_names(rewards: Sequence[str]) -> None:
    """
    Refuses rewards whose columns in summary.csv another would overwrite.

    Raises:
        DeRaError: names the reward.
    """
    for name in rewards:
        others = [other for other in rewards if other != name and re.fullmatch(f"{re.escape(other)}{OWN}", name)]
        if name in COLUMNS or re.fullmatch(f"kl{OWN}", name) or name.startswith(("judge_", "lambda_")) or others:
            raise DeRaError(
                f"rewards: {name!r} is the name of another column of summary.csv; give the function another name."
            )


def write_csv(summaries: Sequence[LambdaSummary], file: str | os.PathLike) -> None:
    """`summary_rows`, of which what is unknown is empty."""
    table = summary_rows(summaries)
    names = list(dict.fromkeys(name for row in table for name in row))
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, names, restval="")
    writer.writeheader()
    writer.writerows(
        {name: _csv(value) if isinstance(value, float) else value for name, value in row.items()} for row in table
    )
    write_atomically(file, stream.getvalue())


def summary_rows(summaries: Sequence[LambdaSummary]) -> list[dict[str, str | int | float | None]]:
    """
    One row per arm and λ, which is None in an arm that knows none. λ of several adapters is a text, and stands in
    lambda_ADAPTER for each as well. An estimate has the columns NAME, NAME_se, NAME_low and NAME_high; what is unknown
    is NaN.

    A reward has those of its level under its own name, NAME_failed, NAME_group_GROUP for each group's mean,
    NAME_robust for the worst reweighting of the prompts where that was asked for, and for
    the comparison with λ=0 those of NAME_minus_lambda_0, and NAME_win_lambda_0, NAME_tie_…, NAME_loss_…; with λ=1 the
    same. A judge has judge_lambda_0 (the win rate), judge_win_lambda_0, ….
    """
    return [_flat(summary) for summary in summaries]


def _flat(summary: LambdaSummary) -> dict[str, str | int | float | None]:
    by_name = summary.lam if isinstance(summary.lam, NamedLambda) else {}
    row: dict[str, str | int | float | None] = {
        "arm": summary.arm,
        "lambda": f"{summary.lam:g}" if isinstance(summary.lam, NamedLambda) else summary.lam,
        **{f"lambda_{name}": value for name, value in by_name.items()},
        "prompts": summary.prompts,
        "samples": summary.samples,
        **_columns("kl", summary.kl),
        "kl_per_token": summary.kl_per_token,
        "tokens": summary.tokens,
        "ended": summary.ended,
    }
    for name, reward in summary.rewards.items():
        row |= _columns(name, reward.level) | {f"{name}_failed": reward.failed}
        for other, paired in reward.versus.items():
            row |= _columns(f"{name}_minus_lambda_{other:g}", paired.difference)
            row |= {f"{name}_{share}_lambda_{other:g}": getattr(paired, share) for share in ("win", "tie", "loss")}
        for own, level in reward.groups.items():
            row |= _columns(f"{name}_group_{own}", level)
        if reward.robust is not None:
            row |= _columns(f"{name}_robust", reward.robust)
    for other, judged in summary.judged.items():
        row |= _columns(f"judge_lambda_{other:g}", judged.rate)
        row |= {f"judge_{share}_lambda_{other:g}": getattr(judged, share) for share in ("win", "tie", "loss", "failed")}
    return row


def _csv(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.8g}"


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {
        name: estimate.mean,
        f"{name}_se": estimate.se,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
    }
