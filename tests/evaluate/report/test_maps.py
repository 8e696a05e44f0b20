"""The pictures and the page of a sweep over the λ of several adapters."""

import re
from dataclasses import replace

import pytest

from dera_peft.decoding.lambdas import NamedLambda
from dera_peft.evaluate.analysis.curve import Curve, Point
from dera_peft.evaluate.analysis.recommend import recommend
from dera_peft.evaluate.analysis.summary import Estimate, summarise
from dera_peft.evaluate.points import fine_grid, simplex
from dera_peft.evaluate.report.findings import Findings
from dera_peft.evaluate.report.page import write_report
from dera_peft.evaluate.report.plots import pareto_picture, sweep_picture


def swept(names: list[str], line: bool = False) -> tuple[Findings, list[dict]]:
    """Findings and rows: a reward that is the highest at the first adapter alone."""
    points = [*([] if line else [NamedLambda(dict.fromkeys(names, 0.0))]), *simplex(names, 2)]
    rows = [
        {
            "arm": "logits", "prompt_index": index, "prompt": "a", "lambda": lam, "sample": 0, "columns": {},
            "completion": f"at {lam:g}", "num_tokens": 3, "finish_reason": "eos",
            "kl": sum(value**2 for value in lam.values()), "rewards": {"r": lam[names[0]] + 0.1 * index},
        }
        for lam in points
        for index in range(3)
    ]  # fmt: skip
    summaries = summarise(rows)
    between = [lam for lam in fine_grid(points) if lam not in points]
    estimate = Estimate(0.5, 0.1, 0.4, 0.6)
    curve = Curve([Point(lam, 50.0, 1.0, estimate, {"r": estimate}) for lam in between], samples=len(rows), needed=5.0)
    found = Findings(summaries, curve, recommend(summaries, None, "reward", "r"), adapter=" and ".join(names))
    return found, rows


def texts(svg: bytes) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


@pytest.mark.parametrize("names", [["helpful", "harmless"], ["helpful", "harmless", "brief"]])
@pytest.mark.parametrize("line", [False, True], ids=["with the reference", "on a line"])
def test_a_map_of_two_and_axes_of_three(names, line):
    found, _ = swept(names, line)
    shown = texts(sweep_picture(found, "r"))
    assert {f"λ of {name}" for name in names} <= set(shown)
    assert {"recommended", "r (mean over prompts)", "KL to the reference (nats)"} <= set(shown)
    assert ("estimated between" in shown) == (len(names) == 2)
    assert ("contours between the points, no estimate" in shown) == (len(names) == 2 and not line)
    assert sweep_picture(replace(found, curve=None, recommendation=None), None), "of the KL alone, without a curve"
    shown = texts(pareto_picture(found, "r"))
    assert f"labels: λ of {', '.join(names)}" in shown
    assert ", ".join(["1", *"0" * (len(names) - 1)]) in shown, "the best one is on the front"


def test_the_page_names_points(tmp_path):
    write_report(tmp_path / "report.html", "title", {}, *swept(["helpful", "harmless"]))
    page = (tmp_path / "report.html").read_text()
    assert '<p class="lead">λ*: helpful=1, harmless=0</p>' in page
    assert '<th scope="row" dir="auto">helpful=0.5, harmless=0.5</th>' in page
    for name in ("the reference (λ=0)", "helpful alone, as trained (λ=1)", "harmless alone, as trained (λ=1)"):
        assert f"Against {name}" in page
    assert '"recommended":["logits","helpful=1,harmless=0"]' in page
    lambdas = (
        '"lambdas":["helpful=0,harmless=0","helpful=0,harmless=1","helpful=0.5,harmless=0.5","helpful=1,harmless=0"]'
    )
    assert lambdas in page
