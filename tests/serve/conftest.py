"""One server for all tests, in this process: a tiny model, its tokenizer with a template that takes tools."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from served import Running, running
from transformers import AutoTokenizer

from dera_peft import DeRaModel
from dera_peft.serve.server import service_of
from dera_peft.serve.settings import ServeSettings
from dera_peft.serve.trace import Trace

TEMPLATE = (
    "{{ bos_token }}{% if tools %}tools: {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% for c in m.tool_calls or [] %}"
    " calls {{ c.function.arguments.city }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


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
