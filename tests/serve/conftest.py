"""One server for all tests, in this process: a tiny model, its tokenizer with a template that takes tools."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import httpx2
import openai
import pytest
import uvicorn
from transformers import AutoTokenizer

from dera_peft import DeRaModel
from dera_peft.serve.app import make_app
from dera_peft.serve.server import listen, service_of
from dera_peft.serve.service import Service
from dera_peft.serve.settings import ServeSettings
from dera_peft.serve.trace import Trace

TEMPLATE = (
    "{{ bos_token }}{% if tools %}tools: {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% for c in m.tool_calls or [] %}"
    " calls {{ c.function.arguments.city }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Running:
    """
    A server that runs.

    Attributes:
        url: its address.
        key: that it asks for.
    """

    service: Service
    url: str
    key: str = "none"

    @cached_property  # a new one reads all certificates
    def http(self) -> httpx2.Client:
        return httpx2.Client(timeout=60)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    def post(self, path: str, body=None, **arguments) -> httpx2.Response:
        arguments = arguments if body is None else {"json": body, **arguments}
        return self.http.post(self.url + path, **arguments)

    def complete(self, **body) -> dict:
        """Of /v1/completions; fails where it is refused."""
        answer = self.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def is_idle(self) -> bool:
        now = self.service.engine.statistics()
        return (now.running, now.waiting) == (0, 0)

    def wait_until(self, holds, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.service.engine.statistics()
            time.sleep(0.005)


@contextmanager
def running(service: Service, settings: ServeSettings) -> Iterator[Running]:
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(make_app(service, settings), log_config=None, access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        keys = settings.api_keys()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Running(service, url, keys[0].decode() if keys else "none")
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def served_tokenizer(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def served_model(tiny_base, tiny_adapter) -> DeRaModel:
    return DeRaModel.from_pretrained(tiny_base, tiny_adapter, lam=1.0)


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> ServeSettings:
    return ServeSettings(trace=tmp_path_factory.mktemp("served") / "trace.jsonl", max_body=100_000)


@pytest.fixture(scope="session")
def server(served_model, served_tokenizer, settings) -> Iterator[Running]:
    service = service_of(
        served_model, served_tokenizer, {"dpo": "aligned"}, "base", settings, {}, Trace(settings.trace)
    )
    with running(service, settings) as server:
        yield server


@pytest.fixture
def another(served_model, served_tokenizer, settings):
    """Makes a further server of the same model, with other settings."""

    @contextmanager
    def make(**changes) -> Iterator[Running]:
        changed = replace(settings, **{"trace": None, **changes})
        service = service_of(served_model, served_tokenizer, {"dpo": "aligned"}, "base", changed, {})
        with running(service, changed) as server:
            yield server

    return make


@pytest.fixture(scope="session")
def server_of_two(tiny_base, tiny_adapter, top_adapter, served_tokenizer) -> Iterator[Running]:
    """Two adapters, helpful and harmless."""
    model = DeRaModel.from_pretrained(tiny_base, adapters={"helpful": tiny_adapter, "harmless": top_adapter})
    settings = ServeSettings()
    service = service_of(model, served_tokenizer, {name: name for name in model.aligned}, "base", settings, {})
    with running(service, settings) as server:
        yield server
