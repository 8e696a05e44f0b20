"""Which base and adapter names stand for: in subfolders, in an adapter's own config, and where something has moved."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import make_adapter
from torch import nn
from transformers import AutoModelForCausalLM

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.source import ModelSource
from dera_peft.training.trainer import ModelConfig

IDS = torch.arange(3, 11).view(2, 4)


def error(*args, **kwargs) -> str:
    with pytest.raises(DeRaError) as caught:
        ModelSource.read(**kwargs).resolve() if not args else DeRaModel.from_pretrained(*args, **kwargs)
    return str(caught.value)


def with_config(adapter: Path, folder: Path, **values) -> Path:
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))
    return folder


@torch.no_grad()
def test_an_adapter_names_its_base(tiny_base, tiny_adapter, top_adapter, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "dera_peft"):
        model = DeRaModel.from_pretrained(adapter=tiny_adapter)
    assert f"the base is {str(tiny_base)!r}" in caplog.text
    expected = DeRaModel.from_pretrained(tiny_base, tiny_adapter)(IDS, lam=0.5).logits
    assert torch.equal(model(IDS, lam=0.5).logits, expected)
    assert ModelSource(adapters={"a": tiny_adapter, "b": top_adapter}).resolve().base == str(tiny_base)
    nameless = with_config(tiny_adapter, tmp_path / "nameless", base_model_name_or_path=None)
    assert "names no base: give the base too" in error(adapter=nameless)
    other = with_config(tiny_adapter, tmp_path / "other", base_model_name_or_path="org/other")
    assert "the adapters name different bases" in error(adapters={"a": tiny_adapter, "b": other})


def test_what_has_moved_is_named_with_who_named_it(tiny_base, tiny_adapter, tmp_path, monkeypatch):
    gone = with_config(tiny_adapter, tmp_path / "gone", base_model_name_or_path="/no/such/base")
    assert "its adapter_config.json names the base '/no/such/base'" in error(adapter=gone)
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    DeRaModel.from_pretrained(base, tiny_adapter).save_pretrained(tmp_path / "saved")
    base.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for adapter in ("saved", tmp_path / "saved"):
        message = error(adapter=adapter)
        assert "its dera.json names the base" in message
        assert "name it where it is now, with base=" in message
    DeRaModel.from_pretrained(tmp_path / "moved", tmp_path / "saved")


def test_a_missing_folder_is_called_missing(tiny_base):
    assert "there is no such folder" in error("runs/none")
    assert "there is no such folder" in error(adapter="runs/none")
    assert "there is no such folder" in error(tiny_base, "runs/none")


@torch.no_grad()
def test_subfolders_of_adapter_and_base(tiny_base, tiny_adapter, top_adapter, tmp_path):
    shutil.copytree(tiny_adapter, tmp_path / "adapters" / "one")
    shutil.copytree(top_adapter, tmp_path / "adapters" / "two")
    shutil.copytree(tiny_base, tmp_path / "bases" / "two")
    expected = DeRaModel.from_pretrained(tiny_base, tiny_adapter)(IDS, lam=0.5).logits
    found = DeRaModel.from_pretrained(tiny_base, tmp_path / "adapters", subfolder="one")(IDS, lam=0.5).logits
    assert torch.equal(found, expected)
    both = DeRaModel.from_pretrained(tmp_path / "bases", tmp_path / "adapters", subfolder="two")
    expected = DeRaModel.from_pretrained(tiny_base, top_adapter)(IDS, lam=0.5).logits
    assert torch.equal(both(IDS, lam=0.5).logits, expected)
    source = ModelSource(base=tmp_path / "bases", adapter=top_adapter, subfolder="two")
    assert source.tokenizer().eos_token == "</s>"
    message = error(tiny_base, tiny_adapter, subfolder="three")
    assert "subfolder='three' has neither an adapter nor a model" in message


def test_a_base_in_a_subfolder_by_the_arguments_of_transformers(tiny_base, tiny_adapter, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "bases" / "two")
    source = ModelSource(base=tmp_path / "bases", adapter=tiny_adapter, base_arguments={"subfolder": "two"})
    assert source.config.num_hidden_layers == 4


@pytest.mark.parametrize("name", ["", "a.b", "a b"])
def test_names_that_no_module_can_have(name, tiny_base, tiny_adapter, top_adapter):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    with pytest.raises(DeRaError, match="can't be a name"):
        model.add_adapter(name, top_adapter)


def test_from_peft_takes_a_peft_model(tiny_base):
    with pytest.raises(DeRaError, match="from_peft takes a PeftModel, and this is a LlamaForCausalLM"):
        DeRaModel.from_peft(AutoModelForCausalLM.from_pretrained(tiny_base))
    with pytest.raises(DeRaError, match="this is a Linear"):
        DeRaModel.from_peft(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("given", "targets"),
    [(["q_proj"], ["q_proj"]), ("all-linear", "all-linear"), (["q_proj", "v_proj"], ["q_proj", "v_proj"])],
)
def test_one_target_module_is_a_name_and_no_regex(given, targets):
    assert ModelConfig(lora_target_modules=given).lora_target_modules == targets


def test_a_regex_of_target_modules_stays_one():
    assert ModelConfig(lora_target_modules=[r".*\.q_proj"]).lora_target_modules == r".*\.q_proj"


def test_saved_adapters_of_one_target_module_load(tiny_base, tmp_path):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", target_modules=["q_proj"])
    assert len(DeRaModel.from_pretrained(tiny_base, adapter).adapted) == 4
