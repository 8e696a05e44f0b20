"""Loads a model and serves it until a signal ends it."""

import logging
import math
import signal
import socket
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import uvicorn
from starlette.concurrency import run_in_threadpool
from transformers import PreTrainedTokenizerBase

from dera_peft.checkpoint.end_tokens import configured_end_tokens
from dera_peft.checkpoint.fingerprint import settings_fingerprint
from dera_peft.checkpoint.identity import describe
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.padding import num_rows
from dera_peft.errors import DeRaError
from dera_peft.lock import hold
from dera_peft.model import DeRaModel
from dera_peft.serve.app import make_app
from dera_peft.serve.engine import Engine
from dera_peft.serve.grammars import Grammars
from dera_peft.serve.names import ModelNames, served_names
from dera_peft.serve.preparing import Preparer
from dera_peft.serve.service import Service
from dera_peft.serve.settings import ServeSettings, folder_name
from dera_peft.serve.trace import Trace

LAST_SECONDS = 5  # for answers to be sent when all of them are made

logger = logging.getLogger(__name__)


def serve(settings: ServeSettings) -> None:
    """
    Serves until SIGTERM or Ctrl-C; then finishes the requests that there are.

    Raises:
        DeRaError: the model can't be loaded or served, or the address can't be listened at.
    """
    with listen(settings.host, settings.port) as listening, hold(settings.trace, "--trace"):
        service = make_service(settings)
        run(service, settings, listening)


def make_service(settings: ServeSettings) -> Service:
    """Loads the model, and makes what serves it."""
    source = settings.source.placed()
    source.resolve()
    trace = None if settings.trace is None else Trace(settings.trace)
    tokenizer = source.tokenizer()
    model = DeRaModel.from_source(source)
    about = source.fingerprint()
    names = served_names(source, model.aligned) if model.branches_differ else {}
    service = service_of(model, tokenizer, names, source.resolve().base, settings, about, trace)
    quantization, _ = source.quantized_to()
    service.about = describe(source.resolve(), source.load_arguments().get("revision"), quantization, model.dtype)
    return service


def service_of(
    model: MixtureModel,
    tokenizer: PreTrainedTokenizerBase,
    branches: Mapping[str, str],
    base: str,
    settings: ServeSettings,
    about: Mapping[str, Any],
    trace: Trace | None = None,
) -> Service:
    """
    Args:
        branches, base: see `ModelNames`; `base` is a folder or hub id.
        about: which weights they are, for a fingerprint.
    """
    engine = Engine(model, tokenizer, max_queue=settings.max_queue, **settings.engine_arguments())
    low, high = settings.lambda_range
    names = ModelNames(branches, folder_name(base), model.lam, (low, high), settings.model_lambdas)
    vocabulary = model.config.get_text_config().vocab_size
    grammars = Grammars(tokenizer, vocabulary, sorted(configured_end_tokens(model.generation_config)))
    preparer = Preparer(tokenizer, names, grammars, num_rows(model), engine.context, settings.max_queue)
    return Service(model, tokenizer, engine, names, preparer, f"dera_{settings_fingerprint(dict(about))}", trace)


def listen(host: str, port: int) -> socket.socket:
    """
    A socket that listens, before a model is loaded in vain.

    Raises:
        DeRaError: the address is taken, or is none of this machine's.
    """
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise DeRaError(f"host={host!r}, port={port}: {error.strerror}.") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # until then another server could bind to it, too
    except OSError as error:
        listening.close()
        raise DeRaError(f"host={host!r}, port={port}: {error.strerror}; name another with --port or --host.") from None
    return listening


class DrainingServer(uvicorn.Server):
    """
    Goes on answering after a signal until what runs is finished, and refuses new completions; `/health` says so. A
    second signal ends it at once.

    Args:
        seconds: after which what still runs is cancelled.
    """

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float):
        super().__init__(config)
        self.service, self.seconds = service, seconds
        self.deadline = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.deadline = time.monotonic() + (0 if self.service.draining else self.seconds)
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        is_late = time.monotonic() >= self.deadline
        if is_late:  # whoever still waits is told so
            await run_in_threadpool(self.service.engine.close, drain=False)
        self.should_exit = is_late or (self.service.draining and not self.service.metrics.in_progress)
        return await super().on_tick(counter)


def run(service: Service, settings: ServeSettings, listening: socket.socket) -> None:
    """Serves until a signal, which ends it with exit code 0."""
    app = make_app(service, settings)
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=LAST_SECONDS, lifespan="on"
    )
    name = f"[{host}]" if ":" in host else host
    logger.info(f"serving {service.names.plain} at http://{name}:{port}")
    # uvicorn raises the signal that ended it again, for whoever handled it before: nobody has to
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        DrainingServer(config, service, settings.drain_seconds).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    logger.info("ended")
