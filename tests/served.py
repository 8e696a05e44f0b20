"""Servers in this process, for tests: of a model, and such as stand in for others."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import openai
import uvicorn

from dera_peft.serve.app import make_app
from dera_peft.serve.server import listen
from dera_peft.serve.service import Service
from dera_peft.serve.settings import ServeSettings


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


class Gone(Exception):
    """The connection ends without an answer."""


@contextmanager
def standin(answer: Callable[[str, str, dict, dict], tuple[int, dict]]) -> Iterator[str]:
    """
    The address of a server that answers with what `answer` makes of method, path, body and headers: a status and JSON.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length) or b"{}")
            try:
                status, found = answer(self.command, self.path, body, dict(self.headers))
            except Gone:
                self.close_connection = True
                return
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
