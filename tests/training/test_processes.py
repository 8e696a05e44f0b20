"""Two processes on the CPU, over gloo, against one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import LORA, train, write_rows

from dera_peft import DeRaError
from dera_peft.training.program import check_processes

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from small_runs import train
for program, settings in {runs!r}:
    train(program, Path({folder!r}) / program, num_processes=2, per_device_train_batch_size=2, **settings)
"""


def test_two_processes_have_the_loss_of_one_at_the_same_global_batch(tiny_base, preferences, sft_adapter, tmp_path):
    pairs = [json.loads(line) for line in preferences.read_text().splitlines()]
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": row["prompt"] + row["chosen"]} for row in pairs])
    lora = {**LORA, "lora_dropout": 0.0}  # each process would drop others
    runs = [
        ("sft", {"model_name_or_path": str(tiny_base), "dataset_name": str(texts), **lora}),
        ("dpo", {"model_name_or_path": str(tiny_base), "dataset_name": str(preferences),
                 "sft_adapter": str(sft_adapter)}),
    ]  # fmt: skip
    script = tmp_path / "programs.py"
    script.write_text(
        PROGRAMS.format(tests=str(ROOT / "tests"), root=str(ROOT), runs=runs, folder=str(tmp_path / "two"))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("training on 2 processes (cpu), 4 rows a step") == 2, "once a program, not once a process"
    assert done.stdout.count("'train_runtime'") == 2

    for program, settings in runs:
        one = train(program, tmp_path / "one" / program, num_processes=1, per_device_train_batch_size=4, **settings)
        two = tmp_path / "two" / program
        ours, theirs = (json.loads((folder / "dera.json").read_text())["training"] for folder in (one, two))
        assert (ours["processes"], theirs["processes"]) == (1, 2)
        for name in ("first_loss", "loss", "train_loss"):
            assert theirs["metrics"][name] == pytest.approx(ours["metrics"][name], abs=1e-4), (program, name)
        assert abs(ours["metrics"]["loss"] - ours["metrics"]["first_loss"]) > 1e-3, "something was learned"
        expected, found = (load_file(f / "adapter_model.safetensors") for f in (one, two))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-2)


def test_a_launcher_that_starts_one_process_in_silence_is_found_out(tmp_path):
    """accelerate on the CPU: asked for two, it starts one."""
    script = tmp_path / "check.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from dera_peft.cli.program import run_program\n"
        "from dera_peft.training.program import check_processes\n"
        "run_program(lambda: print('running', check_processes(None)))\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run([*launch, "--num_processes", "2", str(script)], capture_output=True, text=True, timeout=120)
    assert "error: num_processes=2, but there is 1 process" in done.stderr
    assert "torchrun --nproc_per_node 2" in done.stderr
    assert "running" not in done.stdout


def test_the_number_of_processes_that_is_expected():
    assert check_processes(None) == 1
    assert check_processes(1) == 1
    with pytest.raises(DeRaError, match="num_processes=4, but there is 1 process"):
        check_processes(4)
