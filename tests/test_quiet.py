"""Other libraries' notes stay out of a user's terminal."""

import os
import subprocess
import sys

import pytest

pty = pytest.importorskip("pty")


def test_a_quantized_model_is_loaded_in_silence_on_a_terminal(tiny_base, tiny_adapter):
    command = [sys.executable, "-m", "dera_peft.cli", "info", "--base", str(tiny_base), "--adapter", str(tiny_adapter)]
    terminal, stderr = pty.openpty()
    subprocess.run([*command, "--quantization", "nf4"], stdout=subprocess.DEVNULL, stderr=stderr, check=True)
    os.set_blocking(terminal, False)
    os.write(stderr, b"end")
    assert os.read(terminal, 10_000) == b"end"
    os.close(terminal)
    os.close(stderr)


def test_what_bitsandbytes_says_of_this_cpu_is_not_shown():
    """On a CPU with AVX512-BF16 it does at import; here it is told that this is one, and imported again."""
    pytest.importorskip("bitsandbytes")
    program = """
import importlib, sys
import bitsandbytes.backends.cpu.ops as ops
import bitsandbytes.functional
from dera_peft.quiet import be_quiet
sys.modules["kernels"] = None
bitsandbytes.functional.has_avx512bf16 = lambda: True
importlib.reload(ops)
print("quiet from here on", file=sys.stderr)
be_quiet()
importlib.reload(ops)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = done.stderr.split("quiet from here on")
    assert "Failed to load CPU gemm_4bit_forward" in before
    assert "Failed to load CPU gemm_4bit_forward" not in after
