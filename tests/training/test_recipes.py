"""
Every recipe in configs/, from its first command to its last, scaled down.

Its own YAML files are read as they are. In place of what is downloaded there is a random model of the same architecture
with a tokenizer like its own, and rows in the format of the same datasets. Overridden are names of models and folders,
steps and sizes, and what needs a GPU (bf16 arithmetic in training, the paged optimizer).
"""

import csv
import importlib.resources
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from tiny_models import CORPUS, make_reward_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import dera_peft.decoding.datasets
from dera_peft import DeRaModel
from dera_peft.cli.app import app
from dera_peft.training import dpo, preferences, sft

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(folder.name for folder in (ROOT / "configs").iterdir() if (folder / "dpo.yaml").is_file())
ZEPHYR_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# recipe -> config of its architecture, special tokens of its tokenizer (beginning and end of a text, then others), and
# its chat template: a text, a file of TRL's, or none
STAND_INS = {
    "smollm2-135m": (LlamaConfig, ["<|endoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"], None),
    "qwen3-0.6b": (Qwen3Config, [None, "<|endoftext|>", "<|im_start|>", "<|im_end|>"], "qwen3.jinja"),
    "llama-3.1-8b-qlora": (
        LlamaConfig, ["<|begin_of_text|>", "<|end_of_text|>"], None,
    ),
    "llama-3.1-70b-qlora": (
        LlamaConfig, ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], "llama3_1.jinja",
    ),
    "zephyr-7b-qlora": (MistralConfig, ["<s>", "</s>"], ZEPHYR_TEMPLATE),
}  # fmt: skip


def chat(number: int, answer: str, turns: int = 1) -> list[dict]:
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"Question {number}.{turn}: who counted the ships?"},
            {"role": "assistant", "content": answer},
        ]
    return messages


def capybara(rows: int) -> list[dict]:
    return [{"source": "x", "messages": chat(i, CORPUS[i % 4], turns=2), "num_turns": 2} for i in range(rows)]


def ultrafeedback(rows: int) -> list[dict]:
    return [
        {
            "chosen": chat(i, CORPUS[0]), "rejected": chat(i, CORPUS[1 + i % 3]),
            "score_chosen": 9.0, "score_rejected": 4.0,
        }
        for i in range(rows)
    ]  # fmt: skip


def ultrafeedback_of_the_handbook(rows: int) -> list[dict]:
    return [
        {"prompt": row["chosen"][0]["content"], "prompt_id": str(i), "messages": row["chosen"], **row}
        for i, row in enumerate(ultrafeedback(rows))
    ]


HUB = {
    "trl-lib/Capybara": {"train": capybara(8), "test": capybara(2)},
    "trl-lib/ultrafeedback_binarized": {"train": ultrafeedback(8), "test": ultrafeedback(4)},
    "HuggingFaceH4/ultrafeedback_binarized": {
        "train_prefs": ultrafeedback_of_the_handbook(8),
        "test_prefs": ultrafeedback_of_the_handbook(4),
    },
}


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` with the rows above under their names on the hub; files are read as ever."""
    load_dataset = datasets.load_dataset

    def load(name, *args, split=None, **kwargs):
        if name not in HUB:
            return load_dataset(name, *args, split=split, **kwargs)
        splits = {key: datasets.Dataset.from_list(rows) for key, rows in HUB[name].items()}
        return datasets.DatasetDict(splits) if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(dera_peft.decoding.datasets, "load_dataset", load)


def make_base(recipe: str, folder: Path) -> str:
    config_class, (bos, eos, *others), template = STAND_INS[recipe]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(token for token in (bos, eos, *others) if token))
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    if template is not None and template.endswith(".jinja"):
        template = (importlib.resources.files("trl") / "chat_templates" / template).read_text()
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = config_class(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.1,
        bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    # every eighth token ends a text: random weights would seldom find the one that does
    model.generation_config.eos_token_id = [fast.eos_token_id, *range(15, 320, 8)]
    model.save_pretrained(folder)
    return str(folder)


def keys_of(file: Path) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "tiny"])  # which test_recipe.py runs
def test_a_recipe_runs_end_to_end(recipe, hub, without_pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = ROOT / "configs" / recipe
    base = make_base(recipe, tmp_path / "base")
    reward = str(make_reward_model(tmp_path / "reward"))
    steps = ["--max_steps", "2", "--bf16", "false", "--optim", "adamw_torch", "--gradient_accumulation_steps", "1"]

    def config(program: str, *arguments: str) -> list[str]:
        return ["--config", str(folder / f"{program}.yaml"), "--output_dir", str(tmp_path / program), *arguments]

    trained = keys_of(folder / "dpo.yaml")
    source = ["--model_name_or_path", base]
    if (folder / "sft.yaml").is_file():
        sft.main(config("sft", *source, *steps))
        if "sft_adapter" in trained:
            source += ["--sft_adapter", str(tmp_path / "sft")]
        else:
            source = ["--model_name_or_path", str(tmp_path / "sft")]
    data = []
    if (folder / "preferences.yaml").is_file():
        preferences.main(
            config("preferences", *source, "--reward", reward, "--max_new_tokens", "16", "--min_margin", "0")
        )
        data = ["--dataset_name", str(tmp_path / "preferences" / "preferences.jsonl")]
    dpo.main(config("dpo", *source, *data, *steps))
    sweep = keys_of(folder / "sweep.yaml")
    rewards = [argument for name in (reward, *sweep["rewards"][1:]) for argument in ("--reward", name)]
    app(
        [
            "sweep", "--config", str(folder / "sweep.yaml"), "--adapter", str(tmp_path / "dpo"), *rewards,
            "--output-dir", str(tmp_path / "sweep"), "--max-prompts", "2", "--samples", "1", "--max-new-tokens", "8",
        ],
        standalone_mode=False,
    )  # fmt: skip

    record = json.loads((tmp_path / "dpo" / "dera.json").read_text())
    assert record["training"]["beta"] == trained["beta"]
    with (tmp_path / "sweep" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lambda"]) for row in rows] == sorted(sweep["lambdas"])
    assert float(rows[0]["kl"]) == 0 < float(rows[-1]["kl"])
    model = DeRaModel.from_pretrained(adapter=tmp_path / "dpo", quantization=sweep.get("quantization"))
    assert model.config.model_type == AutoConfig.from_pretrained(base).model_type
    kind = "Linear4bit" if trained.get("load_in_4bit") else "Linear"
    layer = model.base.model.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == kind


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_how_it_is_run_and_what_it_needs(recipe):
    """Each file opens with its command, and each key has its comment."""
    folder = ROOT / "configs" / recipe
    files = sorted(folder.glob("*.yaml"))
    assert {"dpo.yaml", "sweep.yaml"} <= {file.name for file in files}
    for file in files:
        head = file.read_text(encoding="utf-8").split("\n\n")[0]
        assert f"#   dera {file.stem} --config configs/{recipe}/{file.name}" in head
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not line or line.startswith("#") or " # " in line, f"{file.name}: {line}"
        if recipe != "tiny":
            assert re.search("Memory, computed(, not measured)?: about", head)
