"""The servers that are measured, each in a process of its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from dera_peft.bench.config import ServeTimingSettings
from dera_peft.errors import DeRaError
from dera_peft.serve.settings import EngineSettings
from dera_peft.settings import user_fields

PATIENCE = 600.0  # seconds that a server may take to load
PAGE = 32  # tokens, of transformers' cache


@dataclass(frozen=True)
class Server:
    """
    A server that answers at a port of this machine.

    Attributes:
        process: its id.
    """

    port: int
    process: int


@contextmanager
def dera_server(settings: ServeTimingSettings) -> Iterator[Server]:
    """`dera serve` of the settings' model."""
    given = {each.name: getattr(settings, each.name) for each in user_fields(EngineSettings)}
    config = {name: value for name, value in given.items() if value is not None and value != ()}
    config |= {"access_log": False, "max_queue": max(256, settings.clients)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(json.dumps(config), encoding="utf-8")  # which is YAML too
        with _running([sys.executable, "-m", "dera_peft.cli", "serve", "--config", str(file)], settings) as server:
            yield server


@contextmanager
def transformers_server(settings: ServeTimingSettings, folder: Path, device: str, longest: int) -> Iterator[Server]:
    """
    `transformers serve` of a plain model, with continuous batching; its cache holds what all clients can ask for, and
    not most of the machine's memory, as it does by default.

    Args:
        longest: tokens of the longest request, prompt and answer.
    """
    pages = settings.clients * (-(-longest // PAGE) + 1)
    program = shutil.which("transformers", path=Path(sys.executable).parent) or "transformers"
    options = {"cb-block-size": PAGE, "cb-num-blocks": pages, "cb-max-batch-tokens": settings.prefill_chunk}
    command = [program, "serve", str(folder), "--continuous-batching", "--device", device]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with _running(command, settings) as server:
        yield server


@contextmanager
def _running(command: Sequence[str], settings: ServeTimingSettings) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = dict(os.environ)
    if settings.threads is not None:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    with tempfile.TemporaryFile() as said:
        command = [*command, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            deadline = time.monotonic() + PATIENCE
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    lines = said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
                    raise DeRaError(f"{' '.join(command)} does not serve: {lines[-1]}")
                time.sleep(0.2)
            yield Server(port, process.pid)
        except BaseException:  # an interruption: nobody waits for what it still has to answer
            process.kill()
            raise
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
