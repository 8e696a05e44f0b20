"""DPO's reference is the SFT model, in each of the forms that it comes in; and what is recorded of it."""

import math
import re
import shlex
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from small_runs import load_plainly, log_probs, train

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.fingerprint import base_fingerprint
from dera_peft.checkpoint.record import Record
from dera_peft.cli import app
from dera_peft.decoding.datasets import read_dataset
from dera_peft.engine.quantized import keep_trainable
from dera_peft.training.data import dataset_fingerprint
from dera_peft.training.sft_model import find_sft_model

IDS = torch.arange(3, 43).view(2, 20)


class Spy:
    """Stands before the run of a trainer: measures policy and reference before and after."""

    def __init__(self, monkeypatch):
        import dera_peft.training.trainer

        self.run = dera_peft.training.trainer.run
        monkeypatch.setattr(dera_peft.training.trainer, "run", self)

    def __call__(self, trainer):
        self.batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.eval()
        self.policy = log_probs(trainer.model, self.batch)
        self.reference = self.reference_of(trainer)
        metrics = self.run(trainer)
        trainer.model.eval()
        self.policy_after = log_probs(trainer.model, self.batch)
        self.reference_after = self.reference_of(trainer)
        self.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        self.dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
        return metrics

    def reference_of(self, trainer) -> torch.Tensor:
        return torch.cat(trainer.compute_ref_log_probs(trainer.model, self.batch))


