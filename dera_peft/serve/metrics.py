"""What `/metrics` shows, in Prometheus' form."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dera_peft.serve.engine import Statistics
from dera_peft.serve.handle import Handle

WINDOW = 10.0  # seconds over which tokens/s is taken
LAMBDAS = (-5, -2, -1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
GAUGES = {
    "dera_rows": ("rows", "Rows that a decoding step computes"),
    "dera_running": ("running", "Completions that are decoded"),
    "dera_queue": ("waiting", "Completions that wait"),
    "dera_held_tokens": ("held_tokens", "Tokens whose keys and values are held for completions"),
    "dera_prefix_tokens": ("prefix_tokens", "Tokens that the prefix cache holds"),
}
COUNTERS = {
    "dera_prompt_tokens": ("prompt_tokens", "Tokens of prompts that were computed"),
    "dera_cached_tokens": ("cached_tokens", "Tokens of prompts from the prefix cache"),
    "dera_generated_tokens": ("generated_tokens", "Tokens that were drawn"),
    "dera_steps": ("steps", "Decoding steps"),
}


class Metrics:
    """
    Args:
        statistics: of the engine.

    Attributes:
        in_progress: requests that are being answered.
    """

    def __init__(self, statistics: Callable[[], Statistics]):
        self.in_progress = 0
        self.registry = CollectorRegistry()
        self.answers = Counter(
            "dera_requests", "Answers by path and status", ["path", "status"], registry=self.registry
        )
        open_requests = Gauge("dera_requests_in_progress", "Requests that are being answered", registry=self.registry)
        open_requests.set_function(lambda: self.in_progress)
        self.seconds = Histogram(
            "dera_request_seconds", "Seconds to a completion's end", buckets=SECONDS, registry=self.registry
        )
        self.first_token = Histogram(
            "dera_time_to_first_token_seconds", "Seconds to a completion's first token", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.lam = Histogram(
            "dera_lambda", "λ of completions, by adapter", ["adapter"], buckets=LAMBDAS, registry=self.registry
        )
        self.registry.register(_EngineCollector(statistics))
        self._recent: deque[float] = deque([1.0], maxlen=64)  # seconds of completions

    def began(self, lambdas: dict[str, float]) -> None:
        for adapter, lam in lambdas.items():
            self.lam.labels(adapter).observe(lam)

    def ended(self, handle: Handle) -> None:
        if handle.finished is not None:
            self.seconds.observe(handle.finished - handle.created)
            self._recent.append(handle.finished - handle.created)
        if handle.first_token is not None:
            self.first_token.observe(handle.first_token - handle.created)

    def retry_after(self) -> int:
        """Seconds in which a place in the queue should be free: what completions took of late."""
        return max(1, min(60, round(sum(self._recent) / len(self._recent))))


class _EngineCollector:
    """The engine's counts, read when Prometheus asks."""

    def __init__(self, statistics: Callable[[], Statistics]):
        self.statistics = statistics
        self.seen: deque[tuple[float, int]] = deque()  # time, tokens that were drawn until then

    def collect(self) -> Iterator[Metric]:
        now = self.statistics()
        for name, (field, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, getattr(now, field))
        for name, (field, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, getattr(now, field))
        finished = CounterMetricFamily("dera_finished", "Completions by what ended them", labels=["reason"])
        for reason, count in now.finished.items():
            finished.add_metric([reason], count)
        yield finished
        yield GaugeMetricFamily(
            "dera_tokens_per_second", "Tokens drawn a second since a scrape at most so long ago: 10 s, or the last one",
            self._speed(now.generated_tokens),
        )  # fmt: skip

    def _speed(self, tokens: int) -> float:
        now = time.monotonic()
        self.seen.append((now, tokens))
        while len(self.seen) > 2 and self.seen[1][0] < now - WINDOW:
            self.seen.popleft()
        before, count = self.seen[0]
        return (tokens - count) / (now - before) if now > before else 0.0
