"""What the endpoints share: a model, its engine and names, and what is written down of each completion."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from dera_peft.decoding.lambdas import Lambda
from dera_peft.engine.mixture import MixtureModel
from dera_peft.serve.bodies import GenerationBody
from dera_peft.serve.engine import Engine
from dera_peft.serve.errors import server_ends
from dera_peft.serve.handle import Handle
from dera_peft.serve.metrics import Metrics
from dera_peft.serve.names import ModelNames
from dera_peft.serve.preparing import Prepared, Preparer
from dera_peft.serve.trace import Trace, TraceRow, utc

NO_SETTINGS = {
    "model",
    "lam",
    "prompt",
    "messages",
    "tools",
    "chat_template_kwargs",
    "seed",
}  # have fields of their own


@dataclass
class Service:
    """
    Attributes:
        fingerprint: of the model, in answers and traces.
        about: which model it is, as `checkpoint.identity.describe` says it.
        created: when the server was started, seconds since 1970.
        draining: whether it ends when what runs is finished, and takes no new completions.
    """

    model: MixtureModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    names: ModelNames
    preparer: Preparer
    fingerprint: str
    trace: Trace | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    def __post_init__(self):
        self.metrics = Metrics(self.engine.statistics)
        self.followed: set[asyncio.Task] = set()

    async def check_open(self) -> None:
        """Raises `APIError` where no more completions are taken."""
        if self.draining:
            raise server_ends()

    def began(self, lam: Lambda | None) -> None:
        shown = self.names.shown(lam)
        if shown is not None:
            self.metrics.began(shown if isinstance(shown, dict) else {self.names.plain: shown})

    def follow(self, id: str, path: str, body: GenerationBody, prepared: Prepared, handle: Handle) -> None:
        """Has a completion that has ended, or is about to, counted and traced."""
        task = asyncio.get_running_loop().create_task(self._write_down(id, path, body, prepared, handle))
        self.followed.add(task)
        task.add_done_callback(self.followed.discard)

    async def _write_down(self, id: str, path: str, body: GenerationBody, prepared: Prepared, handle: Handle) -> None:
        events = [event async for event in handle]
        self.metrics.ended(handle)
        if self.trace is None:
            return
        place = next(place for place, each in enumerate(prepared.requests) if each is handle.request)
        prompt = prepared.prompts[place // body.n]
        assert handle.finished is not None  # its last event has come
        now, seconds = time.monotonic(), handle.finished - handle.created
        tokens = [event.token for event in events if event.token is not None]
        first = None if handle.first_token is None else round(handle.first_token - handle.created, 4)
        settings: dict[str, Any] = body.model_dump(mode="json", exclude_unset=True, exclude=NO_SETTINGS)
        self.trace.write(
            TraceRow(
                run=self.fingerprint,
                id=id,
                time=utc(time.time() - (now - handle.created)),
                path=path,
                model=prepared.model,
                lam=self.names.shown(prepared.lam),
                seed=prepared.seed,
                sample=handle.request.sample,
                settings=settings,
                prompt=prompt.content,
                columns=prompt.columns,
                completion="".join(event.text for event in events),
                num_tokens=len(tokens),
                finish_reason=str(events[-1].finish_reason),
                token_ids=tokens,
                seconds=round(seconds, 4),
                first_token_seconds=first,
            )
        )
