"""`ModelSource`: what tells one model from another, and what its tokenizer is loaded with."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
