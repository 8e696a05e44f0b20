"""Which model vLLM's server has, as `dera serve`'s own says it: `GET /dera/model`."""

import os
import secrets

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dera_peft.serve.errors import APIError
from dera_peft.vllm import requests

PATH = "/dera/model"
KEY_VARIABLE = "VLLM_API_KEY"  # where the server has the key that clients send


class About:
    """Stands before vLLM's application (`--middleware`), and asks for the server's key itself."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or not scope["path"].endswith(PATH):
            await self.app(scope, receive, send)
            return
        key = os.environ.get(KEY_VARIABLE)
        given = Headers(scope=scope).get("Authorization", "").removeprefix("Bearer ")
        if key and not secrets.compare_digest(key.encode(), given.encode()):
            await APIError("the key is missing or wrong", 401).response()(scope, receive, send)
        elif requests.about is None:
            await APIError("this process has no model with an adapter of DeRa", 503).response()(scope, receive, send)
        else:
            await JSONResponse(requests.about)(scope, receive, send)
