"""
Checks the project on a machine with a GPU, and measures it there: `make gpu-check`.

First it measures, alone on the GPU: `dera bench` in NF4, `generate` itself, the server's engine, a sweep, and `dera
bench` in bf16. Then it runs, side by side, the tests marked gpu, the four steps of the demo, and a QLoRA DPO of a few
steps on the Llama-8B shape (its peak memory against what the recipe computes). Nothing is installed or downloaded.
Each result goes to runs/gpu-check/figures.json as soon as it is there, so that an interrupted run leaves what it has; a
table of the aims goes to the screen. The exit status is 1 where a check failed, whatever the figures are.

`--only eager` measures the ways to mix without captured steps, which take longer and are not among the aims.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
RECIPE = ROOT / "configs" / "llama-3.1-8b-qlora" / "dpo.yaml"
COMPUTED = 9.5 * 1e9  # bytes, as the recipe computes them
ALONE = ("bench-nf4", "generate", "serve", "sweep", "bench-bf16", "eager")
TOGETHER = ("tests", "demo", "qlora")  # no times are taken of these: they share the GPU
STEPS = (*ALONE, *TOGETHER)
LIMIT = 120  # seconds, of a command: one that hangs must not take the time of the others
BASE, TWICE, DERA, REFERENCE, TWO = "base, B rows", "base, 2B rows", "DeRa λ=0.5", "DeRa λ=0", "two models, two passes"
CAPTURED = (BASE, TWICE, DERA, REFERENCE, "DeRa λ=1", TWO)


class Checker:
    """
    Runs the steps as commands of their own, and keeps what they found.

    Args:
        folder: for what they write.
        logs: gets the output of each command.
    """

    def __init__(self, folder: Path, logs: Path):
        self.folder, self.logs, self.start = folder, logs, time.time()
        (folder / "configs").symlink_to(ROOT / "configs")
        logs.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.start:5.0f} s] {text}", flush=True)

    def command(self, name: str, *arguments: object, limit: float = LIMIT) -> tuple[dict, str]:
        """
        Runs `python <arguments>`; returns its seconds and status, and what it printed to stdout. After `limit` seconds
        it is interrupted, upon which `dera bench` prints what it has measured.
        """
        self.say(f"{name} …")
        began, log = time.time(), self.logs / f"{name.replace(' ', '-')}.log"
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            output = _output_of(process, limit)
            errors.write(output)
        seconds, passed = time.time() - began, process.returncode == 0
        self.say(f"{name}: {'done' if passed else f'FAILED, see {log}'} after {seconds:.0f} s")
        return {"seconds": round(seconds, 1), "passed": passed}, output

    def tests(self) -> dict:
        report = self.folder / "tests.xml"
        found, _ = self.command(
            "tests", "-m", "pytest", ROOT, "--gpu", "-q", "-n", 6, f"--junitxml={report}", limit=150
        )
        if report.is_file():
            counts = ElementTree.parse(report).getroot().find("testsuite").attrib
            found |= {key: int(counts[key]) for key in ("tests", "failures", "errors", "skipped")}
        return found

    def demo(self) -> dict:
        """The four commands of `make demo` on the GPU, in one process, which imports torch once."""
        found, output = self.command("demo", __file__, "--demo")
        return found | {"steps": _json_of(output.splitlines()[-1] if output else "")}

    def qlora(self) -> dict:
        """A few steps of the recipe's DPO over random weights of its base's shape, on pairs of full length."""
        made, _ = self.command("qlora base", __file__, "--make-llama", self.folder / "llama")
        if not made["passed"]:
            return made
        found, out = self.command(
            "qlora dpo", __file__, "--dpo", "--config", RECIPE,
            "--model_name_or_path", self.folder / "llama" / "base", "--sft_adapter", self.folder / "llama" / "sft",
            "--dataset_name", self.folder / "llama" / "pairs", "--output_dir", self.folder / "llama" / "dpo",
            "--max_steps", 3, "--gradient_accumulation_steps", 2, "--eval_strategy", "no", "--logging_steps", 1,
            "--optim", "adamw_torch",  # the recipe's paged moments are not in the allocator's count
        )  # fmt: skip
        if found["passed"]:
            found |= json.loads(out.splitlines()[-1]) | {"computed_bytes": COMPUTED}
        return found

    def generate(self) -> dict:
        """Milliseconds a token of `generate` itself, with all that the host does for a token, eager and captured."""
        found, output = self.command("generate", __file__, "--generate")
        rows = [row for row in map(_json_of, output.splitlines()) if row]
        return found | {"rows": rows}

    def serve(self) -> dict:
        """The server's engine, eager and with captured steps."""
        found, output = self.command("serve", __file__, "--serve")
        return found | {"rows": [row for row in map(_json_of, output.splitlines()) if row]}

    def sweep(self) -> dict:
        """A sweep against separate calls of `generate`."""
        found, output = self.command(
            "sweep", "-m", "dera_peft.cli", "bench", "sweep", "--shape", "llama-1b", "--dtype", "bfloat16",
            "--prompts", 16, "--samples", 4, "--new", 64, "--batch", 64, "--json",
        )  # fmt: skip
        return found | _json_of(output)

    def bench_nf4(self) -> dict:
        return self.bench("bench-nf4", "--quantization", "nf4")

    def bench_bf16(self) -> dict:
        return self.bench("bench-bf16")

    def eager(self) -> dict:
        return self.bench("eager", contenders=(BASE, DERA, "PEFT, mixed batch"), engine="dynamic")

    def bench(self, name: str, *options: str, contenders: tuple[str, ...] = CAPTURED, engine: str = "captured") -> dict:
        only = [part for contender in contenders for part in ("--only", contender)]
        found, output = self.command(
            name, "-m", "dera_peft.cli", "bench", "--shape", "llama-8b", "--dtype", "bfloat16", *options,
            "--batch", "1,8,32", "--prompt", 64, "--new", 16, "--rounds", 2, "--engine", engine, *only, "--json",
        )  # fmt: skip
        return found | _json_of(output)


