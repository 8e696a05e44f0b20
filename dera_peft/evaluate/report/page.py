"""The report of a sweep: one HTML file that loads nothing from elsewhere."""

import base64
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dera_peft.decoding.lambdas import Lambda
from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.analysis.best import BestArm
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.recommend import Recommendation
from dera_peft.evaluate.analysis.summary import Estimate, LambdaSummary, lambda_text
from dera_peft.evaluate.points import anchor_name, anchors, is_of_several
from dera_peft.evaluate.report.marks import COLORS, INK, LABELLED, MUTED, NAMES, PAPER
from dera_peft.evaluate.report.plots import pareto_picture, sweep_picture
from dera_peft.evaluate.report.samples import sample_rows, samples_data, script_json, script_lambda
from dera_peft.files import write_atomically

LISTED_FAILURES = 20
SHOWN_GAPS = 8
KL = "KL (nats)"
MINUS = "\N{MINUS SIGN}"
# what a browser would obey rather than show: control characters, and those that turn the direction of text
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SVG_COLORS = {INK: "ink", MUTED: "muted", PAPER: "paper", **{color: f"arm-{n}" for n, color in enumerate(COLORS)}}


@dataclass(frozen=True)
class Table:
    """
    A table of the page, its cells as text.

    Attributes:
        columns: their heads.
        rows: one per arm and λ; `rows[i][0]` heads its row.
        marked: the rows of the recommended λ.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    marked: set[int] = field(default_factory=set)


def write_report(
    file: str | os.PathLike,
    title: str,
    facts: Mapping[str, str],
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    recommendation: Recommendation | None,
    rows: Sequence[dict],
    command: str | None = None,
    models: Mapping[str, float | None] | None = None,
    reason: str | None = None,
    best: BestArm | None = None,
) -> None:
    """
    Writes the page.

    Args:
        facts: what was swept (model, adapter, β, prompts, sampling, versions, date …), in the order of the page.
        summaries: one per arm and λ.
        curve: the estimates between the measured λ; None where there are none.
        recommendation: None where there is none to make.
        rows: all rows; those of `sample_rows` with their `token_views`, where the tokens are to be coloured.
        command: retrains at the recommended strength.
        models: the arms of other adapters, as in `plots.sweep_picture`.
        reason: why there is no recommendation.
        best: of all arms, if there are several.
    """
    loader = PackageLoader("dera_peft.evaluate.report", "template")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_seen,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, _, _ = loader.get_source(environment, "report.js")
    style, _, _ = loader.get_source(environment, "report.css")
    rewards = list(dict.fromkeys(name for summary in summaries for name in summary.rewards))
    if recommendation:  # the reward that λ was chosen by comes first
        rewards.sort(key=lambda name: name != recommendation.reward)
    samples, arms = sample_rows(rows), {summary.arm for summary in summaries}
    recommended = _recommended(recommendation, best)
    page = environment.get_template("report.html").render(
        title=title,
        facts=facts,
        # nothing but this script runs, whatever a text on the page may hold, and nothing is fetched
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        script=Markup(script),
        style=Markup(style),
        recommendation=recommendation,
        best=best,
        reason=reason,
        command=command,
        curve=curve,
        figures=_figures(summaries, curve, recommendation, rewards, models, best),
        tables=[
            _levels(summaries, rewards, recommended),
            *_comparisons(summaries, rewards, recommended),
            *_groups(summaries, rewards, recommended),
        ],
        failures=_failures(rows, rewards),
        data=Markup(
            script_json(
                samples_data(samples, NAMES)
                | {"recommended": recommended and (recommended[0], script_lambda(recommended[1]))}
            )
        ),
        several=is_of_several(summary.lam for summary in summaries),
        shown_gaps=SHOWN_GAPS,
        several_arms=len(arms) > 1,
        crowded=len(arms) > LABELLED,
        estimated=best.best.estimated if best else bool(recommendation and recommendation.estimated),
        pairs=(len(_pairs(samples)), len(_pairs(rows))),
        has_token_views=any(row.get("token_views") for row in samples),
    )
    write_atomically(file, page)


def _recommended(recommendation: Recommendation | None, best: BestArm | None) -> tuple[str, Lambda | None] | None:
    """Arm and λ."""
    if best is not None:
        return best.best.arm, best.best.lam
    return None if recommendation is None else (LOGITS, recommendation.lam)


def _seen(value: Any) -> Any:
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _pairs(rows: Sequence[dict]) -> set[tuple[int, int]]:
    return {(row["prompt_index"], row["sample"]) for row in rows}


def _figures(
    summaries: Sequence[LambdaSummary],
    curve: Curve | None,
    recommendation: Recommendation | None,
    rewards: Sequence[str],
    models: Mapping[str, float | None] | None,
    best: BestArm | None,
) -> list[list[Markup]]:
    """Two pictures for each reward; where there is none, one of the KL alone."""
    figures = []
    for number, reward in enumerate(rewards or [None]):
        over_lam = sweep_picture(summaries, curve, recommendation, reward, models=models, best=best)
        pictures = [_inline(over_lam, f"lambda-{number}-", f"{reward} and KL against λ" if reward else "KL against λ")]
        if reward is not None:
            pareto = pareto_picture(summaries, curve, recommendation, reward, models=models, best=best)
            pictures.append(_inline(pareto, f"pareto-{number}-", f"{reward} against KL"))
        figures.append(pictures)
    return figures


def _inline(svg: bytes, prefix: str, label: str) -> Markup:
    """An SVG as a part of the page: with the page's fonts and colours, and ids of its own."""
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for color, name in SVG_COLORS.items():
        text = text.replace(f": {color}", f": var(--{name})")
    return Markup(text.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(_seen(label)), 1))


