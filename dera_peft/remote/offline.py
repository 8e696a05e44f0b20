"""vLLM's `LLM` in a process of its own, which may be of another environment: `dera_peft.vllm.offline` runs there."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from typing import Any

from dera_peft import __version__
from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.decoder import ANY_LAMBDA, Prompts
from dera_peft.decoding.requests import Completion, Detokenizer, Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.errors import DeRaError
from dera_peft.remote.forms import MIXED, read_completion, sampling_fields
from dera_peft.remote.settings import RemoteSettings

PROGRAM = "dera_peft.vllm.offline"
GUIDE = "docs/guides/vllm.md"
LOADED_HERE = ("device_map", "capture", "quantization", "dtype")  # of a ModelSource, not of which model it is
ENDS_IN = 20.0  # seconds that it has to end by itself
LINES = 3  # of its log, for a message

logger = logging.getLogger(__name__)


@dataclass
class VLLMProcess:
    """
    The process, which is sent lines of requests and answers with lines of completions.

    Attributes:
        log: what vLLM says.
    """

    process: subprocess.Popen[str]
    log: Path

    def send(self, lines: Sequence[Mapping[str, Any]]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.writelines(json.dumps(line) + "\n" for line in lines)
            self.process.stdin.flush()
        except BrokenPipeError:
            while True:  # it has said why, or ended
                self.receive()

    def receive(self) -> dict[str, Any]:
        """The next line. Raises `DeRaError` where it is an error, or there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        found = json.loads(line)
        if "error" in found:
            raise DeRaError(f"vLLM: {found['error']}")
        return found

    def _ended(self) -> DeRaError:
        self.process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = " / ".join(line.strip() for line in lines if line.strip()) if len(lines) <= LINES else _told(lines)
        return DeRaError(f"vLLM's process has ended (code {self.process.returncode}); its log is {self.log}: {last}")

    def stop(self) -> None:
        """Ends it, and the processes that it has started."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()  # at the end of its requests it ends
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDS_IN)
                break
        with suppress(ProcessLookupError):  # what it has left behind
            os.killpg(self.process.pid, signal.SIGKILL)


def _told(lines: Sequence[str]) -> str:
    """The last lines of a log that say what went wrong."""
    errors = [line.strip() for line in lines if "Error" in line] or [line.strip() for line in lines if line.strip()]
    return " / ".join(errors[-LINES:])


@contextmanager
def start_vllm(settings: RemoteSettings, source: ModelSource, tokenizer: Detokenizer) -> Iterator["VLLMDecoder"]:
    """
    Starts vLLM with a model, and ends it with the body.

    Raises:
        DeRaError: there is no vLLM, or it can't decode such a model.
    """
    command = [str(find_python(settings)), "-m", PROGRAM]
    with tempfile.NamedTemporaryFile("wb", prefix="dera-vllm-", suffix=".log", delete=False) as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
                start_new_session=True,
            )  # fmt: skip # Ctrl-C is for this process, which ends the other one
        except OSError as error:
            raise DeRaError(f"vllm_python={command[0]!r} can't be started: {error.strerror}.") from None
    engine = VLLMProcess(process, Path(log.name))
    logger.info(f"starting vLLM; its log is {engine.log}")
    try:
        engine.send([{"version": __version__, "source": named(source), "arguments": arguments(settings, source)}])
        engine.receive()
        yield VLLMDecoder(engine, settings, tokenizer, source.end_tokens())
    except BaseException:
        engine.stop()  # and its log is left
        raise
    engine.stop()
    engine.log.unlink(missing_ok=True)


def find_python(settings: RemoteSettings) -> Path:
    """
    The interpreter of vLLM's environment.

    Raises:
        DeRaError: it is not named, and vLLM is not in this environment; or there is no such file.
    """
    if settings.vllm_python is not None:
        if not settings.vllm_python.is_file():
            raise DeRaError(f"vllm_python={str(settings.vllm_python)!r}: there is no such file.")
        return settings.vllm_python
    if find_spec("vllm") is None:
        raise DeRaError(
            "engine='vllm': vLLM is not installed in this environment. Name the Python of the one that it is in, as "
            f"--vllm-python vllm-env/bin/python, or a running server with --endpoint; {GUIDE} says how to install it."
        )
    return Path(sys.executable)


def named(source: ModelSource) -> dict[str, Any]:
    """Which model a source means, as a JSON-like value."""
    values = {each.name: getattr(source, each.name) for each in fields(ModelSource) if each.name not in LOADED_HERE}
    return {name: value for name, value in values.items() if value not in (None, (), {})}


def arguments(settings: RemoteSettings, source: ModelSource) -> dict[str, Any]:
    """What vLLM's `LLM` is given beside the model: dtype and quantization as the model would be loaded here with."""
    dtype = source.dtype if source.dtype not in (None, "auto") else source.config.dtype
    found = {"dtype": "auto" if dtype is None else str(dtype).removeprefix("torch.")}
    found |= {"quantization": "bitsandbytes"} if source.quantization == "nf4" else {}
    return found | dict(settings.vllm_arguments)


@dataclass(frozen=True)
class VLLMDecoder:
    """
    Attributes:
        ends: the ids of the tokens that end a completion.
    """

    engine: VLLMProcess
    settings: RemoteSettings
    tokenizer: Detokenizer
    ends: Sequence[int]
    lambda_range: tuple[float, float] = ANY_LAMBDA

    def decode(
        self,
        prompts: Prompts,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        particles: int | None = None,
        reference_prompts: Prompts | None = None,
    ) -> Iterator[list[Completion]]:
        """
        Raises:
            DeRaError: vLLM refuses a request, or its process has ended; what was finished is yielded before.
        """
        assert (particles, reference_prompts) == (None, None)  # `RemoteSettings.check_way` refuses them
        waiting = zip(count(), requests, strict=False)
        running: dict[int, Request] = {}

        def start(number: int) -> None:
            lines = []
            for place, request in islice(waiting, number):
                running[place] = request
                lam = dict(request.lam) if isinstance(request.lam, Mapping) else request.lam
                lines.append(
                    {
                        "id": place,
                        "prompt": [*prompts[request.index]],
                        "sampling": sampling_fields(request, sampling, self.ends, "vllm"),
                        "extra": {} if lam is None else {MIXED: lam},
                    }
                )
            self.engine.send(lines)

        start(self.settings.at_once)
        while running:
            finished = self.engine.receive()["finished"]
            yield [
                read_completion(running.pop(each["id"]), each, sampling, self.ends, self.tokenizer, "vLLM")
                for each in finished
            ]
            start(len(finished))
