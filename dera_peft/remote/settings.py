"""Where completions are decoded: in this process, in vLLM beside it, or at a server."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from dera_peft.checkpoint.source import ACCESS, ModelSource
from dera_peft.decoding.requests import rule_fields
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.names import LOGITS
from dera_peft.engine.rules import LINEAR, Schedule
from dera_peft.errors import DeRaError
from dera_peft.settings import COUNT, Check, Settings, option_name, read_pairs, setting

PANEL = "Engine"
KEY_VARIABLE = "DERA_API_KEY"  # of the environment: a key is not for a list of processes, nor for files
AT_ENDPOINT, IN_VLLM = 64, 2048  # requests that are under way at once
OWN_ARGUMENTS = {  # of vLLM's `LLM`, which other settings say
    "model": "--base", "tokenizer": "--adapter", "revision": "--revision", "dtype": "--dtype",
    "trust_remote_code": "--trust-remote-code", "hf_overrides": "--base", "additional_config": "--adapter",
    "generation_config": "the base's own", "seed": "--seed",
}  # fmt: skip
# Arguments of vLLM's `LLM` that say where and how much is computed, and not what.
PLACES = {
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
    "block_size", "enforce_eager", "enable_prefix_caching", "enable_chunked_prefill", "swap_space", "cpu_offload_gb",
    "disable_log_stats", "load_format", "download_dir", "async_scheduling",
}  # fmt: skip


def read_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """`["tensor_parallel_size=2"]` -> {"tensor_parallel_size": 2}: a value is written as in YAML."""
    return {name: yaml.safe_load(value) for name, value in read_pairs("--vllm-argument", texts).items()}


@dataclass(frozen=True)
class RemoteSettings(Settings):
    """
    What decodes.

    Raises:
        DeRaError: a value is of another type or out of range, or would have no effect.
    """

    engine: Literal["dera", "vllm"] = setting(
        "dera",
        "What decodes: dera, the model in this process, or vllm, for several GPUs and many prompts.",
        panel=PANEL,
    )
    endpoint: str | None = setting(
        None,
        "Address of a running server that decodes in its place: of dera serve, or with --engine vllm of dera serve "
        f"--engine vllm. A key that it asks for is taken from the environment ({KEY_VARIABLE}).",
        metavar="URL",
        panel=PANEL,
    )
    concurrency: int | None = setting(
        None,
        f"Completions that are under way at once; {AT_ENDPOINT} at an endpoint and {IN_VLLM} in vLLM unless given.",
        check=COUNT,
        metavar="N",
        panel=PANEL,
    )
    timeout: float = setting(
        600.0,
        "How long an endpoint may take to answer a request, then it is sent again; and how long it may be busy (429).",
        check=Check(lambda value: value > 0, "more than 0"),
        metavar="S",
        panel=PANEL,
    )
    vllm_python: Path | None = setting(
        None,
        "The Python of the environment that vLLM is installed in, where that is not this one.",
        metavar="FILE",
        panel=PANEL,
    )
    vllm_arguments: Mapping[str, Any] = setting(
        {},
        "Further arguments of vLLM's LLM, as tensor_parallel_size=2. Can be repeated.",
        metavar="NAME=VALUE",
        panel=PANEL,
        option="--vllm-argument",
        parse=read_arguments,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.endpoint is not None:
            object.__setattr__(self, "endpoint", _read_url(self.endpoint))
        for name, is_used in {
            "concurrency": not self.is_local,
            "timeout": self.endpoint is not None,
            "vllm_python": self.starts_vllm,
            "vllm_arguments": self.starts_vllm,
        }.items():
            each = next(each for each in fields(RemoteSettings) if each.name == name)
            value = getattr(self, name)
            if not is_used and value not in ({}, each.default):
                needed = {"concurrency": "--engine vllm or --endpoint", "timeout": "--endpoint"}
                raise DeRaError(
                    f"{name}={value!r} has no effect: {option_name(each)} is for "
                    f"{needed.get(name, '--engine vllm without --endpoint')}."
                )
        for name in self.vllm_arguments:
            if name in OWN_ARGUMENTS:
                raise DeRaError(f"vllm_arguments: {name!r} is said by other settings: {OWN_ARGUMENTS[name]}.")

    @property
    def is_local(self) -> bool:
        """Whether a model in this process decodes."""
        return self.engine == "dera" and self.endpoint is None

    @property
    def starts_vllm(self) -> bool:
        return self.engine == "vllm" and self.endpoint is None

    @property
    def decoder_name(self) -> str:
        """What decodes, for messages."""
        return f"--engine {self.engine}" if self.endpoint is None else f"--endpoint {self.endpoint}"

    @property
    def at_once(self) -> int:
        return self.concurrency or (IN_VLLM if self.endpoint is None else AT_ENDPOINT)

    @property
    def api_key(self) -> str | None:
        """Raises `DeRaError`, which does not show it, where a header can't hold it."""
        key = os.environ.get(KEY_VARIABLE, "").strip()  # of a file a line may end behind it
        if not (key.isascii() and key.isprintable()):
            raise DeRaError(f"{KEY_VARIABLE}: a key has printable ASCII characters alone, and this one has others.")
        return key or None

    def fingerprint_of_engine(self, sampling: Sampling) -> dict[str, Any]:
        """
        What of these settings a run's fingerprint has: what decides completions, apart from rounding.

        dera serve draws the same random numbers as the model in this process; vLLM draws its own.
        """
        found: dict[str, Any] = {"engine": "vllm"} if self.engine == "vllm" and sampling.temperature > 0 else {}
        arguments = {name: value for name, value in self.vllm_arguments.items() if name not in PLACES}
        return found | ({"vllm_arguments": arguments} if arguments else {})

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises `DeRaError` where vLLM would draw tokens in another way, and not say so."""
        if self.engine == "vllm" and 0 < sampling.temperature < 0.01:
            raise DeRaError(f"temperature={sampling.temperature:g}: vLLM takes 0 (greedy), or at least 0.01.")

    def check_way(
        self,
        *,
        prompts_differ: bool = False,
        mixing: str = LOGITS,
        combine: str = LINEAR,
        schedule: Schedule = (),
        particles: int | None = None,
        called: str = "",
    ) -> None:
        """
        Args:
            prompts_differ, mixing, combine, schedule, particles: a way to decode, as of an `Arm`.
            called: of which way, for messages, as "arms[0]: ".

        Raises:
            DeRaError: the engine can't decode in this way.
        """
        if self.is_local:
            return
        asked = {
            "principle and reference_system": prompts_differ,
            f"particles={particles}": particles is not None,
            f"mixing={mixing!r}": mixing != LOGITS,
        }
        if self.engine == "vllm":
            for name, value in rule_fields(combine, schedule).items():
                asked[f"{name}={value!r}"] = value is not None
        for what, is_asked in asked.items():
            if is_asked:
                raise DeRaError(
                    f"{called}{what} can't be had with {self.decoder_name}: leave it out, or decode in this process, "
                    "without --engine and --endpoint."
                )

    def check_model(self, source: ModelSource) -> None:
        """Raises `DeRaError` where vLLM can't load a base in the way that is asked for."""
        if self.starts_vllm and source.quantization in ("fp4", "int8"):
            raise DeRaError(
                f"quantization={source.quantization!r} can't be had in vLLM: nf4 (its bitsandbytes) can, or one of its "
                "own (--vllm-argument quantization=fp8)."
            )
        if self.starts_vllm and (further := [name for name in source.base_arguments if name not in ACCESS]):
            raise DeRaError(f"base_arguments: {further[0]!r} is of transformers' from_pretrained, and vLLM takes none.")
        if source.quantization is not None and "quantization" in self.vllm_arguments:
            raise DeRaError("quantization is there twice: give it or vllm_arguments, not both.")


def _read_url(text: str) -> str:
    """The address of a server, without the path of its API and without a slash behind it."""
    url = text.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
        _ = parts.port
    except ValueError:
        is_url, parts = False, None
    if not is_url or parts is None:
        raise DeRaError(f"endpoint={text!r} is not the address of a server, as http://127.0.0.1:8000.")
    if "@" in parts.netloc:
        raise DeRaError(f"endpoint: a user or a password is not for an address: put a key into {KEY_VARIABLE}.")
    return url
