"""A load of requests through `dera serve`, against `generate` and `transformers serve`."""

import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.utils.import_utils import is_serve_available

from dera_peft.bench.config import ServeTimingSettings
from dera_peft.bench.load import Answer, send
from dera_peft.bench.memory import resident
from dera_peft.bench.servers import Server, dera_server, transformers_server
from dera_peft.bench.shapes import load_for_bench
from dera_peft.decoding.prompts import token_ids
from dera_peft.engine.padding import pad, padding_id
from dera_peft.errors import DeRaError
from dera_peft.model import DeRaModel
from dera_peft.serve.text import INCOMPLETE

BATCHED, ALONE, SERVED = "generate, batched", "generate, one at a time", "dera serve"
BATCHED_ALIGNED, SERVED_ALIGNED, PLAIN = "generate, batched, λ=1", "dera serve, λ=1", "transformers serve, λ=1"
NAMES = (BATCHED, ALONE, SERVED, BATCHED_ALIGNED, SERVED_ALIGNED, PLAIN)
ALIGNED = (BATCHED_ALIGNED, SERVED_ALIGNED, PLAIN)


@dataclass(frozen=True)
class Asked:
    """A completion to be made, greedily, of exactly `new` tokens: `ids` are those of the text `prompt`."""

    prompt: str
    ids: list[int] = field(repr=False)
    lam: float
    new: int


@dataclass(frozen=True)
class Measured:
    """
    How one contender answered all requests.

    Attributes:
        tokens: new ones, of the answers that came.
        first: seconds from a client's request to its first text, of each answer that came.
        lost: why, of each answer that did not come.
        different: answers that are not those of batched `generate` at their λ.
        before: bytes of the server's memory when as many requests as there are clients were answered.
        after: when all were.
    """

    contender: str
    seconds: float
    tokens: int
    first: list[float] = field(repr=False)
    lost: list[str]
    different: int
    before: int | None = None
    after: int | None = None

    def figures(self) -> dict[str, Any]:
        """As `dera bench serve --json` has it."""
        ordered = sorted(self.first)
        return {
            "contender": self.contender,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "first_token_seconds": {
                "median": statistics.median(ordered) if ordered else None,
                "p95": ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else None,
            },
            "answered": len(ordered),
            "lost": len(self.lost),
            "errors": list(dict.fromkeys(self.lost))[:3],
            "different": self.different,
            "memory_bytes": {"start": self.before, "end": self.after},
        }


