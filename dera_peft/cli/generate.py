"""`dera generate`: prompts in, a completion per prompt, λ and sample out."""

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.batch_size import batch_size_setting
from dera_peft.decoding.lambdas import Lambda, for_adapters, lambdas_setting
from dera_peft.decoding.prompt_settings import PromptSettings
from dera_peft.decoding.requests import Request
from dera_peft.decoding.rows import GeneratedRow, RowLog, expect_prompts, to_line
from dera_peft.decoding.rule_settings import RuleSettings
from dera_peft.decoding.sampling import Sampling, particles_setting
from dera_peft.decoding.system_settings import SystemSettings, Tokens
from dera_peft.engine.samples import advice
from dera_peft.errors import DeRaError
from dera_peft.lock import hold
from dera_peft.remote.settings import RemoteSettings
from dera_peft.settings import COUNT, part, setting

if TYPE_CHECKING:
    from dera_peft.decoding.prompts import Prompt

SHORT = 5.0  # seconds of decoding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateSettings(SystemSettings, RuleSettings, PromptSettings, Sampling, RemoteSettings, ModelSource):
    """The settings of `dera generate`."""

    instead: ClassVar[tuple[tuple[str, ...], ...]] = (("greedy", "temperature"), ("lambdas", "lambda_schedule"))

    lambdas: tuple[float | Mapping[str, Any], ...] = lambdas_setting(
        (),
        "Strengths; the one that dera.json names, else 1, unless given. Of several adapters a point is name=λ,name=λ.",
        "Prompts",
    )
    greedy: bool = setting(False, "The same as --temperature 0.", panel="Sampling")
    particles: int | None = particles_setting()
    samples: int = setting(1, "Completions per prompt and λ.", check=COUNT, metavar="N", panel="Sampling")
    batch_size: int | None = batch_size_setting("Sampling")
    output: Path | None = setting(
        None,
        "A .jsonl file: a line per completion, written as it finishes. Run again, it is continued.",
        metavar="FILE",
    )
    json: bool = setting(False, "Print those lines instead of the texts side by side.")
    stream: bool = setting(False, "Print tokens as they come: one prompt, one λ.")

    def __post_init__(self):
        super().__post_init__()
        if self.greedy and self.temperature not in (0.0, 1.0):
            raise DeRaError(f"greedy=True, temperature={self.temperature:g}: greedy is 0; give one of them.")
        if self.particles is not None:
            self.sampling.check_exact()
            if self.asked is not None:
                raise DeRaError(f"{self.asked}: the exact mixture is of λ alone; leave it out, or --particles.")
            if self.stream:
                raise DeRaError("--stream shows tokens as they come, and which particle is drawn is known at the end.")
        if not self.is_local:
            self._check_remote()

    def _check_remote(self) -> None:
        """Raises `DeRaError` where something is asked for that is of a model in this process."""
        for name in ("device_map", "capture", "batch_size"):
            if (value := getattr(self, name)) is not None:
                raise DeRaError(f"{name}={value!r} is of a model in this process, and {self.decoder_name} decodes.")
        if self.stream:
            raise DeRaError(f"--stream shows tokens of a model in this process, and {self.decoder_name} decodes.")
        self.check_sampling(self.sampling)
        self.check_way(
            prompts_differ=self.prompts_differ, combine=self.combine, schedule=self.schedule, particles=self.particles
        )

    @property
    def sampling(self) -> Sampling:
        sampling = part(self, Sampling)
        return replace(sampling, temperature=0.0) if self.greedy else sampling


def generate(settings: GenerateSettings) -> None:
    """Decode prompts at one or several λ, in one batched pass.

    Prompts come from --prompt, --prompts or the lines of standard input. It ends with tokens/s on standard error; where
    that is no terminal, only if it decoded for 5 seconds or longer.

    **Examples**

    `dera generate --adapter runs/tiny/dpo --lambda 0,0.5,1,2 --prompt "Once upon a time"`

    `dera generate --base org/base --adapter ./dpo --quantization nf4 --chat --lambda 0.6 --prompt "Hi!" --stream`

    `dera generate --adapter ./dpo --lambda=-0.5,0,1 --prompts prompts.jsonl --samples 4 --output out.jsonl`

    `dera generate --adapter ./dpo --lambda 2,3 --combine plausible:0.1 --prompt "Hi!" --json`

    `dera generate --base org/chat --chat --principle "Answer in one sentence." --lambda 0,1,3
    --prompt "Why is it dark?"`

    `dera generate --endpoint http://127.0.0.1:8000 --adapter ./dpo --lambda 0,1 --prompt "Hi!"`

    `dera generate --engine vllm --vllm-python vllm-env/bin/python --adapter ./dpo --prompts prompts.jsonl
    --output out.jsonl`

    `dera generate --adapters helpful=./a --adapters harmless=./b --lambda helpful=0.7,harmless=0.3
    --lambda helpful=1 --prompt "Hi!"`
    """
    settings.check_paths()
    prompts = settings.read_prompts_or_lines()
    with hold(settings.output, "--output"):
        _generate(settings, prompts)


