"""The settings of a server: which model, where it listens, what it admits."""

import ipaddress
import re
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from dera_peft.checkpoint.source import ModelSource, Quantization
from dera_peft.decoding.lambdas import is_lambda, read_lambdas
from dera_peft.errors import DeRaError
from dera_peft.files import check_writable
from dera_peft.settings import AT_LEAST_1, Check, nearest, option_name, setting, setting_like, user_fields

PANEL = "Server"
NAMED = re.compile(r"([^\W\d]\w*)=(.+)")  # NAME=LORA
PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")  # of the extra

NOT_NEGATIVE = Check(lambda value: value >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True)
class EngineSettings(ModelSource):
    """A model, and how much of it is computed at once; for `dera serve` and `dera chat`."""

    instead: ClassVar[tuple[tuple[str, ...], ...]] = (("adapter", "adapters"),)

    # a repeated option here, where ModelSource takes one adapter
    adapter: tuple[str, ...] = setting(  # pyrefly: ignore[bad-override]
        (),
        "LoRA adapter of the aligned model: hub id or folder, in PEFT's format. For several, repeat it as NAME=LORA.",
        metavar="LORA",
        panel="Model",
    )
    max_rows: int | None = setting(
        None,
        "Rows that are decoded at once; a request needs one for each branch. By default what the device holds.",
        check=AT_LEAST_1,
        metavar="N",
        panel=PANEL,
    )
    max_tokens: int | None = setting(
        None,
        "Tokens whose keys and values are held at once, in all rows. By default what the device holds.",
        check=AT_LEAST_1,
        metavar="N",
        panel=PANEL,
    )
    prefill_chunk: int = setting(
        512, "Tokens of prompts that are computed between two decoding steps.", check=AT_LEAST_1, metavar="N",
        panel=PANEL,
    )  # fmt: skip
    prefix_tokens: int | None = setting(
        None,
        "Tokens that are held for further requests that begin alike, part of --max-tokens; a quarter of it by default, "
        "0 for none.",
        check=NOT_NEGATIVE,
        metavar="N",
        panel=PANEL,
    )

    @property
    def source(self) -> ModelSource:
        """The base and its adapters. An adapter without a name, beside others, has that of its folder."""
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(ModelSource)}
        if values["quantization"] not in get_args(Quantization):  # one of vLLM's
            values["quantization"] = None
        adapters = dict(self.adapters or {})
        single = len(self.adapter) == 1 and not adapters and _named(self.adapter[0]) is None
        if single:
            return ModelSource.read(None, **{**values, "adapter": self.adapter[0]})
        for text in self.adapter:
            name, adapter = _named(text) or (re.sub(r"\W", "_", folder_name(text)), text)
            if name in adapters:
                raise DeRaError(f"--adapter: the name {name!r} is there twice; give each its own, as NAME=LORA.")
            adapters[name] = adapter
        return ModelSource.read(None, **{**values, "adapter": None, "adapters": adapters or None})

    def check_paths(self) -> None:
        self.source.check_paths()

    def engine_arguments(self) -> dict[str, Any]:
        """Of `Engine`."""
        names = ("max_rows", "max_tokens", "prefill_chunk", "prefix_tokens")
        return {name: getattr(self, name) for name in names}


def _named(text: str) -> tuple[str, str] | None:
    """NAME=LORA in its parts; a folder of such a name is one folder."""
    found = None if Path(text).exists() else NAMED.fullmatch(text)
    if found is None and "=" in text and not Path(text).exists():
        raise DeRaError(
            f"--adapter {text}: {text.partition('=')[0]!r} can't be a name; use letters, digits and underscores."
        )
    return (found[1], found[2]) if found else None


