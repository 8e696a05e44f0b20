"""`dera serve --engine vllm` on a case, as a process. Of the standard library alone: it is for either environment."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

BLOCK = 32  # tokens of a cache's block: on a CPU a multiple of 32
LONGEST = 600  # seconds that the server may take to start


@contextmanager
def serving(python: str, case: Path, log_file: Path, *options: str) -> Iterator[str]:
    """
    The address of the server.

    Args:
        python: of vLLM's environment.
        log_file: what it says.
        options: further ones of the command.

    Raises:
        RuntimeError: it did not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "dera_peft.cli", "serve", "--engine", "vllm", "--port", str(port)]
    command += ["--base", str(case / "base"), "--adapter", str(case / "aligned"), "--dtype", "float32"]
    command += ["--enforce-eager", "--block-size", str(BLOCK), "--max-model-len", "256", *options]
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + LONGEST
        while not _is_up(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start; see {log_file}")
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def _is_up(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
