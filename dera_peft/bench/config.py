"""What `dera bench` measures: its settings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.lambdas import lambdas_setting
from dera_peft.errors import DeRaError
from dera_peft.serve.settings import EngineSettings
from dera_peft.settings import COUNT, Check, setting

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

PICTURES = (".png", ".svg", ".pdf")
MODEL, MEASURING = "What is measured", "Measuring"


def read_batches(texts: Sequence[str]) -> list[int]:
    """`["1,4"]` -> [1, 4]."""
    text = ",".join(texts)
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise DeRaError(f"--batch: {text!r} is not batch sizes with commas, as 1,4,16.")
    return list(dict.fromkeys(sizes))


@dataclass(frozen=True, kw_only=True)
class BenchedModel(ModelSource):
    """
    What is measured: a shape with random weights, or a base and an adapter.

    Raises:
        DeRaError: both or neither are given, or an option is for the other.
    """

    called: ClassVar[str] = "dera bench"

    shape: str | None = setting(
        None,
        "llama-8b, llama-1b, qwen3-0.6b or smollm2-135m, in place of --base and --adapter: random weights of this "
        "shape and a random LoRA of rank 16 on all linear layers. Nothing is downloaded.",
        metavar="NAME",
        panel=MODEL,
    )
    layers: int | None = setting(None, "Give the --shape so many layers.", check=COUNT, metavar="N", panel=MODEL)
    top: float = setting(
        1.0,
        "The share of the --shape's layers, from the top, that the adapter is on; 0.5 is the upper half.",
        metavar="SHARE",
        panel=MODEL,
    )
    threads: int | None = setting(
        None, "Threads on a CPU; torch's own choice by default.", check=COUNT, metavar="N", panel=MEASURING
    )

    def __post_init__(self):
        super().__post_init__()
        is_loaded = any((self.base, self.adapter, self.adapters, self.reference))
        if is_loaded == (self.shape is not None):
            raise DeRaError("say what to measure: --base and --adapter, or --shape.")
        if self.quantization == "int8":
            raise DeRaError(
                "--quantization int8: its layers keep their weights in a state of their own, which the ways that are "
                "compared can't share; measure nf4 or fp4."
            )
        if not 0 < self.top <= 1:
            raise DeRaError(f"--top must be in (0, 1]; got {self.top:g}.")
        if is_loaded and (self.top != 1.0 or self.layers is not None):
            raise DeRaError("--top and --layers make a random model of a --shape; a loaded one is as it is.")

    @property
    def device(self) -> "torch.device":
        """
        The one device that it is measured on: the one named, or else the accelerator if there is one.

        Raises:
            DeRaError: several are named, or one that is not here.
        """
        import torch

        from dera_peft.checkpoint.devices import STRATEGIES, read_device_map

        if self.device_map is None:
            return torch.accelerator.current_accelerator() or torch.device("cpu")
        if self.device_map in STRATEGIES:
            raise DeRaError(f"--device-map {self.device_map}: what is measured is on one device; name it, as cuda:0.")
        device = read_device_map(self.device_map)
        assert device is not None  # one is named
        return torch.device(device)

    def build(self, context: int = 0) -> "PeftModel":
        """
        The model with its adapter.

        Args:
            context: tokens that the positions of a shape have to reach.
        """
        from dera_peft.bench.shapes import load_for_bench, make_random, read_config

        device = self.device
        if self.shape is None:
            return load_for_bench(replace(self, device_map=str(device)))
        config = read_config(self.shape, context, self.layers)
        return make_random(config, self.dtype, device, self.quantization, self.top)

    @property
    def title(self) -> str:
        parts = [self.shape or self.name, self.quantization, self.dtype]
        if self.layers is not None:
            parts.append(f"{self.layers} layers")
        if self.top != 1.0:
            parts.append(f"adapter on the top {self.top:.0%} of the layers")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class StepSettings(BenchedModel):
    """The settings of `dera bench`."""

    batch: tuple[int, ...] = setting(
        (1, 4, 16),
        "Batch sizes, with commas.",
        check=Check(lambda sizes: len(sizes) > 0 and min(sizes) >= 1, "batch sizes, as [1, 4, 16]"),
        metavar="B[,B…]",
        panel=MEASURING,
        parse=read_batches,
    )
    prompt: int = setting(128, "Tokens of the prompt.", check=COUNT, metavar="N", panel=MEASURING)
    new: int = setting(64, "Decoding steps.", check=COUNT, metavar="N", panel=MEASURING)
    rounds: int = setting(5, "Measured rounds.", check=COUNT, metavar="N", panel=MEASURING)
    only: tuple[str, ...] = setting(
        (), "Measure this contender, named as in the table; can be repeated.", metavar="NAME", panel=MEASURING
    )
    engine: Literal["dynamic", "static", "captured"] = setting(
        "dynamic",
        "dynamic: eager, a growing cache. static: a static cache and a compiled step (CUDA graphs on a GPU). captured: "
        "a static cache and a step that is recorded as a CUDA graph. The last two are for those that are one pass of a "
        "plain model or of DeRa; the others stay dynamic.",
        panel=MEASURING,
    )
    prefill_chunk: int | None = setting(
        None, "Prefill so many tokens at once.", check=COUNT, metavar="N", panel=MEASURING
    )
    memory: bool = setting(
        False,
        "Also measure each contender's peak memory on a CPU, each in a process of its own.",
        panel=MEASURING,
    )
    json: bool = setting(False, "Print the figures as JSON.")
    plot: Path | None = setting(
        None,
        "A bar chart: .png, .svg or .pdf.",
        check=Check(lambda file: file.suffix in PICTURES, f"a file that ends in {', '.join(PICTURES)}"),
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class SweepTimingSettings(BenchedModel):
    """The settings of `dera bench sweep`."""

    called: ClassVar[str] = "dera bench sweep"

    lambdas: tuple[float, ...] = lambdas_setting((0.0, 0.5, 1.0, 1.5, 2.0), "Strengths.", MEASURING)
    samples: int = setting(4, "Completions per prompt and λ.", check=COUNT, metavar="N", panel=MEASURING)
    prompts: int = setting(8, "Random prompts.", check=COUNT, metavar="N", panel=MEASURING)
    prompt: int = setting(128, "Tokens of each prompt.", check=COUNT, metavar="N", panel=MEASURING)
    new: int = setting(32, "New tokens of each completion.", check=COUNT, metavar="N", panel=MEASURING)
    batch: int = setting(8, "Completions decoded at once, by both.", check=COUNT, metavar="B", panel=MEASURING)
    rounds: int = setting(1, "Measured rounds.", check=COUNT, metavar="N", panel=MEASURING)
    json: bool = setting(False, "Print the figures as JSON.")


@dataclass(frozen=True, kw_only=True)
class ServeTimingSettings(EngineSettings):
    """The settings of `dera bench serve`."""

    called: ClassVar[str] = "dera bench serve"

    lambdas: tuple[float, ...] = lambdas_setting((0.0, 0.5, 1.0), "Strengths, one request after the other.", MEASURING)
    requests: int = setting(1000, "Requests, with random texts as prompts.", check=COUNT, metavar="N", panel=MEASURING)
    clients: int = setting(
        64,
        "Clients, each of which sends its next request when it has its answer; also the batch size of `generate`.",
        check=COUNT,
        metavar="N",
        panel=MEASURING,
    )
    prompt: int = setting(
        32, "Tokens of the longest prompts; the shortest have a quarter.", check=COUNT, metavar="N", panel=MEASURING
    )
    new: int = setting(
        32, "New tokens of the longest answers; the shortest have a quarter.", check=COUNT, metavar="N", panel=MEASURING
    )
    threads: int | None = setting(
        None, "Threads on a CPU; torch's own choice by default.", check=COUNT, metavar="N", panel=MEASURING
    )
    only: tuple[str, ...] = setting(
        (), "Measure this contender, named as in the table; can be repeated.", metavar="NAME", panel=MEASURING
    )
    json: bool = setting(False, "Print the figures as JSON.")

    @property
    def title(self) -> str:
        return ", ".join(part for part in (self.source.name, self.quantization, self.dtype) if part)
