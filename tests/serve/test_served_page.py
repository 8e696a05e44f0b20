"""The server's own page in a headless Chromium, and what it asks: each token with what each branch would have said."""

import json
import time

import pytest
import torch
from browser import BINARY, Browser

PROMPT = "The old lighthouse"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BINARY is None:
        pytest.skip("there is no Chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def until(browser, expression: str):
    """Waits until an expression holds."""
    deadline = time.monotonic() + 30
    while not (value := browser.js(expression)):
        assert time.monotonic() < deadline, (expression, browser.errors)
        time.sleep(0.02)
    return value


@pytest.fixture
def page(browser, server):
    """The page, as a new visitor sees it."""
    browser.errors.clear()
    browser.requests.clear()
    browser.open(server.url)
    browser.js("localStorage.clear()")
    browser.open(server.url)
    until(browser, "!document.querySelector('#main').hidden")
    return browser


def put(browser, **values):
    for name, value in values.items():
        browser.js(
            f"(() => {{ const at = document.getElementById({json.dumps(name)}); at.value = {json.dumps(value)};"
            " at.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )


def answers(browser) -> list[str]:
    return browser.js("[...document.querySelectorAll('.text')].map((each) => each.textContent)")


def test_a_prompt_is_compared_at_two_lambda_and_its_tokens_are_read(page, server):
    page.point("[value=prompt]", click=True)
    put(page, prompt=PROMPT, max_tokens="12", temperature="0.8", seed="3", **{"dial-dpo": "1.5"})
    assert page.js("document.querySelector('#lam-dpo').value") == "1.5"
    page.point("#compare", click=True)
    page.point("#send", click=True)
    until(page, "!running && document.querySelectorAll('.token').length")
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0.8, "seed": 3, "return_token_ids": True}
    made = [server.complete(**body, **{"lambda": lam}) for lam in (1.5, 0)]
    assert answers(page) == [each["choices"][0]["text"] for each in made]  # the same random numbers
    assert page.js("[...document.querySelectorAll('h2')].map((each) => each.textContent)") == ["λ = 1.5", "λ = 0"]

    told = server.post(
        "/dera/tokens", {"prompt": PROMPT, "lambda": 1.5, "completion": made[0]["choices"][0]["token_ids"]}
    ).json()
    token = told["tokens"][3]
    page.point(".token:nth-child(4)")
    reading = page.text("#reading")
    for name in ("reference", "aligned"):
        text, chance = token[name][0]
        assert f"{json.dumps(text, ensure_ascii=False)} {100 * chance:.1f} %" in reading
    page.js("document.querySelector('.token').focus()")
    page.press("ArrowRight")
    assert page.js("document.activeElement === document.querySelectorAll('.token')[1]")

    # what it shows as curl and Python is what it asked for
    command = page.text("#curl")
    assert json.loads(command.partition("-d '")[2].rstrip("'"))["lambda"] == 1.5
    compile(page.text("#python"), "snippet", "exec")
    assert 'extra_body={"lambda":1.5}' in page.text("#python")

    # a seed keeps its digits, a rule is chosen, and an empty field is the server's default, which it shows
    put(page, seed="12345678901234567890", temperature="", combine="plausible")
    assert page.js("['amount', 'temperature'].map((id) => $(id).value || $(id).placeholder)") == ["0.1", "1"]
    asked = page.text("#curl").partition("-d '")[2].rstrip("'")
    assert json.loads(asked) == {
        "model": "dpo", "lambda": 1.5, "top_p": 1, "max_tokens": 12, "seed": 12345678901234567890,
        "combine": "plausible:0.1", "prompt": PROMPT,
    }  # fmt: skip
    assert 'extra_body={"lambda":1.5,"combine":"plausible:0.1"}' in page.text("#python")
    assert "seed=12345678901234567890," in page.text("#python")
    page.point("#clear", click=True)
    page.point("#send", click=True)
    until(page, "!running && turns.length === 1 && turns[0].answers.every((each) => each.tokens)")
    ruled = server.complete(**json.loads(asked))["choices"][0]["text"]
    assert answers(page)[0] == ruled != made[0]["choices"][0]["text"]
    assert page.text("h2") == "λ = 1.5, plausible:0.1"

    # it is all there again after a reload; and a retry makes the same
    before = answers(page)
    page.open(server.url)
    until(page, "document.querySelectorAll('.token').length")
    assert answers(page) == before
    page.point("#retry", click=True)
    until(page, "!running && document.querySelectorAll('.token').length")
    assert answers(page) == before
    assert page.errors == []
    assert all(url.startswith((server.url, "data:")) for url in page.requests)


def test_a_chat_goes_on_and_stops(page, server):
    put(page, prompt="Who is there?", max_tokens="6")
    page.press("Enter")  # in no field: nothing is sent
    page.js("document.querySelector('#prompt').focus()")
    page.call(
        "Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=2
    )
    until(page, "!running && document.querySelectorAll('.token').length")
    first = answers(page)[0]
    put(page, prompt="And now?", max_tokens="6")
    page.point("#send", click=True)
    until(page, "!running && turns.length === 2 && turns[1].answers[0].tokens")
    messages = [
        {"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": first},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    answer = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 6, "temperature": 0, "seed": 0})
    assert answers(page)[1] == answer.json()["choices"][0]["message"]["content"]

    page.point("#clear", click=True)
    put(page, prompt="x", max_tokens="9999")
    page.point("#send", click=True)
    until(page, "!running && document.querySelector('.error').textContent.includes('context of 256')")
    page.point("[value=prompt]", click=True)
    put(page, prompt=PROMPT, max_tokens="200")
    page.js("document.querySelector('#colour').checked = false")
    before = server.service.engine.statistics().finished.get("cancelled", 0)
    # an end token would end it too early to be stopped
    page.js("(() => { const asked = request; request = (...of) => { const [path, body] = asked(...of);"
            " return [path, {...body, ignore_eos: true}]; }; })()")  # fmt: skip
    page.point("#send", click=True)
    until(page, "turns.at(-1).answers[0].text.length > 3")
    page.press("Escape")
    until(page, "!running")
    assert page.js("turns.at(-1).answers[0].error") == "stopped"
    server.wait_until(server.is_idle)
    assert server.service.engine.statistics().finished["cancelled"] == before + 1
    # a browser's log names the answer that was refused, and nothing else
    assert [error for error in page.errors if "400" not in error] == []