def _levels(summaries: Sequence[LambdaSummary], rewards: Sequence[str], recommended: tuple | None) -> Table:
    columns = {name: [s.rewards[name].level if name in s.rewards else None for s in summaries] for name in rewards}
    if any(s.rewards[name].robust for s in summaries for name in rewards[:1] if name in s.rewards):
        (first, *_) = rewards
        columns[f"{first}: worst reweighting"] = [s.rewards[first].robust for s in summaries]
    columns[KL] = [s.kl for s in summaries]
    cells = [_estimates(values, signed=name != KL) for name, values in columns.items()]
    failed = {name: [s.rewards[name].failed if name in s.rewards else 0 for s in summaries] for name in rewards}
    failed = {name: counts for name, counts in failed.items() if any(counts)}
    return Table(
        "Every λ",
        "Means over prompts, with 95 % intervals (bootstrap over prompts).",
        [
            *_heads(summaries), "samples", *columns, "KL per token", "tokens", "ended",
            *(f"{name}: without a value" for name in failed),
        ],
        [
            [
                *_keys(summaries, s), str(s.samples), *row,
                f"{s.kl_per_token:.3f}", f"{s.tokens:.1f}", f"{s.ended:.0%}",
                *(str(counts[place]) for counts in failed.values()),
            ]
            for place, (s, row) in enumerate(zip(summaries, zip(*cells, strict=True), strict=True))
        ],
        _marked(summaries, recommended),
    )  # fmt: skip


def _comparisons(summaries: Sequence[LambdaSummary], rewards: Sequence[str], recommended: tuple | None) -> list[Table]:
    """One table for each λ that all others are compared with."""
    tables = []
    for other in anchors(s.lam for s in summaries if s.arm == LOGITS):
        columns: dict[str, list[str]] = {}
        for reward in rewards:
            pairs = [s.rewards[reward].versus.get(other) if reward in s.rewards else None for s in summaries]
            if any(pairs):
                columns[f"{reward}: difference"] = _estimates([p.difference if p else None for p in pairs], signed=True)
                columns[f"{reward}: better / same / worse"] = [_shares(pair) for pair in pairs]
        judged = [s.judged.get(other) for s in summaries]
        if any(judged):
            columns["judge: win rate"] = _estimates([j.rate if j else None for j in judged], signed=False)
            columns["judge: win / tie / loss"] = [_shares(verdict) for verdict in judged]
            if any(j and j.failed for j in judged):
                columns["judge: no verdict"] = [str(j.failed) if j else "–" for j in judged]
        if columns:
            tables.append(
                Table(
                    f"Against {anchor_name(other)}",
                    "On the same prompts and samples, so that a difference is sharper than its two levels.",
                    [*_heads(summaries), *columns],
                    [
                        [*_keys(summaries, s), *row]
                        for s, row in zip(summaries, zip(*columns.values(), strict=True), strict=True)
                    ],
                    _marked(summaries, recommended),
                )
            )
    return tables