def _output_of(process: subprocess.Popen, limit: float) -> str:
    """What a process prints to stdout until it ends; after `limit` seconds it is interrupted, and then killed."""
    for patience, sent in ((limit, signal.SIGINT), (20, signal.SIGKILL)):
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=patience)[0]
        process.send_signal(sent)
    return process.communicate()[0]


def _json_of(text: str) -> dict:
    """The JSON object that a command has printed; nothing if it was stopped before."""
    with suppress(json.JSONDecodeError):
        found = json.loads(text)
        return found if isinstance(found, dict) else {}
    return {}


def aims(found: dict) -> list[tuple[str, str, str]]:
    """What was aimed at on an H100 or H200, and what was measured: rows of (what, aim, measured)."""
    rows = []
    for dtype in ("bf16", "nf4"):
        run = found.get(f"bench-{dtype}", {})
        by = {(row["contender"], row["batch"]): row for row in run.get("results", [])}

        def step(name: str, batch: int, by=by) -> float:
            return by[name, batch]["step_seconds"]["median"]

        for batch, bf16_aim in ((1, 1.12), (8, 1.08)):
            if (DERA, batch) not in by:  # it was stopped before
                continue
            aim = bf16_aim if dtype == "bf16" else 1.10
            ratio = step(DERA, batch) / step(TWICE, batch)
            rows.append((f"{dtype}, B = {batch}: DeRa λ=0.5, × base at 2B rows", f"≤ {aim:.2f}", f"{ratio:.2f}"))
        if (DERA, 1) not in by:
            continue
        ratio = step(TWO, 1) / step(DERA, 1)
        rows.append((f"{dtype}, B = 1: faster than two models, eager", "≥ 5 ×", f"{ratio:.1f} ×"))
        rows.append((f"{dtype}, B = 1: λ=0, × base", "≤ 1.01", f"{step(REFERENCE, 1) / step(BASE, 1):.2f}"))
        if dtype == "bf16":
            for name, aim in ((BASE, "≥ 60 %"), (DERA, "≥ 55 %")):
                rows.append((f"bf16, B = 1: bandwidth, {name}", aim, f"{by[name, 1]['bandwidth_share']:.0%}"))
        else:
            ratio = by[DERA, 1]["peak_bytes"] / by[TWO, 1]["peak_bytes"]
            rows.append(("nf4, B = 1: peak memory, × two NF4 models", "≤ 0.60", f"{ratio:.2f}"))
    if len(served := found.get("serve", {}).get("rows", [])) == 3:
        ratio = served[2]["tokens_per_second"] / served[0]["tokens_per_second"]
        rows.append(("bf16: the server's engine, captured, × eager", "≥ 2 ×", f"{ratio:.1f} ×"))
    if "peak_allocated" in found.get("qlora", {}):
        measured = found["qlora"]["peak_allocated"]
        rows.append(
            ("QLoRA DPO of an 8B: peak memory", f"{COMPUTED / 1e9:.1f} GB, computed", f"{measured / 1e9:.1f} GB")
        )
    return rows


