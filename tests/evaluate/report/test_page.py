"""The report: what is in the page, and that nothing a sample holds can get out of it."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from swept import HOSTILE, LN2, PROMPTS, RULE, TOKENS, rows, swept

from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.summary import summarise
from dera_peft.evaluate.report import samples
from dera_peft.evaluate.report.page import write_report
from dera_peft.evaluate.report.samples import sample_rows, script_json

FACTS = {"adapter": "runs/<b>x</b>", "β": "0.5", "bell": "a\x07b\ud800"}


class Page(HTMLParser):
    """The elements of a page with their attributes, its scripts, and its visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.words: list[str] = []
        self._inside: str | None = None
        self.feed(text)

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
        (text,) = (text for attributes, text in self.scripts if attributes.get("type") == "application/json")
        return json.loads(text)


def written(tmp_path, title="A <sweep>", **changes) -> Page:
    write_report(tmp_path / "report.html", title, FACTS, **{**swept(), **changes})
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    folder = tmp_path_factory.mktemp("report")
    made = written(folder, command="dera dpo --beta 0.5 --x '<y>'")
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
    hostile = pairs[0, 0]["rows"]["logits"][3]
    assert hostile["text"] == HOSTILE + "🎉\n"
    assert [data["texts"][view[0]] for view in hostile["token_views"]] == TOKENS
    _, js, *best = hostile["token_views"][4]
    assert js == round(LN2 * 4 / 15, 5)
    assert [data["texts"][text] for text in best[::2]] == [TOKENS[4], "<b>r4</b>", "\x07", "a4", "\u202e", "�"]
    assert best[1::2] == [0.5, 0.25, 0.125, 0.75, 0.0625, 0.0312]
    assert data["branches"] == ["reference", "aligned"]
    assert pairs[2, 1]["rows"]["logits"][3]["errors"] == {"$fun$": "ValueError: <b>no</b>"}


def test_recommendation_and_command(page):
    assert "λ* = 1 · β* = 0.5" in page.text
    assert "the highest mean reward" in page.text
    assert "dera dpo --beta 0.5 --x '<y>'" in page.text
    assert "measure at λ=0.75 (between 0.5 and 1)." in page.text


def test_tables(page):
    # prompts' means at λ=0.5 are 0.5, 0.75 and 1; against λ=0 each is better by 0.5
    assert re.search(r"\+0\.750 \[\+0\.500, \+1\.000\]", page.text)
    assert re.search(r"\+0\.500 \[\+0\.500, \+0\.500\] 100% / 0% / 0%", page.text)
    assert "$fun$ by group" in page.text
    assert "−0.5" in page.text
    assert "$fun$: 1 of 24 rows" in page.text
    assert "ValueError: <b>no</b>" in page.text


def test_without_views_and_recommendation(tmp_path):
    bare = {**swept(views=False), "recommendation": None, "curve": None}
    page = written(tmp_path, **bare)
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
    page = written(tmp_path, rows=bare, summaries=summarise(bare), recommendation=None, curve=None)
    assert [a["aria-label"] for tag, a in page.elements if tag == "svg"] == ["KL against λ"]
    assert "0.250 [0.250, 0.250]" in page.text, "the KL at λ=0.5"
    assert "Rows without a value" not in page.text


def test_several_arms(tmp_path):
    arms = ("logits", "weights", "retrained")
    page = written(tmp_path, **swept(arms=arms), models={"retrained": 0.5})
    assert [arm["arm"] for arm in page.data["arms"]] == list(arms)
    assert page.data["pairs"][0]["rows"]["retrained"][0]["lambda"] == 1.0
    assert page.text.count("adapter's weights scaled by λ") >= 4


def test_the_best_of_all_arms_and_how_it_is_decoded(tmp_path):
    made = swept(arms=("logits", "weights", RULE))
    made["best"] = replace(made["best"], use="dera generate --lambda-schedule 0:2,20:1")
    page = written(tmp_path, **made)
    assert page.data["recommended"] == [RULE, None]
    assert [arm["lambdas"] for arm in page.data["arms"] if arm["arm"] == RULE] == [[None]]
    assert page.data["pairs"][0]["rows"][RULE][0]["token_lambda"] == [2.0, 0.25, 0.0]
    for text in (
        f"Of all arms {RULE} is the best by the rule 'reward'",
        "a difference that these prompts show",
        "To decode like that:",
        "dera generate --lambda-schedule 0:2,20:1",
        "Of plain λ",
        "β* = 0.5",
    ):
        assert text in page.text
    without = written(tmp_path, **swept())
    assert "Of all arms" not in without.text
    assert "Pareto" not in without.text


def test_the_page_is_bounded_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "SAMPLE_PAIRS", 4)
    kept = sample_rows(rows())
    assert {(row["prompt_index"], row["sample"]) for row in kept} == {(0, 0), (1, 0), (2, 0), (0, 1)}, (
        "first samples first"
    )
    assert len(kept) == 4 * 4, "each at every λ"
    assert "Here are 4 of 6 samples" in written(tmp_path).text
    monkeypatch.setattr(samples, "SAMPLE_TOKENS", 25)  # a pair has 3 tokens at each of 4 λ
    assert len(sample_rows(rows())) == 2 * 4
    monkeypatch.setattr(samples, "SAMPLE_TOKENS", 1)
    assert len(sample_rows(rows())) == 4, "one pair at least"


def test_json_inside_a_script():
    data = {"a": "</script><!-- & \u2028", "b": [float("nan"), float("inf"), 1.5, None, "\ud83c"]}
    text = script_json(data)
    assert not re.search(r"[<>&\u2028]", text)
    assert json.loads(text) == {"a": data["a"], "b": [None, None, 1.5, None, "\ud83c"]}
