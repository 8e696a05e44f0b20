"""The report: what is in the page, and that nothing a sample holds can get out of it."""

import base64
import hashlib
import json
import math
import random
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
from swept import HOSTILE, LN2, PROMPTS, RULE, TOKENS, row, rows, swept

from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.guards import GuardResult
from dera_peft.evaluate.analysis.recommend import recommend
from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.analysis.summary import summarise
from dera_peft.evaluate.benchmarks import BenchmarkRow
from dera_peft.evaluate.report import page as page_module
from dera_peft.evaluate.report import samples, tables
from dera_peft.evaluate.report.findings import Findings
from dera_peft.evaluate.report.page import write_report
from dera_peft.evaluate.report.samples import pack_samples, script_json, viewed_rows

FACTS = {"adapter": "runs/<b>x</b>", "β": "0.5", "bell": "a\x07b\ud800"}


class Page(HTMLParser):
    """The elements of a page with their attributes, its scripts, and its visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.words: list[str] = []
        self._inside: str | None = None
        self.feed(text.replace("<wbr>", ""))

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        elif self._inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def data(self) -> dict:
        """What the script reads, its pairs as they are packed and unpacked."""
        (text,) = (text for attributes, text in self.scripts if attributes.get("type") == "application/json")
        data = json.loads(text)
        for pair in data["pairs"]:
            pair |= json.loads(zlib.decompress(base64.b64decode(pair["packed"])))
        return data


def written(tmp_path, title="A <sweep>", draw=False, **changes) -> Page:
    return write(tmp_path, *swept(**changes), title, draw)


def write(tmp_path, found: Findings, made: list[dict], title="A <sweep>", draw=False) -> Page:
    """Without pictures, unless they are asked for: they take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(page_module, "panels", lambda *_: {})
        write_report(tmp_path / "report.html", title, FACTS, found, made)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    folder = tmp_path_factory.mktemp("report")
    found, rows_of_it = swept()
    recommended = replace(found.recommendation, retrain="dera dpo --beta 0.5 --x '<y>'")
    made = write(folder, replace(found, recommendation=recommended), rows_of_it, draw=True)
    assert [file.name for file in folder.iterdir()] == ["report.html"], "no temporary file is left"
    return made


def test_nothing_in_a_sample_becomes_a_part_of_the_page(page):
    assert len(page.scripts) == 2
    for tag, attributes in page.elements:
        assert tag not in ("img", "link", "iframe", "textarea", "b", "i")
        assert not [name for name in attributes if name.startswith("on")]
    text = (page.scripts[0], page.scripts[1])
    assert "\x07" not in str(text) + page.text
    assert "\u202e" not in page.text
    assert "runs/<b>x</b>" in page.text
    assert "a�b�" in page.text


def test_nothing_is_fetched(page):
    for _, attributes in page.elements:
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    addresses = {value for _, attributes in page.elements for value in attributes.values() if "//" in (value or "")}
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of XML, not addresses"


def test_only_the_script_of_the_page_may_run(page):
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = (text for attributes, text in page.scripts if not attributes)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_samples_reach_the_script_as_they_are(page):
    data = page.data
    assert [arm["lambdas"] for arm in data["arms"]] == [[-0.5, 0.0, 0.5, 1.0]]
    assert data["recommended"] == ["logits", 1.0]
    pairs = {(pair["index"], pair["sample"]): pair for pair in data["pairs"]}
    assert len(pairs) == 6
    assert pairs[0, 0]["prompt"] == [[None, PROMPTS[0]]]
    assert pairs[1, 0]["prompt"] == [["system", "Be <b>brief</b>."], ["user", "مرحبا"]]
    hostile, listed = pairs[0, 0]["rows"]["logits"][3], pairs[0, 0]["texts"]
    assert hostile["text"] == HOSTILE + "🎉\n"
    assert [listed[view[0]] for view in hostile["token_views"]] == TOKENS
    _, js, *best = hostile["token_views"][4]
    assert js == round(LN2 * 4 / 15, 3)
    assert [listed[text] for text in best[::2]] == [TOKENS[4], "<b>r4</b>", "\x07", "a4", "\u202e", "�"]
    assert best[1::2] == [0.5, 0.25, 0.125, 0.75, 0.062, 0.031]
    assert data["branches"] == ["reference", "aligned"]
    assert pairs[2, 1]["rows"]["logits"][3]["errors"] == {"$fun$": "ValueError: <b>no</b>"}


