"""The report of a sweep: one HTML file that loads nothing from elsewhere."""

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dera_peft.evaluate.report.findings import Findings
from dera_peft.evaluate.report.marks import COLORS, INK, LABELLED, MUTED, PAPER, Legend, mark_picture
from dera_peft.evaluate.report.plots import panels
from dera_peft.evaluate.report.samples import Samples, pack_samples, script_json
from dera_peft.evaluate.report.tables import tabs
from dera_peft.evaluate.report.tiles import tiles, tiles_of_arm
from dera_peft.files import write_atomically

MAX_BYTES = 1_950_000  # of the file
SHOWN_GAPS = 8
SCRIPTS = ("tabs.js", "copy.js", "samples.js")
# what a browser would obey rather than show: control characters, and those that turn the direction of text
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
DECIMALS = re.compile(r"(\.\d\d)\d+")  # more than a screen needs
SVG_COLORS = {INK: "ink", MUTED: "muted", PAPER: "paper", **{color: f"arm-{n}" for n, color in enumerate(COLORS)}}


def write_report(
    file: str | os.PathLike, title: str, facts: Mapping[str, str], findings: Findings, rows: Sequence[dict]
) -> None:
    """
    Writes the page, of less than 2 MB: it shows as many samples as there is room for, and says how many those are.

    Args:
        facts: what was swept (model, adapter, β, prompts, sampling, versions, date …), in the order of the page.
        rows: all rows; those of `viewed_rows` with their `token_views`, where the tokens are to be coloured.
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
    environment.filters["breakable"] = _breakable
    script = "\n".join(loader.get_source(environment, name)[0] for name in SCRIPTS)
    style, _, _ = loader.get_source(environment, "report.css")
    figures, legend = _figures(findings)
    values: dict[str, Any] = {
        "title": title,
        "facts": facts,
        # nothing but this script runs, whatever a text on the page may hold, and nothing is fetched
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "script": Markup(script),
        "style": Markup(style),
        "findings": findings,
        "tiles": tiles(findings),
        "tiles_of_arm": tiles_of_arm(findings),
        "figures": figures,
        "legend": legend,
        "tables": tabs(findings, rows),
        "shown_gaps": SHOWN_GAPS,
        "is_crowded": len(findings.arms) > LABELLED,
        "is_estimated": findings.recommended not in {(s.arm, s.lam) for s in findings.summaries} | {None},
        "several_arms": len(findings.arms) > 1,
        "has_views": any(row.get("token_views") for row in rows),
    }
    template = environment.get_template("report.html")

    def render(samples: Samples) -> str:
        return template.render(values, samples=samples, data=Markup(script_json(samples.data)))

    without = render(pack_samples(rows, findings, room=0))  # with one pair
    room = MAX_BYTES - len(without.encode())
    write_atomically(file, render(pack_samples(rows, findings, room)))


def _seen(value: Any) -> Any:
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _breakable(text: str) -> Markup:
    """A name that a narrow column may break where its parts join."""
    return Markup(re.sub(r"([_/:])", r"\1<wbr>", str(escape(_seen(text)))))


def _figures(findings: Findings) -> tuple[dict[str, list[tuple[str, Markup]]], dict[str, Markup]]:
    """The panels of each reward, or of the KL alone, with what they show; and the legend of all."""
    legend: Legend = {}
    figures = {
        reward or "KL": [
            (name, _inline(svg, f"p{number}-{place}-", name))
            for place, (name, svg) in enumerate(panels(findings, reward, legend).items())
        ]
        for number, reward in enumerate(findings.rewards or [None])
    }
    marks = {name: _inline(mark_picture(mark), f"m{n}-", "") for n, (name, mark) in enumerate(legend.items())}
    return figures, marks


def _inline(svg: bytes, prefix: str, label: str) -> Markup:
    """An SVG as a part of the page: with its fonts and colours, ids of its own, and numbers as a screen needs."""
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', lambda match: DECIMALS.sub(r"\1", match[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    for color, name in SVG_COLORS.items():
        text = text.replace(f": {color}", f": var(--{name})")
    role = Markup('role="img" aria-label="{}"').format(_seen(label)) if label else Markup('aria-hidden="true"')
    return Markup(text.replace("<svg", f"<svg {role}", 1))
