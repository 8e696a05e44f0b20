"""
Requests of mixed λ inside vLLM against `DeRaModel.generate`: what `make test-vllm` runs, in vLLM's environment.

    python tests/vllm_plugin/vllm_check.py CASES [--only v2]

CASES is the folder that `vllm_cases.py` wrote. Each check decodes 16 requests in fp32 on a CPU, and each must have the
tokens that `generate` gave it. A group of checks is a process, since model runner, workers and server are chosen by its
environment.
"""

import argparse
import gc
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vllm_engine import decode, make_engine, metric, read_case
from vllm_server import check_server

V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
TWO_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
THREE_SLOTS, CHUNKS, LITTLE_ROOM = {"max_num_seqs": 3}, {"max_num_batched_tokens": 16, "max_num_seqs": 16}, 12
SERVER = "server"
TENSOR, PIPELINE = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
COMPILED = {"enforce_eager": False}


@dataclass(frozen=True)
class Run:
    """A case under some options of vLLM's `LLM`, and what else is to hold of the engine and the requests."""

    title: str
    case: str
    options: dict = field(default_factory=dict)
    also: Callable | None = None


def hits(engine, requests) -> None:
    assert metric(engine, "prefix_cache_hits") > 0, "no block of the prefix cache was used again"


def hits_across_lambda(engine, requests) -> None:
    """Of two requests that begin alike, the second uses the blocks of the first, of another λ."""
    engine.reset_prefix_cache()
    one, other = (next(each for each in requests[1::2] if each["lambda"] == lam) for lam in (0.0, 1.5))
    decode(engine, [one])
    before = metric(engine, "prefix_cache_hits")
    (output,) = decode(engine, [other])
    assert metric(engine, "prefix_cache_hits") - before >= 64, "the blocks of another λ were not used"
    assert list(output.outputs[0].token_ids) == other["tokens"], "other tokens by the blocks of another λ"


def preempted(engine, requests) -> None:
    assert metric(engine, "num_preemptions") > 0, "nothing was preempted"


def refuses(engine, requests) -> None:
    """λ that is no finite number, or of another adapter; and in runner V1 log-probabilities of a prompt."""
    from vllm.exceptions import VLLMValidationError  # which the server answers with status 400

    is_v1 = "VLLM_USE_V2_MODEL_RUNNER" not in os.environ
    for lam, sampling in [(math.nan, {}), ("x=1", {}), (True, {})] + [(0.5, {"prompt_logprobs": 0})] * is_v1:
        try:
            decode(engine, [{**requests[0], "lambda": lam}], **sampling)
        except VLLMValidationError:
            continue
        raise AssertionError(f"λ={lam!r} with {sampling} was not refused")
    hits(engine, requests)


def prompt_logprobs(engine, requests) -> None:
    for each, output in zip(requests, decode(engine, requests, prompt_logprobs=0), strict=True):
        found = [
            step[token].logprob for step, token in zip(output.prompt_logprobs[1:], each["prompt"][1:], strict=True)
        ]
        difference = max(abs(a - b) for a, b in zip(found, each["prompt_logprobs"], strict=True))
        assert difference < 1e-3, f"a prompt's log-probabilities differ by {difference:.2g}"