def make_llama(folder: Path, shape: str = "llama-8b", device: str = "cuda") -> None:
    """A random Llama-8B in bf16 with a tokenizer, an SFT adapter over it, and pairs of about 1,000 tokens."""
    import torch

    sys.path.insert(0, str(ROOT / "configs" / "tiny"))
    import world

    from dera_peft.bench.shapes import make_random, read_config

    peft_model = make_random(read_config(shape, 1024), "bfloat16", torch.device(device))
    peft_model.save_pretrained(folder / "sft")
    peft_model.unload().save_pretrained(folder / "base")
    _, tokenizer = world.model()
    tokenizer.model_max_length = 1024
    tokenizer.chat_template = (ROOT / "configs" / "llama-3.1-8b-qlora" / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(folder / "base")
    ids = tokenizer(" ".join(row["prompt"] + row["completion"] for row in world.stories().select(range(50))))[
        "input_ids"
    ]
    answers = [tokenizer.decode(ids[start : start + 960], skip_special_tokens=True) for start in range(0, 1600, 100)]
    rows = [
        {
            "chosen": [{"role": "user", "content": f"Story {i}"}, {"role": "assistant", "content": answers[i]}],
            "rejected": [{"role": "user", "content": f"Story {i}"}, {"role": "assistant", "content": answers[i + 1]}],
        }
        for i in range(len(answers) - 1)
    ]
    (folder / "pairs").mkdir()
    for split in ("train", "test"):
        (folder / "pairs" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def time_generate() -> None:
    """Prints the milliseconds a token of greedy decoding of a Llama-8B in bf16, each as a line of JSON."""
    import torch

    from dera_peft.bench.config import BenchedModel
    from dera_peft.bench.contenders import make_dera

    model = make_dera(BenchedModel(shape="llama-8b", dtype="bfloat16").build(1024))

    def seconds(ids: torch.Tensor, lam: float, new: int, capture: bool) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), lam=lam, capture=capture, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    for batch in (1, 8):
        ids = torch.randint(3, 30_000, (batch, 64), device="cuda")
        for lam, capture in ((0.5, True), (0.0, True), (1.0, True), (0.5, False)):
            first = seconds(ids, lam, 40, capture)  # with the recording
            seconds(ids, lam, 8, capture)
            # both of the same prefill
            step = (seconds(ids, lam, 40, capture) - seconds(ids, lam, 8, capture)) / 32
            row = {"batch": batch, "lambda": lam, "capture": capture, "step_ms": step * 1e3, "first_s": first}
            print(json.dumps(row), flush=True)


def time_serving() -> None:
    """
    Prints the tokens/s of the server's engine with a Llama-8B in bf16, eager and captured, as lines of JSON: 24
    requests of unlike λ, prompts and lengths, 16 rows at a time. Captured ones come twice, first with the recordings.
    """
    import torch

    from dera_peft.bench.config import BenchedModel
    from dera_peft.bench.contenders import make_dera
    from dera_peft.decoding.sampling import Sampling
    from dera_peft.serve.engine import Engine
    from dera_peft.serve.requests import GenerationRequest

    sys.path.insert(0, str(ROOT / "configs" / "tiny"))
    import world

    model, (_, tokenizer) = make_dera(BenchedModel(shape="llama-8b", dtype="bfloat16").build(1024)), world.model()
    requests = [
        GenerationRequest(
            tuple(range(100 + 7 * i, 140 + 9 * i)), (0.0, 0.5, 1.0)[i % 3], ignore_eos=True, stream=False,
            sampling=Sampling(temperature=0, max_new_tokens=16 + 2 * i),
        )
        for i in range(24)
    ]  # fmt: skip
    for capture in (False, True, True):
        model.capture = capture
        engine = Engine(model, tokenizer, max_rows=16, prefix_tokens=0)
        torch.cuda.synchronize()
        began = time.perf_counter()
        handles = [engine.submit(request) for request in requests]
        while engine.step():
            pass
        seconds = time.perf_counter() - began  # the last tokens are on the host
        tokens = sum(len(handle.result(0).tokens) for handle in handles)
        row = {"capture": capture, "tokens_per_second": tokens / seconds, "steps": engine.statistics().steps}
        print(json.dumps(row), flush=True)


def run_demo() -> None:
    """The commands of `make demo`, then the seconds of each as a line of JSON."""
    from dera_peft.cli.app import main

    seconds = {}
    for step in ("sft", "preferences", "dpo", "sweep"):
        began = time.time()
        try:
            main([step, "--config", f"configs/tiny/{step}.yaml"])
        except SystemExit as end:
            if end.code:
                raise
        seconds[step] = round(time.time() - began, 1)
    print(json.dumps(seconds))


def run_dpo(arguments: list[str]) -> None:
    """`dera dpo`, then its peak memory as a line of JSON."""
    import torch

    from dera_peft.training import dpo

    dpo.main(arguments)
    peaks = {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
    print(json.dumps(peaks))


def run_steps(checker: Checker, steps: list[str], keep: Callable[[str, dict], None]) -> None:
    """The steps that are asked for, in the order of `STEPS`; `keep` gets the result of each when it is there."""

    def result_of(name: str) -> dict:
        return getattr(checker, name.replace("-", "_"))()

    for name in ALONE:
        if name in steps:
            keep(name, result_of(name))
    with ThreadPoolExecutor() as pool:
        running = {pool.submit(result_of, name): name for name in TOGETHER if name in steps}
        for done in as_completed(running):
            keep(running[done], done.result())


def main() -> int:
    if sys.argv[1:2] == ["--make-llama"]:
        make_llama(Path(sys.argv[2]))
        return 0
    if sys.argv[1:2] == ["--generate"]:
        time_generate()
        return 0
    if sys.argv[1:2] == ["--serve"]:
        time_serving()
        return 0
    if sys.argv[1:2] == ["--demo"]:
        run_demo()
        return 0
    if sys.argv[1:2] == ["--dpo"]:
        run_dpo(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "gpu-check", help="folder for figures.json and the logs"
    )
    usual = ",".join(step for step in STEPS if step != "eager")
    parser.add_argument("--only", default=usual, help=f"steps with commas, of {', '.join(STEPS)}")
    arguments = parser.parse_args()
    steps = arguments.only.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"--only: {sorted(unknown)[0]!r} is not a step; there are {', '.join(STEPS)}")
    import torch

    if not torch.cuda.is_available():
        print("error: there is no CUDA device here, which make gpu-check is for", file=sys.stderr)
        return 2
    from dera_peft.bench.report import environment
    from dera_peft.files import write_atomically

    found: dict = {"environment": environment(torch.device("cuda"))}
    with tempfile.TemporaryDirectory() as folder:
        checker = Checker(Path(folder), arguments.output.resolve() / "logs")
        figures = arguments.output / "figures.json"

        def keep(name: str, result: dict) -> None:
            found[name] = result
            write_atomically(figures, json.dumps(found, indent=1, ensure_ascii=False))

        run_steps(checker, steps, keep)
        facts = found["environment"]
        print(f"\n{facts['device']}, {facts['date']}; " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))
        for what, aim, measured in aims(found):
            print(f"{what:55} {aim:>20} {measured:>10}")
        failed = [name for name in steps if not found[name]["passed"]]
        print(f"failed: {', '.join(failed)}" if failed else "all passed", f"(figures: {figures})", flush=True)
    return 1 if failed else 0  # printed before the 16 GB of the folder are removed, which takes its time


if __name__ == "__main__":
    sys.exit(main())
