"""`ModelSource`: what tells one model from another, and what its tokenizer is loaded with."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint import base as loading_module
from dera_peft.checkpoint.fingerprint import settings_fingerprint
from dera_peft.checkpoint.source import ModelSource

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def hub(tiny_base, tmp_path, monkeypatch) -> Path:
    """The repository org/tiny in a cache as the hub's client lays it out, with two commits; main is the first."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--org--tiny"
    for commit in (FIRST, SECOND):
        shutil.copytree(tiny_base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(FIRST)
    return repository


def fingerprint(**source) -> str:
    return settings_fingerprint(ModelSource.read(**source).fingerprint())


def test_the_commit_of_a_hub_base_is_part_of_its_fingerprint(hub, tiny_adapter):
    source = {"base": "org/tiny", "adapter": tiny_adapter}
    first = fingerprint(**source)
    assert ModelSource.read(**source).fingerprint()["revision"] == FIRST
    assert fingerprint(**source, revision="main") == fingerprint(**source, revision=FIRST) == first
    assert fingerprint(**source, revision=SECOND) != first
    assert fingerprint(**source, base_arguments={"revision": SECOND}) != first
    (hub / "refs" / "main").write_text(SECOND)
    assert fingerprint(**source) == fingerprint(**source, revision=SECOND) != first


def test_a_commit_in_another_cache_is_found(hub, tiny_adapter, tmp_path):
    moved = shutil.move(hub.parent, tmp_path / "other")
    source = ModelSource.read(base="org/tiny", adapter=tiny_adapter, base_arguments={"cache_dir": str(moved)})
    assert source.fingerprint()["revision"] == FIRST


def test_how_a_base_is_loaded_is_part_of_its_fingerprint(tiny_base, tiny_adapter):
    source = {"base": tiny_base, "adapter": tiny_adapter}
    plain = fingerprint(**source)
    assert ModelSource.read(**source).fingerprint()["revision"] is None, "a folder has none"
    assert fingerprint(**source, base_arguments={"attn_implementation": "eager"}) != plain
    assert fingerprint(**source, base_arguments={"token": "secret"}) == plain, "it says who reads, not what"


def test_a_file_beside_the_bases_weights_is_none_of_them(tiny_base, tiny_adapter, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    before = fingerprint(base=base, adapter=tiny_adapter)
    save_file({"x": torch.ones(2)}, base / "stray.safetensors")
    assert fingerprint(base=base, adapter=tiny_adapter) == before
    save_file({"x": torch.ones(2)}, base / "model.safetensors")
    assert fingerprint(base=base, adapter=tiny_adapter) != before


def test_a_broken_tokenizer_of_an_adapter_is_not_passed_over(tiny_base, tiny_adapter, tmp_path):
    adapter = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    source = ModelSource.read(base=tiny_base, adapter=adapter)
    assert len(source.tokenizer()) == 320, "the base's: the adapter has none"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        for content in ("{ broken", "[]", '{"model": 1}'):
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tiny_base / name, adapter)
            assert len(source.tokenizer()) == 320
            if (file, content) == ("tokenizer_config.json", '{"model": 1}'):
                continue  # it names nothing, and breaks nothing
            (adapter / file).write_text(content)
            with pytest.raises(DeRaError, match=f"the tokenizer of '{adapter}' can't be loaded"):
                source.tokenizer()


def test_a_broken_tokenizer_on_the_hub_is_not_passed_over(hub, tiny_base, tiny_adapter):
    adapter = hub.parent / "models--org--adapter" / "snapshots" / FIRST
    shutil.copytree(tiny_adapter, adapter)
    (adapter.parents[1] / "refs").mkdir()
    (adapter.parents[1] / "refs" / "main").write_text(FIRST)
    source = ModelSource.read(base=tiny_base, adapter="org/adapter")
    assert len(source.tokenizer()) == 320, "the base's: the adapter has none"
    (adapter / "tokenizer.json").write_text("{ broken")
    with pytest.raises(DeRaError, match="the tokenizer of 'org/adapter' can't be loaded"):
        source.tokenizer()


def test_what_the_base_is_loaded_with_reaches_its_tokenizer(tiny_base, tiny_adapter, tmp_path, monkeypatch):
    nested = shutil.copytree(tiny_base, tmp_path / "base" / "nested").parent
    source = {"base": nested, "adapter": tiny_adapter, "base_arguments": {"subfolder": "nested"}}
    assert len(ModelSource.read(**source).tokenizer()) == 320
    seen = {}

    def refuse(name, **arguments):
        seen[name] = arguments
        raise OSError("none")

    monkeypatch.setattr("dera_peft.checkpoint.tokenizers.AutoTokenizer.from_pretrained", refuse)
    access = {"token": "secret", "cache_dir": "cache", "local_files_only": True}
    source = ModelSource.read(
        base="org/base",
        adapter="org/adapter",
        trust_remote_code=True,
        base_arguments={**access, "revision": "v1", "subfolder": "nested", "attn_implementation": "eager"},
    )
    with pytest.raises(DeRaError, match=r"no tokenizer can be loaded: 'org/adapter': none; 'org/base': none\. Save"):
        source.tokenizer()
    common = {**access, "trust_remote_code": True, "padding_side": "left"}
    assert seen == {"org/adapter": common, "org/base": {**common, "revision": "v1", "subfolder": "nested"}}


def test_the_config_is_read_once(tiny_base, tiny_adapter, monkeypatch):
    read = []

    def load_config(base, *args):
        read.append(base)
        return loading(base, *args)

    loading = loading_module.load_config
    monkeypatch.setattr(loading_module, "load_config", load_config)
    source = ModelSource.read(base=tiny_base, adapter=tiny_adapter)
    assert source.config.num_hidden_layers == 4
    DeRaModel.from_source(source)
    assert read == [str(tiny_base)]


def test_the_name_is_what_the_user_pointed_at():
    assert ModelSource.read(base="org/base", adapter="org/lora").name == "org/lora"
    assert ModelSource.read(base="org/base", adapters={"brief": "org/brief"}).name == "org/brief"
    assert ModelSource.read(base="runs/saved").name == "runs/saved"