GROUPS = {
    "v1": (
        {},
        [
            Run("all at once", "llama-whole", also=refuses),
            Run("hits across λ", "llama-whole", also=hits_across_lambda),
            Run("3 slots", "llama-whole", THREE_SLOTS),
            Run("chunks of 16 tokens", "llama-whole", CHUNKS),
            Run("preemption", "llama-upper", {"num_gpu_blocks_override": LITTLE_ROOM}, preempted),
            Run("ranks by module, rsLoRA, without o_proj", "llama-patterns"),
            Run("compiled", "llama-upper", COMPILED),
            Run("two adapters", "llama-two", also=hits),
            Run("an SFT adapter below", "llama-stacked", also=hits),
            Run("all at once", "qwen3-whole", also=hits),
            Run("3 slots, chunks of 16 tokens", "qwen3-upper", THREE_SLOTS | {"max_num_batched_tokens": 16}),
            Run("preemption", "qwen3-patterns", {"num_gpu_blocks_override": LITTLE_ROOM}, preempted),
            *(Run("all at once", f"{kind}-upper", also=hits) for kind in ("qwen2", "mistral", "gemma", "phi3")),
        ],
    ),
    "v2": (
        V2,
        [
            Run("all at once", "llama-whole", also=refuses),
            Run("3 slots, chunks of 16 tokens", "llama-upper", THREE_SLOTS | {"max_num_batched_tokens": 16}),
            Run("preemption", "llama-upper", {"num_gpu_blocks_override": LITTLE_ROOM}, preempted),
            Run("hits across λ", "qwen3-upper", also=hits_across_lambda),
            Run("log-probabilities of prompts", "qwen3-whole", also=prompt_logprobs),
            Run("two adapters", "llama-two"),
        ],
    ),
    "v1, two processes": (
        TWO_PROCESSES,
        [
            Run("tensor parallel 2", "llama-upper", TENSOR),
            Run("tensor parallel 2", "qwen3-whole", TENSOR),
            Run("tensor parallel 2", "phi3-upper", TENSOR),
            # not compiled, runner V1 on a CPU gets no hidden states from the other rank, with models of vLLM's neither
            Run("pipeline parallel 2, compiled", "llama-upper", PIPELINE | COMPILED),
        ],
    ),
    "v2, two processes": (
        V2 | TWO_PROCESSES,
        [
            Run("tensor parallel 2", "qwen3-whole", TENSOR),
            Run("pipeline parallel 2", "llama-two", PIPELINE),
        ],
    ),
}


def check(folder: Path, run: Run) -> str | None:
    """What is wrong with a run; None where all requests have their tokens."""
    requests, engine = read_case(folder / run.case)["requests"], None
    try:
        engine = make_engine(folder / run.case, **run.options)
        outputs = decode(engine, requests)
        pairs = zip(outputs, requests, strict=True)
        wrong = [place for place, (one, each) in enumerate(pairs) if list(one.outputs[0].token_ids) != each["tokens"]]
        if wrong:
            return f"the requests {wrong} have other tokens than generate gives them"
        if run.also is not None:
            run.also(engine, requests)
    except Exception as error:  # the other runs of the group are still of interest
        traceback.print_exc()
        return str(error) or repr(error)
    finally:
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
    return None


def check_group(folder: Path, name: str) -> int:
    """Writes a line for each run into `NAME.txt` beside the cases; what vLLM says is on the standard streams."""
    failed = 0
    with (folder / f"{name}.txt").open("w", encoding="utf-8") as results:
        for run in GROUPS[name][1]:
            start = time.monotonic()
            problem = check(folder, run)
            failed += problem is not None
            word, took = "ok" if problem is None else "FAILED", f"{time.monotonic() - start:.0f} s"
            print(f"{word:6} {name}: {run.case}, {run.title} ({took})", file=results, flush=True)
            if problem is not None:
                print(f"       {problem}", file=results, flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--only", action="append", choices=[*GROUPS, SERVER], metavar="GROUP", help="can be repeated")
    parser.add_argument("--here", choices=GROUPS, help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args()
    if options.here:
        return check_group(options.cases, options.here)
    failed = []
    for name in options.only or [*GROUPS, SERVER]:
        if name == SERVER:
            problem = check_server(options.cases)
            print(f"ok     {SERVER}" if problem is None else f"FAILED {SERVER}\n       {problem}", flush=True)
            failed += [] if problem is None else [name]
            continue
        command = [sys.executable, __file__, str(options.cases), "--here", name]
        with (options.cases / f"{name}.log").open("wb") as log:
            code = subprocess.call(command, env={**os.environ, **GROUPS[name][0]}, stdout=log, stderr=log)
        print((options.cases / f"{name}.txt").read_text(encoding="utf-8"), end="", flush=True)
        failed += [name] if code else []
    if failed:
        print(f"failed: {', '.join(failed)}; the logs are in {options.cases}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
