"""Completions of a server: the rows of a model in this process, and servers that are not what they should be."""

import json
from pathlib import Path

import pytest
from served import Gone, running, standin
from tiny_models import make_adapter

from dera_peft import DeRaModel
from dera_peft.cli.generate import GenerateSettings, generate
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.noise import row_key, seed_of
from dera_peft.errors import DeRaError
from dera_peft.evaluate import SweepConfig, sweep
from dera_peft.evaluate.check import check
from dera_peft.remote import checks, endpoint
from dera_peft.remote.forms import read_completion
from dera_peft.serve.server import make_service
from dera_peft.serve.settings import ServeSettings

TEXTS = ["Rain fell on the market", "A fox crossed", "My sister"]
LAMBDAS = (0.0, 1 / 3, 1.5)


@pytest.fixture
def model(tiny_base, tiny_adapter) -> dict:
    return {"base": str(tiny_base), "adapter": str(tiny_adapter)}


@pytest.fixture(autouse=True)
def quick(remote_server, model, monkeypatch):
    """The model in this process is that of the server, which is idle then; servers are probed with one prompt."""
    load, same = DeRaModel.from_source, remote_server.service.model

    def loaded(source, **how):
        return same if source.adapter == model["adapter"] else load(source, **how)

    monkeypatch.setattr(DeRaModel, "from_source", loaded)
    monkeypatch.setattr(checks, "PROMPTS", 1)


@pytest.fixture(scope="module")
def greedy():
    """The rows of the model in this process, filled by whoever needs them first."""
    return []


@pytest.fixture
def here(greedy, rows):
    if not greedy:
        greedy.extend(rows())
    return greedy


@pytest.fixture
def rows(tmp_path, model):
    """Runs `dera generate`; returns its rows, in the order of prompts, λ and samples."""
    made = []

    def rows(**settings) -> list[dict]:
        made.append(settings.pop("output", None) or tmp_path / f"{len(made)}.jsonl")
        settings = {"prompt": TEXTS, "lambdas": LAMBDAS, "max_new_tokens": 4, "temperature": 0.0, **model, **settings}
        generate(GenerateSettings(**settings, output=made[-1], json=True))
        return read(made[-1])

    return rows


def read(file: Path) -> list[dict]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(found, key=lambda row: (row["prompt_index"], str(row["lambda"]), row["sample"]))


def different(rows: list[dict]) -> int:
    return len({tuple(row["token_ids"]) for row in rows})


def test_a_seed_that_draws_as_any_prompt_and_sample():
    for seed, prompt, sample in [(0, 0, 0), (7, 3, 1), (2**64 - 1, 10**6, 63)]:
        key = row_key(seed, prompt, sample)
        assert row_key(seed_of(key), 0, 0) == key


# -- the same rows as here ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "samples": 9, "max_new_tokens": 24, "lambdas": (1 / 3,), "prompt": TEXTS[:1], "seed": 5},
        {
            "temperature": 0.9,
            "top_k": 40,
            "top_p": 0.95,
            "min_p": 0.01,
            "repetition_penalty": 1.2,
            "concurrency": 2,
        },
        {"lambdas": (), "lambda_schedule": {0: 2.0, 5: 0.1}, "combine": "plausible:0.2", "max_new_tokens": 8},
    ],
    ids=["sampled", "warped", "rule"],
)
def test_rows_are_those_of_the_model_in_this_process(rows, remote_server, settings):
    there = rows(endpoint=f"{remote_server.url}/v1/", **settings)
    here = rows(**{name: value for name, value in settings.items() if name != "concurrency"})
    assert there == here
    assert different(here) > (2 if "combine" in settings else len(TEXTS)), "λ and samples change nothing"
    if settings.get("samples"):
        assert {row["finish_reason"] for row in here} == {"eos", "length"}
    if "combine" in settings:
        assert {tuple(row["token_lambda"]) for row in there} == {(2.0,) * 5 + (0.1,) * 3}


def test_several_adapters_and_a_base_alone(rows, tiny_base, tiny_adapter, top_adapter):
    adapters = {"kind": str(tiny_adapter), "brief": str(top_adapter)}
    lambdas = ({"kind": 0.5, "brief": 1.25}, {"kind": 0.0, "brief": 0.0}, {"kind": 1 / 3, "brief": -0.5})
    several = {"adapter": None, "adapters": adapters, "lambdas": lambdas, "prompt": TEXTS[:1], "max_new_tokens": 5}
    settings = ServeSettings(base=str(tiny_base), adapter=tuple(f"{name}={path}" for name, path in adapters.items()))
    with running(make_service(settings), settings) as server:
        there = rows(endpoint=server.url, **several)
        with pytest.raises(DeRaError, match=r"serves another model than .*: it has the branches"):
            rows(endpoint=server.url)
    assert there == rows(**several)
    assert different(there) > 1
    alone = {"adapter": None, "lambdas": (), "prompt": TEXTS[:1], "temperature": 1.0, "max_new_tokens": 3}
    settings = ServeSettings(base=str(tiny_base))
    with running(make_service(settings), settings) as server:
        assert rows(endpoint=server.url, **alone) == rows(**alone)


