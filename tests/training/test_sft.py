"""SFT of all weights, of an adapter, and of an adapter over a quantized base; on texts and on chats."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import LORA, load_plainly, store_quantized, train, words, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.record import Record
from dera_peft.training.adapters import merge_and_save
from dera_peft.training.sft_model import SFTModel, find_sft_model, find_sft_model_to_train
from dera_peft.training.trainer import ModelConfig

IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    rng = random.Random(3)
    rows = [{"text": words(rng, rng.randint(3, 9))} for _ in range(32)]
    return write_rows(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    rng = random.Random(7)
    rows = [
        {"messages": [{"role": "user", "content": words(rng, 3)}, {"role": "assistant", "content": words(rng, 5)}]}
        for _ in range(32)
    ]
    return write_rows(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


def losses(monkeypatch) -> list[float]:
    """Will hold the losses of the run that follows."""
    import dera_peft.training.trainer

    found, run = [], dera_peft.training.trainer.run

    def spy(trainer):
        metrics = run(trainer)
        found[:] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return metrics

    monkeypatch.setattr(dera_peft.training.trainer, "run", spy)
    return found


def test_all_weights(tiny_base, texts, tmp_path):
    folder = train("sft", tmp_path / "sft", model_name_or_path=tiny_base, dataset_name=texts)
    before, after = (load_file(f / "model.safetensors") for f in (tiny_base, folder))
    assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    assert not (folder / "dera.json").exists(), "there is no adapter that a record could be of"


@pytest.mark.parametrize("nf4", [False, True], ids=["full", "nf4"])
@torch.no_grad()
def test_an_adapter_and_its_merge(nf4, tiny_base, texts, tmp_path, capsys):
    with torch.enable_grad():
        folder = train(
            "sft", tmp_path / "sft", model_name_or_path=tiny_base, dataset_name=texts, merge_adapter=True,
            learning_rate=1e-2, load_in_4bit=nf4, **LORA,
        )  # fmt: skip
    expected = load_plainly(tiny_base, folder)(IDS).logits
    assert (expected - load_plainly(tiny_base)(IDS).logits).abs().max() > 0.1
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-5)
    assert merged.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder / "merged").chat_template
    said = capsys.readouterr().err
    assert ("differs slightly from what was trained" in said) == nf4
    record = Record.load(folder)
    assert record.training["method"] == "sft"
    assert record.training["quantization"] == ("nf4" if nf4 else None)
    model = DeRaModel.from_pretrained(adapter=folder, **({"quantization": "nf4"} if nf4 else {}))
    if not nf4:
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "trls"),
    [
        ("nf4", {"load_in_4bit": True}),
        ("fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("int8", {"load_in_8bit": True}),
    ],
)
def test_quantization_is_trls_by_the_name_that_decoding_has_for_it(kind, trls, tiny_base, texts, tmp_path):
    settings = {"model_name_or_path": tiny_base, "dataset_name": texts, "max_steps": 2, **LORA}
    ours = train("sft", tmp_path / "ours", quantization=kind, **settings)
    theirs = train("sft", tmp_path / "theirs", **trls, **settings)
    expected, found = (load_file(f / "adapter_model.safetensors") for f in (theirs, ours))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert Record.load(ours).training["quantization"] == Record.load(theirs).training["quantization"] == kind
    assert json.loads((ours / "run.json").read_text())["settings"]["quantization"] == kind


def test_a_base_whose_checkpoint_is_quantized(tiny_base, texts, preferences, tmp_path):
    base = store_quantized(tiny_base, tmp_path / "nf4", "nf4")
    settings = {"model_name_or_path": base, "dataset_name": texts, "max_steps": 1}
    with pytest.raises(DeRaError, match=r"is a checkpoint in nf4.*use_peft: true"):
        train("sft", tmp_path / "full", **settings)
    with pytest.raises(DeRaError, match=r"merge_adapter=True.*is a checkpoint in nf4"):
        train("sft", tmp_path / "merged", merge_adapter=True, **settings, **LORA)
    with pytest.raises(DeRaError, match="int8 is asked for"):
        train("sft", tmp_path / "int8", quantization="int8", **settings, **LORA)
    adapter = train("sft", tmp_path / "sft", **settings, **LORA)
    aligned = train("dpo", tmp_path / "dpo", model_name_or_path=adapter, dataset_name=preferences, max_steps=1)
    for folder in (adapter, aligned):
        assert Record.load(folder).training["quantization"] == "nf4 without double quantization"
    model = DeRaModel.from_pretrained(adapter=aligned)
    assert model.base.model.layers[0].mlp.up_proj.base_layer.weight.quant_state.quant_type == "nf4"


def test_dpo_takes_the_adapter_where_a_model_is_named(tiny_base, texts, preferences, tmp_path, capsys):
    """The adapter names its base, which may have moved along with it."""
    tree = tmp_path / "a"
    (tree / "base").mkdir(parents=True)
    for file in tiny_base.iterdir():
        (tree / "base" / file.name).write_bytes(file.read_bytes())
    settings = {"learning_rate": 1e-2, **LORA}
    train("sft", tree / "sft", model_name_or_path=tree / "base", dataset_name=texts, **settings)
    tree = tree.rename(tmp_path / "b")
    folder = train("dpo", tree / "dpo", model_name_or_path=tree / "sft", dataset_name=preferences)
    record = json.loads((folder / "dera.json").read_text())
    assert record["base"] == "../base"
    assert record["adapters"] == {"sft": "./sft", "default": "."}
    assert record["branches"] == {"reference": ["sft"], "aligned": ["sft", "default"]}
    reference = load_plainly(tree / "base", tree / "sft")(IDS).logits
    tree = tree.rename(tmp_path / "c")
    found = DeRaModel.from_pretrained(adapter=tree / "dpo")(IDS, lam=0.0).logits
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-5)
    train(
        "dpo", tmp_path / "nf4", model_name_or_path=tree / "sft", dataset_name=preferences, load_in_4bit=True,
        max_steps=1,
    )  # fmt: skip
    assert "trained on a base unquantized, and this one is quantized to nf4" in capsys.readouterr().err
    with pytest.raises(DeRaError, match="stands on other adapters"):
        train("dpo", tmp_path / "again", model_name_or_path=tree / "dpo", dataset_name=preferences)


def test_chats_and_the_loss_on_the_assistants_words_alone(tiny_base, chats, tmp_path, monkeypatch):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(base)
    found = losses(monkeypatch)
    settings = {
        "model_name_or_path": base,
        "dataset_name": chats,
        "max_steps": 1,
        "learning_rate": 0,
        "max_length": 128,
    }
    train("sft", tmp_path / "all", per_device_train_batch_size=32, **settings)
    on_all = found[0]
    train("sft", tmp_path / "own", per_device_train_batch_size=32, assistant_only_loss=True, **settings)
    # worked out with the whole model: the mean over the assistant's tokens, of every chat
    model, total, count = AutoModelForCausalLM.from_pretrained(base), 0.0, 0
    for line in chats.read_text().splitlines():
        row = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        ids, mask = row["input_ids"], torch.as_tensor(row["assistant_masks"]).view(1, -1)[:, 1:]
        with torch.no_grad():
            log_probs = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        total, count = total - (log_probs * mask).sum().item(), count + mask.sum().item()
    assert found[0] == pytest.approx(total / count, abs=1e-3)
    assert abs(on_all - found[0]) > 1e-2


def test_packed_texts(tiny_base, texts, tmp_path, monkeypatch):
    """All texts packed into whole batches have the mean loss of the texts one by one."""
    found = losses(monkeypatch)
    settings = {"model_name_or_path": tiny_base, "dataset_name": texts, "learning_rate": 0}
    train("sft", tmp_path / "plain", per_device_train_batch_size=32, max_steps=1, **settings)
    plain = found[0]
    train(
        "sft", tmp_path / "packed", per_device_train_batch_size=32, max_steps=1, packing=True,
        attn_implementation="sdpa", **settings,
    )  # fmt: skip
    assert found[0] == pytest.approx(plain, abs=2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit=True: quantized weights can't be trained"),
        ({"quantization": "nf4"}, "quantization=nf4: quantized weights can't be trained"),
        (
            {"quantization": "nf4", "load_in_8bit": True, **LORA},
            "quantization='nf4' and load_in_8bit=True: give one of the two",
        ),
        (
            {"quantization": "nf4", "use_bnb_nested_quant": False, **LORA},
            "quantization='nf4' and use_bnb_nested_quant=False: give one of the two",
        ),
        ({"merge_adapter": True}, "merge_adapter=True: there is no adapter"),
        ({"assistant_only_loss": True}, "not conversational"),
        ({"early_stopping_patience": 2, "save_strategy": "steps"}, "dataset_test_split"),
        ({"num_processes": 2}, "num_processes=2, but there is 1 process"),
    ],
)
def test_settings_that_cannot_be(settings, message, tiny_base, texts, tmp_path):
    with pytest.raises(DeRaError, match=message):
        train("sft", tmp_path / "out", model_name_or_path=tiny_base, dataset_name=texts, **settings)


def test_an_adapter_needs_a_base_that_can_be_loaded_again(texts, tmp_path):
    with pytest.raises(DeRaError, match="which nothing can load again"):
        train("sft", tmp_path / "out", model_name_or_path="configs/tiny/world.py:model", dataset_name=texts, **LORA)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ({"model_revision": "v2"}, "model_revision='v2'"),
        ({"attn_implementation": "eager"}, "attn_implementation='eager'"),
        ({"model_init_kwargs": '{"device_map": "cpu"}'}, "device_map='cpu'"),
        ({"quantization": "nf4", **LORA}, "quantization='nf4'"),
    ],
)
def test_a_function_makes_its_model_as_it_is(settings, name, texts, tmp_path):
    with pytest.raises(DeRaError, match=f"{name} has no effect on model_name_or_path=.*world.py:model'.*leave"):
        train("sft", tmp_path / "out", model_name_or_path="configs/tiny/world.py:model", dataset_name=texts, **settings)


def test_of_a_function_an_adapter_has_no_effect_and_a_default_is_no_wish():
    function = "configs/tiny/world.py:model"
    with pytest.raises(DeRaError, match="sft_adapter='org/sft' has no effect"):
        find_sft_model(function, "org/sft")
    assert find_sft_model_to_train(ModelConfig(model_name_or_path=function), None, {"dtype": "auto"}).is_function


def test_the_4_bit_weights_of_a_functions_model_stay_trainable(tmp_path):
    """bitsandbytes would pack a layer that says so; see `keep_trainable`."""
    (tmp_path / "made.py").write_text(
        "from torch import nn\n"
        "def model():\n"
        "    layer = nn.Linear(2, 2)\n"
        "    layer.support_avx512bf16_for_cpu = True\n"
        "    layer.weight.quant_state = None\n"
        "    return nn.Sequential(layer), 'tokenizer'\n"
    )
    model, tokenizer = find_sft_model(f"{tmp_path}/made.py:model").load_to_train()
    assert (model[0].support_avx512bf16_for_cpu, tokenizer) == (False, "tokenizer")


def test_an_unfinished_model_is_no_start(tiny_base, texts, preferences, tmp_path):
    folder = train("sft", tmp_path / "sft", model_name_or_path=tiny_base, dataset_name=texts)
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**state, "complete": False}))
    with pytest.raises(DeRaError, match="is unfinished"):
        train("dpo", tmp_path / "dpo", model_name_or_path=folder, dataset_name=preferences)


def test_a_merge_that_is_killed_loses_neither_model(tiny_base, tiny_adapter, tmp_path, monkeypatch):
    def merge_into(folder):
        model = SFTModel(base=str(tiny_base), adapter=str(tiny_adapter))
        merge_and_save(model, AutoTokenizer.from_pretrained(tiny_base), folder)

    def killed(*args):
        raise KeyboardInterrupt

    folder, file = tmp_path / "merged", "model.safetensors"
    folder.mkdir()
    (folder / file).write_text("before")
    rename = Path.rename

    def killed_in_between(path, new):
        return killed() if path.name.endswith(".unfinished") else rename(path, new)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_in_between)
        with pytest.raises(KeyboardInterrupt):
            merge_into(folder)
    assert (tmp_path / "merged.old" / file).read_text() == "before"
    merge_into(folder)
    assert len(load_file(folder / file)) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_into(folder)
    assert len(load_file(folder / file)) > 10
    merge_into(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
