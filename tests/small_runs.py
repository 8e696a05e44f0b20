"""Small bases, adapters and rows for the training programs, which run in this process."""

import importlib
import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import CORPUS, make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from dera_peft.engine.quantized import keep_trainable
from dera_peft.messages import messages_on_stderr

COMMON = {
    "report_to": "none", "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
    "per_device_train_batch_size": 4, "max_steps": 4, "max_length": 64, "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
}  # fmt: skip
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}

PICTURES = ("plot_sweep", "plot_pareto", "write_report")  # of a sweep, in `results`


def train(program: str, output_dir: Path, **settings) -> Path:
    """Runs `dera <program>` in this process, without the settings that are None; returns its folder."""
    settings = {**COMMON, **(LORA if program == "dpo" else {}), **settings}
    arguments = ["--output_dir", str(output_dir)]
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values)]
    with messages_on_stderr():
        importlib.import_module(f"dera_peft.training.{program}").main(arguments)
    return output_dir


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(" ".join(CORPUS).split(), k=count))


@pytest.fixture(scope="module")
def without_pictures():
    """Sweeps do not draw: it takes seconds. `dera sweep`'s test, the demo's and those of the report do."""
    from dera_peft.evaluate import results  # imports matplotlib

    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(results, name, lambda *arguments, **keywords: None)
        yield


@pytest.fixture(scope="session")
def preferences(tmp_path_factory) -> Path:
    """Forty pairs of random words."""
    rng = random.Random(5)
    rows = [
        {"prompt": words(rng, 3), "chosen": f" {words(rng, 4)}", "rejected": f" {words(rng, 4)}"} for _ in range(40)
    ]
    return write_rows(tmp_path_factory.mktemp("preferences") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def sft_adapter(tiny_base, tmp_path_factory) -> Path:
    """An SFT adapter that changes the base a lot."""
    return make_adapter(tiny_base, tmp_path_factory.mktemp("sft-adapter"), seed=7)


@pytest.fixture(scope="session")
def merged(tiny_base, sft_adapter, tmp_path_factory) -> Path:
    """The base with the SFT adapter merged into it, and its tokenizer."""
    folder = tmp_path_factory.mktemp("merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    PeftModel.from_pretrained(base, sft_adapter).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


def load_plainly(base: Path, *adapters: Path, nf4: bool = False):
    """
    A base with adapters over it by PEFT alone, each merged into what is below it unless the base is quantized. 4-bit
    weights stay unpacked, as where they are trained through, so that both compute by the same kernel on every CPU.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantization if nf4 else None
    )
    keep_trainable(model)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter)
        if not nf4:
            model = model.merge_and_unload()
    return model.eval()


def store_quantized(base: Path, folder: Path, kind: str) -> Path:
    """A base whose checkpoint is in "nf4" (computed in bfloat16, without double quantization) or "int8"."""
    in_four_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8", **in_four_bits)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu").save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@torch.no_grad()
def log_probs(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed log-probabilities of the completions in a batch of TRL's, by a softmax over all logits; `[2B]`."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    tokens = batch["input_ids"][:, 1:, None]
    return (logits.log_softmax(-1).gather(-1, tokens)[..., 0] * batch["completion_mask"][:, 1:]).sum(-1)
