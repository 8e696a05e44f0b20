"""Reward models: what they read, in batches that fit into memory, and which models are none."""

import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import make_reward_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from dera_peft import DeRaError
from dera_peft.rewards.functions import call_reward, load_reward

PROMPTS = ["A fox crossed the river.", "Rain", "My sister repairs bicycles and"]
COMPLETIONS = [" Nobody saw it.", " fell on the market, so the baker sold his bread.", " wheels."]


@pytest.fixture
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


@torch.no_grad()
def reward_alone(folder: Path, ids: list[int]) -> float:
    """One text by itself, read off the head at its last token: no padding, no batch."""
    model = LlamaForSequenceClassification.from_pretrained(folder)
    hidden = model.model(torch.tensor([ids])).last_hidden_state
    return model.score(hidden[0, -1]).item()


def test_a_reward_model_reads_chats_by_its_template(tmp_path, tokenizer):
    folder = make_reward_model(tmp_path / "model", tokenizer)
    reward = load_reward(str(folder))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
    found = call_reward(reward, [*PROMPTS, chat], [*COMPLETIONS, " Hello."])
    texts = [f"<s>user: {p}\nassistant: {c}\n" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    texts.append("<s>system: Be brief.\nuser: Hi!\nassistant:  Hello.\n")
    expected = [reward_alone(folder, tokenizer(text)["input_ids"]) for text in texts]
    assert len({round(value, 3) for value in expected}) == 4
    assert found == pytest.approx(expected, abs=1e-5)
    reward.batch_size = 1
    assert call_reward(reward, PROMPTS, COMPLETIONS) == pytest.approx(expected[:3], abs=1e-5)


def test_a_reward_model_without_a_template_reads_one_text(tmp_path, tokenizer):
    tokenizer.chat_template = None
    folder = make_reward_model(tmp_path / "model", tokenizer)
    reward = load_reward(str(folder))
    ids = [tokenizer(p + c)["input_ids"] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert call_reward(reward, PROMPTS, COMPLETIONS) == pytest.approx(
        [reward_alone(folder, row) for row in ids], abs=1e-5
    )
    with pytest.raises(DeRaError, match="has no chat template, and the prompts are chats"):
        call_reward(reward, [[{"role": "user", "content": "Hi!"}]], [" Hello."])


def test_out_of_memory_halves_the_batch(tmp_path, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr("torch.accelerator.empty_cache", lambda: None)
    reward = load_reward(str(make_reward_model(tmp_path / "model", tokenizer)))
    expected = call_reward(reward, PROMPTS, COMPLETIONS)
    forward, sizes = reward.model.forward, []

    def limited(input_ids, room, **inputs):
        sizes.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError
        return forward(input_ids, **inputs)

    monkeypatch.setattr(reward.model, "forward", lambda input_ids, **inputs: limited(input_ids, 1, **inputs))
    assert call_reward(reward, PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert sizes == [3, 1, 1, 1]
    assert "out of memory, going on with 1 texts at once" in caplog.text
    monkeypatch.setattr(reward.model, "forward", lambda input_ids, **inputs: limited(input_ids, 0, **inputs))
    with pytest.raises(DeRaError, match="out of memory for a single text of"):
        call_reward(reward, PROMPTS, COMPLETIONS)


def test_a_freed_reward_model_is_loaded_again(tmp_path, tokenizer):
    reward = load_reward(str(make_reward_model(tmp_path / "model", tokenizer)))
    expected = call_reward(reward, PROMPTS, COMPLETIONS)
    held = weakref.ref(reward.model)
    reward.free()
    assert held() is None
    assert call_reward(reward, PROMPTS, COMPLETIONS) == expected


def test_what_is_too_long_gets_no_reward(tmp_path, tokenizer, caplog):
    tokenizer.chat_template = None
    folder = make_reward_model(tmp_path / "model", tokenizer, context=16)
    reward = load_reward(str(folder))
    fits, long = "Rain" + " fell", "Rain" + " fell on the market" * 9
    assert len(tokenizer(fits)["input_ids"]) <= 16 < len(tokenizer(long)["input_ids"])
    values = call_reward(reward, ["Rain"] * 2, [long[4:], fits[4:]])
    assert values == [None, pytest.approx(reward_alone(folder, tokenizer(fits)["input_ids"]), abs=1e-5)]
    assert "1 of 2 completions get no reward" in caplog.text


def test_what_is_not_a_reward_model(tmp_path, tokenizer, tiny_base):
    with pytest.raises(DeRaError, match="has 3 labels, and a reward model has one"):
        load_reward(str(make_reward_model(tmp_path / "three", tokenizer, labels=3)))
    # a language model's config may say one label, and still there is no head
    model = AutoModelForCausalLM.from_pretrained(tiny_base, num_labels=1)
    model.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    with pytest.raises(DeRaError, match=r"was not trained as a reward model: it has no 'score.weight'"):
        call_reward(load_reward(str(tmp_path / "language")), PROMPTS, COMPLETIONS)
