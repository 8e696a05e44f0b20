"""What `make gpu-check` makes of its figures, and what it says where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import gpu_check
import torch

TESTS = Path(__file__).resolve().parents[1]


def row(contender: str, batch: int, step: float, **more) -> dict:
    return {"contender": contender, "batch": batch, "step_seconds": {"median": step}, **more}


def test_figures_against_the_aims():
    rows = [
        row(gpu_check.BASE, 1, 8e-3, bandwidth_share=0.62), row(gpu_check.TWICE, 1, 8.2e-3),
        row(gpu_check.DERA, 1, 9.02e-3, bandwidth_share=0.57, peak_bytes=6e9), row(gpu_check.REFERENCE, 1, 8.04e-3),
        row(gpu_check.TWO, 1, 54.12e-3, peak_bytes=12e9), row(gpu_check.TWICE, 8, 9e-3), row(gpu_check.DERA, 8, 9.9e-3),
    ]  # fmt: skip
    found = {"bench-bf16": {"results": rows}, "bench-nf4": {"passed": False}, "qlora": {"peak_allocated": 8.25e9}}
    found["serve"] = {"rows": [{"tokens_per_second": speed} for speed in (100.0, 150.0, 310.0)]}
    assert [(aim, measured) for _, aim, measured in gpu_check.aims(found)] == [
        ("≤ 1.12", "1.10"), ("≤ 1.08", "1.10"), ("≥ 5 ×", "6.0 ×"), ("≤ 1.01", "1.01"),
        ("≥ 60 %", "62%"), ("≥ 55 %", "57%"), ("≥ 2 ×", "3.1 ×"), ("9.5 GB, computed", "8.2 GB"),
    ]  # fmt: skip
    found["bench-nf4"] = {"results": rows}
    assert gpu_check.aims(found)[-3][1:] == ("≤ 0.60", "0.50")
    assert gpu_check.aims({}) == []
    stopped = {"bench-nf4": {"results": [row for row in rows if row["batch"] == 1]}}
    assert next(what for what, *_ in gpu_check.aims(stopped)).startswith("nf4, B = 1")
    assert len(gpu_check.aims(stopped)) == 4


def test_each_result_is_kept_when_it_is_there(tmp_path, monkeypatch):
    """What was never measured comes first. A command that hangs is interrupted, and what it then prints is kept."""
    # a background job of a shell ignores SIGINT, and so would its children
    program = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('{\"results\": []}')"
    )
    checker = gpu_check.Checker(tmp_path, tmp_path / "logs")
    command, kept, seen = checker.command, {}, []
    monkeypatch.setattr(checker, "command", lambda name, *_: command(name, "-c", program, limit=3))
    monkeypatch.setattr(checker, "generate", lambda: seen.append(list(kept)) or {"passed": True})
    gpu_check.run_steps(checker, ["generate", "bench-nf4"], kept.__setitem__)
    assert seen == [["bench-nf4"]]
    assert kept["bench-nf4"]["results"] == []
    assert kept["generate"] == {"passed": True}
    assert 3 <= kept["bench-nf4"]["seconds"] < 50


def test_without_a_gpu_it_says_so():
    assert not torch.cuda.is_available()
    run = subprocess.run([sys.executable, TESTS / "gpu_check.py"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "error: there is no CUDA device here, which make gpu-check is for\n"
