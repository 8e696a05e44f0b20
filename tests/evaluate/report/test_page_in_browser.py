"""The report in a browser: the slider moves, tokens tell what each branch would have said, and nothing is fetched."""

import json

import pytest
from browser import BINARY, Browser
from swept import RULE, TOKENS, swept

from dera_peft.evaluate.report.page import write_report

pytestmark = pytest.mark.skipif(BINARY is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_report(file, "A sweep", {"adapter": "x"}, **swept(), command="dera dpo")
    return file


@pytest.fixture
def page(browser, report):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(report)
    yield browser
    assert browser.errors == []
    assert browser.requests == [report.as_uri()], "nothing but the page itself"


def token(number: int) -> str:
    return f"#moving-text .token:nth-of-type({number})"


def test_the_slider_moves_through_lambda(page):
    page.js("document.getElementById('pair').selectedIndex = 2")
    page.js("document.getElementById('pair').dispatchEvent(new Event('change'))")
    assert page.text("#strength") == "1", "it starts at the recommended λ"
    assert page.text("#moving-text") == " one λ=1</s>"
    assert page.text("#fixed-text") == " one λ=0</s>", "beside it stands the reference"
    page.js("document.getElementById('lambda').focus()")
    page.press("ArrowLeft")
    assert (page.text("#strength"), page.text("#moving-text")) == ("0.5", " one λ=0.5</s>")
    assert "$fun$ 1.000 · length 3.000 · KL 0.25 nats" in page.text("#moving-figures")
    page.press("Home")
    assert (page.text("#strength"), page.text("#moving-text")) == ("−0.5", " one λ=-0.5</s>")
    assert page.js("document.getElementById('lambda').getAttribute('aria-valuetext')") == "λ = −0.5"
    page.point("#lambda", click=True)  # the middle of the track
    assert page.text("#strength") in ("0", "0.5")
    assert page.text("#fixed-text") == " one λ=0</s>"


def test_a_prompt_is_chosen(page):
    page.point("#next", click=True)
    assert page.text("#prompt") == "systemBe <b>brief</b>.userمرحبا"
    page.point("#previous", click=True)
    assert page.text("#prompt") == "Say </textarea><script>alert(1)</script>."
    assert page.js("document.getElementById('previous').disabled")
    assert page.js("document.querySelectorAll('#pair option').length") == 6


def test_a_token_tells_what_each_branch_would_have_said(page):
    page.point(token(3))
    assert "document.title = 'taken'" in page.text("#detail .of")
    assert "disagreement 0.092 of at most 0.693 nats" in page.text("#detail .of")
    assert page.text("#detail section:nth-of-type(1)") == (
        "reference would saydocument.title = 'taken'50.0 %<b>r2</b>25.0 %␇12.5 %"
    )
    assert page.text("#detail section:nth-of-type(2)") == "aligned would saya275.0 %U+202E6.3 %�3.1 %"
    page.point(token(1), click=True)
    assert page.js(f"document.querySelector({json.dumps(token(1))}).getAttribute('aria-pressed')") == "true"
    page.point(token(3))
    assert "<b>r0</b>" in page.text("#detail"), "what was clicked is held"
    page.press("ArrowRight")
    page.press("Enter")
    assert "<b>r1</b>" in page.text("#detail"), "the keyboard does the same"
    page.press("Escape")
    page.point(token(5))
    assert "<b>r4</b>" in page.text("#detail")


def test_hostile_text_stays_text(page):
    assert page.js("document.title") == "A sweep"
    assert page.js("document.querySelectorAll('#viewer img, #viewer script, #viewer b:not(.of b)').length") == 0
    shown = page.text("#moving-text")
    assert "<img src=x onerror=alert(1)>" in shown
    assert "U+202EabcU+202C" in shown
    assert "␇" in shown
    assert "🎉↵\n</s>" in shown
    assert page.js("document.querySelectorAll('#moving-text .token').length") == len(TOKENS)


def test_colours_grow_with_the_disagreement(page):
    depths = page.js(
        "Array.from(document.querySelectorAll('#moving-text .token'), (t) => +t.style.getPropertyValue('--depth'))"
    )
    assert depths == pytest.approx([(place / 15) ** 0.5 for place in range(15)], abs=1e-3)
    last = page.js(f"getComputedStyle(document.querySelector({json.dumps(token(15))})).backgroundColor")
    assert last == "rgba(213, 94, 0, 0.6)", "0.62, the deepest, times 0.97"


@pytest.mark.parametrize("width", [1280, 390])
def test_labels_of_the_slider_stay_within_its_track(browser, report, width):
    browser.open(report, width=width)
    ends = "Array.from(document.querySelectorAll('#ticks span'), (tick) => tick.getBoundingClientRect())"
    track = "document.querySelector('.track').getBoundingClientRect()"
    assert browser.js(f"{ends}.length") == 4
    assert browser.js(f"Math.min(...{ends}.map((box) => box.left)) >= {track}.left")
    assert browser.js(f"Math.max(...{ends}.map((box) => box.right)) <= {track}.right")
    # each stands below its place on the slider
    assert browser.js("document.querySelector('#lambda').getBoundingClientRect().width") == pytest.approx(
        browser.js("document.querySelector('#ticks').getBoundingClientRect().width") + 16
    )


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_follows_the_colour_scheme(browser, report, dark):
    browser.open(report, width=390, height=844, dark=dark)
    assert browser.js("document.documentElement.scrollWidth") == 390
    paper = browser.js("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    ink = browser.js("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert ink == ("rgb(230, 237, 243)" if dark else "rgb(31, 35, 40)"), "pictures follow too"


def test_an_arm_that_knows_no_lambda(browser, tmp_path):
    """It is the best one, and stands there first; its tokens tell which λ they were decoded at."""
    write_report(tmp_path / "report.html", "arms", {}, **swept(arms=("logits", RULE)))
    browser.errors.clear()
    browser.open(tmp_path / "report.html", width=390)
    assert (browser.text("#moving-name"), browser.text("#strength")) == (RULE, "–")
    assert browser.text("#fixed-name option:checked") == "λ = 0 · DeRa (logits mixed)"
    assert browser.text("#ticks").startswith("–★")
    assert "λ of its tokens: mean 0.75" in browser.text("#moving-figures")
    browser.point(token(2))
    assert "decoded at λ = 0.250" in browser.text("#detail .of")
    browser.point("#fixed-text .token")
    assert "decoded at" not in browser.text("#detail .of")
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert browser.errors == []


def test_a_page_without_views(browser, tmp_path):
    bare = {**swept(views=False, arms=("logits", "retrained")), "recommendation": None, "curve": None}
    write_report(tmp_path / "report.html", "bare", {}, **bare)
    browser.errors.clear()
    browser.open(tmp_path / "report.html")
    assert browser.text("#strength") == "1"
    assert "U+202EabcU+202C" in browser.text("#moving-text")
    browser.js("document.getElementById('arm').selectedIndex = 1")
    browser.js("document.getElementById('arm').dispatchEvent(new Event('change'))")
    assert browser.text("#moving-name") == "λ = 1 · retrained"
    assert browser.text("#moving-text") == "λ=1 of 0, 0"
    assert browser.js("document.getElementById('lambda').disabled")
    assert browser.errors == []
