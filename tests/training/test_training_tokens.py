"""Tokens that the base has no row for: padding does no harm, any other stops the training before it begins."""

import json
import shutil
from pathlib import Path

import pytest
from small_runs import train, write_rows
from tiny_models import CORPUS
from transformers import AutoTokenizer

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.source import ModelSource

LORA = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "max_steps": 1}


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    """A base whose tokenizer has three tokens more than the base has rows."""
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def test_padding_without_a_row(base, preferences, tmp_path, capsys):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in (*CORPUS[:3], "Rain")])
    whole = train("sft", tmp_path / "whole", model_name_or_path=base, dataset_name=texts, max_steps=1)
    assert (
        "the base has no row for the tokenizer's padding token '[PAD]': padding with '</s>'" in capsys.readouterr().err
    )
    assert json.loads((whole / "config.json").read_text())["pad_token_id"] == 2, "else it could not be loaded again"
    adapter = train("dpo", tmp_path / "dpo", model_name_or_path=base, dataset_name=preferences, **LORA)
    assert ModelSource(adapter=str(adapter)).tokenizer().pad_token == "</s>"
    assert DeRaModel.from_pretrained(adapter=adapter).generation_config.eos_token_id == 2


def test_other_tokens_without_a_row(base, tmp_path):
    rows = [{"text": f"<|im_start|>{text}<|im_end|>"} for text in CORPUS[:4]]
    data = write_rows(tmp_path / "texts.jsonl", rows)
    with pytest.raises(DeRaError, match=r"no row for the tokens '<\|im_start\|>' \(321\), '<\|im_end\|>' \(322\)"):
        train("sft", tmp_path / "sft", model_name_or_path=base, dataset_name=data, **LORA)
    pairs = [{"prompt": "<|im_start|>", "chosen": text, "rejected": "Rain"} for text in CORPUS[:4]]
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    with pytest.raises(DeRaError, match=r"no row for the token '<\|im_start\|>' \(321\): its embedding has 320"):
        train("dpo", tmp_path / "dpo", model_name_or_path=base, dataset_name=data, **LORA)
