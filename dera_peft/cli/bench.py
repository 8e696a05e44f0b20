"""`dera bench`: what DeRa costs on this machine, beside the base alone and the other ways to mix."""

import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dera_peft.bench.contenders import NAMES, make_contenders, make_dera
from dera_peft.bench.measure import Timings, copy_bandwidth, measure
from dera_peft.bench.memory import measure_alone
from dera_peft.bench.report import decoding_table, environment, figures, memory_table, peaks_table, plot, spread
from dera_peft.bench.shapes import Source
from dera_peft.bench.sweep import SweepTimings, measure_sweep
from dera_peft.errors import DeRaError
from dera_peft.progress import show_progress

PEAKS = "memory of each contender alone in a process of its own (resident, less that of the libraries)"


def bench(
    source: Source,
    batch_sizes: Sequence[int],
    prompt: int,
    new: int,
    rounds: int,
    only: Sequence[str],
    engine: str,
    chunk: int | None,
    memory: bool,
    threads: int | None,
    as_json: bool,
    plot_file: Path | None,
) -> bool:
    """See `dera bench --help`. Returns whether it was interrupted."""
    names = list(only) or list(NAMES)
    settings = {**asdict(source), "prompt": prompt, "new": new, "rounds": rounds, "engine": engine, "chunk": chunk}
    with _threads(threads):
        peft_model = source.build()
        contenders = make_contenders(peft_model, names, engine)
        weight = contenders[0].tensors[0]
        device = weight.device
        _check_memory(memory, device)
        facts = environment(device)
        with torch.cuda.device_of(weight):  # clocks and counters are of the current device
            bandwidth = copy_bandwidth(device)
        found: dict[int, list[Timings]] = {}
        peaks: list[dict] = []
        interrupted = False
        total = len(batch_sizes) * len(names) * (1 + rounds + memory)
        try:
            with torch.cuda.device_of(weight), show_progress("measuring", total) as advance:
                for timings in measure(contenders, batch_sizes, prompt, new, rounds, chunk, lambda: advance(1)):
                    found[timings[0].batch_size] = timings
                for batch_size in batch_sizes if memory else ():
                    for name in names:
                        alone = measure_alone(source, name, batch_size, prompt, new, chunk, threads)
                        peaks.append({"contender": name, "batch": batch_size, **alone})
                        advance(1)
        except KeyboardInterrupt:
            interrupted = True
    rows = figures([one for timings in found.values() for one in timings], bandwidth)
    if as_json:
        print(
            json.dumps(
                {
                    "environment": facts,
                    "settings": settings,
                    "copy_bytes_per_second": bandwidth,
                    "results": rows,
                    "memory_alone": peaks,
                    "complete": not interrupted,
                },
                indent=2,
                ensure_ascii=False,
            )
        )
    else:
        _print(source.title, facts, settings, bandwidth, rows, peaks)
    if plot_file is not None and rows:
        plot(rows, plot_file, f"{source.title}; {facts['device']}")
    return interrupted


def bench_sweep(
    source: Source,
    lambdas: Sequence[float],
    samples: int,
    prompts: int,
    prompt: int,
    new: int,
    batch_size: int,
    rounds: int,
    threads: int | None,
    as_json: bool,
) -> bool:
    """See `dera bench sweep --help`. Returns whether it was interrupted."""
    timings = SweepTimings()
    interrupted = False
    with _threads(threads):
        model = make_dera(source.build())
        facts = environment(model.device)
        try:
            with show_progress("measuring", 2 * rounds) as advance:
                measure_sweep(
                    model, lambdas, samples, prompts, prompt, new, batch_size, rounds, timings, lambda: advance(1)
                )
        except KeyboardInterrupt:
            interrupted = True
    settings = {
        **asdict(source), "lambda": list(lambdas), "samples": samples, "prompts": prompts, "prompt": prompt,
        "new": new, "batch": batch_size, "rounds": rounds,
    }  # fmt: skip
    rows = {name: spread(values) for name, values in vars(timings).items() if values}
    ratio = rows["sweep"]["median"] / rows["separate"]["median"] if len(rows) == 2 else None
    if as_json:
        result = {"environment": facts, "settings": settings, "seconds": rows, "ratio": ratio}
        print(json.dumps({**result, "complete": not interrupted}, indent=2, ensure_ascii=False))
        return interrupted
    console = Console()
    console.print(f"{source.title} on {facts['device']}: {len(lambdas)} λ × {samples} samples of {prompts} prompts")
    table = Table(box=None, header_style="bold cyan", padding=(0, 1))
    for name in ("", "seconds", "quartiles"):
        table.add_column(name)
    labels = {"sweep": "one sweep", "separate": f"{len(lambdas) * samples} separate calls of generate"}
    for name, figure in rows.items():
        table.add_row(labels[name], f"{figure['median']:.2f}", f"{figure['q1']:.2f} to {figure['q3']:.2f}")
    console.print(table)
    if ratio is not None:
        console.print(f"the sweep takes {ratio:.2f} of the time")
    return interrupted


def read_batches(text: str) -> list[int]:
    """`"1,4"` -> [1, 4]."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise DeRaError(f"--batch: {text!r} is not batch sizes with commas, as 1,4,16.")
    return list(dict.fromkeys(sizes))


@contextmanager
def _threads(count: int | None):
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_memory(wanted: bool, device: torch.device) -> None:
    if wanted and device.type != "cpu":
        raise DeRaError("--memory is for CPUs; on a GPU the allocator's peak is measured in any case.")


def _print(title: str, facts: dict, settings: dict, bandwidth: float, rows: list[dict], peaks: list[dict]) -> None:
    console = Console()
    console.print(f"{title} on {facts['device']} ({facts['cpu']}), {facts['date']}", style="bold", highlight=False)
    console.print(
        f"{settings['prompt']} tokens of prompt, {settings['new']} steps, {settings['rounds']} rounds; "
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
