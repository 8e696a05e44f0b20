"""`dera serve --engine vllm` on a case, and what clients are answered."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from vllm_engine import BLOCK, read_case

LONGEST = 600  # seconds that the server may take to start
REFUSED: tuple[tuple[dict[str, Any], int], ...] = (
    ({"lambda": float("nan")}, 400),
    ({"lambda": float("inf")}, 400),
    ({"lambda": "much"}, 400),
    ({"lambda": 7}, 400),  # out of range
    ({"vllm_xargs": {"lambda": float("nan")}}, 400),
    ({"vllm_xargs": {"lambda": "much"}}, 400),
    ({"vllm_xargs": {"lambda": "aligned=nan"}}, 400),
    ({"lambda": 10**400}, 400),
    ({"lamda": 0.5}, 400),
    ({"lambda": 0.5, "combine": "kl:0.1"}, 400),
    ({"model": ["aligned"]}, 400),
    ({"model": "aligned@x"}, 400),
    ({"model": "alined"}, 404),
    ({"lambda": 0.5, "echo": True, "logprobs": 1}, 400),  # of the prompt, in runner V1
)


def check_server(folder: Path) -> str | None:
    """What is wrong; None where all is as it should be."""
    case = folder / "llama-whole"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dera_peft.cli", "serve", "--engine", "vllm", "--port", str(port)]
    command += ["--base", str(case / "base"), "--adapter", str(case / "aligned"), "--dtype", "float32"]
    command += ["--enforce-eager", "--block-size", str(BLOCK), "--max-model-len", "256", "--max-num-seqs", "8"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + LONGEST
        while not _is_up(port):
            if server.poll() is not None or time.monotonic() > deadline:
                return "the server did not start; see server.log"
            time.sleep(1)
        return _check_answers(port, read_case(case)["requests"])
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def _check_answers(port: int, requests: list[dict]) -> str | None:
    for place, each in enumerate(requests):
        forms = (
            {"lambda": each["lambda"]},
            {"model": f"aligned@{each['lambda']}"},
            {"vllm_xargs": {"lambda": each["lambda"]}},
            {"n": 2, "temperature": 1, "top_k": 1, "lambda": each["lambda"]},
        )
        form = {} if each["lambda"] == 1 else forms[place % len(forms)]  # without λ it is 1
        _, answer = _complete(port, each, form)
        if any(choice["token_ids"] != each["tokens"] for choice in answer.get("choices", [{"token_ids": None}])):
            return f"request {place} has other tokens than generate gives it: {answer}"
    for body, status in REFUSED:
        found, answer = _complete(port, requests[0], body)
        if found != status:
            return f"{body} is answered {found}, not {status}: {answer}"
    return None


def _complete(port: int, request: dict, body: dict) -> tuple[int, dict]:
    body = {
        "prompt": request["prompt"], "max_tokens": len(request["tokens"]), "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, **body,
    }  # fmt: skip
    sent = Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urlopen(sent, timeout=120) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def _is_up(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False