class FirstToken(StoppingCriteria):
    """Notes when the first token was there; ends nothing."""

    def __init__(self):
        self.time: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.time = self.time or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def make_requests(tokenizer: PreTrainedTokenizerBase, settings: ServeTimingSettings) -> list[Asked]:
    """Random texts and lengths, the same for all contenders, each with one λ after the other."""
    rng = random.Random(0)
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    asked = []
    for number in range(settings.requests):
        length, new = (rng.randint(-(-most // 4), most) for most in (settings.prompt, settings.new))
        # without parts of characters, which are no text to be sent
        text = text_of(tokenizer, rng.choices(ordinary, k=length)).replace(INCOMPLETE, "") or "."
        asked.append(Asked(text, token_ids(tokenizer, text), settings.lambdas[number % len(settings.lambdas)], new))
    return asked


def measure_serving(
    model: DeRaModel,
    settings: ServeTimingSettings,
    names: Sequence[str],
    found: list[Measured],
    advance: Callable[[int], None],
) -> None:
    """
    Has each contender answer the same requests, one contender after the other, and notes how in `found`. The ones with
    λ=1 in their names answer them at λ=1.

    Args:
        names: of `contenders`.

    Raises:
        DeRaError: a server does not start, or λ does not fit the model.
    """
    tokenizer = settings.source.tokenizer()
    model.generation_config.eos_token_id = None  # no completion ends before its length
    mixed = make_requests(tokenizer, settings)
    aligned = [replace(one, lam=1.0) for one in mixed]
    clients = settings.clients
    decode(model, tokenizer, mixed[:clients], clients, clients, lambda items: None)  # what torch does once
    expected: dict[bool, list[str]] = {}
    for name in names:
        is_aligned, before, after = name in ALIGNED, None, None
        asked = aligned if is_aligned else mixed
        if name in (BATCHED, BATCHED_ALIGNED):
            answers = decode(model, tokenizer, asked, clients, clients, advance)
            expected[is_aligned] = [answer.text for answer in answers]
        elif name == ALONE:
            answers = decode(model, tokenizer, asked, 1, clients, advance)
        elif name == PLAIN:
            longest = max(len(one.ids) + one.new for one in asked)
            with merged(settings) as folder:
                server = transformers_server(settings, folder, str(model.device), longest)
                bodies = [{"prompt": one.prompt} for one in asked]
                answers, before, after = _ask(server, asked, bodies, clients, advance)
        else:
            bodies = [{"prompt": one.ids, "lambda": one.lam, "ignore_eos": True} for one in asked]
            answers, before, after = _ask(dera_server(settings), asked, bodies, clients, advance)
        found.append(compare(name, asked, answers, expected[is_aligned], before, after))


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return cast("str", tokenizer.decode(tokens, skip_special_tokens=True))  # of one sequence


def compare(
    name: str,
    asked: Sequence[Asked],
    answers: Sequence[Answer],
    expected: Sequence[str],
    before: int | None = None,
    after: int | None = None,
) -> Measured:
    """A contender's answers, with what they should be."""
    came = [(one, answer, text) for one, answer, text in zip(asked, answers, expected, strict=True) if not answer.error]
    return Measured(
        name,
        max(answer.ended for answer in answers) - min(answer.sent for answer in answers),
        sum(one.new for one, _, _ in came),
        [answer.first - answer.sent for _, answer, _ in came],
        [answer.error for answer in answers if answer.error],
        sum(answer.text != text for _, answer, text in came),
        before,
        after,
    )


@torch.inference_mode()
def decode(
    model: DeRaModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    size: int,
    clients: int,
    advance: Callable[[int], None],
) -> list[Answer]:
    """
    The answers of `generate`, so many at a time, as clients would see them: each of them sends a request when it has
    the answer to the one before, and requests are computed in their order.
    """
    answers: list[Answer] = []
    filler = padding_id(model, tokenizer.pad_token_id)
    options = {"do_sample": False, "repetition_penalty": 1.0, "pad_token_id": filler}
    start = time.perf_counter()
    for place in range(0, len(asked), size):
        batch = asked[place : place + size]
        ids, mask = (tensor.to(model.device) for tensor in pad([one.ids for one in batch], filler, left=True))
        clock = FirstToken()
        lam = [one.lam for one in batch]
        new = max(one.new for one in batch)
        out = model.generate(
            ids, attention_mask=mask, lam=lam, max_new_tokens=new, stopping_criteria=[clock], **options
        )
        texts = [
            text_of(tokenizer, row[: one.new]) for row, one in zip(out[:, ids.shape[1] :].tolist(), batch, strict=True)
        ]
        ended = time.perf_counter()
        first = ended if clock.time is None else clock.time
        sent = [
            start if number < clients else answers[number - clients].ended
            for number in range(place, place + len(batch))
        ]
        answers += [Answer(when, first, ended, text) for when, text in zip(sent, texts, strict=True)]
        advance(len(batch))
    return answers


def _ask(
    server: AbstractContextManager[Server],
    asked: Sequence[Asked],
    bodies: Sequence[dict[str, Any]],
    clients: int,
    advance: Callable[[int], None],
) -> tuple[list[Answer], int | None, int | None]:
    """The answers of a server, and its memory after as many requests as there are clients, and after all."""
    full = [{**body, "max_tokens": one.new, "temperature": 0} for body, one in zip(bodies, asked, strict=True)]
    with server as running:
        send(running.port, full[:clients], clients, lambda items: None)
        before = resident(running.process)
        answers = send(running.port, full, clients, advance)
        return answers, before, resident(running.process)


@contextmanager
def merged(settings: ServeTimingSettings) -> Iterator[Path]:
    """A folder with the plain model at λ=1, whose completions end at their length."""
    source = settings.source.placed()
    with tempfile.TemporaryDirectory() as folder:
        model = load_for_bench(source).merge_and_unload()
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder)
        source.tokenizer().save_pretrained(folder)
        del model
        yield Path(folder)


def contenders(settings: ServeTimingSettings) -> list[str]:
    """
    Those of `--only`, or all that can be measured here; with batched `generate`, which they are compared with.

    Raises:
        DeRaError: one is not known, or can't be measured.
    """
    if unknown := [name for name in settings.only if name not in NAMES]:
        raise DeRaError(f"--only: {unknown[0]!r} is not known; there are: {'; '.join(NAMES)}.")
    wanted = set(settings.only or NAMES)
    reason = None
    if settings.quantization is not None:
        reason = "an adapter can't be merged into a quantized base without changing it"
    elif not is_serve_available():
        reason = "its packages are not installed: pip install 'transformers[serving]'"
    if reason is not None:
        if PLAIN in settings.only:
            raise DeRaError(f"--only {PLAIN!r}: {reason}.")
        wanted.discard(PLAIN)
    wanted |= {BATCHED_ALIGNED if name in ALIGNED else BATCHED for name in wanted}
    return [name for name in NAMES if name in wanted]