def folder_name(name: str) -> str:
    """The last part of a path or hub id."""
    path = Path(name)
    return path.resolve().name if path.is_dir() else path.name


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class ServeSettings(EngineSettings):
    """The settings of `dera serve`."""

    # any of vLLM's own with it, where ModelSource takes bitsandbytes'
    quantization: str | None = setting_like(ModelSource, "quantization")  # pyrefly: ignore[bad-override]
    engine: Literal["dera", "vllm"] = setting(
        "dera",
        "What decodes: dera, which takes every base, or vllm, for several GPUs and many clients. Options that are not "
        "known here are then passed on to vllm serve, as --tensor-parallel-size 2.",
        panel=PANEL,
    )
    vllm: tuple[str, ...] = setting(
        (), "Further arguments of vllm serve, with engine=vllm.", metavar="ARGUMENT", panel=PANEL, is_rest=True
    )
    host: str = setting("127.0.0.1", "Address to listen at; any but this machine's own needs a key.", panel=PANEL)
    port: int = setting(
        8000,
        "Port to listen at; 0 for a free one.",
        check=Check(lambda value: 0 <= value < 1 << 16, "from 0 to 65535"),
        metavar="N",
        panel=PANEL,
    )
    api_key_file: Path | None = setting(
        None,
        "A file with the key that clients send (Authorization: Bearer KEY); one a line, if there are several.",
        metavar="FILE",
        panel=PANEL,
    )
    allow_origin: tuple[str, ...] = setting(
        (),
        "A web page's origin (https://example.org) that may call the server from a browser; * for any. Its own page "
        "always may.",
        metavar="ORIGIN",
        panel=PANEL,
    )
    lambda_range: tuple[float, ...] = setting(
        (-5.0, 5.0),
        "The λ that requests may ask for.",
        check=Check(
            lambda values: len(values) == 2 and all(map(is_lambda, values)) and values[0] <= values[1],
            "the least and the greatest λ, as -5,5",
        ),
        metavar="λ,λ",
        panel=PANEL,
        parse=read_lambdas,
    )
    model_lambdas: tuple[float, ...] = setting(
        (0.0, 0.5, 1.0),
        "λ with which /v1/models lists each adapter, as name@λ, for clients that can send nothing but a model's name.",
        check=Check(lambda values: all(map(is_lambda, values)), "finite numbers, as [0, 0.5, 1]"),
        metavar="λ[,λ…]",
        panel=PANEL,
        parse=read_lambdas,
    )
    max_queue: int = setting(
        256, "Completions that may wait; more are refused (429).", check=AT_LEAST_1, metavar="N", panel=PANEL
    )
    max_body: int = setting(8 << 20, "Bytes of a request's body.", check=AT_LEAST_1, metavar="BYTES", panel=PANEL)
    drain_seconds: float = setting(
        60.0,
        "How long requests may go on after SIGTERM or Ctrl-C; then they are cancelled.",
        check=NOT_NEGATIVE,
        metavar="S",
        panel=PANEL,
    )
    access_log: bool = setting(True, "Write a line of JSON for each request to standard error.", panel=PANEL)
    trace: Path | None = setting(
        None,
        "A .jsonl file: a line per completion with its settings, prompt and text, written as it ends.",
        metavar="FILE",
        panel=PANEL,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.engine == "dera":
            self._check_own_engine()
        low, high = self.lambda_range
        if outside := [lam for lam in self.model_lambdas if not low <= lam <= high]:
            raise DeRaError(f"model_lambdas: {outside[0]:g} is not in lambda_range, {low:g} to {high:g}.")
        if self.api_key_file is None and not is_loopback(self.host):
            raise DeRaError(
                f"host={self.host!r} can be reached from other machines, and there is no key: give --api-key-file, or "
                "listen at 127.0.0.1."
            )

    def check(self) -> None:
        """
        What can be checked before a model is loaded.

        Raises:
            DeRaError: a package, a folder or a file is not there, or can't be written.
        """
        if self.engine == "dera":
            check_packages()
        self.check_paths()
        self.api_keys()
        if self.trace is not None:
            check_writable(self.trace, "--trace")

    def _check_own_engine(self) -> None:
        """Raises `DeRaError` where something is given that only vLLM knows."""
        if self.vllm:
            known = [option_name(each) for each in user_fields(type(self))]
            raise DeRaError(
                f"No such option: {self.vllm[0]}; {nearest(self.vllm[0], known)} With --engine vllm what is not known "
                "here is passed on to vllm serve."
            )
        kinds = get_args(Quantization)
        if self.quantization is not None and self.quantization not in kinds:
            raise DeRaError(
                f"quantization={self.quantization!r} is not known; choose one of {', '.join(kinds)}, or with --engine "
                "vllm one of vLLM's own."
            )

    def api_keys(self) -> tuple[bytes, ...]:
        """Those that clients may send; none where no key is asked for."""
        if self.api_key_file is None:
            return ()
        try:
            lines = self.api_key_file.read_bytes().splitlines()
        except OSError as error:
            raise DeRaError(f"--api-key-file: {str(self.api_key_file)!r} can't be read: {error.strerror}.") from None
        keys = tuple(line.strip() for line in lines if line.strip())
        if not keys:
            raise DeRaError(f"--api-key-file: {str(self.api_key_file)!r} has no key in it.")
        return keys


def check_packages() -> None:
    """Raises `DeRaError` where one of the extra's packages is not installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise DeRaError(
            f"dera serve needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'dera-peft[serve]'"
        )
