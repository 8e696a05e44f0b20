"""A server of a tiny model in this process, loaded as `dera serve` does."""

from collections.abc import Iterator

import pytest
from served import Running, running

from dera_peft.serve.server import make_service
from dera_peft.serve.settings import ServeSettings


@pytest.fixture(scope="session")
def remote_server(tiny_base, tiny_adapter) -> Iterator[Running]:
    settings = ServeSettings(base=str(tiny_base), adapter=(str(tiny_adapter),))
    with running(make_service(settings), settings) as server:
        yield server
