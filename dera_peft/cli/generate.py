"""`dera generate`: prompts in, a completion per prompt, λ and sample out."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from transformers import TextStreamer

from dera_peft.checkpoint.fingerprint import model_fingerprint, settings_fingerprint
from dera_peft.checkpoint.loading import load, load_config, load_tokenizer, resolve
from dera_peft.cli.console import progress, read_lambdas, side_by_side
from dera_peft.decoding.batching import Request, decode
from dera_peft.decoding.prompts import Prompt, encode, from_file, from_lines, from_texts
from dera_peft.decoding.rows import Results
from dera_peft.decoding.sampling import Sampling
from dera_peft.errors import DeRaError


def read_prompts(texts: Sequence[str], file: str | None) -> list[Prompt]:
    """From `--prompt`, `--prompts` or standard input; exactly one of them."""
    if texts and file:
        raise DeRaError("give --prompt or --prompts, not both.")
    if texts:
        return from_texts(texts)
    if file:
        return from_file(file)
    if sys.stdin is None or sys.stdin.isatty():
        raise DeRaError("no prompt: give --prompt TEXT, --prompts FILE, or lines on standard input.")
    prompts = from_lines(sys.stdin, "standard input")
    if not prompts:
        raise DeRaError("no prompt: standard input is empty.")
    return prompts


def generate(
    base: str | None,
    adapter: str | None,
    quantization: str | None,
    dtype: str | None,
    device_map: str | None,
    lambdas: Sequence[str],
    texts: Sequence[str],
    prompts_file: str | None,
    sampling: Sampling,
    samples: int,
    chat: bool,
    batch_size: int,
    output: Path | None,
    as_json: bool,
    stream: bool,
) -> None:
    """See `dera generate --help`."""
    default = read_lambdas(lambdas) if lambdas else None
    prompts = read_prompts(texts, prompts_file)
    record = resolve(base, adapter)
    if len(record.branches) > 2:
        raise DeRaError(
            f"dera generate decodes one aligned model, and the record has {list(record.branches)[1:]}; use "
            "DeRaModel.generate with lam by name, or export a mixture of them (dera export)."
        )
    requests = [
        Request(prompt.index, lam, sample)
        for prompt in prompts
        for lam in (prompt.lam or default or [record.lam])
        for sample in range(samples)
    ]
    if stream and (len(requests) > 1 or output or as_json):
        raise DeRaError(
            "--stream shows one completion: one prompt, one λ, one sample, and neither --output nor --json."
        )
    run = settings_fingerprint(
        {
            **model_fingerprint(record),
            "quantization": quantization,
            "dtype": dtype,
            "chat": chat,
            "sampling": asdict(sampling),
        }
    )
    results = None if output is None else Results(output, run, "--output")
    finished = {} if results is None else results.finished(prompts)
    todo = [request for request in requests if request not in finished]
    if len(todo) < len(requests):
        done = len(requests) - len(todo)
        print(f"{output}: {done} of {len(requests)} completions are there already", file=sys.stderr)

    if as_json:
        _print_rows(finished[request] for request in requests if request in finished)

    if todo:
        config = load_config(record.base, revision=record.base_revision)
        tokenizer = load_tokenizer(base, adapter)
        tokens = encode(prompts, tokenizer, config, sampling.max_new_tokens, chat)
        model = load(base, adapter, quantization=quantization, dtype=dtype, device_map=device_map)
        if stream:
            _stream(model, tokenizer, tokens[0], todo[0], sampling)
            return
        with progress("decoding", len(requests), len(requests) - len(todo)) as advance:
            for completions in decode(model, tokenizer, tokens, todo, sampling, batch_size):
                rows = [completion.row(prompts[completion.request.index]) for completion in completions]
                rows = [{"run": run, **row} for row in rows] if results is None else results.append(rows)
                finished.update({completion.request: row for completion, row in zip(completions, rows, strict=True)})
                if as_json:
                    _print_rows(rows)
                advance(len(completions))
    if not as_json:
        _show(prompts, requests, finished)


def _print_rows(rows: Iterable[dict]) -> None:
    for row in rows:
        print(json.dumps(row, ensure_ascii=False), flush=True)


def _show(prompts: Sequence[Prompt], requests: Sequence[Request], finished: dict) -> None:
    console = Console()
    by_prompt: dict[int, dict[float, list[str]]] = defaultdict(lambda: defaultdict(list))
    for request in requests:
        by_prompt[request.index][request.lam].append(finished[request]["completion"])
    for index, texts in by_prompt.items():
        side_by_side(console, prompts[index].text, texts)


def _stream(model, tokenizer, tokens: list[int], request: Request, sampling: Sampling) -> None:
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for _ in decode(model, tokenizer, [tokens], [request], sampling, batch_size=1, streamer=streamer):
        pass