def test_it_fits_a_phone_and_takes_several_adapters(browser, server_of_two):
    server = server_of_two
    for width, dark in ((390, False), (390, True), (1280, True)):
        browser.open(server.url, width, 844, dark)
        until(browser, "!document.querySelector('#main').hidden")
        assert browser.js("document.documentElement.scrollWidth") <= width
    browser.point("[value=prompt]", click=True)
    put(browser, prompt=PROMPT, max_tokens="8", **{"lam-helpful": "0.5", "lam-harmless": "0.25"})
    browser.point("#send", click=True)
    until(browser, "!running && document.querySelectorAll('.token').length")
    lam = {"helpful": 0.5, "harmless": 0.25}
    made = server.complete(prompt=PROMPT, max_tokens=8, temperature=0, **{"lambda": lam})
    assert answers(browser) == [made["choices"][0]["text"]]
    assert made["lambda"] == lam
    ids = server.service.tokenizer(PROMPT, return_tensors="pt")
    by_hand = server.service.model.generate(**ids, lam=lam, max_new_tokens=8, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    assert server.service.tokenizer.decode(by_hand, skip_special_tokens=True) == made["choices"][0]["text"]
    named = server.complete(model="helpful@0.5+harmless@0.25", prompt=PROMPT, max_tokens=8, temperature=0)
    assert named["choices"] == made["choices"]
    one = server.complete(model="harmless", prompt=PROMPT, max_tokens=8, temperature=0)
    assert one["lambda"] == {"helpful": 0.0, "harmless": 1.0}
    answer = server.post("/v1/completions", {"prompt": PROMPT, "lambda": 0.5})
    assert "several adapters" in answer.json()["error"]["message"]
    assert [model["id"] for model in server.http.get(f"{server.url}/v1/models").json()["data"]][:3] == [
        "helpful", "harmless", "helpful+harmless",
    ]  # fmt: skip


def test_the_page_asks_for_the_key(browser, another, tmp_path):
    (tmp_path / "key").write_text("s3cret")
    with another(api_key_file=tmp_path / "key") as server:
        browser.open(server.url)
        until(browser, "!document.querySelector('#key-form').hidden")
        put(browser, key="s3cret")
        browser.point("#key-form button", click=True)
        until(browser, "!document.querySelector('#main').hidden")


def test_the_page_loads_nothing_and_runs_no_other_script(server):
    answer = server.http.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert (
        "http" not in answer.text.replace("location.origin", "").replace("https://", "http://").partition("<script>")[0]
    )


@torch.no_grad()
def test_tokens_have_what_each_branch_would_have_said(server):
    prompt = server.service.tokenizer(PROMPT)["input_ids"]
    completion = server.service.tokenizer(" keeper counted", add_special_tokens=False)["input_ids"]
    told = server.post("/dera/tokens", {"prompt": PROMPT, "completion": completion, "lambda": 0.5, "top": 2}).json()
    output = server.service.model(torch.tensor([[*prompt, *completion]]), lam=0.5, output_branches=True)
    logs = {name: x[0, len(prompt) - 1 : -1].log_softmax(-1) for name, x in output.branch_logits.items()}
    mixed = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    mean = (logs["reference"].exp() + logs["aligned"].exp()).log() - torch.log(torch.tensor(2.0))
    js = sum((each.exp() * (each - mean)).sum(-1) for each in logs.values()) / 2
    assert js.max() > 0.01
    assert [token["js"] for token in told["tokens"]] == pytest.approx(js.tolist(), abs=1e-5)
    assert [token["id"] for token in told["tokens"]] == completion
    assert "".join(token["token"] for token in told["tokens"]) == " keeper counted"
    for place, token in enumerate(told["tokens"]):
        assert token["log_p"] == pytest.approx(float(mixed[place, completion[place]]), abs=1e-4)
        for name, each in logs.items():
            assert token["branch_log_p"][name] == pytest.approx(float(each[place, completion[place]]), abs=1e-4)
            assert [p for _, p in token[name]] == pytest.approx(each[place].exp().topk(2).values.tolist(), abs=1e-5)
    messages = [{"role": "user", "content": "Hi"}]
    assert server.post("/dera/tokens", {"messages": messages, "completion": "The end"}).json()["tokens"]
    for wrong in (
        {}, {"messages": messages}, {"completion": [10**9]}, {"completion": [5] * 255}, {"completion": [-1]},
        {"completion": []}, {"lambda": 9}, {"top": 0},
    ):  # fmt: skip
        answer = server.post(
            "/dera/tokens", {"prompt": "Hi", "completion": "x", **wrong} if wrong else {"prompt": "Hi"}
        )
        assert answer.status_code == 400, wrong
