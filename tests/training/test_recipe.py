"""The tiny recipe's five commands and the quickstart, scaled down, in a folder of their own."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.record import Record
from dera_peft.cli.app import app, main
from dera_peft.evaluate.retrain import retrain_command
from dera_peft.messages import messages_on_stderr
from dera_peft.training import distill, dpo, preferences, sft
from dera_peft.user_code import load_object

ROOT = Path(__file__).resolve().parents[2]
SFT = ["--max_steps", "40", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--save_strategy", "no"]
DPO = ["--max_steps", "8", "--save_strategy", "no", "--logging_steps", "1", "--lr_scheduler_type", "constant"]


def run(program, config: str, output_dir: Path, *arguments) -> Path:
    program.main(
        ["--config", str(ROOT / "configs" / "tiny" / config), "--output_dir", str(output_dir), *map(str, arguments)]
    )
    return output_dir


@pytest.fixture(scope="module", autouse=True)
def in_the_repository():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, in_the_repository) -> Path:
    """SFT, preferences and DPO, once."""
    folder = tmp_path_factory.mktemp("recipe")
    load_object("configs/tiny/world.py:stories")().select(range(400)).to_json(folder / "stories.jsonl")
    run(sft, "sft.yaml", folder / "sft", "--dataset_name", folder / "stories.jsonl", *SFT)
    (folder / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "Mara the baker wanted to bake pie {i}."}}\n' for i in range(12))
    )
    run(
        preferences, "preferences.yaml", folder / "preferences",
        "--model_name_or_path", folder / "sft", "--prompts", folder / "prompts.jsonl",
    )  # fmt: skip
    run(
        dpo, "dpo.yaml", folder / "dpo", "--model_name_or_path", folder / "sft",
        "--dataset_name", folder / "preferences" / "preferences.jsonl", *DPO,
    )  # fmt: skip
    return folder


def test_a_lambda_is_distilled(recipe, tmp_path):
    prompts = ["--prompts", recipe / "prompts.jsonl", "--held_out_prompts", recipe / "prompts.jsonl", "--held_out", 2]
    with pytest.raises(DeRaError, match="12 prompts are fewer than one step takes, 16"):
        run(distill, "distill.yaml", tmp_path / "none", "--adapter", recipe / "dpo", *prompts)
    steps = [
        "--per_device_train_batch_size",
        4,
        "--max_steps",
        2,
        "--max_completion_length",
        8,
        "--save_strategy",
        "no",
    ]
    run(distill, "distill.yaml", tmp_path / "out", "--adapter", recipe / "dpo", *prompts, *steps)
    training = Record.load(tmp_path / "out").training
    assert (training["lambda"], training["beta"], training["steps"]) == (1.5, pytest.approx(0.5 / 1.5), 2)


def test_preferences_are_in_trls_format(recipe):
    rows = [json.loads(line) for line in (recipe / "preferences" / "preferences.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"}
        assert row["chosen_reward"] > row["rejected_reward"]
    samples = (recipe / "preferences" / "completions.jsonl").read_text().splitlines()
    assert len(samples) == 12 * 4


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


def test_the_loss_starts_at_log_2(recipe):
    """At the first step the policy is the reference."""
    state = json.loads((recipe / "dpo" / "dera.json").read_text())["training"]["metrics"]
    assert state["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert state["loss"] < state["first_loss"]


def test_run_again_it_is_reused_and_other_settings_are_an_error(recipe, capsys):
    again = [sft, "sft.yaml", recipe / "sft", "--dataset_name", recipe / "stories.jsonl", *SFT]
    stamp = (recipe / "sft" / "model.safetensors").stat().st_mtime_ns
    with messages_on_stderr():
        run(*again)
    assert "is complete: reusing it" in capsys.readouterr().err
    assert (recipe / "sft" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(DeRaError, match="made with seed=1, and now it is 77"):
        run(*again, "--seed", "77")
    assert (recipe / "sft" / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("sft", ["--dataset_name", "nowhere.jsonl"], "there is no such file"),
        ("sft", ["--model_name_or_path", "./nowhere"], "model_name_or_path='./nowhere': there is no such folder"),
        ("sft", ["--learning_rat", "1"], "learning_rat"),
        ("dpo", ["--dataset_name", "nowhere.jsonl"], "there is no such file"),
        ("dpo", ["--use_peft", "false"], "DeRa needs the aligned model as a LoRA adapter"),
        ("preferences", ["--prompts", "nowhere.txt"], "there is no such file"),
        ("preferences", ["--reward", "configs/tiny/world.py:rewrad"], "has no 'rewrad'"),
        ("preferences", ["--samples", "1"], "samples=1 must be at least 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(recipe, tmp_path, capsys, program, arguments, message):
    config = ["--config", f"configs/tiny/{program}.yaml", "--output_dir", str(tmp_path / "out")]
    if program != "sft":  # whose model the others take
        config += ["--model_name_or_path", str(recipe / "sft")]
    if program == "dpo":
        config += ["--dataset_name", str(recipe / "preferences" / "preferences.jsonl")]
    with pytest.raises(SystemExit) as caught:
        main([program, *config, *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_an_unknown_key_in_a_config(tmp_path):
    (tmp_path / "sft.yaml").write_text("learning_rat: 1\noutput_dir: x\nbf16: false\n")
    with pytest.raises(DeRaError, match="learning_rat"):
        sft.main(["--config", str(tmp_path / "sft.yaml")])


def test_sweep_retraining_and_quickstart(recipe, tmp_path, capsys, monkeypatch):
    done = CliRunner().invoke(
        app,
        ["sweep", "--config", "configs/tiny/sweep.yaml", "--adapter", str(recipe / "dpo"), "--output-dir",
         str(tmp_path / "sweep"), "--samples", "1", "--max-prompts", "4", "--max-new-tokens", "20"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "2  " in done.output
    assert "worst group" in done.output
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000

    command = retrain_command(str(recipe / "dpo"), Record.load(recipe / "dpo"), 0.125, tmp_path)
    assert command == f"dera dpo --config {tmp_path}/retrain.yaml"
    dpo.main([*command.split()[2:], "--output_dir", str(tmp_path / "again"), "--max_steps", "1"])
    first, again = (
        json.loads((folder / "run.json").read_text())["settings"] for folder in (recipe / "dpo", tmp_path / "again")
    )
    assert (first.pop("beta"), again.pop("beta"), first.pop("max_steps"), again.pop("max_steps")) == (0.5, 0.125, 8, 1)
    assert again == first, "nothing but β is another"

    monkeypatch.syspath_prepend(ROOT / "examples")
    capsys.readouterr()
    importlib.import_module("quickstart").main(str(recipe / "dpo"))
    shown = capsys.readouterr().out
    assert "λ=0.5" in shown
    assert "largest difference to the formula" in shown
