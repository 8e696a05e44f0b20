"""Every LoRA factor gets a gradient, on every CPU; and a run in which one does not is stopped."""

import pytest
import torch
from cpu_packing import force_cpu_packing
from safetensors.torch import load_file
from small_runs import train

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def settings(tiny_base, preferences) -> dict:
    """Of runs that evaluate before every step."""
    return {
        "model_name_or_path": tiny_base, "dataset_name": preferences, "load_in_4bit": True,
        "dataset_train_split": "train[8:]", "dataset_test_split": "train[:8]", "eval_on_start": True,
        "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], EVERY], ids=["attention", "all"])
def test_a_cpu_that_packs_4_bit_weights_to_evaluate_trains_as_any_other(modules, settings, tmp_path, monkeypatch):
    settings["lora_target_modules"] = modules
    expected = load_file(train("dpo", tmp_path / "plain", **settings) / "adapter_model.safetensors")
    force_cpu_packing(monkeypatch)
    found = load_file(train("dpo", tmp_path / "packing", **settings) / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) and tensor.any() for name, tensor in expected.items())