def test_recommendation_and_command(page):
    assert "λ* = 1 · β* = 0.5" in page.text
    assert "the highest mean reward" in page.text
    assert "dera dpo --beta 0.5 --x '<y>'" in page.text
    assert "measure at λ=0.75 (between 0.5 and 1)." in page.text


def test_tiles(page):
    """At λ=1 the prompts' means are 1, 1.25 and 1.5; the KL is λ²."""
    start = page.text.index("λ* = 1")
    tiles = page.text[start : page.text.index("To retrain there")]
    assert tiles == (
        "λ* = 1 · β* = 0.5 $fun$ +1.250 95 % interval: +1.000 to +1.500 mean over prompts "
        "Difference to λ=1, as trained 0 that is λ=1 itself "
        "KL to the reference 1.000 95 % interval: 1.000 to 1.000 nats a completion "
        "Fluency – not measured "
    )


@pytest.fixture(scope="module")
def guarded() -> tuple[Findings, list[dict]]:
    """
    Perplexity is 2 up to λ=0.5, and 8 at λ=1, where it is passed over; "gold" falls beyond λ=0, where "$fun$" rises.
    """
    made = [
        {
            **each,
            "rewards": {
                "$fun$": each["lambda"] + each["prompt_index"],
                "gold": -abs(each["lambda"]) - each["prompt_index"],
            },
            "guards": {"log_perplexity": math.log(8 if each["lambda"] == 1 else 2), "repetition": 0.0},
        }
        for each in rows(views=False)
    ]
    summaries = summarise(made)
    over = GuardResult("perplexity", 1.25, 0.0, 2.5, ((1.0, Estimate(8.0, 0.0, 8.0, 8.0)),), (1.0,))
    recommended = recommend(summaries, None, "kl_budget", "$fun$", kl_budget=0.25, gold=("$fun$", "gold"))
    use = {"generate": "dera generate '<x>'", "serve": "dera serve"}
    recommended = replace(recommended, guards=(over,), use=use, retrain="dera dpo")
    return Findings(summaries, None, recommended), made


def test_tiles_of_another_lambda(tmp_path, guarded):
    """At λ=0.5 the mean over prompts is 1.5, and against λ=1 each prompt loses 0.5."""
    text = write(tmp_path, *guarded).text
    assert "$fun$ +1.500 95 %" in text
    assert "gold −1.500" in text
    assert "highest at λ=0; falls from λ=0.5 on" in text
    assert "Difference to λ=1, as trained −0.500 95 % interval: −0.500 to −0.500 these prompts show it" in text
    assert "Fluency 2.000 95 % interval: 2.000 to 2.000 perplexity per token" in text
    assert "λ=0 has 2.000; λ=1 has 8.000" in text


def test_guards_gold_and_how_it_is_used(tmp_path, guarded):
    text = write(tmp_path, *guarded).text
    assert "Passed over for its perplexity: λ=1" in text
    assert re.search(r"8\.000 8\.000 to 8\.000 above 2\.5: passed over", text), "in the table too"
    assert "From λ=0.5 on $fun$ (the reward that was trained for) still rises, and gold (held out) falls." in text
    said = ["To use it:", "dera generate '<x>'", "To serve it:", "dera serve", "To retrain there:", "dera dpo"]
    places = [text.index(each) for each in said]
    assert places == sorted(places), "first how it is used, then how to retrain"


def test_benchmarks_have_a_tab(tmp_path):
    def row(lam: float, value: float | None, stderr: float | None, better: bool) -> BenchmarkRow:
        return BenchmarkRow("run", "model", lam, "t", "m", "none", value, stderr, 100, 0, better)

    lines = {
        "arc <easy> acc": [row(0.0, 0.5, 0.0125, True), row(1.0, 0.625, None, True)],
        "wiki perplexity": [row(1.0, 12.5, 0.5, False), row(2.0, None, None, False)],
    }
    page = written(tmp_path, benchmarks=lines)
    found = page.text[page.text.index("± its standard error over the documents") :]
    assert (
        "benchmark λ = 0 λ = 1 λ = 2 arc <easy> acc ↑ 0.500 ± 0.013 0.625 – wiki perplexity ↓ – 12.50 ± 0.50 –" in found
    )
    assert "Benchmarks" not in written(tmp_path).text


