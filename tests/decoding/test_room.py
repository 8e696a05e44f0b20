"""How much is computed at once on a device."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dera_peft.decoding import room
from dera_peft.decoding.room import Room


def test_a_cpu_has_its_usual_room(tiny_model):
    assert Room.of(tiny_model) == Room()


def test_a_gpu_has_what_is_free(tiny_model, monkeypatch):
    """Counted by hand: 4 layers, 2 heads of 16 for keys and values, fp32, hidden size 64, 128 in the MLP."""
    monkeypatch.setattr(type(tiny_model), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(room, "free_bytes", lambda device: 48_000_000)
    found = Room.of(tiny_model)
    assert found.sequences == 256
    assert found.cached == 24_000_000 // (2 * 4 * 2 * 16 * 4 * 2), "keys and values of both branches in half of it"
    assert found.tokens == 9_600_000 // ((8 * 64 + 4 * 128) * 4)
    assert found.logits == 12_000_000 // 24


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "mamba", "t5"])
def test_other_configs_can_be_read(kind, monkeypatch):
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    with torch.device("meta"):
        made = auto.from_config(AutoConfig.for_model(kind))
    monkeypatch.setattr(type(made), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(room, "free_bytes", lambda device: 10**10)
    found = Room.of(made)
    assert min(found.cached, found.tokens, found.logits) > 1000
