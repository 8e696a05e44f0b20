"""Adapters on the hub, by a stand-in of its client, whose uploads land in the cache that downloads would fill."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint import push as push_module
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.source import ModelSource
from dera_peft.cli.app import main

COMMIT = "c" * 40


class Hub:
    """What `push` calls of `HfApi`; an upload lands in a cache as the hub's client lays it out."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.made = {}

    def __call__(self, token=None) -> "Hub":
        return self

    def repo_exists(self, name: str) -> bool:
        validate_repo_id(name)
        return self.folder(name).is_dir()

    def create_repo(self, name: str, *, private, exist_ok) -> SimpleNamespace:
        if name.startswith("others/"):
            raise RepositoryNotFoundError("404 Client Error", response=SimpleNamespace(headers={}, request=None))
        self.made[name] = private
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id, folder_path, revision, create_pr, commit_message) -> SimpleNamespace:
        self.put(repo_id, folder_path)
        return SimpleNamespace(pr_url=None, commit_url=f"the hub/{repo_id}/commit/{COMMIT}: {commit_message}")

    def folder(self, name: str) -> Path:
        return self.cache / f"models--{name.replace('/', '--')}"

    def put(self, name: str, folder: Path) -> Path:
        """The files of a folder as a repository's only commit."""
        repository = self.folder(name)
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        return repository / "snapshots" / COMMIT


@pytest.fixture
def hub(tiny_base, tmp_path, monkeypatch) -> Hub:
    """With the base at org/tiny."""
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(push_module, "HfApi", hub)
    hub.put("org/tiny", tiny_base)
    return hub


@pytest.fixture
def trained(tiny_base, tiny_adapter, top_adapter, tmp_path) -> Path:
    """A folder as `dera dpo` leaves it, of an adapter on a frozen SFT adapter over a base in a folder."""
    folder = shutil.copytree(tiny_adapter, tmp_path / "runs" / "dpo")
    shutil.copytree(top_adapter, folder / "sft")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, folder)
    (folder / "checkpoint-3").mkdir()
    for file in ("checkpoint-3/adapter_model.safetensors", "training_args.bin", "run.json"):
        (folder / file).write_bytes(b"not for others")
    (data := tmp_path / "my secret folder" / "pairs.jsonl").parent.mkdir()
    data.touch()
    branches = {"reference": ["sft"], "aligned": ["sft", "default"]}
    training = {"method": "dpo", "beta": 0.5, "dataset": str(data)}
    Record(str(tiny_base), {"default": str(folder), "sft": str(folder / "sft")}, branches, training=training).save(
        folder
    )
    return folder


def test_what_is_pushed_is_loaded_by_its_name(hub, trained, tiny_base, tmp_path, capsys):
    """The reference, too, is the one that it was trained on: PEFT's config alone would tell of the base."""
    local = DeRaModel.from_pretrained(adapter=trained)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    expected = local(**inputs, output_branches=True).branch_logits
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)(**inputs)
    assert not torch.equal(expected["reference"], plain.logits), "the reference is more than the base"

    with pytest.raises(SystemExit, match="0"):
        main(["push", "--adapter", str(trained), "--base", "org/tiny", "--to", "org/dpo", "--private"])
    assert "the hub/org/dpo/commit" in capsys.readouterr().out
    assert hub.made == {"org/dpo": True}
    (pushed,) = hub.folder("org/dpo").glob("snapshots/*")
    files = sorted(str(file.relative_to(pushed)) for file in pushed.rglob("*") if file.is_file())
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    own = ["README.md", *adapter, "dera.json", "tokenizer.json", "tokenizer_config.json"]
    assert files == sorted([*own, *(f"sft/{file}" for file in adapter)])
    for file in ("README.md", "dera.json", "adapter_config.json", "sft/adapter_config.json"):
        text = (pushed / file).read_text()
        assert "org/tiny" in text
        assert not any(path in text for path in (str(tmp_path), str(tiny_base), "secret", "/tmp")), file
    card = (pushed / "README.md").read_text()
    assert "base_model: org/tiny" in card
    assert "--adapter org/dpo " in card
    assert "adapter='org/dpo'" in card
    assert "with the adapter `sft`" in card

    shutil.rmtree(trained)
    source = ModelSource(adapter="org/dpo")
    assert source.resolve().base == "org/tiny"
    found = DeRaModel.from_source(source)(**inputs, output_branches=True).branch_logits
    assert all(torch.equal(found[name], expected[name]) for name in ("reference", "aligned"))
    assert len(source.tokenizer()) == 320


