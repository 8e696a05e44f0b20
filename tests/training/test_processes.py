"""Two processes on the CPU, over gloo, against one: with the whole model each, and sharded by FSDP2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp2_on_cpu import CONFIG
from safetensors.torch import load_file
from small_runs import LORA, train, write_rows

from dera_peft import DeRaError, DeRaModel
from dera_peft.training.program import check_processes

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from fsdp2_on_cpu import fsdp2, without_fsdp
from small_runs import train
for program, name, settings in {runs!r}:
    with fsdp2() if "fsdp" in name else without_fsdp():
        train(program, Path({folder!r}) / name, num_processes=2, per_device_train_batch_size=2, **settings)
"""


def test_two_processes_have_the_loss_of_one_at_the_same_global_batch(tiny_base, preferences, sft_adapter, tmp_path):
    pairs = [json.loads(line) for line in preferences.read_text().splitlines()]
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": row["prompt"] + row["chosen"]} for row in pairs])
    lora = {**LORA, "lora_dropout": 0.0}  # each process would drop others
    dpo = {"model_name_or_path": str(tiny_base), "dataset_name": str(preferences), "sft_adapter": str(sft_adapter)}
    runs = [
        ("sft", "sft", {"model_name_or_path": str(tiny_base), "dataset_name": str(texts), **lora}),
        ("dpo", "dpo", dpo),
        ("dpo", "dpo-fsdp", {**dpo, "quantization": "nf4", "save_strategy": "steps", "save_steps": 2}),
    ]
    script = tmp_path / "programs.py"
    script.write_text(
        PROGRAMS.format(tests=str(ROOT / "tests"), root=str(ROOT), runs=runs, folder=str(tmp_path / "two"))
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command += ["--num_processes", "2", "--main_process_port", "0", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("training on 2 processes (cpu), 4 rows a step") == 3, "once a program, not once a process"
    assert done.stdout.count("'train_runtime'") == 3

    for program, name, settings in runs:
        one = train(program, tmp_path / "one" / name, num_processes=1, per_device_train_batch_size=4, **settings)
        two = tmp_path / "two" / name
        ours, theirs = (json.loads((folder / "dera.json").read_text())["training"] for folder in (one, two))
        assert (ours["processes"], theirs["processes"]) == (1, 2)
        assert ours["quantization"] == theirs["quantization"] == settings.get("quantization")
        for metric in ("first_loss", "loss", "train_loss"):
            assert theirs["metrics"][metric] == pytest.approx(ours["metrics"][metric], abs=1e-4), (name, metric)
        assert abs(ours["metrics"]["loss"] - ours["metrics"]["first_loss"]) > 1e-3, "something was learned"
        expected, found = (load_file(f / "adapter_model.safetensors") for f in (one, two))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-4, rtol=1e-2)

    # a checkpoint of the sharded run has FSDP's weights, and the whole adapter
    checkpoint = tmp_path / "two" / "dpo-fsdp" / "checkpoint-4"
    assert (checkpoint / "pytorch_model_fsdp.bin").is_file()
    last = load_file(checkpoint / "adapter_model.safetensors")
    assert all(torch.equal(last[key], tensor) for key, tensor in found.items())
    model = DeRaModel.from_pretrained(adapter=two, quantization="nf4")
    branches = model(torch.arange(3, 11)[None], lam=0.5, output_branches=True).branch_logits
    assert not torch.allclose(branches["aligned"], branches["reference"], atol=1e-3)


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
