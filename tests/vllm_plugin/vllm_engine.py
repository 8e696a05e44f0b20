"""A case's base and adapters in vLLM, in this process, and what it makes of requests."""

import json
import os
from pathlib import Path
from typing import Any

from vllm_serving import BLOCK

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process less to start

if os.environ.get("TRITON_INTERPRET") == "1":  # model runner V2 on a CPU: its kernels run in Triton's interpreter
    from triton.backends import backends

    backends["cpu"] = backends["nvidia"]  # vLLM asks for a backend of this name, and the interpreter uses none


def read_case(case: Path) -> dict:
    """`dera`: fields of `ModelSource`; `requests`: prompt, λ, tokens and the prompt's log-probabilities."""
    return json.loads((case / "expected.json").read_text(encoding="utf-8"))


def make_engine(case: Path, **options: Any):
    from vllm import LLM

    from dera_peft.vllm.command import engine_arguments

    return LLM(
        **engine_arguments(base=str(case / "base"), **read_case(case)["dera"]),
        **{
            "dtype": "float32", "enforce_eager": True, "block_size": BLOCK, "max_model_len": 256, "seed": 0,
            "skip_tokenizer_init": True, "disable_log_stats": False, **options,
        },
    )  # fmt: skip


def decode(engine, requests: list[dict], **sampling: Any) -> list:
    """What vLLM makes of the requests, all given at once."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=len(each["tokens"]), ignore_eos=True, detokenize=False,
            extra_args={"lambda": each["lambda"]}, **sampling,
        )
        for each in requests
    ]  # fmt: skip
    return engine.generate([{"prompt_token_ids": each["prompt"]} for each in requests], params, use_tqdm=False)


def metric(engine, name: str) -> float:
    return sum(each.value for each in engine.get_metrics() if each.name == f"vllm:{name}")
