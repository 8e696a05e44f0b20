"""Settings, folders of results and datasets of the training programs."""

import json
from types import SimpleNamespace

import pytest
import torch

from dera_peft import DeRaError
from dera_peft.decoding.datasets import read_dataset
from dera_peft.messages import messages_on_stderr
from dera_peft.training import trainer
from dera_peft.training.data import dataset_fingerprint
from dera_peft.training.program import OutputFolder, given_settings, settings_of
from dera_peft.training.trainer import ModelConfig, SFTConfig


def test_a_folder_is_reused_by_the_same_run_alone(tmp_path):
    folder = tmp_path / "out"
    first = OutputFolder(folder, {"seed": 1}, {"model": "abc"})
    assert not first.is_complete
    assert not OutputFolder(folder, {"seed": 1}, {"model": "abc"}).is_complete, "begun is not complete"
    first.complete()
    assert OutputFolder(folder, {"seed": 1}, {"model": "abc"}).is_complete
    with pytest.raises(DeRaError, match=r"made with seed=1, and now it is 2.*--overwrite true"):
        OutputFolder(folder, {"seed": 2}, {"model": "abc"})
    with pytest.raises(DeRaError, match="made with seed=1, and now it is 'the default'"):
        OutputFolder(folder, {}, {"model": "abc"})
    with pytest.raises(DeRaError, match="made with model='abc', and now it is 'abd'"):
        OutputFolder(folder, {"seed": 1}, {"model": "abd"})
    assert json.loads((folder / "run.json").read_text())["complete"] is True
    assert not OutputFolder(folder, {"seed": 2}, {"model": "abc"}, overwrite=True).is_complete
    (folder / "run.json").write_text("{")
    with pytest.raises(DeRaError, match="damaged"):
        OutputFolder(folder, {"seed": 2}, {"model": "abc"})


def test_a_try_that_came_to_nothing_is_in_nobodys_way(tmp_path):
    OutputFolder(tmp_path, {"seed": 1, "dataset_name": "mistyped"}, {})
    second = OutputFolder(tmp_path, {"seed": 2}, {})
    assert not second.is_complete
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == {"seed": 2}
    (tmp_path / "completions.jsonl").write_text("")  # nor is a file without rows
    OutputFolder(tmp_path, {"seed": 3}, {})
    for begun in ("completions.jsonl", "checkpoint-2/trainer_state.json", "adapter_model.safetensors"):
        (tmp_path / begun).parent.mkdir(exist_ok=True)
        (tmp_path / begun).write_text("{}")
        with pytest.raises(DeRaError, match="made with seed=3, and now it is 4"):
            OutputFolder(tmp_path, {"seed": 4}, {})
        (tmp_path / begun).unlink()
        if begun.startswith("checkpoint"):
            (tmp_path / begun).parent.rmdir()


def test_a_complete_folder_is_made_again_where_results_are_missing_or_cut(tmp_path, caplog):
    def complete() -> OutputFolder:
        output = OutputFolder(tmp_path, {}, {})
        for name in ("adapter_model.safetensors", "adapter_config.json", "merged/model-2.safetensors", "README.md"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("0123456789")
        output.complete()
        return output

    complete()
    (tmp_path / "README.md").unlink()  # which is no result
    (tmp_path / "adapter_config.json").write_text("{} edited")
    assert OutputFolder(tmp_path, {}, {}).is_complete
    damages = {
        "adapter_model.safetensors": ("012", "has 3 of 10 bytes"),
        "adapter_config.json": ("", "is missing or empty"),
        "merged/model-2.safetensors": (None, "is missing or empty"),
    }
    for name, (content, message) in damages.items():
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_text(content)
        with pytest.raises(DeRaError, match="made with seed"):  # it is still the folder of these settings
            OutputFolder(tmp_path, {"seed": 1}, {})
        assert not OutputFolder(tmp_path, {}, {}).is_complete
        assert f"{name} {message}: making it again" in caplog.text
        assert complete().is_complete


def test_a_model_of_others_is_not_written_over(tmp_path):
    base, link = tmp_path / "base", tmp_path / "link"
    base.mkdir()
    link.symlink_to(base)
    (base / "config.json").write_text("{}")
    with pytest.raises(DeRaError, match=r"holds 'config\.json', which no run of this program made.*--overwrite true"):
        OutputFolder(base, {}, {})
    for overwrite in (False, True):
        for name in ("model_name_or_path", "sft_adapter"):
            with pytest.raises(DeRaError, match=f"{name}=.* is in the folder to write"):
                OutputFolder(link, {name: str(base)}, {}, overwrite)
    assert [file.name for file in base.iterdir()] == ["config.json"]


def test_what_was_given_is_written_and_not_compared(tmp_path):
    kwargs = {"revision": "main", "token": "hf_secret"}
    given = {"model_init_kwargs": json.dumps(kwargs), "max_length": None, "seed": 42, "hub_token": "hf_secret"}
    config = SFTConfig(output_dir=str(tmp_path), model_init_kwargs=json.dumps(kwargs), max_length=None)
    written = given_settings(given, config, ignore=("seed",))
    assert written == {"model_init_kwargs": {"revision": "main"}, "max_length": None}
    OutputFolder(tmp_path, {"seed": 1}, {}, given=written).complete()
    assert json.loads((tmp_path / "run.json").read_text())["given"] == written
    again = OutputFolder(tmp_path, {"seed": 1}, {}, given={})
    assert again.is_complete
    assert again.record == {"settings": {"seed": 1}, "inputs": {}}


def test_overwriting_takes_away_what_the_programs_wrote_and_nothing_else(tmp_path):
    ours = [
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
        "generation_config.json", "adapter_config.json", "adapter_model.safetensors", "dera.json",
        "merged/config.json", "sft/adapter_config.json", "checkpoint-3/optimizer.pt",
    ]  # fmt: skip
    others = ["notes.txt", "rewards.safetensors", "tokenizer.json", "mine/config.json"]
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in ("model_name_or_path", "sft_adapter"):
        for source in (tmp_path, tmp_path / "sft"):
            with pytest.raises(DeRaError, match=rf"{name}=.* is in the folder to write"):
                OutputFolder(tmp_path, {name: str(source)}, {}, overwrite=True)
    OutputFolder(tmp_path, {}, {}, overwrite=True)
    assert (tmp_path / "model.safetensors").exists(), "no program had made that folder"
    OutputFolder(tmp_path, {"model_name_or_path": "org/sft"}, {}, overwrite=True)
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert found == {*others, "run.json"}


def test_settings_are_told_as_they_are_but_for_the_hubs_token(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path), eos_token="</s>", hub_token="secret", lr_scheduler_type="cosine")
    settings = settings_of(config, ModelConfig(dtype="bfloat16", lora_r=16), ignore=("dtype",))
    assert settings["eos_token"] == "</s>"
    assert settings["lr_scheduler_type"] == "cosine"
    assert not settings.keys() & {"hub_token", "output_dir", "dtype", "lora_r", "learning_rate"}
    assert "secret" not in json.dumps(settings)


