"""`dera serve --engine vllm` on a case, and what clients are answered."""

import json
import sys
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from vllm_engine import read_case
from vllm_serving import serving

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
    try:
        with serving(sys.executable, case, folder / "server.log", "--max-num-seqs", "8") as url:
            return _check_answers(url, read_case(case)["requests"])
    except RuntimeError as error:
        return str(error)


def _check_answers(url: str, requests: list[dict]) -> str | None:
    for place, each in enumerate(requests):
        forms = (
            {"lambda": each["lambda"]},
            {"model": f"aligned@{each['lambda']}"},
            {"vllm_xargs": {"lambda": each["lambda"]}},
            {"n": 2, "temperature": 1, "top_k": 1, "lambda": each["lambda"]},
        )
        form = {} if each["lambda"] == 1 else forms[place % len(forms)]  # without λ it is 1
        _, answer = _complete(url, each, form)
        if any(choice["token_ids"] != each["tokens"] for choice in answer.get("choices", [{"token_ids": None}])):
            return f"request {place} has other tokens than generate gives it: {answer}"
    for body, status in REFUSED:
        found, answer = _complete(url, requests[0], body)
        if found != status:
            return f"{body} is answered {found}, not {status}: {answer}"
    return None


def _complete(url: str, request: dict, body: dict) -> tuple[int, dict]:
    body = {
        "prompt": request["prompt"], "max_tokens": len(request["tokens"]), "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, **body,
    }  # fmt: skip
    sent = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(sent, timeout=120) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)