COMMON = {
    "prompts": TEXTS, "lambdas": (0, 1), "samples": 1, "max_new_tokens": 4, "rewards": ["length"], "curve": False,
}  # fmt: skip


@pytest.mark.usefixtures("without_pictures")
def test_a_sweep_is_that_of_the_model_in_this_process(remote_server, model, tmp_path):
    arms = [{"combine": "plausible:0.3", "lambdas": [2]}]
    results = {
        name: sweep(**COMMON, **model, arms=arms, output_dir=str(tmp_path / name), **way)
        for name, way in {"here": {}, "there": {"endpoint": remote_server.url}}.items()
    }
    assert results["there"].rows == results["here"].rows
    assert different(results["here"].rows) > len(TEXTS)
    assert {row["arm"] for row in results["here"].rows} == {"logits", "plausible:0.3"}
    for file in ("samples.jsonl", "summary.csv"):
        assert (tmp_path / "there" / file).read_text() == (tmp_path / "here" / file).read_text()
    # with all completions there nothing is asked
    assert sweep(**COMMON, **model, arms=arms, output_dir=str(tmp_path / "here"), endpoint=NOWHERE).reused == 9


def test_the_quick_look_keeps_to_what_a_server_takes(remote_server, model):
    found = check(SweepConfig(prompts=TEXTS[:1], lambdas=(0, 1), max_new_tokens=3, endpoint=remote_server.url, **model))
    assert [each.lam for each in found.lambdas] == [0, 0.5, 1, 1.5, 2, 3, 4]
    assert found.responds


# -- vLLM's server, which a server of this package stands in for -------------------------------------------------------

VLLM_FIELDS = {
    "prompt", "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop_token_ids",
    "ignore_eos", "return_token_ids", "vllm_xargs",
}  # fmt: skip


def as_vllm(server, follows_lambda=True, tells=None, seen=None):
    """What answers as vLLM's server does: λ in `vllm_xargs`, other fields unheeded, and `tells` to /dera/model."""

    def answer(method, path, body, headers):
        if path == "/dera/model":
            return (404, {"detail": "Not Found"}) if tells is None else (200, tells)
        if seen is not None and "logprobs" not in body:
            seen.append(dict(body))
        lam = body.pop("vllm_xargs")["lambda"] if follows_lambda else body.pop("vllm_xargs") and 0.7
        answered = server.post(path, {**body, "lambda": lam})
        return answered.status_code, answered.json()

    return answer


def test_a_server_of_vllm(rows, remote_server, here):
    seen = []
    with standin(as_vllm(remote_server, seen=seen)) as url:
        there = rows(endpoint=url, engine="vllm")
        rows(endpoint=url, engine="vllm", temperature=0.7, samples=2, prompt=TEXTS[:1], max_new_tokens=1)
    assert there == here
    assert different(here) > len(TEXTS)
    assert {*map(frozenset, seen)} == {frozenset(VLLM_FIELDS)}
    assert {body["vllm_xargs"]["lambda"] for body in seen} == set(LAMBDAS)
    assert all(0 <= body["seed"] < 1 << 63 for body in seen)
    assert len({body["seed"] for body in seen[len(there) :]}) == 2, "of a sample, the same at each λ"


def test_a_server_that_leaves_lambda_aside_is_refused(rows, remote_server, tmp_path, monkeypatch):
    said = "its answers do not depend on λ: at λ=0 and λ=1 the next tokens of 2 prompts"
    monkeypatch.setattr(checks, "PROMPTS", 2)
    with standin(as_vllm(remote_server, follows_lambda=False)) as url, pytest.raises(DeRaError, match=said):
        rows(endpoint=url, engine="vllm", output=tmp_path / "flat.jsonl")
    assert not (tmp_path / "flat.jsonl").exists() or not read(tmp_path / "flat.jsonl")


@pytest.mark.parametrize(("by", "is_refused"), [(1e-6, True), (1e-3, False)], ids=["rounding", "an effect"])
def test_rounding_is_no_answer_to_lambda(rows, remote_server, by, is_refused):
    """A server without λ that computes a request at λ=1 in another batch, and one whose adapter does little."""

    def answer(method, path, body, headers):
        if method == "GET":
            answered = remote_server.http.get(remote_server.url + path)
            return answered.status_code, answered.json()
        answered = remote_server.post(path, {**body, "lambda": 0.5}).json()
        if "logprobs" in body:
            for first in answered["choices"][0]["logprobs"]["top_logprobs"]:
                first.update({text: value + by * body["lambda"] for text, value in first.items()})
        return 200, answered

    with standin(answer) as url:
        if is_refused:
            with pytest.raises(DeRaError, match="do not depend on λ"):
                rows(endpoint=url)
        else:
            assert rows(endpoint=url, prompt=TEXTS[:1], lambdas=(0.5,))


