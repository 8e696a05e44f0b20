"""The command that retrains; that it trains as the first time is tested with the tiny recipe."""

import json

import pytest
import yaml

from dera_peft.checkpoint.record import Record
from dera_peft.evaluate.retrain import retrain_command

TRAINING = {"method": "dpo", "beta": 0.5, "dataset": "pairs.jsonl"}
ON_TOP = {"reference": ["sft"], "aligned": ["sft", "default"]}
CONTINUED = {"reference": ["sft"], "aligned": ["default"]}
ALONE = {"reference": [], "aligned": ["default"]}


def record(branches, training=TRAINING) -> Record:
    return Record("org/base", {"sft": "org/sft", "default": "org/dpo"}, branches, training=training)


@pytest.mark.parametrize(
    ("branches", "known"),
    [
        (ALONE, ""),
        (ON_TOP, "--sft_adapter org/sft "),
        (CONTINUED, "--sft_adapter org/sft --continue_sft_adapter true "),
    ],
)
def test_of_what_the_record_knows(tmp_path, branches, known):
    assert retrain_command("org/dpo", record(branches), 1 / 3, tmp_path) == (
        f"dera dpo --model_name_or_path org/base {known}--dataset_name pairs.jsonl --use_peft true "
        "--beta 0.3333 --output_dir org/dpo-beta-0.3333  # and its other settings, which its record does not hold"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("quantization", "known"),
    [
        (None, ""),
        ("nf4", "--quantization nf4 "),
        ("int8", "--quantization int8 "),
        (
            "fp4 without double quantization",
            "--load_in_4bit true --bnb_4bit_quant_type fp4 --use_bnb_nested_quant false ",
        ),
        ("gptq", ""),
    ],
)
def test_the_quantization_that_the_record_knows(quantization, known, tmp_path):
    training = {**TRAINING, "quantization": quantization, "dtype": "bfloat16"}
    command = retrain_command("org/dpo", record(ALONE, training), 1 / 3, tmp_path)
    assert command is not None
    assert f"--dataset_name pairs.jsonl --dtype bfloat16 {known}--use_peft true" in command


def test_of_the_settings_of_the_training(tmp_path):
    (tmp_path / "dpo").mkdir()
    settings = {"dataset_name": "p.jsonl", "beta": 0.5, "seed": 3, "debug": [], "processes": 2, "max_length": None}
    (tmp_path / "dpo" / "run.json").write_text(json.dumps({"settings": settings}))
    command = retrain_command(f"{tmp_path}/dpo/", record(ALONE), 0.25, tmp_path)
    assert command == f"torchrun --nproc_per_node 2 -m dera_peft.cli dpo --config {tmp_path}/retrain.yaml"
    assert yaml.safe_load((tmp_path / "retrain.yaml").read_text()) == {
        "dataset_name": "p.jsonl", "beta": 0.25, "seed": 3, "max_length": None,
        "output_dir": f"{tmp_path}/dpo-beta-0.25",
    }  # fmt: skip


def test_of_what_the_user_gave_where_the_folder_has_it(tmp_path):
    (tmp_path / "dpo").mkdir()
    given = {"dataset_name": "p.jsonl", "max_length": None, "seed": 42, "report_to": []}
    settings = {"dataset_name": "p.jsonl", "max_length": None, "use_cpu": True, "bf16": False, "processes": 1}
    (tmp_path / "dpo" / "run.json").write_text(json.dumps({"settings": settings, "given": given}))
    retrain_command(f"{tmp_path}/dpo", record(ALONE), 0.25, tmp_path)
    assert yaml.safe_load((tmp_path / "retrain.yaml").read_text()) == {
        **given, "beta": 0.25, "output_dir": f"{tmp_path}/dpo-beta-0.25",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}}', '{"settings": {"dataset_name": "p"}, "given": 3}'])
def test_a_damaged_folder_says_nothing(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    assert "which its record does not hold" in retrain_command(str(tmp_path), record(ALONE), 0.25, tmp_path)


def test_what_another_program_trained_has_none(tmp_path):
    assert retrain_command("org/dpo", record(ALONE, {}), 0.25, tmp_path) is None
    assert retrain_command("org/dpo", record(ALONE, {"method": "kto"}), 0.25, tmp_path) is None