def test_a_model_pushes_its_adapters(hub, tiny_adapter, top_adapter):
    model = DeRaModel.from_pretrained("org/tiny", adapters={"one": tiny_adapter, "two": top_adapter}, lam=0.25)
    address = model.push_to_hub("org/both", commit_message="Both")
    assert address.endswith(": Both")
    lam = {"one": 0.5, "two": 0.25}
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    found = DeRaModel.from_pretrained(adapter="org/both")
    assert torch.equal(found(**inputs, lam=lam).logits, model(**inputs, lam=lam).logits)
    assert not list(hub.folder("org/both").rglob("model.safetensors"))


def test_nothing_is_pushed_that_others_could_not_load(hub, trained, tiny_base, tiny_adapter, capsys):
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["push", "--to", "org/dpo", *arguments])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert f"base={str(tiny_base)!r} is a folder, which nobody else has" in refused("--adapter", str(trained))
    assert "base='org/none' is not on the hub" in refused("--adapter", str(trained), "--base", "org/none")
    assert "has no dera.json" in refused("--adapter", str(tiny_adapter), "--base", "org/tiny")
    assert "a repository can't have such a name" in refused("--adapter", str(trained), "--base", "a//b")
    other = AutoModelForCausalLM.from_pretrained(tiny_base)
    other.lm_head.weight.data.neg_()
    hub.put("org/other", tiny_base).joinpath("model.safetensors").unlink()
    other.save_pretrained(next(hub.folder("org/other").glob("snapshots/*")))
    record = json.loads((trained / "dera.json").read_text())
    model = DeRaModel.from_pretrained(adapter=trained)
    record["base_fingerprint"] = model.record.base_fingerprint
    (trained / "dera.json").write_text(json.dumps(record))
    assert "is not the base that the adapter was trained on" in refused(
        "--adapter", str(trained), "--base", "org/other"
    )
    with pytest.raises(DeRaError, match="is a folder, which nobody else has"):
        model.push_to_hub("org/dpo")
    assert not hub.folder("org/dpo").exists()
    with pytest.raises(DeRaError, match="'others/dpo': the hub has none that you may write to"):
        push_module.push(trained, "others/dpo", base="org/tiny")


def test_a_record_that_can_not_be_looked_for_is_told_of(hub, trained, tiny_adapter, caplog):
    """Offline, an adapter that another program has fetched, which needs no dera.json."""
    hub.put("org/fetched", tiny_adapter)
    assert ModelSource(base="org/tiny", adapter="org/fetched").resolve().adapters == {"default": "org/fetched"}
    assert "whether 'org/fetched' has a dera.json is not known" in caplog.text
    caplog.clear()
    none = hub.folder("org/fetched") / ".no_exist" / COMMIT
    none.mkdir(parents=True)
    (none / "dera.json").touch()
    ModelSource(base="org/tiny", adapter="org/fetched").resolve()
    assert not caplog.text


@pytest.mark.parametrize("program", ["dpo", "sft"])
def test_a_trainer_does_not_push_an_adapter_without_its_record(program, tmp_path, capsys):
    given = {"model_name_or_path": "org/tiny", "dataset_name": "org/rows", "use_peft": True, "push_to_hub": True}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    with pytest.raises(SystemExit):
        main([program, *options, "--output_dir", str(tmp_path / "out"), "--hub_model_id", "org/mine"])
    assert f"dera push --adapter {tmp_path / 'out'} --to org/mine" in capsys.readouterr().err
