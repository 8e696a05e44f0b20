"""What clients do wrong is answered in OpenAI's form, never by a 500; and what a server must not let happen."""

import itertools
import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from dera_peft.decoding.rows import read_rows
from dera_peft.errors import DeRaError
from dera_peft.serve import settings as serve_settings
from dera_peft.serve.engine import Statistics
from dera_peft.serve.metrics import Metrics
from dera_peft.serve.settings import ServeSettings
from dera_peft.serve.trace import TraceRow

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
HI = {"prompt": "Hi", "max_tokens": 4}


def refused(answer, status: int = 400) -> dict:
    """The error of an answer, in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"lambda": float("nan")}, "lambda", "finite"),
        ({"lambda": float("inf")}, "lambda", "finite"),
        ({"lambda": 1e39}, "lambda", "finite"),
        ({"lambda": 5.01}, "lambda", "-5 to 5"),
        ({"lambda": "0.5"}, "lambda", "number"),
        ({"lambda": True}, "lambda", "number"),
        ({"lambda": [0.5]}, "lambda", "number"),
        ({"lambda": {"other": 1}}, "lambda", "'other'"),
        ({"lambda": 1, "model": "dpo@0.5"}, "lambda", "dpo@0.5"),
        ({"model": "dpo@9"}, "model", "-5 to 5"),
        ({"model": "dpo@nan"}, "model", "finite"),
        ({"model": "dpo@"}, "model", "not a number"),
        ({"model": "dpo+dpo"}, "model", "twice"),
        ({"temperature": -1}, "temperature", "0 (greedy), or at least 1e-6"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"min_p": 1}, "min_p", "[0, 1)"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "more than 0"),
        ({"presence_penalty": 3}, "presence_penalty", "2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "-2"),
        ({"n": 0}, "n", "1"),
        ({"n": 100, "prompt": ["a", "b", "c"]}, "n", "256"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"max_tokens": -1}, "max_tokens", "0"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": 256}, "max_tokens", "context of 256"),
        ({"prompt": "fox " * 300}, "prompt", "context of 256"),
        ({"prompt": "fox " * 9000}, "prompt", "at least"),
        ({"prompt": [5, "fox"]}, "prompt", "prompt[1]: Input should be a valid integer"),
        ({"prompt": ["fox"] * 3000}, "prompt", "at most 2048"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"prompt": [1, -2]}, "prompt", "-2"),
        ({"prompt": [1, 100_000]}, "prompt", "100000"),
        ({"prompt": [1, 1 << 70]}, "prompt", ""),
        ({"prompt": 5}, "prompt", ""),
        ({"stop": ""}, "stop", "stop"),
        ({"stop": [1]}, "stop", "string"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "99999999"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias", "not the id"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"suffix": "end"}, "suffix", "not known"),
        ({"best_of": 3}, "best_of", "not known"),
        ({"max_token": 3}, "max_token", "not known"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"combine": "nonsense"}, "combine", "nonsense"),
        ({"combine": "kl"}, "combine", "kl"),
        ({"lambda_schedule": "0:9"}, "lambda_schedule", "-5 to 5"),
        ({"lambda_schedule": {"x": 1}}, "lambda_schedule", "0:2.0"),
        ({"lambda_schedule": {"0": 1, "1_0": 2}}, "lambda_schedule", "'1_0' is not a position"),
        ({"lambda_schedule": {"0": 1, " 5": 2}}, "lambda_schedule", "' 5' is not a position"),
        ({"lambda_schedule": {"0": "1"}}, "lambda_schedule", "'1' is not a number"),
        ({"lambda_schedule": "0:1,1_0:2"}, "lambda_schedule", "0:2.0"),
        ({"lambda_schedule": "0:1_0"}, "lambda_schedule", "0:2.0"),
        ({"lambda_schedule": "0:1," + "9" * 30 + ":2"}, "lambda_schedule", "is not a position"),
        ({"model": "dpo@1_0"}, "model", "'1_0' is not a number"),
        ({"model": "dpo@ 0.5"}, "model", "' 0.5' is not a number"),
        ({"lambda_schedule": {"0": 1}, "lambda": 1}, "lambda_schedule", "beside"),
        ({"lambda_schedule": {"0": 1}, "model": "dpo@1"}, "lambda_schedule", "beside"),
        ({"response_format": {"type": "xml"}}, "response_format", "regex"),
        ({"response_format": {"type": "regex", "regex": "(("}}, "response_format", "unclosed group"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}},
            "response_format", "nope",
        ),
        ({"echo": True, "stream": True, "logprobs": 1}, "echo", "echo"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(server, change, param, says):
    body = json.dumps({**HI, **change})  # writes NaN and Infinity, as careless clients do
    error = refused(server.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}))
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "texts alone",
        ),
        ({"top_logprobs": 2}, "logprobs=true"),
        ({"max_completion_tokens": 5}, "differ"),
        ({"tool_choice": "required"}, "as response_format"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "as response_format"),
        ({"tool_choice": "any"}, "'none' or 'auto'"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls: how many"),
        ({"principle": "Be kind."}, "principle: a prompt of the reference's own is not served; dera generate"),
        ({"reference_system": "Be kind."}, "reference_system"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"echo": True}, "echo"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "UTF-8"),
        ({"chat_template_kwargs": {"messages": 1}}, "template"),
        ({"chat_template_kwargs": {"tokenize": False}}, "tokenize"),
        ({"messages": [{"role": "user", "content": "fox " * 9000}]}, "messages: at least"),
    ],
)
def test_a_wrong_chat_is_refused(server, change, says):
    body = json.dumps({**CHAT, **change})
    answer = server.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert says in refused(answer)["message"]


def test_a_prompt_beyond_the_context_is_told_its_length(server):
    ids = [5] * 300
    error = refused(server.post("/v1/completions", {"prompt": ids}))
    assert error["code"] == "context_length_exceeded"
    assert "300 tokens" in error["message"]
    with pytest.raises(openai.BadRequestError, match="250 tokens, which with 7 new ones"):
        server.client.completions.create(model="dpo", prompt=[5] * 250, max_tokens=7)
    assert server.complete(prompt=[5] * 250)["usage"]["completion_tokens"] <= 6  # without a number: what fits


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[1]",
        '"text"',
        "null",
        '{"prompt": ' + "[" * 50_000,
        b"\xff\xfe",
        '{"prompt": "Hi", "n": ' + "9" * 5000 + "}",
    ],
)
def test_what_is_no_request_is_told_so(server, body):
    refused(server.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}))
    refused(server.post("/dera/tokens", content=body, headers={"Content-Type": "application/json"}))


def test_fields_that_say_nothing_of_the_text_are_taken(server):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "logit_bias": {}, "suffix": None, "best_of": 1}
    assert server.complete(**HI, **harmless, stop=None, seed=-1, response_format={"type": "text"}, top_k=-1)


def test_other_paths_models_and_methods(server):
    assert "/v1/nothing" in refused(server.post("/v1/nothing", {}), 404)["message"]
    assert refused(server.http.get(f"{server.url}/v1/completions"), 405)["message"]
    error = refused(server.post("/v1/completions", {**HI, "model": "gpt-4"}), 404)
    assert error["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(model="gpt-4@1", messages=CHAT["messages"])


def test_a_body_is_bounded(server):
    assert refused(server.post("/v1/completions", {"prompt": "x" * 100_001}), 413)
    chunks = (b" " * 1000 for _ in range(200))  # no Content-Length
    assert refused(server.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"}), 413)


def test_pages_of_other_origins_are_refused(server, another):
    own = server.url
    assert server.post("/v1/completions", HI, headers={"Origin": own}).status_code == 200
    for origin in ("https://example.org", "null", own.replace("127.0.0.1", "localhost")):
        assert refused(server.post("/v1/completions", HI, headers={"Origin": origin}), 403)
    # a page under a name of its own that leads here
    assert refused(server.post("/v1/completions", HI, headers={"Host": "evil.example:80"}), 403)
    with another(allow_origin=("https://example.org",)) as open_to_one:
        allowed = {"Origin": "https://example.org"}
        answer = open_to_one.post("/v1/completions", HI, headers=allowed)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        asked = {**allowed, "Access-Control-Request-Method": "POST"}
        assert open_to_one.http.options(f"{open_to_one.url}/v1/completions", headers=asked).status_code == 200
        assert refused(open_to_one.post("/v1/completions", HI, headers={"Origin": "https://example.com"}), 403)


def test_a_key_is_asked_for(another, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("s3cret\n\nother\n")
    with another(api_key_file=keys) as server:
        for headers in (
            {},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "Bearer"},
        ):
            assert refused(server.post("/v1/completions", HI, headers=headers), 401)["code"] == "invalid_api_key"
            assert refused(server.http.get(f"{server.url}/metrics", headers=headers), 401)
        assert server.post("/v1/completions", HI, headers={"Authorization": "Bearer other"}).status_code == 200
        assert server.client.models.list().data
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
        for path in ("/", "/health"):
            assert server.http.get(server.url + path).status_code == 200


# -- load, and clients that go away ------------------------------------------------------------------------------------

LONG = {"prompt": "The old", "max_tokens": 240, "ignore_eos": True}


def test_a_full_queue_says_when_to_come_again(another):
    with another(max_rows=2, max_queue=2) as server, ThreadPoolExecutor(10) as pool:
        answers = list(
            pool.map(lambda seed: server.post("/v1/completions", {**LONG, "max_tokens": 20, "seed": seed}), range(10))
        )
        refusals = [answer for answer in answers if answer.status_code == 429]
        assert 0 < len(refusals) <= 6  # two are computed while two wait
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in refusals:
            assert refused(answer, 429)["code"] == "queue_full"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        # all of a request's completions, or none: neither of two takes places that both need
        server.wait_until(server.is_idle)
        pairs = pool.map(lambda seed: server.post("/v1/completions", {**LONG, "n": 2, "max_tokens": 20}), range(2))
        assert [answer.status_code for answer in pairs] == [200, 200]
        assert "n=3" in refused(server.post("/v1/completions", {**LONG, "n": 3}))["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(server, stream):
    server.wait_until(server.is_idle)
    body = json.dumps({**LONG, "n": 4, "stream": stream, "lambda": 0.5}).encode()
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {':'.join(address)}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.wait_until(lambda: server.service.engine.statistics().rows == 8)
        before = server.service.engine.statistics()
    server.wait_until(server.is_idle)
    after = server.service.engine.statistics()
    assert after.finished["cancelled"] == before.finished.get("cancelled", 0) + 4
    assert after.steps - before.steps < 200  # of 240


def test_a_third_is_cancelled_midway_and_the_others_are_right(server):
    def ask(number):
        body = {
            "prompt": f"The old {number % 5}",
            "max_tokens": 16,
            "temperature": 0,
            "lambda": [0, 0.5, 1][number % 3 - 1],
        }
        if number % 3:
            return number, server.complete(**body)["choices"][0]["text"]
        stream = server.client.completions.create(
            model="dpo", stream=True, prompt=body["prompt"], max_tokens=200, extra_body={"ignore_eos": True}
        )
        list(itertools.islice(stream, 3))
        stream.close()
        return number, None

    with ThreadPoolExecutor(24) as pool:
        texts = dict(pool.map(ask, range(96)))
    server.wait_until(server.is_idle)
    for number in range(96):
        if number % 3:  # what was alike got alike, whatever ran beside it
            assert texts[number] == texts[number % 15]
    assert len({text for text in texts.values() if text}) > 5


def test_a_row_that_fails_fails_alone(server, monkeypatch):
    from dera_peft.serve.grammars import GrammarMask

    def broken(self):
        raise ValueError("the grammar is broken")

    monkeypatch.setattr(GrammarMask, "allowed", broken)
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(server.post, "/v1/completions", {**HI, "response_format": {"type": "regex", "regex": "a"}})
        assert server.complete(**HI)["choices"][0]["finish_reason"]
        error = refused(bad.result())
    assert error["code"] == "generation_failed"
    assert "broken" in error["message"]
    stream = {"stream": True, "response_format": {"type": "json_object"}}
    with pytest.raises(openai.APIError, match="broken"):
        list(server.client.completions.create(model="dpo", prompt="Hi", **{"stream": True}, extra_body=stream))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [5] * 5000, "echo": True, "max_tokens": 0, "logprobs": 1}, "prompt"),
        ({"prompt": [5, 999999], "echo": True, "max_tokens": 8, "logprobs": 1}, "prompt"),
        ({"prompt": [5, 10**30], "echo": True, "max_tokens": 0}, "prompt"),
        ({"prompt": "Hi", "echo": True, "logprobs": 0, "combine": "kl:0"}, "echo"),
        ({"prompt": "Hi", "lambda": {}}, "lambda"),
        ({"prompt": "Hi", "model": "dpo@0_5"}, "model"),
        ({"prompt": "Hi", "logit_bias": {"1" * 5000: 1}}, None),
        ({"prompt": "Hi", "temperature": 1e-38}, "temperature"),
    ],
    ids=lambda value: None,
)
def test_what_a_check_had_let_through(server, body, param):
    error = refused(server.post("/v1/completions", body))
    assert param is None or error["param"] == param


def test_hosts_and_origins_that_are_none(server):
    for name in ("Host", "Origin"):
        refused(server.post("/v1/completions", HI, headers={name: "http://[::1" if name == "Origin" else "[::1"}), 403)


def test_logprobs_of_a_rule_are_finite(server):
    found = server.complete(prompt="Hi", max_tokens=3, logprobs=5, combine="aad:0.99")["choices"][0]["logprobs"]
    assert all(1 <= len(top) <= 5 for top in found["top_logprobs"])
    assert any(len(top) < 5 for top in found["top_logprobs"])


def test_a_defect_is_told_of_without_details(server, monkeypatch):
    monkeypatch.setattr(type(server.service.preparer), "completions", lambda *given: 1 / 0)
    with httpx2.Client() as client:  # the server ends the connection that it failed on
        error = refused(client.post(f"{server.url}/v1/completions", json=HI), 500)
    assert error["type"] == "server_error"
    assert "division" not in error["message"]


# -- what is written down ----------------------------------------------------------------------------------------------


def test_each_completion_is_traced(server, settings):
    body = {"prompt": "A fox", "max_tokens": 3, "n": 2, "model": "dpo@0.25", "top_p": 0.5}
    made = server.complete(**body)

    def rows():
        return [row for row in read_rows(settings.trace, TraceRow)[0] if row.id == made["id"]]

    server.wait_until(lambda: len(rows()) == 2)
    assert sorted(row.sample for row in rows()) == [0, 1]
    for row in rows():
        assert (row.prompt, row.lam, row.model, row.path) == ("A fox", 0.25, "dpo@0.25", "/v1/completions")
        assert row.completion == made["choices"][row.sample]["text"]
        assert row.settings == {"max_tokens": 3, "n": 2, "top_p": 0.5}
        assert row.seconds >= (row.first_token_seconds or 0) >= 0
    # the seed that was drawn makes the same text again
    again = server.complete(**body, seed=rows()[0].seed)
    assert [choice["text"] for choice in again["choices"]] == [choice["text"] for choice in made["choices"]]


def test_each_request_is_a_line_of_json(server, caplog):
    with caplog.at_level(logging.INFO, "dera_peft.serve.trace"):
        made = server.complete(**HI, **{"lambda": 0.5})
        server.post("/v1/completions", {**HI, "lambda": 99})
        server.wait_until(lambda: len(caplog.messages) == 2)
    good, bad = map(json.loads, caplog.messages)
    assert (good["status"], good["path"], good["lambda"], good["id"]) == (200, "/v1/completions", 0.5, made["id"])
    assert good["completion_tokens"] == made["usage"]["completion_tokens"]
    assert good["seconds"] > 0
    assert bad["status"] == 400


def metrics(server) -> dict[str, float]:
    lines = server.http.get(f"{server.url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics_count(server):
    server.wait_until(server.is_idle)
    time.sleep(0.05)
    before = metrics(server)
    made = server.complete(prompt="Hi", max_tokens=7, n=2, seed=1, **{"lambda": -1})
    server.wait_until(lambda: metrics(server)["dera_request_seconds_count"] == before["dera_request_seconds_count"] + 2)
    after = metrics(server)
    tokens = made["usage"]["completion_tokens"]
    assert after["dera_generated_tokens_total"] - before["dera_generated_tokens_total"] == tokens
    assert after["dera_time_to_first_token_seconds_count"] - before["dera_time_to_first_token_seconds_count"] == 2
    lam = 'dera_lambda_bucket{adapter="dpo",le="-1.0"}'
    assert after[lam] - before.get(lam, 0) == 2
    answers = 'dera_requests_total{path="/v1/completions",status="200"}'
    assert after[answers] - before[answers] == 1
    assert {"dera_rows", "dera_queue", "dera_tokens_per_second"} <= after.keys()
    assert server.http.get(f"{server.url}/health").json() == {"status": "ok"}


def test_the_speed_is_of_the_time_between_scrapes(monkeypatch):
    from dera_peft.serve import metrics as module

    clock, drawn = [100.0], [0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    made = Metrics(lambda: Statistics(generated_tokens=drawn[0]))

    def speed(at, tokens):
        clock[0], drawn[0] = at, tokens
        return made.registry.get_sample_value("dera_tokens_per_second")

    assert [speed(100, 0), speed(104, 40), speed(130, 300), speed(132, 304)] == pytest.approx(
        [0, 10, 10, 264 / 28]
    )  # since 104, ten seconds and more ago


# -- settings ----------------------------------------------------------------------------------------------------------


def test_a_host_that_others_reach_needs_a_key(tmp_path):
    key = tmp_path / "key"
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        with pytest.raises(DeRaError, match="--api-key-file"):
            ServeSettings(host=host)
        assert ServeSettings(host=host, api_key_file=key).host == host
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert ServeSettings(host=host).host == host
    with pytest.raises(DeRaError, match="can't be read"):
        ServeSettings(api_key_file=key).api_keys()
    key.write_text("\n \n")
    with pytest.raises(DeRaError, match="no key"):
        ServeSettings(api_key_file=key).api_keys()


def test_adapters_are_named_or_have_their_folders_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dpo-2", "b", "a=b"):
        (tmp_path / name).mkdir()
    one = ServeSettings(adapter=("dpo-2",)).source
    assert (one.adapter, one.adapters) == ("dpo-2", None)
    assert ServeSettings(adapter=("a=b",)).source.adapter == "a=b"  # a folder of that name
    assert ServeSettings(adapter=("x=b",)).source.adapters == {"x": "b"}
    assert ServeSettings(adapter=("dpo-2", "x=b")).source.adapters == {"dpo_2": "dpo-2", "x": "b"}
    with pytest.raises(DeRaError, match="twice"):
        _ = ServeSettings(adapter=("x=b", "x=dpo-2")).source
    with pytest.raises(DeRaError, match="no such folder"):
        ServeSettings(adapter=("./nowhere",)).check_paths()
    for wrong in ({"lambda_range": (1.0,)}, {"lambda_range": (2.0, 1.0)}, {"model_lambdas": (9.0,)}, {"port": 1 << 16}):
        with pytest.raises(DeRaError, match=next(iter(wrong))):
            ServeSettings(**wrong)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(serve_settings, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(DeRaError, match=r"needs uvicorn, which is not installed: pip install 'dera-peft\[serve\]'"):
        ServeSettings().check()