def _generate(settings: GenerateSettings, prompts: "Sequence[Prompt]") -> None:
    from dera_peft.checkpoint.fingerprint import settings_fingerprint
    from dera_peft.model import DeRaModel
    from dera_peft.progress import show_progress
    from dera_peft.remote.decoders import open_decoder

    source, sampling = part(settings, ModelSource).placed(), settings.sampling
    if settings.lambdas or settings.asked or any(prompt.lam for prompt in prompts):
        source.check_has_adapter("a λ", settings.prompts_differ)
    record = source.resolve()
    aligned = record.aligned
    lambdas: tuple[Lambda | None, ...] = (None,)
    if record.branches_differ or settings.prompts_differ:
        default = for_adapters([record.lam], aligned, "dera.json")
        lambdas = settings.lambdas_of(for_adapters(settings.lambdas, aligned), default, aligned)

    def lambdas_of(prompt: "Prompt") -> Sequence[Lambda | None]:
        own = for_adapters(prompt.lam, aligned, prompt.source) if prompt.lam else ()
        return settings.lambdas_of(own, (), aligned, prompt.source) if own else lambdas

    requests = [
        Request(prompt.index, lam, sample, settings.combine, settings.schedule)
        for prompt in prompts
        for lam in lambdas_of(prompt)
        for sample in range(settings.samples)
    ]
    output = settings.output
    if settings.stream and (len(requests) > 1 or output or settings.json):
        raise DeRaError(
            "--stream shows one completion: one prompt, one λ, one sample, and neither --output nor --json."
        )
    particles = {} if settings.particles is None else {"particles": settings.particles}
    own = particles | settings.system_prompts() | settings.fingerprint_of_engine(sampling)
    run = settings_fingerprint({**source.fingerprint(), "chat": settings.chat, "sampling": asdict(sampling), **own})
    log = None
    if output is not None:
        log = RowLog(output, GeneratedRow, run, expected=expect_prompts(prompts), argument="--output")
    finished = {row.request: row for row in log.rows} if log else {}
    todo = [request for request in requests if request not in finished]
    if len(todo) < len(requests):
        done = len(requests) - len(todo)
        logger.info(f"{output}: {done} of {len(requests)} completions are there already")

    if settings.json:
        _print_rows(finished[request] for request in requests if request in finished)

    new_tokens, seconds, samples = 0, 0.0, []
    if todo:
        base_config, tokenizer = source.config, source.tokenizer()
        tokens, reference = settings.encode(prompts, tokenizer, base_config, sampling.max_new_tokens, settings.chat)
        if settings.stream:
            model = DeRaModel.from_source(source)
            start = time.perf_counter()
            new_tokens = _stream(model, tokenizer, tokens, todo[0], sampling, reference)
            _tell_speed(new_tokens, time.perf_counter() - start)
            return
        with open_decoder(
            settings, source, tokenizer, lambda: DeRaModel.from_source(source), settings.batch_size
        ) as decoder:
            start = time.perf_counter()
            with show_progress("decoding", len(requests), len(requests) - len(todo)) as advance:
                for completions in decoder.decode(
                    tokens, todo, sampling, particles=settings.particles, reference_prompts=reference
                ):
                    rows = [GeneratedRow.of(run, each, prompts[each.request.index]) for each in completions]
                    if log:
                        log.append(rows)
                    finished.update({row.request: row for row in rows})
                    if settings.json:
                        _print_rows(rows)
                    new_tokens += sum(row.num_tokens for row in rows)
                    samples += [each.exact for each in completions if each.exact is not None]
                    advance(len(completions))
            seconds = time.perf_counter() - start
        if (message := advice(samples)) is not None:
            logger.warning(message)
    if not settings.json:
        _show(prompts, requests, finished)
    _tell_speed(new_tokens, seconds)


def _print_rows(rows: Iterable[GeneratedRow]) -> None:
    from dera_peft.cli.console import print_json

    for row in rows:
        print_json(to_line(row))


def _show(prompts: "Sequence[Prompt]", requests: Sequence[Request], finished: dict[Request, GeneratedRow]) -> None:
    from rich.console import Console

    from dera_peft.cli.console import side_by_side

    console = Console()
    by_prompt: dict[int, dict[Lambda | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for request in requests:
        by_prompt[request.index][request.lam].append(finished[request].completion)
    for index, texts in by_prompt.items():
        side_by_side(console, prompts[index].text, texts)


def _tell_speed(new_tokens: int, seconds: float) -> None:
    """Of this run alone. A program that reads standard error of a short job is told nothing."""
    if new_tokens and (sys.stderr.isatty() or seconds >= SHORT):
        logger.info(f"{new_tokens:,} tokens in {seconds:.1f} s: {new_tokens / seconds:.1f} tokens/s")


def _stream(model, tokenizer, tokens: Tokens, request: Request, sampling: Sampling, reference: Tokens | None) -> int:
    """Prints the tokens as they come; returns how many."""
    from transformers import TextStreamer

    from dera_peft.checkpoint.end_tokens import configured_end_tokens
    from dera_peft.decoding.batching import decode

    ends = configured_end_tokens(model.generation_config)

    class Streamer(TextStreamer):
        """An end token need not be a special one, which is left out."""

        def put(self, value) -> None:
            if value.dim() > 1 or value.item() not in ends:
                super().put(value)

    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ((completion,),) = decode(
        model, tokenizer, tokens, [request], sampling, batch_size=1, streamer=streamer, reference_prompts=reference
    )
    return len(completion.tokens)
