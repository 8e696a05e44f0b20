"""What was measured as rows of figures, a table, JSON and a bar chart."""

import io
import platform
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dera_peft.bench.contenders import BASE, BASE_TWICE
from dera_peft.bench.measure import Timings
from dera_peft.files import write_atomically
from dera_peft.formatting import format_bytes
from dera_peft.versions import package_versions


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def environment(device: torch.device) -> dict:
    """What the figures depend on, beside the settings."""
    on_cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if on_cuda else f"CPU, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "versions": package_versions("bitsandbytes") | {"python": platform.python_version()},
    }


def figures(timings: Sequence[Timings], bandwidth: float | None = None) -> list[dict]:
    """
    A row for each contender and batch size that has times: medians and quartiles in seconds, rates, bytes, and the
    ratios of its medians to those of the base at the same batch size.

    Args:
        bandwidth: bytes a second that the device copies.
    """
    rows: list[dict[str, Any]] = []
    for one in timings:
        if not one.steps:
            continue
        step, prefill = spread(one.steps), spread(one.prefill)
        rows.append(
            {
                "contender": one.contender,
                "batch": one.batch_size,
                "prefill_seconds": prefill,
                "prefill_tokens_per_second": one.batch_size * one.prompt / prefill["median"],
                "step_seconds": step,
                "tokens_per_second": one.batch_size / step["median"],
                "weights_bytes": one.weights_bytes,
                "cache_bytes": one.cache_bytes,
                "peak_bytes": one.peak_bytes,
                "bandwidth_share": None if bandwidth is None else one.read_bytes / step["median"] / bandwidth,
                "logits_difference": one.difference,
            }
        )
    by_name = {(row["contender"], row["batch"]): row for row in rows}
    for row in rows:
        for other, key in ((BASE, "base"), (BASE_TWICE, "base_2b")):
            against = by_name.get((other, row["batch"]))
            for what in ("step", "prefill"):
                row[f"{what}_over_{key}"] = (
                    row[f"{what}_seconds"]["median"] / against[f"{what}_seconds"]["median"] if against else None
                )
    return rows


def decoding_table(rows: Sequence[dict]) -> Table:
    """Milliseconds a step, tokens a second of the whole batch, and ratios to the base at B and at 2B rows."""

    def cells(row: dict) -> list[str]:
        step = row["step_seconds"]
        return [
            f"{step['median'] * 1e3:.1f}",
            f"{step['q1'] * 1e3:.1f}–{step['q3'] * 1e3:.1f}",
            f"{row['tokens_per_second']:.1f}",
            _ratio(row["step_over_base"]),
            _ratio(row["step_over_base_2b"]),
        ]

    return _table(rows, ("ms/step", "quartiles", "tokens/s", "× B", "× 2B"), cells)


def memory_table(rows: Sequence[dict]) -> Table:
    """Prefill and memory; where the weights are on a CUDA device, the allocator's peak too."""
    has_peak = any(row["peak_bytes"] is not None for row in rows)

    def cells(row: dict) -> list[str]:
        found = [
            f"{row['prefill_tokens_per_second']:.0f}",
            _ratio(row["prefill_over_base"]),
            format_bytes(row["weights_bytes"]),
            format_bytes(row["cache_bytes"]),
            "" if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.0%}",
        ]
        return [*found, format_bytes(row["peak_bytes"] or 0)] if has_peak else found

    names = ["prefill/s", "× B", "weights", "cache", "bandwidth", *(["peak"] if has_peak else [])]
    return _table(rows, names, cells)


def _table(rows: Sequence[dict], names: Sequence[str], cells: Callable[[dict], list[str]]) -> Table:
    table = Table(box=None, header_style="bold cyan", padding=(0, 1, 0, 0))
    table.add_column("B", justify="right")
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last not in (None, row["batch"]):
            table.add_row()
        table.add_row("" if last == row["batch"] else str(row["batch"]), row["contender"], *cells(row))
        last = row["batch"]
    return table


def peaks_table(peaks: Sequence[dict]) -> Table:
    """Of `memory.measure_alone`, less what the libraries take."""

    def cells(row: dict) -> list[str]:
        return [format_bytes(row[name] - row["libraries"]) for name in ("model", "peak")]

    return _table(peaks, ("model", "peak"), cells)


def serving_table(rows: Sequence[dict]) -> Table:
    """Of `serving.Measured.figures`."""
    table = Table(box=None, header_style="bold cyan", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("seconds", "tokens/s", "first token", "95 %", "memory", "at the end", "answered", "lost", "different"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        first = row["first_token_seconds"].values()
        memory = row["memory_bytes"].values()
        table.add_row(
            row["contender"],
            f"{row['seconds']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            *("" if seconds is None else f"{seconds:.2f} s" for seconds in first),
            *("" if held is None else format_bytes(held) for held in memory),
            *(str(row[name]) for name in ("answered", "lost", "different")),
        )
    return table


def plot(rows: Sequence[dict], file: Path, title: str) -> None:
    """Bars of the milliseconds of a decoding step, with quartiles, by contender; a panel for each batch size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(row["batch"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure = Figure(figsize=(4 + 3.2 * len(batches), 1.2 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axis, batch in zip(axes, batches, strict=True):
        here = [row for row in rows if row["batch"] == batch]
        medians = [row["step_seconds"]["median"] * 1e3 for row in here]
        low = [m - row["step_seconds"]["q1"] * 1e3 for m, row in zip(medians, here, strict=True)]
        high = [row["step_seconds"]["q3"] * 1e3 - m for m, row in zip(medians, here, strict=True)]
        colors = ["#d95f02" if row["contender"].startswith("DeRa") else "#7f8c9b" for row in here]
        bars = axis.barh([row["contender"] for row in here], medians, xerr=[low, high], color=colors, ecolor="#333333")
        labels = [
            f"{row['step_over_base']:.2f} × base" if row["step_over_base"] is not None else f"{median:.1f} ms"
            for row, median in zip(here, medians, strict=True)
        ]
        axis.bar_label(bars, labels, padding=6, fontsize=8)
        axis.margins(x=0.35)
        axis.set(xlabel="ms a decoding step", title=f"B = {batch}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    stream = io.BytesIO()
    figure.savefig(stream, format=file.suffix[1:], dpi=150)
    write_atomically(file, stream.getvalue())


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