def test_a_token_for_the_hub_is_not_written_down(tmp_path):
    kwargs = {"revision": "main", "token": "hf_secret"}
    config = SFTConfig(output_dir=str(tmp_path), model_init_kwargs=kwargs, hub_token="hf_secret")
    assert settings_of(config)["model_init_kwargs"] == {"revision": "main"}
    assert "hf_secret" not in json.dumps(settings_of(config))
    assert config.model_init_kwargs == kwargs, "the run itself still has it"


def test_datasets_by_file_folder_and_function(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\np0, a, b\n")
    (tmp_path / "made.py").write_text(
        "from datasets import Dataset, DatasetDict\n"
        "def split(): return DatasetDict({'a': Dataset.from_list([{'x': 1}]), 'b': Dataset.from_list([{'x': 2}])})\n"
        "def plain(): return Dataset.from_list([{'x': i} for i in range(10)])\n"
        "def wrong(): return [1]\n"
        "def empty(): return Dataset.from_list([])\n"
    )
    assert read_dataset(str(tmp_path / "rows.jsonl")).to_list() == rows
    assert read_dataset(str(tmp_path / "rows.csv"))[0] == rows[0]
    assert read_dataset(f"{tmp_path}/made.py:split", "b")[0] == {"x": 2}
    assert read_dataset(str(tmp_path / "rows.jsonl"), "train[:67%]").to_list() == rows[:2]
    assert read_dataset(str(tmp_path / "rows.jsonl"), "train[67%:]").to_list() == rows[2:]
    for split, expected in [
        ("train", range(10)), ("train[:90%]", range(9)), ("train[90%:]", [9]), ("train[:2]+train[-1:]", [0, 1, 9]),
    ]:  # fmt: skip
        assert read_dataset(f"{tmp_path}/made.py:plain", split)["x"] == list(expected)
    assert read_dataset(f"{tmp_path}/made.py:split", "a+b[:1]")["x"] == [1, 2]
    for name, split, message in [
        ("nowhere.jsonl", "train", "there is no such file"),
        (f"{tmp_path}/rows.jsonl", "test", "Unknown split"),
        (f"{tmp_path}/made.py:split", "c", r"split='c'.*Unknown split \"c\". Should be one of \['a', 'b'\]"),
        (f"{tmp_path}/made.py:plain", "test[:9]", r"Unknown split \"test\". Should be one of \['train'\]"),
        (f"{tmp_path}/made.py:plain", "train[:0]", "is empty"),
        (f"{tmp_path}/made.py:wrong", "train", "gave a list"),
        (f"{tmp_path}/made.py:empty", "train", "is empty"),
        ("some-org/no-such-dataset", "train", "some-org/no-such-dataset"),
    ]:
        with pytest.raises(DeRaError, match=message):
            read_dataset(name, split)
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    with pytest.raises(DeRaError, match=r"broken\.jsonl"):
        read_dataset(str(tmp_path / "broken.jsonl"))


def test_fingerprints_of_datasets(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    (tmp_path / "b.jsonl").write_text('{"x": 1}\n{"x": 3}\n')
    first, second = (dataset_fingerprint(read_dataset(str(tmp_path / name))) for name in ("a.jsonl", "b.jsonl"))
    assert first != second
    assert first == dataset_fingerprint(read_dataset(str(tmp_path / "a.jsonl")))


def test_one_process_trains_on_one_gpu(tmp_path, monkeypatch, capsys):
    """Several in one process would be transformers' DataParallel, which TRL refuses."""
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: self._n_gpu if self._n_gpu > 0 else 2))
    with messages_on_stderr():
        config = SFTConfig(output_dir=str(tmp_path))
    assert config.n_gpu == 1
    assert "2 GPUs are here" in capsys.readouterr().err


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_bf16_is_not_chosen_where_it_is_emulated(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability[0]))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert trainer._has_bf16() == expected
