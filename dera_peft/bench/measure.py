"""Interleaved, warm measurements of contenders over the same forced tokens."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dera_peft.bench.contenders import MIXTURES, Contender

COPIED = 1 << 28  # bytes that are copied to measure the bandwidth


@dataclass
class Timings:
    """
    What was measured of one contender at one batch size.

    Attributes:
        prefill: seconds of each prefill.
        steps: seconds of each decoding step.
        weights_bytes, cache_bytes, read_bytes: see `Contender`; the cache's at its fullest.
        peak_bytes: on a CUDA device, weights and the most that was allocated beyond what was there before.
        difference: between its logits and those of the first mixture measured, the largest over all steps, as a
            share of their standard deviation; None where it does not compute the mixture.
    """

    contender: str
    batch_size: int
    prompt: int
    prefill: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    weights_bytes: int = 0
    cache_bytes: int = 0
    read_bytes: int = 0
    peak_bytes: int | None = None
    difference: float | None = None


class Clock:
    """Marks points of a run; on a CUDA device on its own time line, so that nothing waits between two steps."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.marks: list = []

    def mark(self) -> None:
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.on_cuda:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def make_tokens(vocab_size: int, batch_size: int, count: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """`[B, count]` random token ids: the prompt and the tokens that are forced."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch_size, count), generator=generator).to(device)


def decode_forced(
    contender: Contender, tokens: torch.Tensor, prompt: int, chunk: int | None, see: Callable | None = None
) -> tuple[float, list[float]]:
    """
    Prefills `tokens[:, :prompt]` and decodes the others one by one.

    Args:
        see: is called with the logits of each step, `[B, V]`, outside of the measured time on a CPU.

    Returns:
        Seconds of the prefill, and of each step.
    """
    clock = Clock(tokens.device)
    clock.mark()
    contender.prefill(tokens[:, :prompt], tokens.shape[1], chunk)
    clock.mark()
    (prefill,) = clock.seconds()
    clock = Clock(tokens.device)
    clock.mark()
    for place in range(prompt, tokens.shape[1]):
        logits = contender.step(tokens[:, place : place + 1])
        if see is None:
            clock.mark()
        else:
            see(logits)
    return prefill, clock.seconds()


def measure(
    contenders: Sequence[Contender],
    batch_sizes: Sequence[int],
    prompt: int,
    new: int,
    rounds: int,
    chunk: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[list[Timings]]:
    """
    Yields the timings of all contenders after each round of each batch size, each list taking the place of the last of
    its batch size; the first, of the warm-up, has no times yet.

    In a round every contender prefills and decodes once, in an order that is shuffled anew, so that a machine that is
    slower for a while is so for all of them. In the warm-up their logits are compared.
    """
    order = random.Random(0)
    device = contenders[0].tensors[0].device
    vocab_size = contenders[0].passes[0].config.vocab_size
    for batch_size in batch_sizes:
        tokens = make_tokens(vocab_size, batch_size, prompt + new, device)
        timings = {one.name: Timings(one.name, batch_size, prompt) for one in contenders}
        torch.compiler.reset()  # steps of the last batch size are not needed again
        expected: list[torch.Tensor] = []
        for one in contenders:
            _warm_up(one, timings[one.name], tokens, prompt, chunk, expected)
            advance()
        yield list(timings.values())
        for _ in range(rounds):
            for one in order.sample(list(contenders), len(contenders)):
                prefill, steps = decode_forced(one, tokens, prompt, chunk)
                timings[one.name].prefill.append(prefill)
                timings[one.name].steps += steps
                advance()
            yield list(timings.values())
        for one in contenders:
            one.free()


def _warm_up(
    contender: Contender,
    timings: Timings,
    tokens: torch.Tensor,
    prompt: int,
    chunk: int | None,
    expected: list[torch.Tensor],
) -> None:
    """Runs it untimed, compares its logits (the first mixture leaves them in `expected`), and notes its memory."""
    on_cuda = tokens.device.type == "cuda"
    before = 0
    if on_cuda:
        # a first run, in which libraries take their workspaces and a step is compiled: neither is its own
        decode_forced(contender, tokens, prompt, chunk)
        contender.free()  # caches and recordings are
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found: list[torch.Tensor] = []
    decode_forced(contender, tokens, prompt, chunk, lambda logits: found.append(logits.float().cpu()))
    if contender.name in MIXTURES:
        if not expected:
            expected += found
        pairs = zip(found, expected, strict=True)
        timings.difference = max(float((one - other).abs().max() / other.std()) for one, other in pairs)
    timings.weights_bytes, timings.cache_bytes = contender.weights_bytes, contender.cache_bytes
    timings.read_bytes = contender.read_bytes
    if on_cuda:
        timings.peak_bytes = timings.weights_bytes + torch.cuda.max_memory_allocated() - before
    if not contender.engine.keeps_caches:
        contender.free()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the best of several copies of a large tensor."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        clock = Clock(device)
        clock.mark()
        target.copy_(source)
        clock.mark()
        best = min(best, clock.seconds()[0])
    return 2 * source.nbytes / best
