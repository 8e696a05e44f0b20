"""`dera bench`: what DeRa costs on this machine, beside the base alone and the other ways to mix."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from dera_peft.bench.config import ServeTimingSettings, StepSettings, SweepTimingSettings
from dera_peft.cli.program import INTERRUPTED
from dera_peft.errors import DeRaError
from dera_peft.lock import hold
from dera_peft.serve.settings import check_packages

if TYPE_CHECKING:
    from dera_peft.bench.measure import Timings
    from dera_peft.bench.serving import Measured

PEAKS = "memory of each contender alone in a process of its own (resident, less that of the libraries)"


def bench(settings: StepSettings) -> None:
    """Measure what a decoding step costs: the base alone, DeRa, and the other ways to mix two models.

    All decode the same forced tokens over the same weights, in interleaved rounds after a warm-up; shown are medians
    and quartiles. Ctrl-C shows what was measured so far.

    **Examples**

    `dera bench --base org/base --adapter ./dpo --quantization nf4 --batch 1,8`

    `dera bench --shape smollm2-135m --dtype float32 --threads 2 --plot bench.png`

    `dera bench sweep --shape smollm2-135m`
    """
    settings.check_paths()
    with hold(settings.plot, "--plot"):
        _bench(settings)


def _bench(settings: StepSettings) -> None:
    import torch

    from dera_peft.bench.contenders import NAMES, make_contenders
    from dera_peft.bench.measure import copy_bandwidth, measure
    from dera_peft.bench.memory import measure_alone
    from dera_peft.bench.report import environment, figures, plot
    from dera_peft.progress import show_progress

    prompt, new, rounds, chunk = settings.prompt, settings.new, settings.rounds, settings.prefill_chunk
    names = settings.only or NAMES
    with _threads(settings.threads):
        contenders = make_contenders(settings.build(prompt + new), names, settings.engine)
        weight = contenders[0].tensors[0]
        if settings.memory and weight.device.type != "cpu":
            raise DeRaError("--memory is for CPUs; on a GPU the allocator's peak is measured in any case.")
        facts = environment(weight.device)
        with torch.cuda.device_of(weight):  # clocks and counters are of the current device
            bandwidth = copy_bandwidth(weight.device)
        found: dict[int, list[Timings]] = {}
        peaks: list[dict] = []
        interrupted = False
        total = len(settings.batch) * len(names) * (1 + rounds + settings.memory)
        try:
            with torch.cuda.device_of(weight), show_progress("measuring", total) as advance:
                for timings in measure(contenders, settings.batch, prompt, new, rounds, chunk, lambda: advance(1)):
                    found[timings[0].batch_size] = timings
                for batch_size in settings.batch if settings.memory else ():
                    for name in names:
                        alone = measure_alone(settings, name, batch_size)
                        peaks.append({"contender": name, "batch": batch_size, **alone})
                        advance(1)
        except KeyboardInterrupt:
            interrupted = True
    rows = figures([one for timings in found.values() for one in timings], bandwidth)
    if settings.json:
        result = {"copy_bytes_per_second": bandwidth, "results": rows, "memory_alone": peaks}
        _print_json(settings, facts, result, interrupted)
    else:
        _print(settings, facts, bandwidth, rows, peaks)
    if settings.plot is not None and rows:
        plot(rows, settings.plot, f"{settings.title}; {facts['device']}")
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def bench_sweep(settings: SweepTimingSettings) -> None:
    """Measure a whole sweep over λ against separate calls of `generate` for each λ and sample.

    **Examples**

    `dera bench sweep --shape smollm2-135m --lambda 0,0.5,1`
    """
    settings.check_paths()
    from dera_peft.bench.contenders import make_dera
    from dera_peft.bench.report import environment, spread
    from dera_peft.bench.sweep import SweepTimings, measure_sweep
    from dera_peft.progress import show_progress

    timings = SweepTimings()
    interrupted = False
    with _threads(settings.threads):
        model = make_dera(settings.build(settings.prompt + settings.new))
        facts = environment(model.device)
        try:
            with show_progress("measuring", 2 * settings.rounds) as advance:
                measure_sweep(model, settings, timings, lambda: advance(1))
        except KeyboardInterrupt:
            interrupted = True
    rows = {name: spread(values) for name, values in vars(timings).items() if values}
    ratio = rows["sweep"]["median"] / rows["separate"]["median"] if len(rows) == 2 else None
    if settings.json:
        _print_json(settings, facts, {"seconds": rows, "ratio": ratio}, interrupted)
    else:
        _print_sweep(settings, facts, rows, ratio)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def bench_serve(settings: ServeTimingSettings) -> None:
    """Measure a load of requests through `dera serve`, against `generate` and `transformers serve`.

    Every answer is compared with that of `generate` at its λ; the exit code is 1 where one is lost or another text.
    Each server is a process of its own; `transformers serve` has the adapter merged into the base, at λ=1.

    **Examples**

    `dera bench serve --adapter runs/tiny/dpo --threads 2`
    """
    check_packages()
    settings.check_paths()
    from dera_peft.bench.report import environment
    from dera_peft.bench.serving import contenders, measure_serving
    from dera_peft.model import DeRaModel
    from dera_peft.progress import show_progress

    names = contenders(settings)
    found: list[Measured] = []
    interrupted = False
    with _threads(settings.threads):
        model = DeRaModel.from_source(settings.source.placed())
        facts = environment(model.device)
        try:
            with show_progress("measuring", len(names) * settings.requests) as advance:
                measure_serving(model, settings, names, found, advance)
        except KeyboardInterrupt:
            interrupted = True
    rows = [one.figures() for one in found]
    if settings.json:
        _print_json(settings, facts, {"results": rows}, interrupted)
    else:
        _print_serving(settings, facts, rows)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(row["lost"] or row["different"] for row in rows):
        raise typer.Exit(1)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _print_json(
    settings: StepSettings | SweepTimingSettings | ServeTimingSettings,
    environment: dict,
    result: dict,
    interrupted: bool,
) -> None:
    from dera_peft.cli.console import print_json

    whole = {"environment": environment, "settings": asdict(settings), **result, "complete": not interrupted}
    print_json(json.dumps(whole, indent=2, ensure_ascii=False, default=str))


def _print(settings: StepSettings, facts: dict, bandwidth: float, rows: list[dict], peaks: list[dict]) -> None:
    from rich.console import Console

    from dera_peft.bench.report import decoding_table, memory_table, peaks_table

    console = Console()
    title = f"{settings.title} on {facts['device']} ({facts['cpu']}), {facts['date']}"
    console.print(title, style="bold", highlight=False)
    console.print(
        f"{settings.prompt} tokens of prompt, {settings.new} steps, {settings.rounds} rounds; "
        f"memory copies {bandwidth / 2**30:.1f} GiB/s; "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        highlight=False,
    )
    if not rows:
        console.print("nothing was measured yet")
        return
    console.print(decoding_table(rows))
    console.print()
    console.print(memory_table(rows))
    console.print(
        "× B, × 2B: ratios to the base at B and at 2B rows; bandwidth: what a step reads, of what memory copies"
    )
    differences = [row["logits_difference"] for row in rows if row["logits_difference"] is not None]
    if len(differences) > 1:
        console.print(
            f"logits of all ways to mix: equal within {max(differences):.1e} of their standard deviation",
            highlight=False,
        )
    if peaks:
        console.print(PEAKS)
        console.print(peaks_table(peaks))


def _print_sweep(settings: SweepTimingSettings, facts: dict, rows: dict[str, dict], ratio: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    count, samples = len(settings.lambdas), settings.samples
    console.print(f"{settings.title} on {facts['device']}: {count} λ × {samples} samples of {settings.prompts} prompts")
    table = Table(box=None, header_style="bold cyan", padding=(0, 1))
    for name in ("", "seconds", "quartiles"):
        table.add_column(name)
    labels = {"sweep": "one sweep", "separate": f"{count * samples} separate calls of generate"}
    for name, figure in rows.items():
        table.add_row(labels[name], f"{figure['median']:.2f}", f"{figure['q1']:.2f} to {figure['q3']:.2f}")
    console.print(table)
    if ratio is not None:
        console.print(f"the sweep takes {ratio:.2f} of the time")


def _print_serving(settings: ServeTimingSettings, facts: dict, rows: list[dict]) -> None:
    from rich.console import Console

    from dera_peft.bench.report import serving_table

    console = Console()
    console.print(f"{settings.title} on {facts['device']} ({facts['cpu']}), {facts['date']}", style="bold")
    console.print(
        f"{settings.requests} requests of {settings.clients} clients, up to {settings.prompt} tokens of prompt and "
        f"{settings.new} new ones; " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        highlight=False,
    )
    console.print(serving_table(rows))
    console.print(
        "first token: median and 95th percentile, from a client's request on; memory: resident in the server's "
        "process, at first and at the end; different: answers that are not those of batched generate",
        highlight=False,
    )
    for error in dict.fromkeys(error for row in rows for error in row["errors"]):
        console.print(f"lost: {error}", highlight=False, markup=False)