def test_a_server_of_another_model_is_refused(rows, remote_server, model, tmp_path):
    other = {**model, "adapter": str(make_adapter(model["base"], tmp_path / "other", seed=9))}
    with pytest.raises(DeRaError, match=r"another model than .*other.*: an adapter of its branch 'aligned' has"):
        rows(endpoint=remote_server.url, **other)
    said = "with another model than the one that scores: at λ=1 its log-prob"
    # which does not say what it serves: its numbers do
    with standin(as_vllm(remote_server)) as url, pytest.raises(DeRaError, match=said):
        sweep(**COMMON, **other, endpoint=url, engine="vllm", output_dir=str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("parts/completions*"))


def test_what_a_server_says_of_its_model_is_compared(rows, remote_server):
    about = remote_server.http.get(f"{remote_server.url}/dera/model").json()
    with standin(lambda *_: (404, {})) as url, pytest.raises(DeRaError, match="is no dera serve of this version"):
        rows(endpoint=url)
    with standin(lambda *_: (200, {"status": "ok"})) as url, pytest.raises(DeRaError, match="address of a server"):
        rows(endpoint=url)
    for changes, settings, said in [
        ({"engine": "vllm"}, {}, "give --engine vllm"),
        ({"quantization": "nf4"}, {}, "give --quantization nf4 here, too"),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, "computes in bfloat16"),
        ({"weights": {**about["weights"], "base": "0" * 12}}, {}, "its base has the fingerprint 0000"),
        ({"weights": None}, {}, "does not say which weights"),
        ({"weights": {**about["weights"], "branches": {"aligned": None}}}, {}, "does not say which weights"),
        ({"lambda_range": [0]}, {}, r"range of λ is none: lambda_range=\[0\]"),
        ({"lambda_range": [0, 1]}, {}, r"takes λ from 0 to 1, and λ=1.5 is asked for"),
        ({"lambda_range": [0, 1]}, {"lambdas": (), "lambda_schedule": {0: 1, 3: 7}}, "to 1, and λ=7 is asked for"),
    ]:
        with standin(as_vllm(remote_server, tells={**about, **changes})) as url, pytest.raises(DeRaError, match=said):
            rows(endpoint=url, **settings)


def test_a_server_of_another_dtype_is_told_of(rows, remote_server, here, caplog):
    about = remote_server.http.get(f"{remote_server.url}/dera/model").json()
    assert about["dtype"] == "float32"
    with standin(through(remote_server, lambda number: None, {**about, "dtype": "bfloat16"})) as url:
        assert rows(endpoint=url) == here
        assert "computes in bfloat16, and the model here would in float32" in caplog.text
        caplog.clear()
        rows(endpoint=url, dtype="bfloat16", prompt=TEXTS[:1])
    assert "computes in" not in caplog.text


# -- connections, keys and answers that fail ---------------------------------------------------------------------------

NOWHERE = "http://127.0.0.1:9"


def through(server, fails, tells=None):
    """
    What passes requests on to a server, where `fails` of their number, from 0, gives no answer of its own; `tells` to
    /dera/model, if given.
    """
    count = iter(range(10**6))

    def answer(method, path, body, headers):
        if method == "GET" and tells is not None:
            return 200, tells
        if method == "POST" and (own := fails(next(count))) is not None:
            return own
        answered = server.http.request(method, server.url + path, json=body or None)
        return answered.status_code, answered.json()

    return answer


def test_what_came_before_a_connection_was_lost_is_kept(rows, remote_server, here, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "WAITS", (0.0, 0.0))
    output, probes = tmp_path / "out.jsonl", 4

    def lost(number):
        if number >= probes + 4:
            raise Gone

    with (
        standin(through(remote_server, lost)) as url,
        pytest.raises(DeRaError, match=r"does not answer, after 3 tries: RemoteProtocolError .*run the same command"),
    ):
        rows(endpoint=url, output=output, concurrency=1, prompt=TEXTS[:2])
    kept = read(output)
    assert len(kept) == 4
    there = rows(endpoint=remote_server.url, output=output, prompt=TEXTS[:2])
    assert there == here[:6]
    assert all(row in there for row in kept)


