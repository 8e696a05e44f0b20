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
    write_report(file, "A sweep", {"adapter": "x"}, *swept())
    return file


@pytest.fixture
def page(browser, report):
    browser.errors.clear()
    browser.requests.clear()
    show(browser, report)
    yield browser
    assert browser.errors == []
    assert browser.requests == [report.as_uri()], "nothing but the page itself"


def show(browser, file, place: str = "", **screen) -> None:
    browser.open(file.as_uri() + place, **screen)
    browser.wait("document.documentElement.dataset.ready === ''")


def token(number: int) -> str:
    return f"#moving-text .token:nth-of-type({number})"


def test_the_slider_moves_through_lambda(page):
    page.js("document.getElementById('pair').selectedIndex = 2")
    page.js("document.getElementById('pair').dispatchEvent(new Event('change'))")
    page.wait("document.querySelector('#prompt').textContent === 'plain'")
    assert page.text("#strength") == "1", "it starts at the recommended λ"
    assert page.text("#moving-text") == " one λ=1</s>"
    assert page.text("#fixed-text") == " one λ=0</s>", "beside it stands the reference"
    page.js("document.getElementById('lambda').focus()")
    page.press("ArrowLeft")
    assert (page.text("#strength"), page.text("#moving-text")) == ("0.5", " one λ=0.5</s>")
    assert "$fun$ 1.000 · length 3.000 · KL 0.25 nats" in page.text("#moving-figures")
    page.press("Home")
    assert (page.text("#strength"), page.text("#moving-text")) == ("−0.5", " one λ=-0.5</s>")
    assert page.js("document.getElementById('lambda').getAttribute('aria-valuetext')") == "λ = −0.5, $fun$ 0.000"
    page.point("#lambda", click=True)  # the middle of the track
    assert page.text("#strength") in ("0", "0.5")
    assert page.text("#fixed-text") == " one λ=0</s>"


def test_a_prompt_is_chosen(page):
    page.point("#next", click=True)
    page.wait("!document.getElementById('previous').disabled")
    assert page.text("#prompt") == "systemBe <b>brief</b>.userمرحبا"
    page.point("#previous", click=True)
    page.wait("document.getElementById('previous').disabled")
    assert page.text("#prompt") == "Say </textarea><script>alert(1)</script>."
    assert page.js("document.querySelectorAll('#pair option').length") == 6


def test_a_token_tells_what_each_branch_would_have_said(page):
    page.point(token(3))
    assert "document.title = 'taken'" in page.text("#detail .of")
    assert "disagreement 0.092 of at most 0.693 nats" in page.text("#detail .of")
    assert page.text("#detail section:nth-of-type(1)") == (
        "reference would saydocument.title = 'taken'50.0 %<b>r2</b>25.0 %␇12.5 %"
    )
    assert page.text("#detail section:nth-of-type(2)") == "aligned would saya275.0 %U+202E6.2 %�3.1 %"
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
    assert depths == pytest.approx([(place / 15) ** 0.5 for place in range(15)], abs=2e-3)
    last = page.js(f"getComputedStyle(document.querySelector({json.dumps(token(15))})).backgroundColor")
    assert last == "rgba(213, 94, 0, 0.6)", "0.62, the deepest, times 0.97"


@pytest.mark.parametrize("width", [1280, 390])
def test_labels_of_the_slider_stay_within_its_track(browser, report, width):
    show(browser, report, width=width)
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
    show(browser, report, width=390, height=844, dark=dark)
    assert browser.js("document.documentElement.scrollWidth") == 390
    paper = browser.js("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    ink = browser.js("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert ink == ("rgb(230, 237, 243)" if dark else "rgb(31, 35, 40)"), "pictures follow too"


def test_an_arm_that_knows_no_lambda(browser, tmp_path):
    """It is the best one, and stands there first; its tokens tell which λ they were decoded at."""
    write_report(tmp_path / "report.html", "arms", {}, *swept(arms=("logits", RULE)))
    browser.errors.clear()
    show(browser, tmp_path / "report.html", width=390)
    assert (browser.text("#moving-name"), browser.text("#strength")) == (RULE, "–")
    assert browser.text("#fixed-name option:checked") == "λ = 0 · runs/dpo (DeRa)"
    assert browser.text("#ticks").startswith("–★")
    assert "λ of its tokens: mean 0.75" in browser.text("#moving-figures")
    browser.point(token(2), click=True)
    assert "decoded at λ = 0.250" in browser.text("#moving-text #detail .of"), (
        "in the text, where there is no column beside"
    )
    browser.point("#fixed-text .token", click=True)
    assert "decoded at" not in browser.text("#fixed-text #detail .of")
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert browser.errors == []


def test_a_page_without_views(browser, tmp_path):
    bare = swept(views=False, arms=("logits", "retrained"), recommendation=None, curve=None, best=None)
    write_report(tmp_path / "report.html", "bare", {}, *bare)
    browser.errors.clear()
    show(browser, tmp_path / "report.html")
    assert browser.text("#strength") == "1"
    assert "U+202EabcU+202C" in browser.text("#moving-text")
    browser.js("document.getElementById('arm').selectedIndex = 1")
    browser.js("document.getElementById('arm').dispatchEvent(new Event('change'))")
    assert browser.text("#moving-name") == "λ = 1 · retrained"
    assert browser.text("#moving-text") == "λ=1 of 0, 0"
    assert browser.js("document.getElementById('lambda').disabled")
    assert browser.errors == []


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("#prompt=2&sample=1&lambda=0.5", ("plain", "0.5", " one λ=0.5</s>")),
        ("#prompt=2&sample=1&lambda=-0.5&arm=logits", ("plain", "−0.5", " one λ=-0.5</s>")),
        ("#prompt=1", ("systemBe <b>brief</b>.userمرحبا", "−0.5", " one λ=-0.5</s>")),
    ],
)
def test_a_link_opens_a_row(browser, report, place, shown):
    browser.open("about:blank")
    show(browser, report, place)
    assert (browser.text("#prompt"), browser.text("#strength"), browser.text("#moving-text")) == shown
    assert abs(browser.js("document.querySelector('#viewer').getBoundingClientRect().top")) < 5
    assert browser.js("document.getElementById('missing').hidden")


