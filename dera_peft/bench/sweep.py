"""What a sweep over λ costs against separate calls of `generate`, over the same prompts at the same batch size."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dera_peft.bench.config import SweepTimingSettings
from dera_peft.bench.measure import make_tokens
from dera_peft.decoding.batching import decode
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.model import DeRaModel


class NoTokenizer:
    """The part of a tokenizer that decoding asks for, where nobody reads the text."""

    pad_token_id = 0

    def decode(self, tokens: Sequence[int], **kwargs) -> str:
        return ""


@dataclass
class SweepTimings:
    """Seconds of each whole sweep, and of each set of separate calls."""

    sweep: list[float] = field(default_factory=list)
    separate: list[float] = field(default_factory=list)


def measure_sweep(
    model: DeRaModel,
    settings: SweepTimingSettings,
    timings: SweepTimings,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """
    Decodes completions of random prompts at each λ, `settings.samples` of each, and notes the times in `timings`:

    - sweep: all requests given to `decoding.decode` at once;
    - separate: for each λ and sample a `generate` over the prompts, `settings.batch` of them at a time.

    Every completion has `settings.new` tokens: none ends before. Both go first in turn, after a short run of each that
    is not timed.
    """
    model.generation_config.eos_token_id = None
    tokens = make_tokens(model.config.vocab_size, settings.prompts, settings.prompt, torch.device("cpu"))
    ids = dict(enumerate(tokens.tolist()))

    def sweep(lambdas: Sequence[float], samples: int, new: int) -> None:
        requests = [Request(index, lam, sample) for lam in lambdas for sample in range(samples) for index in ids]
        for _ in decode(model, NoTokenizer(), ids, requests, Sampling(max_new_tokens=new), settings.batch):
            pass

    def separate(lambdas: Sequence[float], samples: int, new: int) -> None:
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "pad_token_id": 0}
        for lam in lambdas:
            for _ in range(samples):
                for batch in tokens.to(model.device).split(settings.batch):
                    model.generate(batch, attention_mask=torch.ones_like(batch), lam=lam, **options)

    ways = [(sweep, timings.sweep), (separate, timings.separate)]
    for way, _ in ways:
        way([0.5], 1, 1)
    for _ in range(settings.rounds):
        for way, times in ways:
            start = time.perf_counter()
            way(settings.lambdas, settings.samples, settings.new)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            times.append(time.perf_counter() - start)
            advance()
        ways.reverse()
