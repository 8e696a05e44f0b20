"""The server's endpoints."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from dera_peft.engine.rules import RULES
from dera_peft.errors import DeRaError
from dera_peft.serve.answering import Answer
from dera_peft.serve.bodies import ChatBody, CompletionBody, GenerationBody, TokensBody
from dera_peft.serve.errors import APIError, answer_errors, from_user_error
from dera_peft.serve.guard import Guard
from dera_peft.serve.lengths import check_text
from dera_peft.serve.preparing import DEFAULT_TOKENS
from dera_peft.serve.scoring import scored_tokens
from dera_peft.serve.service import Service
from dera_peft.serve.settings import ServeSettings
from dera_peft.serve.trace import AccessLog

PAGE = Path(__file__).parent / "page" / "index.html"
OWNER = "dera"
RULE_SYMBOLS = {name: parameter and parameter.symbol for name, parameter in RULES.items()}
DEFAULTS = {name: GenerationBody.model_fields[name].default for name in ("temperature", "top_p", "max_tokens")}


def make_app(service: Service, settings: ServeSettings) -> FastAPI:
    """The application; its engine runs while it does, and finishes what it has to when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        # uvicorn has waited for the requests; what is left has no reader
        await run_in_threadpool(service.engine.close, drain=False)
        await _finish(service)

    middleware = [
        Middleware(AccessLog, metrics=service.metrics, wanted=settings.access_log),
        Middleware(
            Guard, keys=settings.api_keys(), host=settings.host, origins=settings.allow_origin,
            max_body=settings.max_body,
        ),
    ]  # fmt: skip
    if settings.allow_origin:
        allowed = Middleware(
            CORSMiddleware, allow_origins=settings.allow_origin, allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )  # fmt: skip
        middleware.insert(1, allowed)
    # the pages that show an API's documentation load scripts from elsewhere
    app = FastAPI(title="dera serve", lifespan=lifespan, middleware=middleware, docs_url=None, redoc_url=None)
    answer_errors(app)
    _add_api(app, service)
    _add_own(app, service)
    return app


async def _finish(service: Service) -> None:
    """What is traced is traced to the end."""
    with anyio.move_on_after(5):
        while service.followed:
            await anyio.sleep(0.01)


def _add_api(app: FastAPI, service: Service) -> None:
    """OpenAI's."""

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.created, "owned_by": OWNER}

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [model(name) for name in service.names.listing()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Any:
        service.names.read(name)
        return model(name)

    @app.post("/v1/completions", dependencies=[Depends(service.check_open)])
    async def completions(body: CompletionBody, request: Request) -> Response:
        prepared = await run_in_threadpool(service.preparer.completions, body)
        return await Answer(service, body, prepared, request).make()

    @app.post("/v1/chat/completions", dependencies=[Depends(service.check_open)])
    async def chat(body: ChatBody, request: Request) -> Response:
        prepared = await run_in_threadpool(service.preparer.chat, body)
        return await Answer(service, body, prepared, request).make()


def _add_own(app: FastAPI, service: Service) -> None:
    text = PAGE.read_text(encoding="utf-8")
    policy = _content_policy(text)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """No more requests are sent to a server that drains."""
        return JSONResponse({"status": "draining"}, 503) if service.draining else JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/dera/settings")
    async def settings() -> Any:
        """What the page needs to know."""
        names = service.names
        return {
            "model": names.plain,
            "adapters": list(names.branches),
            "lambda": names.shown(names.read(None)),
            "lambda_range": names.lambda_range,
            "rules": RULE_SYMBOLS if len(names.branches) == 1 else {},
            "chat": bool(service.tokenizer.chat_template),
            "context": service.engine.context,
            "defaults": {"chat": DEFAULTS, "prompt": {**DEFAULTS, "max_tokens": DEFAULT_TOKENS}},
        }

    @app.get("/dera/model")
    async def which_model() -> Any:
        """What a client that decodes from afar compares with the model that it means."""
        return {"engine": "dera", "lambda_range": service.names.lambda_range, **service.about}

    @app.post("/dera/tokens")
    async def tokens(body: TokensBody) -> Any:
        """Each token of a completion with how far the branches disagree there, and what each would have said."""
        return await run_in_threadpool(_tokens, service, body)


def _tokens(service: Service, body: TokensBody) -> dict[str, Any]:
    lam = service.names.read(body.model, body.lam)
    if lam is None:
        raise APIError("this model has no adapter, and so no branches to compare")
    preparer = service.preparer
    if body.prompt is not None:
        prompt = preparer.encode(body.prompt)
    else:
        prompt = preparer.encode_chat(body.messages, body.tools, body.chat_template_kwargs).ids
    completion = body.completion
    if isinstance(completion, str):
        check_text(service.tokenizer, completion, preparer.context, "completion")
        completion = list(service.tokenizer(completion, add_special_tokens=False)["input_ids"])
    if completion and min(completion) < 0:
        raise APIError(f"completion: {min(completion)} is not the id of a token", param="completion")
    length = len(prompt) + len(completion)
    if preparer.context is not None and length > preparer.context:
        raise APIError(
            f"prompt and completion have {length} tokens, more than the model's context of {preparer.context}",
            code="context_length_exceeded",
        )
    try:
        found = scored_tokens(service.model, service.tokenizer, prompt, completion, lam, body.top)
    except DeRaError as error:
        raise from_user_error(error, {}) from None
    return {"lambda": service.names.shown(lam), **found}


def _content_policy(page: str) -> str:
    """The page's own scripts and styles, and this server: nothing else, should a completion ever become markup."""

    def sources(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode() for text in texts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
