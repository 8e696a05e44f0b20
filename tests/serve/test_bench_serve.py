"""`dera bench serve`: its clients, what it compares answers with, and what it tells of those that are lost."""

import json
import os
import socket
import threading
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from dera_peft import DeRaError
from dera_peft.bench import serving
from dera_peft.bench.config import ServeTimingSettings
from dera_peft.bench.load import Answer, ask
from dera_peft.bench.servers import Server
from dera_peft.bench.serving import ALONE, BATCHED, BATCHED_ALIGNED, PLAIN, SERVED, Asked, compare, contenders
from dera_peft.cli.app import app


@pytest.fixture
def bench(tiny_adapter, another, monkeypatch):
    """Runs the command with a server in this process in place of one in another."""

    @contextmanager
    def in_process(settings):
        with another() as running:
            yield Server(int(running.url.rpartition(":")[2]), os.getpid())

    monkeypatch.setattr(serving, "dera_server", in_process)
    options = ("--adapter", str(tiny_adapter), "--requests", "9", "--clients", "4", "--prompt", "8", "--new", "8")

    def run(*arguments):
        return CliRunner().invoke(app, ["bench", "serve", *options, *arguments], catch_exceptions=False)

    return run


def test_every_answer_is_that_of_generate(bench):
    result = bench("--only", SERVED, "--only", ALONE, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["complete"]
    assert [row["contender"] for row in found["results"]] == [BATCHED, ALONE, SERVED]  # what it is compared with too
    for row in found["results"]:
        assert (row["answered"], row["lost"], row["different"]) == (9, 0, 0)
        assert 0 < row["first_token_seconds"]["median"] <= row["first_token_seconds"]["p95"] <= row["seconds"]
    assert found["results"][2]["memory_bytes"]["start"] > 1e7
    assert found["settings"]["lambdas"] == [0.0, 0.5, 1.0]


def test_answers_that_are_mixed_up_or_lost_are_told(bench, monkeypatch):
    send = serving.send

    def mixed_up(*arguments):
        answers = send(*arguments)
        return [answers[1], answers[0], *answers[2:-1], Answer(0.0, 0.0, 0.0, error="429: [busy]")]

    monkeypatch.setattr(serving, "send", mixed_up)
    result = bench("--only", SERVED)
    assert result.exit_code == 1
    assert "lost: 429: [busy]" in result.stdout
    assert result.stdout.split("dera serve")[1].split("first token")[0].split()[-3:] == ["8", "1", "2"]


def test_figures():
    asked = [Asked("a", [1], 0.0, 3), Asked("b", [2], 1.0, 5), Asked("c", [3], 1.0, 7)]
    answers = [Answer(1, 1.5, 3, "x"), Answer(1, 3, 5, "y"), Answer(3, 6, 6, error="it broke off")]
    found = compare(SERVED, asked, answers, ["x", "z", "w"]).figures()
    assert found["tokens_per_second"] == pytest.approx(8 / 5)  # those of the lost one were not made
    assert found["first_token_seconds"] == {"median": 1.25, "p95": 2}
    assert (found["answered"], found["lost"], found["different"]) == (2, 1, 1)


def answering(text: bytes) -> int:
    """The port of a server that says this to its one client, and goes away."""
    listening = socket.create_server(("127.0.0.1", 0))

    def work():
        connection, _ = listening.accept()
        with listening, connection:
            connection.recv(65536)
            connection.sendall(text)

    threading.Thread(target=work, daemon=True).start()
    return listening.getsockname()[1]


CHUNK = b'data: {"choices": [{"text": "one", "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"HTTP/1.1 429 Busy\r\n\r\nthe queue is full", "429: the queue is full"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + CHUNK, "it broke off"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": "no memory"}\n\n', "no memory"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {\n\n", "JSONDecodeError"),
        (b"", "RemoteDisconnected"),
    ],
)
def test_an_answer_that_does_not_come_whole_is_lost(said, error):
    assert error in ask(answering(said), {"prompt": "a"}).error


def test_what_can_be_measured(monkeypatch):
    assert contenders(ServeTimingSettings(adapter=("x",), only=(PLAIN,))) == [BATCHED_ALIGNED, PLAIN]
    assert PLAIN not in contenders(ServeTimingSettings(adapter=("x",), quantization="nf4"))
    with pytest.raises(DeRaError, match="can't be merged into a quantized base"):
        contenders(ServeTimingSettings(adapter=("x",), quantization="nf4", only=(PLAIN,)))
    with pytest.raises(DeRaError, match="'nothing' is not known"):
        contenders(ServeTimingSettings(adapter=("x",), only=("nothing",)))
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    assert PLAIN not in contenders(ServeTimingSettings(adapter=("x",)))
