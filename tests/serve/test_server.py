"""A server from its settings to its end."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from dera_peft.errors import DeRaError
from dera_peft.serve.bodies import CompletionBody
from dera_peft.serve.errors import APIError
from dera_peft.serve.names import served_names
from dera_peft.serve.server import listen, make_service, run
from dera_peft.serve.settings import ServeSettings


def test_sigterm_finishes_what_runs_and_ends(tiny_adapter, tmp_path):
    """From a config file, as `dera serve --config` reads it; with the tokenizer of the base."""
    file = tmp_path / "serve.yaml"
    file.write_text(f"adapter: {tiny_adapter}\nlambda-range: [-2, 2]\nmodel_lambdas: [2]\naccess-log: false\n")
    settings = ServeSettings.read(file, port=0)
    assert (settings.lambda_range, settings.adapter) == ((-2.0, 2.0), (str(tiny_adapter),))
    settings.check()
    service = make_service(settings)
    name = tiny_adapter.name
    assert service.names.listing() == [name, f"{name}@2"]
    listening = listen(settings.host, settings.port)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"

    def ask():
        deadline = time.monotonic() + 30
        while True:
            try:
                httpx2.get(f"{url}/health")
                break
            except httpx2.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        body = {"model": f"{name}@0.5", "prompt": "The old", "max_tokens": 240, "ignore_eos": True, "stream": True}
        lines = []
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in filter(None, answer.iter_lines()):
                if not lines:
                    os.kill(os.getpid(), signal.SIGTERM)
                    while (health := httpx2.get(f"{url}/health")).status_code == 200:
                        assert time.monotonic() < deadline
                    assert (health.status_code, health.json()) == (503, {"status": "draining"})
                    assert httpx2.head(f"{url}/health").status_code == 503
                    refused = httpx2.post(f"{url}/v1/completions", json=body)
                    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
                lines.append(line.removeprefix("data: "))
        return lines

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        run(service, settings, listening)
        *chunks, end = asked.result()
    assert end == "[DONE]"
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "length"
    assert service.engine.statistics().finished == {"length": 1}
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))


def test_a_base_without_an_adapter_is_served_without_lambda(tiny_base):
    service = make_service(ServeSettings(base=str(tiny_base)))
    assert service.names.listing() == [tiny_base.name]
    prepared = service.preparer.completions(CompletionBody(prompt="The old", max_tokens=4))
    with service.engine as engine:
        assert len(engine.submit(prepared.requests[0]).result(30).tokens) == 4
    with pytest.raises(APIError, match="no adapter"):
        service.preparer.completions(CompletionBody.model_validate({"prompt": "The old", "lambda": 0.5}))


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DeRaError, match=rf"port={port}: Address already in use; name another"):
            listen("127.0.0.1", port)
    with pytest.raises(DeRaError, match=r"host='no\.such\.host\.invalid'"):
        listen("no.such.host.invalid", 0)


def test_adapters_are_served_by_their_names(served_model, tiny_base, tiny_adapter):
    at = ServeSettings(base=str(tiny_base), adapter=(f"{tiny_adapter}/",)).source
    assert served_names(at, served_model.aligned) == {tiny_adapter.name: "aligned"}