@pytest.mark.parametrize("nf4", [False, True], ids=["full", "nf4"])
@pytest.mark.parametrize("form", ["merged", "frozen", "continued"])
def test_the_reference_is_the_sft_model(form, nf4, tiny_base, sft_adapter, merged, preferences, tmp_path, monkeypatch):
    settings = {"model_name_or_path": tiny_base, "sft_adapter": sft_adapter}
    if form == "merged":
        settings = {"model_name_or_path": merged}
    if form == "continued":
        settings["continue_sft_adapter"] = True
        settings["lora_target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if nf4:
        settings["load_in_4bit"] = True
    before = {file: file.read_bytes() for folder in (tiny_base, sft_adapter, merged) for file in folder.iterdir()}
    spy = Spy(monkeypatch)
    folder = train("dpo", tmp_path / "dpo", dataset_name=preferences, **settings)

    # before the first step
    sft = load_plainly(merged, nf4=nf4) if form == "merged" else load_plainly(tiny_base, sft_adapter, nf4=nf4)
    expected = log_probs(sft, spy.batch)
    bare = log_probs(load_plainly(tiny_base, nf4=nf4), spy.batch)
    assert (expected - bare).abs().mean() > 2, "the SFT model must differ from the bare base for this to mean something"
    torch.testing.assert_close(spy.policy, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(spy.reference, expected, atol=1e-4, rtol=0)
    assert spy.losses[0] == pytest.approx(math.log(2), abs=1e-5)

    # after the last
    assert (spy.policy_after - spy.policy).abs().max() > 0.05, "the policy has moved"
    torch.testing.assert_close(spy.reference_after, spy.reference, atol=1e-5, rtol=0)
    assert spy.dtypes == {torch.float32}
    assert {file: file.read_bytes() for file in before} == before, "neither the base nor the SFT adapter is touched"
    assert not (folder / "ref").exists()
    assert not list(folder.glob("model*.safetensors")), "the base is not copied"
    factors = load_file(folder / "adapter_model.safetensors")
    start = load_file(sft_adapter / "adapter_model.safetensors")
    for name, tensor in factors.items():
        if form == "continued":
            assert not torch.equal(tensor, start[name]), "every factor has moved"
        else:
            assert tensor.abs().max() > 0, "every factor has moved away from zero"

    # what is decoded from the saved folder
    quantization = {"quantization": "nf4", "dtype": torch.float32} if nf4 else {}
    model = DeRaModel.from_pretrained(adapter=folder, **quantization)
    keep_trainable(model)  # compared with what was trained, by the kernel that it was trained with
    for lam, expected_now in ((0.0, expected), (1.0, spy.policy_after)):
        model.lam = lam
        torch.testing.assert_close(log_probs(model, spy.batch), expected_now, atol=1e-3, rtol=0)
    if not nf4:
        below = {"merged": (merged,), "frozen": (tiny_base, sft_adapter), "continued": (tiny_base,)}[form]
        z_ref, z_aligned = sft(IDS).logits, load_plainly(*below, folder)(IDS).logits
        assert (z_ref - z_aligned).abs().max() > 1e-2
        torch.testing.assert_close(model(IDS, lam=0.5).logits, (z_ref + z_aligned) / 2, atol=5e-4, rtol=1e-5)
    record = Record.load(folder)
    assert (
        record.branches
        == {
            "merged": {"reference": [], "aligned": ["default"]},
            "frozen": {"reference": ["sft"], "aligned": ["sft", "default"]},
            "continued": {"reference": ["sft"], "aligned": ["default"]},
        }[form]
    )
    assert record.training["quantization"] == ("nf4" if nf4 else None)


def test_what_is_recorded(tiny_base, preferences, tmp_path, capsys):
    folder = train("dpo", tmp_path / "dpo", model_name_or_path=tiny_base, dataset_name=preferences, beta=0.3)
    record = Record.load(folder)
    training = record.training
    assert record.base_fingerprint == base_fingerprint(str(tiny_base))
    assert record.base_revision is None
    assert training["beta"] == 0.3
    assert training["loss_type"] == ["sigmoid"]
    assert (training["quantization"], training["dtype"], training["mixed_precision"]) == (None, "float32", None)
    assert training["dataset"] == str(preferences)
    assert training["dataset_fingerprint"] == dataset_fingerprint(read_dataset(str(preferences)))
    assert training["rows"] == {"total": 40}
    assert training["steps"] == 4
    assert {"loss", "first_loss", "train_loss", "rewards/margins", "tokens_per_second", "peak_memory_bytes"} <= set(
        training["metrics"]
    )
    assert set(training["versions"]) == {"dera-peft", "peft", "torch", "transformers", "trl"}
    check_card(folder, tiny_base, capsys)
    # a part of what was made gets lost
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    train("dpo", folder, model_name_or_path=tiny_base, dataset_name=preferences, beta=0.3)
    assert "adapter_model.safetensors has" in capsys.readouterr().err
    assert weights.read_bytes() == whole
    train("dpo", folder, model_name_or_path=tiny_base, dataset_name=preferences, beta=0.3)
    assert "is complete: reusing it" in capsys.readouterr().err


def check_card(folder, base, capsys) -> None:
    """It names base and β, and what it says can be run as it is."""
    card = (folder / "README.md").read_text()
    head, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head)["tags"] == ["lora", "dera", "dpo"]
    assert f"| base | `{base}` |" in text
    assert "| β | 0.3 |" in text
    assert "λ=0.5 for 0.6" in text, "β/λ"
    (command,) = re.findall(r"```bash\n(.*)\n```", text)
    (program,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    capsys.readouterr()
    exec(program, {})
    assert len(capsys.readouterr().out) > len("Once upon a time")
    with pytest.raises(SystemExit) as end:
        app.main(shlex.split(command)[1:])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert all(f"λ={lam}" in shown for lam in ("0", "0.5", "1"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "ipo"}, "loss_type=ipo"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.1]}, "loss_type=sft"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type=js_divergence"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5"),
        ({"loss_type": "robust", "label_smoothing": 0.1}, None),
        ({}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_loss_that_changes_the_meaning_of_beta_warns(settings, message, tiny_base, preferences, tmp_path, capfd):
    train(
        "dpo", tmp_path / "dpo", model_name_or_path=tiny_base, dataset_name=preferences, max_steps=1, stop_at_loss=0,
        **settings,
    )  # fmt: skip
    said = capfd.readouterr().err
    assert ("only a heuristic" in said) == (message is not None)
    assert message is None or f"warning: with {message} the trained model" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 has no effect.*loss_type: robust"),
        ({"continue_sft_adapter": True}, "needs the adapter: set sft_adapter"),
        ({"sft_adapter": "BASE"}, "is not an adapter: it has no adapter_config.json"),
        ({"sft_adapter": "./nowhere"}, "sft_adapter='./nowhere': there is no such folder"),
        ({"sft_adapter": "SFT", "continue_sft_adapter": True, "lora_r": 32}, "lora_r=32, but .* has 4: leave it out"),
        ({"model_name_or_path": "SFT", "sft_adapter": "SFT"}, "is an adapter, and sft_adapter=.* another"),
        ({"model_name_or_path": "configs/tiny/world.py:model"}, "has no weights that dera.json could name"),
        ({"lora_modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_settings_that_cannot_be(settings, message, tiny_base, sft_adapter, preferences, tmp_path):
    names = {"BASE": tiny_base, "SFT": sft_adapter}
    settings = {name: names.get(value, value) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(DeRaError, match=message):
        train("dpo", tmp_path / "dpo", **{"model_name_or_path": tiny_base, "dataset_name": preferences, **settings})


def test_an_sft_adapter_with_trained_biases_is_refused(tiny_base, tmp_path):
    LoraConfig(bias="lora_only").save_pretrained(tmp_path)
    with pytest.raises(DeRaError, match=r"bias='lora_only'.* does not give the reference back"):
        find_sft_model(str(tiny_base), str(tmp_path))


def test_an_sft_adapter_that_does_not_fit_its_base_is_refused_before_training(
    tiny_base, sft_adapter, preferences, tmp_path
):
    shutil.copytree(sft_adapter, tmp_path / "sft")
    factors = load_file(sft_adapter / "adapter_model.safetensors")
    save_file(
        {key: value[:, :32].contiguous() if "lora_A" in key else value for key, value in factors.items()},
        tmp_path / "sft" / "adapter_model.safetensors",
    )
    settings = {"model_name_or_path": tiny_base, "dataset_name": preferences, "sft_adapter": tmp_path / "sft"}
    with pytest.raises(
        DeRaError, match=r"^sft_adapter='.*' is for another base: its '.*' has 32 inputs, in '.*' it has"
    ):
        train("dpo", tmp_path / "dpo", **settings)
    assert not (tmp_path / "dpo").exists()


def test_a_record_of_another_base_is_refused_before_training(tiny_base, merged, preferences, tmp_path):
    folder = train("dpo", tmp_path / "dpo", model_name_or_path=tiny_base, dataset_name=preferences)
    with pytest.raises(DeRaError, match="is not the base that the adapter was trained on"):
        train("dpo", tmp_path / "again", model_name_or_path=merged, sft_adapter=folder, dataset_name=preferences)