def test_each_row_has_its_link(page):
    """The address of the row that is shown; followed from elsewhere on the page, it shows that row again."""
    page.js("document.getElementById('lambda').focus()")
    page.press("ArrowLeft")
    link = page.js("document.getElementById('moving-link').hash")
    assert link == "#prompt=0&sample=0&lambda=0.5"
    assert page.js("document.getElementById('fixed-link').hash") == "#prompt=0&sample=0&lambda=0"
    page.point("#next", click=True)
    page.wait("document.getElementById('moving-link').hash.startsWith('#prompt=1')")
    page.js(f"location.hash = {json.dumps(link)}")
    page.wait("document.getElementById('moving-link').hash.startsWith('#prompt=0')")
    assert page.text("#strength") == "0.5"
    page.js("location.hash = '#prompt=2&sample=1&arm=logits&lambda=1'")
    page.wait("document.getElementById('moving-link').hash === '#prompt=2&sample=1&lambda=1'")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (
            "#prompt=7&sample=3&lambda=1",
            "no row of prompt 7, sample 3, λ = 1. If it was decoded, it is in samples.jsonl",
        ),
        ("#prompt=0&lambda=3", "no row of prompt 0, sample 0, λ = 3: it was not decoded"),
        ("#prompt=0&lambda=1&arm=<b>", "λ = 1, arm <b>: it was not decoded"),
    ],
)
def test_a_link_to_what_is_not_there_says_so(page, place, said):
    page.js(f"location.hash = {json.dumps(place)}")
    page.wait("!document.getElementById('missing').hidden")
    assert said in page.text("#missing")
    assert page.text("#strength") == "1", "what was shown stays"


def test_tabs_show_one_table_at_a_time(page):
    panels = "Array.from(document.querySelectorAll('#numbers .tabs > section'))"
    shown = f"{panels}.filter((panel) => !panel.hidden).map((panel) => panel.querySelector('h3').textContent)"
    tabs = "Array.from(document.querySelectorAll('#numbers [role=tab]'), (tab) => tab.textContent)"
    assert page.js(tabs) == [
        "Every λ", "Against the reference (λ=0)", "Against the adapter as trained (λ=1)", "By group", "Without a value",
    ]  # fmt: skip
    assert page.js(shown) == ["Every λ"]
    page.point("#numbers [role=tab]:nth-child(4)", click=True)
    assert page.js(shown) == ["By group"]
    page.press("ArrowRight")
    assert page.js(shown) == ["Without a value"]
    page.press("ArrowRight")
    assert page.js(shown) == ["Every λ"], "and round again"
    assert page.js("document.activeElement.getAttribute('aria-selected')") == "true"
    page.press("End")
    page.point("#numbers section:not([hidden]) td a", click=True)
    page.wait("document.getElementById('moving-link').hash === '#prompt=2&sample=1&lambda=1'")
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.js(f"{panels}.map((panel) => getComputedStyle(panel).display)") == ["block"] * 5, (
        "paper has all of them"
    )
    page.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize("width", [1280, 390])
def test_tables_and_plots_are_whole(browser, report, width):
    """Nothing has to be scrolled sideways; on a phone rows are cards, whose cells are called by the heads."""
    show(browser, report, width=width)
    browser.js("document.querySelectorAll('.tabs > section').forEach((panel) => { panel.hidden = false; })")
    inside = (
        "Array.from(document.querySelectorAll('.scroll, tbody td, tbody th, figure svg'))"
        ".filter((e) => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth).length"
    )
    assert browser.js(inside) == 0
    assert browser.js("document.documentElement.scrollWidth") == width
    cards = browser.js("getComputedStyle(document.querySelector('tbody tr')).display") == "block"
    assert cards == (width == 390)
    heads = "Array.from(document.querySelectorAll('tbody tr')[0].cells, (cell) => cell.dataset.head)"
    assert browser.js(heads)[:3] == ["λ", "$fun$", "length"]
    assert browser.js("document.querySelector('tbody td').getAttribute('role')") == "cell"
    # letters of a plot are as large as those of the page
    sizes = "Array.from(document.querySelectorAll('figure svg text'), (text) => text.getBoundingClientRect().height)"
    assert min(size for size in browser.js(sizes) if size) >= 9


def test_nothing_lies_over_the_texts(browser, report):
    for width in (1280, 390):
        show(browser, report, width=width, height=500)
        browser.point(token(3), click=True)
        overlaps = (
            "(() => { const box = document.getElementById('detail').getBoundingClientRect();"
            " return Array.from(document.querySelectorAll('.token'), (t) => t.getBoundingClientRect())"
            ".filter((t) => t.right > box.left && t.left < box.right)"
            ".filter((t) => t.bottom > box.top + 4 && t.top < box.bottom - 4)"
            ".length; })()"
        )
        assert browser.js("document.querySelector('#detail .of') !== null")
        assert browser.js(overlaps) == 0
