"""The tiny recipe's four commands and the quickstart, scaled down, in a folder of their own."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dera_peft import DeRaError, DeRaModel
from dera_peft.record import Record
from training.program import start
from training.sft import main as sft_main

ROOT = Path(__file__).resolve().parents[2]
SFT = ["--max_steps", "60", "--save_strategy", "steps", "--save_steps", "20", "--learning_rate", "5e-3"]
DPO = ["--max_steps", "8", "--save_strategy", "no", "--logging_steps", "1", "--lr_scheduler_type", "constant"]


def run(*command, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, **kwargs)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def sft(folder: Path, *arguments, **kwargs):
    return run(
        "-m", "training.sft", "--config", "configs/tiny/sft.yaml", "--output_dir", folder, *SFT, *arguments, **kwargs
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """SFT, preferences and DPO, once."""
    folder = tmp_path_factory.mktemp("recipe")
    sft(folder / "sft")
    (folder / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "Mara the baker wanted to bake pie {i}."}}\n' for i in range(24))
    )
    run(
        "-m", "training.preferences", "--config", "configs/tiny/preferences.yaml",
        "--model_name_or_path", folder / "sft", "--prompts", folder / "prompts.jsonl",
        "--output_dir", folder / "preferences",
    )  # fmt: skip
    run(
        "-m", "training.dpo", "--config", "configs/tiny/dpo.yaml", "--model_name_or_path", folder / "sft",
        "--dataset_name", folder / "preferences" / "preferences.jsonl", "--output_dir", folder / "dpo", *DPO,
    )  # fmt: skip
    return folder


def test_preferences_are_in_trls_format(recipe):
    rows = [json.loads(line) for line in (recipe / "preferences" / "preferences.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"}
        assert row["chosen_reward"] > row["rejected_reward"]
    samples = (recipe / "preferences" / "completions.jsonl").read_text().splitlines()
    assert len(samples) == 24 * 4


@torch.no_grad()
def test_dpo_moves_the_adapter_and_nothing_else(recipe):
    adapter = load_file(recipe / "dpo" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in adapter.values()), "every factor has moved away from zero"
    assert not list(recipe.glob("dpo/model*.safetensors")), "the base is not copied"
    history = json.loads((recipe / "dpo" / "dera.json").read_text())["training"]
    assert history["beta"] == 0.5
    assert history["steps"] == 8

    record = Record.load(recipe / "dpo")
    assert Path(record.base).resolve() == (recipe / "sft").resolve()
    model = DeRaModel.from_pretrained(adapter=recipe / "dpo")
    ids = torch.arange(3, 43).view(2, 20)
    base = AutoModelForCausalLM.from_pretrained(recipe / "sft")
    z_ref = base(ids).logits
    z_aligned = PeftModel.from_pretrained(base, recipe / "dpo").eval()(ids).logits
    assert (z_ref - z_aligned).abs().max() > 1e-3
    torch.testing.assert_close(model(ids, lam=0.5).logits, (z_ref + z_aligned) / 2, atol=1e-4, rtol=1e-5)


def test_the_loss_starts_at_log_2(recipe, tmp_path):
    """With the learning rate at zero the policy stays the reference, and DPO's loss is log 2 at every step."""
    done = run(
        "-m", "training.dpo", "--config", "configs/tiny/dpo.yaml", "--model_name_or_path", recipe / "sft",
        "--dataset_name", recipe / "preferences" / "preferences.jsonl", "--output_dir", tmp_path / "dpo", *DPO[:4],
        "--logging_steps", "1", "--learning_rate", "0", "--max_steps", "2",
    )  # fmt: skip
    losses = [float(line.split("'loss': '")[1].split("'")[0]) for line in done.stdout.splitlines() if "'loss'" in line]
    assert len(losses) == 2
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-4)


def test_run_again_it_is_reused_and_other_settings_are_an_error(recipe):
    stamp = (recipe / "sft" / "model.safetensors").stat().st_mtime_ns
    assert "is complete: reusing it" in sft(recipe / "sft").stdout
    assert (recipe / "sft" / "model.safetensors").stat().st_mtime_ns == stamp
    done = sft(recipe / "sft", "--seed", "77", check=False)
    assert done.returncode == 2
    assert "made with seed=1, and now it is 77" in done.stderr
    assert "Traceback" not in done.stderr
    assert (recipe / "sft" / "model.safetensors").stat().st_mtime_ns == stamp


def test_killed_training_goes_on_from_its_checkpoint(recipe, tmp_path):
    """And ends with the weights of an uninterrupted run."""
    command = [
        sys.executable, "-m", "training.sft", "--config", "configs/tiny/sft.yaml",
        "--output_dir", str(tmp_path / "sft"), *SFT,
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(tmp_path.glob("sft/checkpoint-*/trainer_state.json")) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "sft" / "model.safetensors").exists(), (
        "it must be killed in the middle for the test to mean something"
    )
    assert "going on from" in sft(tmp_path / "sft").stderr
    expected, found = (load_file(folder / "sft" / "model.safetensors") for folder in (recipe, tmp_path))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("sft", ["--dataset_name", "nowhere.jsonl"], "there is no such file"),
        ("sft", ["--model_name_or_path", "./nowhere"], "model_name_or_path='./nowhere' can't be loaded"),
        ("sft", ["--learning_rat", "1"], "learning_rat"),
        ("dpo", ["--dataset_name", "nowhere.jsonl"], "there is no such file"),
        ("dpo", ["--use_peft", "false"], "DeRa needs the aligned model as a LoRA adapter"),
        ("preferences", ["--prompts", "nowhere.txt"], "there is no such file"),
        ("preferences", ["--reward", "configs/tiny/world.py:rewrad"], "has no 'rewrad'"),
        ("preferences", ["--samples", "1"], "samples=1 must be at least 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, program, arguments, message):
    monkeypatch.chdir(ROOT)
    config = ["--config", f"configs/tiny/{program}.yaml", "--output_dir", str(tmp_path / "out")]
    main = importlib.import_module(f"training.{program}").main
    with pytest.raises(SystemExit) as caught:
        start(lambda: main([*config, *arguments]))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_an_unknown_key_in_a_config(tmp_path):
    (tmp_path / "sft.yaml").write_text("learning_rat: 1\noutput_dir: x\nbf16: false\n")
    with pytest.raises(DeRaError, match="learning_rat"):
        sft_main(["--config", str(tmp_path / "sft.yaml")])


def test_sweep_config_and_quickstart(recipe, tmp_path):
    done = run(
        "-m", "dera_peft.cli", "sweep", "--config", "configs/tiny/sweep.yaml", "--adapter", recipe / "dpo",
        "--output-dir", tmp_path / "sweep", "--samples", "1", "--max-prompts", "4", "--max-new-tokens", "20",
    )  # fmt: skip
    assert "2  " in done.stdout
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000
    done = run(
        "-c", f"import sys; sys.path.insert(0, 'examples'); import quickstart; quickstart.main({str(recipe / 'dpo')!r})"
    )
    assert "λ=0.5" in done.stdout
    assert "largest difference to the formula" in done.stdout