def test_tables(page):
    # prompts' means at λ=0.5 are 0.5, 0.75 and 1; against λ=0 each is better by 0.5
    assert "+0.750 +0.500 to +1.000" in page.text
    assert re.search(r"\+0\.500 \+0\.500 to \+0\.500 100% / 0% / 0%", page.text)
    for tab in ("Every λ", "Against the reference (λ=0)", "By group", "Without a value"):
        assert f" {tab} " in page.text
    assert "$fun$ by group" in page.text
    assert "−0.5" in page.text
    assert "$fun$: 1 of 24 rows" in page.text
    assert "ValueError: <b>no</b>" in page.text
    assert "#prompt=2&sample=1&arm=logits&lambda=1" in [a.get("href") for _, a in page.elements]


def test_numbers_of_a_table_are_as_long_as_they_need_to_be():
    draws = numpy.zeros(2)
    small, large = Estimate(-0.25, 0.1, -0.5, 0.0, draws), Estimate(3599793.5, 1e6, 5e4, 9.9e6, draws)
    assert tables.estimate_cell(small, 3, "+")[:2] == ("−0.250", "−0.500 to +0.000")
    assert tables.estimate_cell(large, 2)[:2] == ("3.60e+06", "50000.00 to 9.90e+06")
    assert tables.estimate_cell(None, 2).text == "–"


def test_a_table_has_no_more_columns_than_a_screen():
    made = [{**row, "rewards": {f"reward_{n}": float(n) for n in range(20)}} for row in rows()]
    parts = [part for tab in tables.tabs(Findings(summarise(made)), made).values() for part in tab]
    assert max(len(part.columns) for part in parts) <= 1 + tables.COLUMNS
    levels = [part for part in parts if part.title.startswith("Every λ")]
    assert [part.title for part in levels] == ["Every λ", *["Every λ, continued"] * (len(levels) - 1)]
    assert {f"reward_{n}" for n in range(20)} < {name for part in levels for name in part.columns}
    assert all([cells[0].text for cells in part.rows] == ["−0.5", "0", "0.5", "1"] for part in levels)


def test_a_long_table_is_cut_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 3)
    assert "The first 3 of 4 rows; all are in summary.csv." in written(tmp_path).text


def test_without_views_and_recommendation(tmp_path):
    page = written(tmp_path, views=False, recommendation=None, curve=None, best=None)
    assert "None could be made from these samples." in page.text
    assert "their tokens are not coloured" in page.text
    assert page.data["recommended"] is None
    assert page.data["pairs"][0]["rows"]["logits"][0]["token_views"] is None
    assert not [a for _, a in page.elements if a.get("id") in ("detail", "copy", "scale")]


def test_the_reason_for_no_recommendation(tmp_path):
    page = written(tmp_path, recommendation=None, reason="kl_budget=1: <b>too</b> small.")
    assert "None could be made from these samples: kl_budget=1: <b>too</b> small." in page.text


def test_the_reason_for_no_curve(tmp_path):
    page = written(tmp_path, curve=Curve(reason="greedy decoding draws no samples"))
    assert "only run smoothly through them: greedy decoding draws no samples." in page.text


def test_without_rewards(tmp_path):
    bare = [{**row, "rewards": {}, "errors": {}} for row in rows()]
    page = write(tmp_path, Findings(summarise(bare)), bare, draw=True)
    assert [a["aria-label"] for tag, a in page.elements if tag == "svg" and "aria-label" in a] == ["KL against λ"]
    assert "0.250 0.250 to 0.250" in page.text, "the KL at λ=0.5"
    assert "Rows without a value" not in page.text


def test_several_arms(tmp_path):
    arms = ("logits", "weights", "retrained")
    page = written(tmp_path, arms=arms, models={"retrained": 0.5}, ways={"retrained": "adapter <b>x</b> (β = 1)"})
    assert [arm["arm"] for arm in page.data["arms"]] == list(arms)
    assert page.data["pairs"][0]["rows"]["retrained"][0]["lambda"] == 1.0
    assert page.text.count("runs/dpo, its weights scaled by λ") >= 4
    assert "Adapter <b>x</b> (β = 1). Means over prompts" in page.text