def _groups(summaries: Sequence[LambdaSummary], rewards: Sequence[str], recommended: tuple | None) -> list[Table]:
    """One table for each reward, with a column for each group of prompts."""
    tables = []
    for reward in rewards:
        with_groups = [s for s in summaries if reward in s.rewards and s.rewards[reward].groups]
        if not with_groups:
            continue
        names = list(dict.fromkeys(name for s in with_groups for name in s.rewards[reward].groups))
        columns = [_estimates([s.rewards[reward].groups.get(name) for s in with_groups], signed=True) for name in names]
        tables.append(
            Table(
                f"{reward} by group",
                "Means over each group's prompts, and the group that fares worst.",
                [*_heads(summaries), *names, "worst"],
                [
                    [*_keys(summaries, s), *row, s.rewards[reward].worst_group or "–"]
                    for s, row in zip(with_groups, zip(*columns, strict=True), strict=True)
                ],
                _marked(with_groups, recommended),
            )
        )
    return tables


def _failures(rows: Sequence[dict], rewards: Sequence[str]) -> dict[str, Any] | None:
    """How many rows have no value, by reward or judge, and the first of them with their messages."""
    failed = []
    for row in rows:
        errors = {name: "no value" for name in rewards if row["rewards"].get(name) is None} | row.get("errors", {})
        failed += [
            [name, row["arm"], lambda_text(row["lambda"]), str(row["prompt_index"]), str(row["sample"]), message]
            for name, message in errors.items()
        ]
    if not failed:
        return None
    counts = Counter(name for name, *_ in failed)
    note = "; ".join(f"{name}: {count} of {len(rows)} rows" for name, count in counts.items())
    if len(failed) > LISTED_FAILURES:
        note += f"; the first {LISTED_FAILURES} of {len(failed)} are listed"
    return {
        "note": note,
        "columns": ["reward or judge", "arm", "λ", "prompt", "sample", "message"],
        "rows": failed[:LISTED_FAILURES],
    }


def _heads(summaries: Sequence[LambdaSummary]) -> list[str]:
    return ["arm", "λ"] if len({s.arm for s in summaries}) > 1 else ["λ"]


def _keys(summaries: Sequence[LambdaSummary], summary: LambdaSummary) -> list[str]:
    lam = lambda_text(summary.lam).replace("-", MINUS).replace(",", ", ")
    keys = [NAMES.get(summary.arm, summary.arm), lam]
    return keys[-len(_heads(summaries)) :]


def _marked(summaries: Sequence[LambdaSummary], recommended: tuple | None) -> set[int]:
    return {n for n, s in enumerate(summaries) if (s.arm, s.lam) == recommended}


def _estimates(estimates: Sequence[Estimate | None], signed: bool) -> list[str]:
    """A column: mean and interval, in as many decimals as its largest number needs for three or four digits."""
    known = [abs(e.mean) for e in estimates if e and math.isfinite(e.mean)]
    largest = max(known, default=0.0)
    decimals = 3 if largest < 10 else 2 if largest < 100 else 1 if largest < 1000 else 0
    sign = "+" if signed and any(e and e.mean < 0 for e in estimates) else ""

    def number(value: float) -> str:
        return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"  # + 0.0: no minus before a zero

    def text(estimate: Estimate | None) -> str:
        if estimate is None or not math.isfinite(estimate.mean):
            return "–"
        known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
        interval = f" [{number(estimate.low)}, {number(estimate.high)}]" if known else ""
        return (number(estimate.mean) + interval).replace("-", MINUS)

    return [text(estimate) for estimate in estimates]


def _shares(pair: Any) -> str:
    if pair is None or not math.isfinite(pair.win):
        return "–"
    return f"{pair.win:.0%} / {pair.tie:.0%} / {pair.loss:.0%}"
