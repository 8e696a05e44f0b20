"""
`dera generate` and `dera sweep` with `--engine vllm` against the same commands without it, in the project's
environment:

    python tests/vllm_plugin/vllm_commands.py CASES VLLM_PYTHON

CASES is the folder that `vllm_cases.py` wrote, VLLM_PYTHON the Python of vLLM's environment. In fp32 on a CPU every row
must be the same, text and tokens.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from vllm_serving import BLOCK, serving

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

TEXTS = ["Rain fell on the market", "A fox crossed the frozen river", "My sister", "The old lighthouse keeper counted"]
LAMBDAS = (0.0, 1 / 3, 1.5, -0.5)
ARGUMENTS = {"enforce_eager": True, "block_size": BLOCK, "max_model_len": 256}


def rows_of(file: Path) -> list[dict]:
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(found, key=lambda row: (row["prompt_index"], str(row["lambda"]), row["sample"]))


def generated(folder: Path, name: str, **settings: Any) -> list[dict]:
    from dera_peft.cli.generate import GenerateSettings, generate

    output = folder / f"{name}.jsonl"
    output.unlink(missing_ok=True)
    given = {"prompt": TEXTS, "lambdas": LAMBDAS, "max_new_tokens": 20, "temperature": 0.0, **settings}
    generate(GenerateSettings(**given, output=output))
    return rows_of(output)


def swept(folder: Path, name: str, **settings: Any) -> list[dict]:
    from dera_peft.evaluate import sweep

    output = folder / name
    shutil.rmtree(output, ignore_errors=True)
    result = sweep(
        prompts=TEXTS, lambdas=(0, 0.5, 1, 2), samples=1, rewards=["length"], max_new_tokens=16, temperature=0.0,
        output_dir=str(output), **settings,
    )  # fmt: skip
    return sorted(result.rows, key=lambda row: (row["prompt_index"], row["lambda"], row["sample"]))


def main(cases: Path, python: str) -> int:
    from dera_peft.errors import DeRaError
    from dera_peft.messages import messages_on_stderr

    vllm = {"engine": "vllm", "vllm_python": python, "vllm_arguments": ARGUMENTS}
    failed = 0

    def compare(title: str, there: list[dict], here: list[dict]) -> None:
        nonlocal failed
        same = sum(one == other for one, other in zip(there, here, strict=True))
        differ = len({tuple(row["token_ids"]) for row in here})
        is_ok = same == len(here) and (differ > len(TEXTS) or here[0]["lambda"] is None)
        failed += not is_ok
        print(f"{'ok    ' if is_ok else 'FAILED'} {title}: {same} of {len(here)} rows", flush=True)

    with messages_on_stderr():
        for name in ("llama-upper", "llama-two"):
            case = cases / name
            model = {"base": str(case / "base"), **json.loads((case / "expected.json").read_text())["dera"]}
            own = {}
            if "adapters" in model:
                lambdas = ({"kind": 1 / 3, "brief": 1.5}, {"kind": 0.0, "brief": 0.0}, {"kind": -0.5, "brief": 0.25})
                own = {"lambdas": lambdas}
            there = generated(case, "vllm", **model, **vllm, **own)
            compare(f"dera generate --engine vllm, {name}", there, generated(case, "local", **model, **own))
        model = {"base": str(cases / "llama-upper" / "base"), "adapter": str(cases / "llama-upper" / "aligned")}
        alone = {"base": model["base"], "lambdas": (), "prompt": TEXTS * 2}
        compare(
            "dera generate --engine vllm, a base alone",
            *(generated(cases, "alone", **alone, **way) for way in (vllm, {})),
        )
        compare("dera sweep --engine vllm", *(swept(cases, "sweep", **model, **way) for way in (vllm, {})))
        with serving(python, cases / "llama-upper", cases / "llama-upper" / "commands.log") as url:
            there = {"engine": "vllm", "endpoint": url}
            compare(
                "dera generate, of a server of vLLM",
                *(generated(cases, "served", **model, **way) for way in (there, {})),
            )
            compare("dera sweep, of a server of vLLM", *(swept(cases, "sweep", **model, **way) for way in (there, {})))
            two = {"adapter": str(cases / "llama-whole" / "aligned")}
            try:
                generated(cases, "served", **{**model, **two}, **there)
            except DeRaError as error:
                is_ok = "serves another model" in str(error)
            else:
                is_ok = False
            failed += not is_ok
            print(f"{'ok    ' if is_ok else 'FAILED'} a server of another adapter is refused", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