def test_the_best_of_all_arms_and_how_it_is_decoded(tmp_path):
    found, made = swept(arms=("logits", "weights", RULE))
    page = write(
        tmp_path, replace(found, best=replace(found.best, use="dera generate --lambda-schedule 0:2,20:1")), made
    )
    assert page.data["recommended"] == [RULE, None]
    assert [arm["lambdas"] for arm in page.data["arms"] if arm["arm"] == RULE] == [[None]]
    assert page.data["pairs"][0]["rows"][RULE][0]["token_lambda"] == [2.0, 0.25, 0.0]
    for text in (
        f"Of all arms {RULE} is the best by the rule 'reward'",
        "a difference that these prompts show",
        "Difference to the best plain λ, 1 +1.000",
        "To decode like that:",
        "dera generate --lambda-schedule 0:2,20:1",
        "Of plain λ",
        "β* = 0.5",
    ):
        assert text in page.text
    without = written(tmp_path)
    assert "Of all arms" not in without.text
    assert "Pareto" not in without.text


def test_tokens_of_some_samples_are_viewed(monkeypatch):
    monkeypatch.setattr(samples, "VIEWED_TOKENS", 4 * 12)  # a pair has 3 tokens at each of 4 λ
    plain = rows(views=False)
    kept = viewed_rows(plain)
    assert {(row["prompt_index"], row["sample"]) for row in kept} == {(0, 0), (1, 0), (2, 0), (0, 1)}, (
        "first samples first"
    )
    assert len(kept) == 4 * 4, "each at every λ"
    monkeypatch.setattr(samples, "VIEWED_TOKENS", 1)
    assert len(viewed_rows(plain)) == 4, "one pair at least"


def test_the_page_is_bounded_and_says_so(tmp_path, monkeypatch):
    """Of samples that are too many texts come before views, and the first ones first."""
    assert "Here are 6 of 6 samples" in written(tmp_path).text
    size = (tmp_path / "report.html").stat().st_size
    monkeypatch.setattr(samples, "OF_TEXTS", 1.0)
    monkeypatch.setattr(page_module, "MAX_BYTES", size - 400)
    page = written(tmp_path)
    assert "there is room for the tokens of the first" in page.text
    viewed = [any(row["token_views"] for row in pair["rows"]["logits"]) for pair in page.data["pairs"]]
    assert viewed == sorted(viewed, reverse=True)
    assert (len(viewed), set(viewed)) == (6, {True, False})
    assert (tmp_path / "report.html").stat().st_size <= size - 400
    monkeypatch.setattr(page_module, "MAX_BYTES", 0)
    page = written(tmp_path)
    assert [(pair["index"], pair["sample"]) for pair in page.data["pairs"]] == [(0, 0)], "one at least"
    assert "Here are 1 of 6 samples" in page.text
    assert "a line for each completion, by the same numbers (prompt_index, sample, lambda)" in page.text


def test_hundreds_of_prompts_fit(tmp_path):
    """300 prompts, 8 λ, 2 samples of 150 to 250 words: texts of the first sample of each, in less than 2 MB."""
    words = re.findall(r"[a-z]+", (Path(__file__).parents[3] / "docs/guides/choose-lambda.md").read_text().lower())
    rng = random.Random(0)
    made = []
    for index in range(300):
        for sample in range(2):
            text = rng.choices(words, k=rng.randint(150, 250))
            for lam in range(8):  # the texts of a sample begin alike
                tail = rng.choices(words, k=100)
                completion = " ".join([*text[: -10 * (lam + 1)], *tail[: 10 * (lam + 1)]])
                made.append(
                    {**row("logits", 0, float(lam), sample, 0.5), "prompt_index": index, "completion": completion}
                )
    packed = pack_samples(made, Findings([]), page_module.MAX_BYTES - 300_000)
    assert packed.total == 600
    assert packed.shown >= 300
    assert [pair["sample"] for pair in packed.data["pairs"][:300]] == [0] * 300
    assert len(script_json(packed.data)) <= page_module.MAX_BYTES - 300_000


def test_json_inside_a_script():
    data = {"a": "</script><!-- & \u2028", "b": [float("nan"), float("inf"), 1.5, None, "\ud83c"]}
    text = script_json(data)
    assert not re.search(r"[<>&\u2028]", text)
    assert json.loads(text) == {"a": data["a"], "b": [None, None, 1.5, None, "\ud83c"]}
