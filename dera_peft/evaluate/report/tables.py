"""The tables of the report page, their cells as text."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlencode

from dera_peft.decoding.lambdas import Lambda, values_of
from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.analysis.summary import LambdaSummary, lambda_text
from dera_peft.evaluate.benchmarks import BenchmarkRow
from dera_peft.evaluate.points import anchor_name, anchors
from dera_peft.evaluate.report.findings import Findings

COLUMNS = 10  # of numbers, that a table has room for beside each other
ROWS = 200
LISTED_FAILURES = 20
LARGE = 1e5  # a number from here on is written as a power of ten, as the perplexity of broken text
KL = "KL (nats a completion)"
MINUS = "\N{MINUS SIGN}"


class Cell(NamedTuple):
    text: str
    interval: str = ""  # below it
    link: str = ""  # a place of the page
    remark: str = ""  # below them


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        columns: their heads.
        rows: `rows[i][0]` heads its row.
        marked: the rows of the recommended λ.
        has_text: the last column is one of sentences.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[Cell]]
    marked: set[int] = field(default_factory=set)
    has_text: bool = False


def tabs(findings: Findings, rows: Sequence[dict]) -> dict[str, list[Table]]:
    """The tables of numbers by the name of their tab; those without anything in them are left out."""
    plain = [s for s in findings.summaries if s.lam is not None]
    against = anchors(s.lam for s in plain)
    found: dict[str, list[Table]] = {}
    if len(findings.arms) == 1:
        found["Every λ"] = _levels(findings, findings.summaries, "Every λ")
        found |= {
            f"Against {anchor_name(other)}": _comparison(findings, findings.summaries, other) for other in against
        }
    else:
        found["All arms"] = _levels(findings, findings.summaries, "Every arm and λ")
        for arm, summaries in findings.arms.items():
            found[findings.name_of(arm)] = [
                *_levels(findings, summaries, "Every λ", findings.ways.get(arm, "")),
                *(table for other in against for table in _comparison(findings, summaries, other)),
            ]
    found["By group"] = [table for reward in findings.rewards for table in _groups(findings, reward)]
    found["Benchmarks"] = _benchmarks(findings)
    found["Without a value"] = _failures(rows, findings.rewards)
    return {name: tables for name, tables in found.items() if tables}


def _levels(findings: Findings, summaries: Sequence[LambdaSummary], title: str, way: str = "") -> list[Table]:
    rewards = findings.rewards
    columns = {
        name: _estimates([s.rewards[name].level if name in s.rewards else None for s in summaries]) for name in rewards
    }
    if any(s.rewards[name].robust for s in summaries for name in rewards[:1] if name in s.rewards):
        columns[f"{rewards[0]}, worst reweighting"] = _estimates([s.rewards[rewards[0]].robust for s in summaries])
    columns[KL] = _estimates([s.kl for s in summaries], signed=False)
    columns |= _guards(findings, summaries)
    columns["KL per token"] = [Cell(f"{s.kl_per_token:.3f}") for s in summaries]
    columns["tokens"] = [Cell(f"{s.tokens:.1f}") for s in summaries]
    columns["ended"] = [Cell(f"{s.ended:.0%}") for s in summaries]
    columns["samples"] = [Cell(str(s.samples)) for s in summaries]
    for name in rewards:
        failed = [s.rewards[name].failed if name in s.rewards else 0 for s in summaries]
        if any(failed):
            columns[f"{name}, without a value"] = [Cell(str(count)) for count in failed]
    note = "Means over prompts, below them 95 % intervals (bootstrap over prompts)."
    return _split(findings, summaries, title, f"{_sentence(way)}{note}", columns)


def _guards(findings: Findings, summaries: Sequence[LambdaSummary]) -> dict[str, list[Cell]]:
    """What tells that text breaks, as it was measured; and which λ were passed over for it."""
    found = findings.recommendation
    limits = {guard.name: guard for guard in found.guards} if found else {}
    figures = {
        "perplexity": [s.perplexity for s in summaries],
        "repetition": [s.guards.get("repetition") for s in summaries],
    }
    columns: dict[str, list[Cell]] = {}
    for name, estimates in figures.items():
        if not any(estimates):
            continue
        cells, limit = _estimates(estimates, signed=False), limits.get(name)
        if limit is not None:
            over = f"above {limit.limit:.3g}: passed over"
            is_over = [s.arm == LOGITS and s.lam in limit.passed_over for s in summaries]
            cells = [cell._replace(remark=over if is_one else "") for cell, is_one in zip(cells, is_over, strict=True)]
        columns[f"guard: {name}"] = cells
    return columns


def _comparison(findings: Findings, summaries: Sequence[LambdaSummary], other: Lambda) -> list[Table]:
    """With one λ of plain λ."""
    columns: dict[str, list[Cell]] = {}
    for reward in findings.rewards:
        pairs = [s.rewards[reward].versus.get(other) if reward in s.rewards else None for s in summaries]
        if any(pairs):
            columns[f"{reward}, difference"] = _estimates([p.difference if p else None for p in pairs])
            columns[f"{reward}, better / same / worse"] = [_shares(pair) for pair in pairs]
    judged = [s.judged.get(other) for s in summaries]
    if any(judged):
        columns["judge, win rate"] = _estimates([j.rate if j else None for j in judged], signed=False)
        columns["judge, win / tie / loss"] = [_shares(verdict) for verdict in judged]
        if any(j and j.failed for j in judged):
            columns["judge, no verdict"] = [Cell(str(j.failed) if j else "–") for j in judged]
    note = "On the same prompts and samples, so that a difference is sharper than its two levels."
    return _split(findings, summaries, f"Against {anchor_name(other)}", note, columns) if columns else []


def _groups(findings: Findings, reward: str) -> list[Table]:
    """A column for each group of prompts."""
    of = [s for s in findings.summaries if reward in s.rewards and s.rewards[reward].groups]
    if not of:
        return []
    names = list(dict.fromkeys(name for s in of for name in s.rewards[reward].groups))
    columns = {name: _estimates([s.rewards[reward].groups.get(name) for s in of]) for name in names}
    columns["lowest mean"] = [Cell(s.rewards[reward].worst_group or "–") for s in of]
    note = "Means over each group's prompts, below them 95 % intervals."
    return _split(findings, of, f"{reward} by group", note, columns)


def _benchmarks(findings: Findings) -> list[Table]:
    """A row for each benchmark, a column for each λ."""
    lambdas = sorted({row.lam for rows in findings.benchmarks.values() for row in rows}, key=values_of)
    note = "Of lm-evaluation-harness; ± its standard error over the documents of a task. ↑ high is good, ↓ low is good."
    tables = []
    for start in range(0, len(lambdas), COLUMNS):
        shown = lambdas[start : start + COLUMNS]
        lines = []
        for name, rows in findings.benchmarks.items():
            at = {row.lam: row for row in rows}
            arrow = {True: " ↑", False: " ↓", None: ""}[rows[0].higher_is_better]
            lines.append([Cell(f"{name}{arrow}"), *(_benchmark(at.get(lam)) for lam in shown)])
        title = "Benchmarks, continued" if start else "Benchmarks"
        heads = [f"λ = {_number(lambda_text(lam))}" for lam in shown]
        tables.append(Table(title, "" if start else note, ["benchmark", *heads], lines))
    return tables


def _benchmark(row: BenchmarkRow | None) -> Cell:
    if row is None or row.value is None:
        return Cell("–")
    places = decimals(abs(row.value))
    return Cell(_number(f"{row.value:.{places}f}"), "" if row.stderr is None else f"± {row.stderr:.{places}f}")


def _failures(rows: Sequence[dict], rewards: Sequence[str]) -> list[Table]:
    """How many rows have no value, by reward or judge, and the first of them with their messages."""
    failed = []
    for row in rows:
        errors = {name: "no value" for name in rewards if row["rewards"].get(name) is None} | row.get("errors", {})
        failed += [(name, row, message) for name, message in errors.items()]
    if not failed:
        return []
    counts = Counter(name for name, *_ in failed)
    note = "; ".join(f"{name}: {count} of {len(rows)} rows" for name, count in counts.items())
    if len(failed) > LISTED_FAILURES:
        note += f"; the first {LISTED_FAILURES} of {len(failed)} are listed"
    listed = [
        [
            Cell(name), Cell(row["arm"]), Cell(lambda_text(row["lambda"])), Cell(str(row["prompt_index"])),
            Cell(str(row["sample"]), link=fragment(row)), Cell(message),
        ]
        for name, row, message in failed[:LISTED_FAILURES]
    ]  # fmt: skip
    columns = ["reward or judge", "arm", "λ", "prompt", "sample", "message"]
    title = "Rows without a value"
    return [Table(title, f"The other tables leave them out. {note}.", columns, listed, has_text=True)]


def fragment(row: Mapping[str, Any]) -> str:
    """The place of a row on the page, by the numbers that samples.jsonl has for it."""
    place = {"prompt": row["prompt_index"], "sample": row["sample"], "arm": row["arm"]}
    lam = {} if row["lambda"] is None else {"lambda": f"{row['lambda']:g}"}
    return f"#{urlencode(place | lam)}"


def _split(
    findings: Findings, summaries: Sequence[LambdaSummary], title: str, note: str, columns: Mapping[str, list[Cell]]
) -> list[Table]:
    """As many tables as a screen needs for so many columns, each with the arms and λ of its rows."""
    kept = summaries[:ROWS]
    if len(kept) < len(summaries):
        note += f" The first {ROWS} of {len(summaries)} rows; all are in summary.csv."
    has_arms = len({s.arm for s in summaries}) > 1
    heads = ["arm", "λ"] if has_arms else ["λ"]
    keys = [
        [*([Cell(findings.name_of(s.arm))] if has_arms else []), Cell(_number(lambda_text(s.lam)).replace(",", ", "))]
        for s in kept
    ]
    marked = {n for n, s in enumerate(kept) if (s.arm, s.lam) == findings.recommended}
    names = list(columns)
    parts = -(-len(names) // COLUMNS)
    each = -(-len(names) // parts)
    tables = []
    for start in range(0, len(names), each):
        part = names[start : start + each]
        rows = [[*keys[n], *(columns[name][n] for name in part)] for n in range(len(kept))]
        more = f"{title}, continued" if start else title
        tables.append(Table(more, "" if start else note, [*heads, *part], rows, marked))
    return tables


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}. " if text else ""


def _number(text: str) -> str:
    return text.replace("-", MINUS)


def _estimates(estimates: Sequence[Estimate | None], signed: bool = True) -> list[Cell]:
    """A column: mean and interval, in as many decimals as most of its numbers need for three or four digits."""
    sizes = sorted(abs(e.mean) for e in estimates if e and math.isfinite(e.mean))
    sign = "+" if signed and any(e and e.mean < 0 for e in estimates) else ""
    return [estimate_cell(estimate, decimals(sizes[len(sizes) // 2] if sizes else 0.0), sign) for estimate in estimates]


def decimals(largest: float) -> int:
    return 3 if largest < 10 else 2 if largest < 100 else 1 if largest < 1000 else 0


def estimate_cell(estimate: Estimate | None, places: int, sign: str = "") -> Cell:
    def number(value: float) -> str:
        if abs(value) >= LARGE:
            return _number(f"{value:{sign}.2e}")
        return _number(f"{round(value, places) + 0.0:{sign}.{places}f}")  # + 0.0: no minus before a zero

    if estimate is None or not math.isfinite(estimate.mean):
        return Cell("–")
    known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    return Cell(number(estimate.mean), f"{number(estimate.low)} to {number(estimate.high)}" if known else "")


def _shares(pair: Any) -> Cell:
    if pair is None or not math.isfinite(pair.win):
        return Cell("–")
    return Cell(f"{pair.win:.0%} / {pair.tie:.0%} / {pair.loss:.0%}")
