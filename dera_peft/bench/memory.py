"""The peak of a contender's memory on a CPU, in a process of its own, where no other contender has left anything."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from dera_peft.bench.config import StepSettings
from dera_peft.errors import DeRaError


def measure_alone(settings: StepSettings, contender: str, batch_size: int) -> dict[str, int]:
    """
    Runs one contender once in a fresh Python.

    Returns:
        In bytes: `libraries`, resident when all is imported and no model made; `model`, when it is made; `peak`, the
        most that was resident while it ran.
    """
    arguments = json.dumps([asdict(settings), contender, batch_size], default=str)
    process = subprocess.run([sys.executable, "-m", __name__, arguments], capture_output=True, text=True)
    if process.returncode:
        raise DeRaError(f"{contender}, measured alone, failed: {_reason(process.returncode, process.stderr)}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def _reason(code: int, stderr: str) -> str:
    """Why a process failed: its last line, or else the signal that killed it or its exit code."""
    if lines := stderr.strip().splitlines():
        return lines[-1]
    if code < 0:
        return f"signal {-code} ended it ({signal.strsignal(-code)})."
    return f"it ended with exit code {code}."


def main() -> None:
    import torch

    from dera_peft.bench.contenders import make_contenders
    from dera_peft.bench.measure import decode_forced, make_tokens

    values, contender, batch_size = json.loads(sys.argv[1])
    settings = StepSettings(**values)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    found = {"libraries": _status("VmRSS")}
    length = settings.prompt + settings.new
    peft_model = settings.build(length)
    (one,) = make_contenders(peft_model, [contender])
    tokens = make_tokens(peft_model.config.vocab_size, batch_size, length, peft_model.device)
    found["model"] = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # what making the model took is not its peak
    decode_forced(one, tokens, settings.prompt, settings.prefill_chunk)
    found["peak"] = _status("VmHWM")
    json.dump(found, sys.stdout)


def _status(name: str) -> int:
    """A figure of the kernel's about this process, in bytes."""
    found = _read_status(name)
    if found is None:
        raise DeRaError(f"this system does not tell {name} of a process in /proc/self/status; --memory needs Linux.")
    return found


def resident(process: int) -> int | None:
    """What is resident of a process, by its id, in bytes; None where the system does not tell."""
    return _read_status("VmRSS", str(process))


def _read_status(name: str, process: str = "self") -> int | None:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


if __name__ == "__main__":
    main()