def test_what_may_go_well_a_second_time_is_sent_again(rows, remote_server, here, monkeypatch):
    monkeypatch.setattr(endpoint, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(endpoint, "LONGEST_WAIT", 0.0)
    busy = {5: (429, {"error": {"message": "full"}}), 6: (503, {}), 8: (502, {})}

    def fails(number):
        if number == 10:
            raise Gone
        return busy.get(number)

    with standin(through(remote_server, fails)) as url:
        assert rows(endpoint=url, concurrency=2, prompt=TEXTS[:2]) == here[:6]
    ends = (503, {"error": {"message": "the server is ending"}})
    said = "after 4 tries: status 503, the server is ending"
    with standin(lambda *_: ends) as url, pytest.raises(DeRaError, match=said):
        rows(endpoint=url)


@pytest.mark.parametrize("says", ["system_fingerprint", "nothing but a lost connection"])
def test_a_server_that_comes_back_with_another_model_is_refused(
    rows, remote_server, model, here, tmp_path, monkeypatch, says
):
    monkeypatch.setattr(endpoint, "WAITS", (0.0,))
    source = {**model, "adapter": str(make_adapter(model["base"], tmp_path / "other", seed=9))}
    settings = ServeSettings(base=source["base"], adapter=(source["adapter"],))
    with running(make_service(settings), settings) as other:
        count, probes = iter(range(10**6)), 4

        def answer(method, path, body, headers):
            server = remote_server
            if method == "POST":
                number = next(count)
                if number == probes + 3 and says != "system_fingerprint":
                    raise Gone
                answer.later = number >= probes + 3
            if answer.later:
                server = other
            answered = server.http.request(method, server.url + path, json=body or None).json()
            if says != "system_fingerprint" and method == "POST":
                del answered["system_fingerprint"]
            return 200, answered

        answer.later = False
        with standin(answer) as url, pytest.raises(DeRaError, match=r"another model than when .* otherwise of weights"):
            rows(endpoint=url, output=tmp_path / "out.jsonl", concurrency=1)
    kept = read(tmp_path / "out.jsonl")
    assert len(kept) == 3
    assert all(row in here for row in kept), "rows of the other model"


def test_a_server_that_is_busy_is_asked_until_the_timeout(rows, remote_server, here, monkeypatch):
    monkeypatch.setattr(endpoint, "WAITS", (0.0,))
    full = (429, {"error": {"message": "full"}})
    with standin(through(remote_server, lambda number: full if 4 <= number < 12 else None)) as url:
        assert rows(endpoint=url, concurrency=2, prompt=TEXTS[:2]) == here[:6]
    with (
        standin(through(remote_server, lambda number: full)) as url,
        pytest.raises(DeRaError, match=r"after \d+ tries: status 429, full"),
    ):
        rows(endpoint=url, timeout=0.2)


def test_a_key_comes_from_the_environment(rows, remote_server, monkeypatch):
    seen = []

    def asks(method, path, body, headers):
        seen.append(headers.get("Authorization"))
        return 401, {"error": {"message": "no key"}}

    with standin(asks) as url:
        with pytest.raises(DeRaError, match=r"asks for a key \(status 401\): put its key into DERA_API_KEY"):
            rows(endpoint=url)
        monkeypatch.setenv("DERA_API_KEY", "secret")
        with pytest.raises(DeRaError, match="is the key in DERA_API_KEY right"):
            rows(endpoint=url)
        monkeypatch.setenv("DERA_API_KEY", " secret\n")
        with pytest.raises(DeRaError, match="is the key in DERA_API_KEY right"):
            rows(endpoint=url)
        for key in ("sécret", "se\ncret"):
            monkeypatch.setenv("DERA_API_KEY", key)
            with pytest.raises(DeRaError, match="DERA_API_KEY: a key has printable ASCII characters alone") as error:
                rows(endpoint=url)
            assert key not in str(error.value)
    assert seen == [None, "Bearer secret", "Bearer secret"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"token_ids": [5, 6], "finish_reason": "length"}, "has 2 tokens and ends .'length'. neither at one of"),
        ({"token_ids": [5, 2, 6], "finish_reason": "length"}, "has 3 tokens and ends"),
        ({"token_ids": [5, 6, 7, 8], "finish_reason": "length"}, "has 4 tokens"),
        ({"text": "x"}, "no token ids"),
        ({"token_ids": [5, None, 2]}, "no token ids"),
    ],
)
def test_an_answer_that_is_no_completion_of_the_request_is_refused(served_text, answer, said):
    with pytest.raises(DeRaError, match=said):
        read_completion(Request(0, 0.5), answer, Sampling(max_new_tokens=3), [2], served_text, "there")
    made = read_completion(
        Request(0, 0.5), {"token_ids": [5, 2]}, Sampling(max_new_tokens=3), [2], served_text, "there"
    )
    assert (made.tokens, made.end_token_id, made.finish_reason) == ([5, 2], 2, "eos")


@pytest.fixture
def served_text(remote_server):
    return remote_server.service.tokenizer
