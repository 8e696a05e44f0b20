"""The example that compares retraining with decoding, scaled down, and its arithmetic."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from dera_peft import DeRaError
from dera_peft.evaluate import SweepResult
from dera_peft.evaluate.analysis.curve import Curve
from dera_peft.evaluate.analysis.summary import summarise
from dera_peft.user_code import load_object

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example():
    return sys.modules[load_object(f"{ROOT}/examples/retrain_vs_dera.py:main").__module__]


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory) -> Path:
    """A recipe of a few rows and steps, over a random model that ends a text at every eighth token."""
    folder = tmp_path_factory.mktemp("recipe")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(7, len(tokenizer), 8)]
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": f"The fox {number}", "completion": " crossed the river."} for number in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def reward(prompts, completions, **columns):\n    return [len(c) / 10 for c in completions]\n"
    )
    training = {
        "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "max_length": 64,
    }  # fmt: skip
    reward = f"{folder}/reward.py:reward"
    common = {"prompts": str(folder / "prompts.jsonl"), "max_new_tokens": 8}
    programs = {
        "sft": {
            "model_name_or_path": str(folder / "base"), "dataset_name": str(folder / "rows.jsonl"),
            "output_dir": str(folder / "sft"), "max_steps": 1, **training,
        },
        "preferences": {"model_name_or_path": str(folder / "sft"), "samples": 4, "reward": reward, **common},
        "dpo": {
            "model_name_or_path": str(folder / "sft"), "use_peft": True, "lora_r": 4, **training,
            "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
        },
        "sweep": {"rewards": [reward, "length"], **common},
    }  # fmt: skip
    for name, settings in programs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_it_trains_decodes_compares_and_reuses(example, recipe, without_pictures, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [
        "--recipe", str(recipe), "--lambda", "0.5", "2", "--beta", "0.2", "--steps", "2", "--samples", "2",
        "--learning-rate", "0.01", "--output-dir", str(output),
    ]  # fmt: skip
    comparisons = example.main(arguments)
    assert [(c.lam, c.beta) for c in comparisons] == [(0.5, 0.4), (1.0, 0.2), (2.0, 0.1)]
    rows = {
        (row["arm"], row["lambda"], row["prompt_index"], row["sample"]): row["rewards"]["reward"]
        for row in read(output / "decoded" / "samples.jsonl")
    }
    assert len(rows) == (4 + 3) * 12
    for c, beta in zip(comparisons, ("0.4", "0.2", "0.1"), strict=True):
        record = json.loads((output / f"retrained-beta-{beta}" / "dera.json").read_text())
        assert record["training"]["beta"] == pytest.approx(c.beta)
        arm = f"retrained at β={beta}"
        difference = sum(
            rows["logits", c.lam, index, sample] - rows[arm, 1.0, index, sample]
            for index in range(6)
            for sample in range(2)
        )
        assert c.difference.mean == pytest.approx(difference / 12, abs=1e-9)
        assert c.dera.kl.mean > 0 < c.retrained.kl.mean
    out = capsys.readouterr().out
    assert "DeRa and retraining agree, within 2 standard errors" in out
    with (output / "table.csv").open() as file:
        assert [row[0] for row in csv.reader(file)] == ["λ", "0.5", "1", "2"]
    assert (output / "retrain_vs_dera.png").stat().st_size > 10_000

    adapters = list(output.glob("*/adapter_model.safetensors"))
    assert len(adapters) == 4
    stamps = [adapter.stat().st_mtime_ns for adapter in adapters]
    (output / "retrain_vs_dera.png").unlink()
    again = example.main(arguments)
    assert [c.difference for c in again] == [c.difference for c in comparisons]
    assert [adapter.stat().st_mtime_ns for adapter in adapters] == stamps
    assert (output / "retrain_vs_dera.png").exists()


def rows_of(arm: str, lam: float, rewards: tuple[float, ...], kl: float) -> list[dict]:
    return [
        {
            "arm": arm, "lambda": lam, "prompt_index": index, "sample": 0, "rewards": {"r": value}, "kl": kl,
            "num_tokens": 10,
            "finish_reason": "eos",
        }
        for index, value in enumerate(rewards)
    ]  # fmt: skip


def test_the_comparison_by_hand(example):
    rows = [
        *rows_of("logits", 0.0, (0, 0, 0), kl=0.0),
        *rows_of("logits", 0.5, (1, 2, 3), kl=0.5),
        *rows_of("logits", 1.0, (2, 2, 2), kl=2.0),
        *rows_of("logits", 4.0, (1.0, 1.1, 1.2), kl=30.0),
        *rows_of("retrained at β=0.4", 1.0, (0, 2, 1), kl=1.0),
        *rows_of("retrained at β=0.2", 1.0, (2, 2, 2), kl=2.5),
        *rows_of("retrained at β=0.05", 1.0, (3.0, 3.0, 3.2), kl=3.0),
    ]
    result = SweepResult(summarise(rows), Curve(), None, None, None, None, rows, 0, 0, [])
    half, one, four = example.compare(0.2, [0.5, 1.0, 4.0], result)
    # differences 1, 0, 2: mean 1, standard error 1/√3
    assert (half.difference.mean, half.difference.se) == (1.0, pytest.approx(1 / math.sqrt(3)))
    assert half.in_errors == pytest.approx(math.sqrt(3))
    assert half.agrees
    assert (one.difference.mean, one.difference.se, one.in_errors, one.agrees) == (0.0, 0.0, 0.0, True)
    # -2.0, -1.9, -2.0: mean -1.9667, standard error 0.1/3
    assert (four.difference.mean, four.difference.se) == (pytest.approx(-5.9 / 3), pytest.approx(0.1 / 3))
    assert not four.agrees
    assert [c.beta for c in (half, one, four)] == [0.4, 0.2, 0.05]
    said = " ".join(example.findings([half, one, four], example.decoded_with_dera(result)))
    assert "differ in reward by +0.000 (+0.0 SE), in KL by a factor of 0.80" in said
    assert "at 1 of 2 λ: 0.5." in said
    assert "They differ at λ = 4 (-1.967, -59.0 SE)" in said
    assert "0.50 at λ=0.5, 10.00 at λ=4" in said
    # DeRa's curve at KL 1 is flat at 2; at KL 3 it has fallen by 1/28 of the way from 2 to 1.1
    assert "higher by +1.000 (β/λ of λ=0.5), -1.099 (β/λ of λ=4)." in said
    assert "falls short of retraining from λ = 4 on" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lambda", "0"], "no β/λ to retrain at"),
        (["--steps", "0"], "--steps 0 must be above 0"),
        (["--recipe", "configs/nowhere"], "has no dpo.yaml"),
    ],
)
def test_bad_arguments(example, arguments, message):
    with pytest.raises(DeRaError, match=message):
        example.main(arguments)
