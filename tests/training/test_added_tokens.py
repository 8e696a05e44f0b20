"""Tokens that SFT adds to its base: what is trained with them loads everywhere."""

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import LORA, train, words, write_rows
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dera_peft import DeRaError, DeRaModel
from dera_peft.training.sft_model import SFTModel

IDS = torch.tensor([[5, 6, 7, 320, 321, 9, 8]])  # 320 and 321 are new
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A tokenizer with a template whose tokens the bases do not have."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TEMPLATE
    folder = tmp_path_factory.mktemp("template")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    rng = random.Random(4)
    rows = [
        {"messages": [{"role": "user", "content": words(rng, 2)}, {"role": "assistant", "content": words(rng, 3)}]}
        for _ in range(8)
    ]
    return write_rows(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    rng = random.Random(5)
    rows = [
        {
            "prompt": [{"role": "user", "content": words(rng, 2)}],
            "chosen": [{"role": "assistant", "content": words(rng, 2)}],
            "rejected": [{"role": "assistant", "content": words(rng, 2)}],
        }
        for _ in range(8)
    ]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def sft(tiny_base, chats, template, tmp_path_factory) -> Path:
    return train(
        "sft", tmp_path_factory.mktemp("sft"), model_name_or_path=tiny_base, dataset_name=chats, max_steps=2,
        chat_template_path=template, learning_rate=1e-2, dtype="float32", max_length=200, merge_adapter=True, **LORA,
    )  # fmt: skip


def by_peft(base: Path, adapter: Path) -> PeftModel:
    """The adapter as a user of PEFT loads it, on a base that is resized by hand."""
    rows = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"].shape[0]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert model.config.vocab_size < rows
    model.resize_token_embeddings(rows)
    return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def test_it_decodes_and_its_merge_is_the_same_model(sft, tiny_base):
    peft_model = by_peft(tiny_base, sft)
    aligned = peft_model(input_ids=IDS).logits
    with peft_model.disable_adapter():
        reference = peft_model(input_ids=IDS).logits
    assert (aligned - reference).abs().max() > 1
    model = DeRaModel.from_pretrained(adapter=sft)
    for lam in (0.0, 0.4, 1.0):
        torch.testing.assert_close(
            model(IDS, lam=lam).logits, (1 - lam) * reference + lam * aligned, rtol=1e-4, atol=1e-4
        )
    merged = AutoModelForCausalLM.from_pretrained(sft / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(IDS).logits, aligned, rtol=1e-4, atol=1e-4)


def test_dpo_takes_it_as_the_reference(sft, pairs, tmp_path):
    folder = train(
        "dpo", tmp_path / "dpo", model_name_or_path=sft, dataset_name=pairs, max_steps=2, learning_rate=1e-2,
        dtype="float32", max_length=200,
    )  # fmt: skip
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(sft / "merged", dtype=torch.float32)
        reference = merged(IDS).logits
        aligned = PeftModel.from_pretrained(merged, folder)(input_ids=IDS).logits
        assert (aligned - reference).abs().max() > 0.1
        model = DeRaModel.from_pretrained(adapter=folder)
        torch.testing.assert_close(model(IDS, lam=0.0).logits, reference, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(IDS, lam=1.0).logits, aligned, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "saved")
        again = DeRaModel.from_pretrained(tmp_path / "saved")
        assert torch.equal(again(IDS, lam=0.4).logits, model(IDS, lam=0.4).logits)


@torch.no_grad()
def test_preferences_are_sampled_from_it(sft):
    merged = AutoModelForCausalLM.from_pretrained(sft / "merged", dtype=torch.float32)
    base = DeRaModel.from_pretrained(adapter=sft).record.base
    sampled = SFTModel(base=base, adapter=str(sft)).load_to_sample()
    torch.testing.assert_close(sampled(input_ids=IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-4)


def test_continued_it_is_refused_with_the_way_out(sft, pairs, tmp_path):
    with pytest.raises(DeRaError, match="continue_sft_adapter: false"):
        train(
            "dpo", tmp_path / "dpo", model_name_or_path=sft, dataset_name=pairs, continue_sft_adapter=True, **LORA
        )  # fmt: skip


def test_embeddings_tied_to_the_head_are_refused_in_words(chats, template, tmp_path):
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(DeRaError, match="tied to its head"):
        train(
            "sft", tmp_path / "sft", model_name_or_path=tmp_path / "base", dataset_name=chats, max_length=200,
            chat_template_path=template, **LORA,
        )  # fmt: skip
