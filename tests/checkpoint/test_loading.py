"""Loading, saving, and the errors of bases and adapters that don't fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_adapter
from transformers import AutoModelForCausalLM

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.fingerprint import base_fingerprint
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.source import ModelSource

IDS = torch.arange(3, 15).view(2, 6)


@torch.no_grad()
def test_save_and_load_one_folder(tiny_base, tiny_adapter, tmp_path):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, lam=0.25)
    expected = model(IDS).logits
    assert not torch.equal(expected, model(IDS, lam=1).logits)
    model.save_pretrained(tmp_path / "dera")
    files = {file.name for file in (tmp_path / "dera").iterdir()}
    assert {"dera.json", "adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files, "never a copy of the base"
    assert torch.equal(DeRaModel.from_pretrained(tmp_path / "dera")(IDS).logits, expected)
    assert torch.equal(DeRaModel.from_pretrained(adapter=tmp_path / "dera")(IDS).logits, expected)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    plain = PeftModel.from_pretrained(base, tmp_path / "dera").eval()  # it is a plain PEFT adapter too
    assert torch.equal(plain(IDS).logits, model(IDS, lam=1).logits)


def test_options_of_saving_that_are_not_known(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "dera", safe_serialization=True)
    for kwargs in ({"safe_serialization": False}, {"max_shard_size": "1GB"}, {"push_to_hub": True}):
        with pytest.raises(DeRaError, match=next(iter(kwargs))):
            tiny_model.save_pretrained(tmp_path / "other", **kwargs)
    assert not (tmp_path / "other").exists()


@torch.no_grad()
def test_a_saved_tree_can_be_moved(tiny_base, tiny_adapter, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "a" / "base")
    model = DeRaModel.from_pretrained(tmp_path / "a" / "base", tiny_adapter)
    model.save_pretrained(tmp_path / "a" / "dera")
    values = json.loads((tmp_path / "a" / "dera" / "dera.json").read_text())
    assert values["base"] == "../base"
    assert values["adapters"] == {"default": "."}
    assert str(tmp_path) not in (tmp_path / "a" / "dera" / "dera.json").read_text()
    (tmp_path / "a").rename(tmp_path / "b")
    assert torch.equal(DeRaModel.from_pretrained(tmp_path / "b" / "dera")(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_an_adapter_of_another_name_and_a_frozen_one_below_it(tiny_base, tiny_adapter, top_adapter, tmp_path):
    """A record may name any branches: here an SFT adapter under both, with DPO's on the top layers."""
    record = Record(
        str(tiny_base),
        {"sft": str(tiny_adapter), "dpo": str(top_adapter)},
        {"reference": ["sft"], "aligned": ["sft", "dpo"]},
    )
    record.save(tmp_path / "made")
    model = DeRaModel.from_pretrained(tmp_path / "made")
    assert model.fork_layer == 2, "the fork is where the branches differ, not where the first adapter is"
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    z_ref = PeftModel.from_pretrained(base, tiny_adapter).merge_and_unload()(IDS).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    sft = PeftModel.from_pretrained(base, tiny_adapter).merge_and_unload()
    z_aligned = PeftModel.from_pretrained(sft, top_adapter).merge_and_unload()(IDS).logits
    assert (z_ref - z_aligned).abs().max() > 1
    for lam in (0.0, 0.4, 1.0):
        expected = (1 - lam) * z_ref + lam * z_aligned
        torch.testing.assert_close(model(IDS, lam=lam).logits, expected, atol=2e-4, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = DeRaModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS, lam=0.4).logits, model(IDS, lam=0.4).logits)


def test_the_adapter_stays_in_fp32_on_a_cpu(tiny_base, tiny_adapter):
    """Its few columns are faster so, over a bf16 base too; and its values are the file's."""
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, dtype="bfloat16", device_map="cpu")
    factors = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert {p.dtype for p in factors.values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in factors} == {torch.bfloat16}
    saved = load_file(tiny_adapter / "adapter_model.safetensors")
    loaded = model.base.model.layers[2].mlp.up_proj.lora_B["default"].weight
    assert torch.equal(loaded, saved["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"])
    assert not model.training


@pytest.mark.gpu
def test_the_adapter_is_cast_once_to_the_bases_dtype_on_a_gpu(tiny_base, tiny_adapter):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, dtype="bfloat16", device_map="cuda")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_tokenizer_pads_on_the_left(tiny_base, tiny_adapter):
    tokenizer = ModelSource(base=tiny_base, adapter=tiny_adapter).tokenizer()
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None


def broken_adapter(source: Path, folder: Path, tensors=None, **config) -> Path:
    """A copy of an adapter with some tensors or settings replaced."""
    shutil.copytree(source, folder)
    if tensors is not None:
        found = load_file(folder / "adapter_model.safetensors")
        save_file(tensors(found), folder / "adapter_model.safetensors")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return folder


def error(*args, **kwargs) -> str:
    with pytest.raises(DeRaError) as caught:
        DeRaModel.from_pretrained(*args, **kwargs)
    return str(caught.value)


def test_missing_folders_are_named(tiny_base, tiny_adapter, tmp_path):
    assert error("./no/such/base", tiny_adapter) == "base='./no/such/base': there is no such folder."
    assert error(tiny_base, "./no/such/adapter") == "adapter='./no/such/adapter': there is no such folder."
    assert "base='some-org/no-such-base'" in error("some-org/no-such-base", tiny_adapter)
    assert "adapter='some-org/no-such-adapter'" in error(tiny_base, "some-org/no-such-adapter")
    assert "without a config.json" in error(tmp_path, tiny_adapter)
    assert "pass it as the adapter" in error(tiny_adapter, tiny_adapter)
    assert "without an adapter_config.json" in error(tiny_base, tiny_base)
    assert "no model is named" in error()


def test_an_adapter_for_another_base(tiny_base, tiny_adapter, stories, stories_adapter, tmp_path):
    message = error(stories, tiny_adapter)
    assert "is for another base" in message
    assert "model.layers.0" in message
    renamed = broken_adapter(
        tiny_adapter, tmp_path / "renamed", lambda ts: {k.replace("q_proj", "query"): v.clone() for k, v in ts.items()}
    )
    assert "has no module 'model.layers.0.self_attn.query'" in error(tiny_base, renamed)
    wider = broken_adapter(
        tiny_adapter,
        tmp_path / "wider",
        lambda ts: {k: torch.zeros(4, 65) if "layers.1.mlp.up_proj.lora_A" in k else v.clone() for k, v in ts.items()},
    )
    assert "'model.layers.1.mlp.up_proj' has 65 inputs" in error(tiny_base, wider)


def test_an_incomplete_adapter(tiny_base, tiny_adapter, tmp_path):
    for dropped in ("layers.2.mlp.up_proj.lora_B", "layers.2.mlp.up_proj"):
        folder = tmp_path / dropped
        broken_adapter(tiny_adapter, folder, lambda ts, d=dropped: {k: v.clone() for k, v in ts.items() if d not in k})
        message = error(tiny_base, folder)
        assert "incomplete" in message
        assert "layers.2.mlp.up_proj" in message


def test_adapters_that_are_not_plain_lora_are_refused_by_name(tiny_base, tiny_adapter, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "ia3")
    assert "IA3" in error(tiny_base, tmp_path / "ia3")
    for config in ({"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}):
        message = error(tiny_base, broken_adapter(tiny_adapter, tmp_path / next(iter(config)), **config))
        assert repr(next(iter(config.values()))) in message
    embedding = make_adapter(tiny_base, tmp_path / "embedding", target_modules=["q_proj", "embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    changed = broken_adapter(
        embedding, tmp_path / "changed", lambda ts: {k: v + 1 if k == key else v.clone() for k, v in ts.items()}
    )
    assert "would change the reference too" in error(tiny_base, changed)
    DeRaModel.from_pretrained(tiny_base, embedding)


@torch.no_grad()
@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: "module." + key,
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.w", "lora_B.default.w"),
    ],
    ids=["no prefix", "DDP", "compiled", "with the adapter's name"],
)
def test_keys_as_other_trainers_write_them(tiny_base, tiny_adapter, tmp_path, rename):
    expected = DeRaModel.from_pretrained(tiny_base, tiny_adapter)(IDS, lam=0.5).logits
    adapter = broken_adapter(
        tiny_adapter, tmp_path / "renamed", lambda ts: {rename(key): value.clone() for key, value in ts.items()}
    )
    assert set(load_file(adapter / "adapter_model.safetensors")) != set(
        load_file(tiny_adapter / "adapter_model.safetensors")
    )
    assert torch.equal(DeRaModel.from_pretrained(tiny_base, adapter)(IDS, lam=0.5).logits, expected)


def test_files_that_cannot_be_read(tiny_base, tiny_adapter, tmp_path):
    corrupt = broken_adapter(tiny_adapter, tmp_path / "corrupt")
    (corrupt / "adapter_model.safetensors").write_bytes(b"not a tensor")
    assert "adapter_model.safetensors is corrupt" in error(tiny_base, corrupt)
    pickled = broken_adapter(tiny_adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in error(tiny_base, pickled)
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00not json")
    assert "corrupt" in error(tmp_path / "base", tiny_adapter)
    (tiny := broken_adapter(tiny_adapter, tmp_path / "config") / "adapter_config.json").write_text("{")
    assert "adapter_config.json can't be read" in error(tiny_base, tiny.parent)
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "dera.json").write_text("{")
    assert "not valid JSON" in error(tmp_path / "record")
    (tmp_path / "record" / "dera.json").write_text('{"format": 99}')
    assert "format 1" in error(tmp_path / "record")


def test_a_command_may_take_one_aligned_model_alone(tiny_base, tiny_adapter, top_adapter):
    one = ModelSource(base=str(tiny_base), adapter=str(tiny_adapter))
    assert one.resolve_one("dera score", "do it twice.") is one.resolve()
    several = ModelSource(base=str(tiny_base), adapters={"a": str(tiny_adapter), "b": str(top_adapter)})
    with pytest.raises(DeRaError) as caught:
        several.resolve_one("dera score", "do it twice.")
    assert str(caught.value) == "dera score takes one aligned model, and adapters has ['a', 'b']: do it twice."


def test_settings_that_are_not_known(tiny_base, tiny_adapter):
    assert "'int3'" in error(tiny_base, tiny_adapter, quantization="int3")
    assert "'float31'" in error(tiny_base, tiny_adapter, dtype="float31")
    assert "default λ" in error(tiny_base, tiny_adapter, lam=float("nan"))


def test_a_base_that_cannot_be_quantized_here_is_refused_before_it_is_loaded(stories, stories_adapter):
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16() or torch.accelerator.is_available():
        pytest.skip("bitsandbytes' packed kernel is not used on this machine")
    message = error(stories, stories_adapter, quantization="nf4")
    assert "'model.layers.0.mlp.gate_proj' has 64 inputs and 172 outputs" in message


@torch.no_grad()
def test_int8_loads_and_decodes(tiny_base, tiny_adapter):
    pytest.importorskip("bitsandbytes")
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, quantization="int8")
    assert type(model.base.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear8bitLt"
    full = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    close, far = (model(IDS, lam=0.5).logits.float() - full(IDS, lam=lam).logits for lam in (0.5, 1.0))
    assert close.abs().mean() < 0.3 * far.abs().mean()


def trained(base: Path, adapter: Path, folder: Path, **training) -> Path:
    """An adapter with a record of its training, as the training programs leave it."""
    shutil.copytree(adapter, folder)
    record = Record(
        str(base), {"default": str(folder)}, {"reference": [], "aligned": ["default"]},
        base_fingerprint=base_fingerprint(str(base)), training=training,
    )  # fmt: skip
    record.save(folder)
    return folder


def test_a_record_refuses_another_base(tiny_base, tiny_adapter, tmp_path):
    folder = trained(tiny_base, tiny_adapter, tmp_path / "adapter")
    DeRaModel.from_pretrained(adapter=folder)
    copied = shutil.copytree(tiny_base, tmp_path / "copied")
    DeRaModel.from_pretrained(copied, folder)  # another folder, the same weights
    tuned = shutil.copytree(tiny_base, tmp_path / "tuned")
    weights = load_file(tuned / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"] += 1e-4
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    message = error(tuned, folder)
    assert f"base={str(tuned)!r} is not the base that the adapter was trained on" in message
    record = json.loads((folder / "dera.json").read_text())
    (folder / "dera.json").write_text(json.dumps({**record, "base": str(tuned)}))
    assert error(None, folder) == message, "named by the record as well"


def test_a_record_warns_where_the_base_is_quantized_otherwise(tiny_base, tiny_adapter, tmp_path, caplog):
    plain = trained(tiny_base, tiny_adapter, tmp_path / "plain", method="dpo", quantization=None)
    on_int8 = trained(tiny_base, tiny_adapter, tmp_path / "int8", method="dpo", quantization="int8")
    DeRaModel.from_pretrained(adapter=plain)
    DeRaModel.from_pretrained(tiny_base, tiny_adapter)  # without a record nothing is known
    assert not caplog.text
    DeRaModel.from_pretrained(adapter=on_int8)
    assert "trained on a base quantized to int8, and this one is unquantized" in caplog.text
    pytest.importorskip("bitsandbytes")
    DeRaModel.from_pretrained(adapter=plain, quantization="int8")
    assert "trained on a base unquantized, and this one is quantized to int8" in caplog.text


def test_saving_keeps_the_record_of_the_training(tiny_base, tiny_adapter, tmp_path):
    folder = trained(tiny_base, tiny_adapter, tmp_path / "trained", method="dpo", beta=0.1, quantization=None)
    DeRaModel.from_pretrained(adapter=folder, lam=0.3).save_pretrained(tmp_path / "saved")
    record, again = Record.load(folder), Record.load(tmp_path / "saved")
    assert again.training == record.training
    assert again.base_fingerprint == record.base_fingerprint is not None
    assert again.lam == 0.3
    DeRaModel.from_pretrained(tiny_base, tiny_adapter).save_pretrained(tmp_path / "unknown")
    unknown = Record.load(tmp_path / "unknown")
    assert unknown.training == {}
    assert unknown.base_fingerprint == record.base_fingerprint, "it is known without a training, too"


def test_the_record_follows_the_adapters_that_come_and_go(tiny_base, tiny_adapter, top_adapter, tmp_path):
    folder = trained(tiny_base, tiny_adapter, tmp_path / "trained", method="dpo", beta=0.1)
    model = DeRaModel.from_pretrained(adapter=folder)
    training = model.record.training
    assert training["beta"] == 0.1
    model.add_adapter("top", top_adapter)
    assert model.record.adapters == {"default": str(folder), "top": str(top_adapter)}
    assert model.record.branches == {"reference": [], "aligned": ["default"], "top": ["top"]}
    assert model.record.training == {}, "it was of one of the two"
    model.remove_adapter("top")
    assert model.record.adapters == {"default": str(folder)}
    assert model.record.training == training, "what was loaded is left"
    model.add_adapter("top", top_adapter)
    model.remove_adapter("aligned")
    assert model.record.adapters == {"top": str(top_adapter)}
    model.save_pretrained(tmp_path / "saved")
    again = Record.load(tmp_path / "saved")
    assert (again.branches, again.training) == ({"reference": [], "top": ["top"]}, {})


def test_a_default_lambda_by_name(tiny_base, tiny_adapter, tmp_path):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    model.save_pretrained(tmp_path)
    file = tmp_path / "dera.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "lambda": {"aligned": 0.5}}))
    assert Record.load(tmp_path).lam == 0.5
    for lam, message in (({"other": 0.5}, "names 'other'"), ("half", "got 'half'"), ([0.5], r"got [0.5]")):
        file.write_text(json.dumps({**values, "lambda": lam}))
        found = error(tmp_path)
        assert str(file) in found
        assert message in found
    model.lam = {"aligned": 0.25}
    model.save_pretrained(tmp_path / "by_name")
    assert json.loads((tmp_path / "by_name" / "dera.json").read_text())["lambda"] == 0.25
    model.lam = float("nan")
    with pytest.raises(DeRaError, match=r"default λ.*nan"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@torch.no_grad()
def test_a_hub_base_is_known_by_its_commit_and_its_cached_weights(tiny_base, tiny_adapter, tmp_path, monkeypatch):
    """A cache as the hub's client lays it out, with two commits of one model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--tiny"
    first, second = repository / "snapshots" / ("a" * 40), repository / "snapshots" / ("b" * 40)
    shutil.copytree(tiny_base, first)
    shutil.copytree(tiny_base, second)
    weights = load_file(second / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, second / "model.safetensors", metadata={"format": "pt"})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)

    assert base_fingerprint("org/tiny") == base_fingerprint(str(tiny_base))
    assert base_fingerprint("org/not-here") is None, "nothing is downloaded for it"
    model = DeRaModel.from_pretrained("org/tiny", tiny_adapter)
    model.save_pretrained(tmp_path / "saved")
    record = Record.load(tmp_path / "saved")
    assert (record.base, record.base_revision) == ("org/tiny", "a" * 40)
    expected = model(IDS).logits
    (repository / "refs" / "main").write_text("b" * 40)  # the hub's model changes, and the record's commit stays
    assert torch.equal(DeRaModel.from_pretrained(adapter=tmp_path / "saved")(IDS).logits, expected)
    assert torch.equal(DeRaModel.from_pretrained(tiny_base, tmp_path / "saved")(IDS).logits, expected)
    with pytest.raises(DeRaError, match="is not the base that the adapter was trained on"):
        DeRaModel.from_pretrained(adapter=tmp_path / "saved", revision="b" * 40)
    for file in second.glob("tokenizer*"):
        file.unlink()
    assert len(ModelSource(adapter=tmp_path / "saved").tokenizer()) == 320, "the tokenizer of the record's commit"
    with pytest.raises(DeRaError, match="no tokenizer can be loaded"):
        ModelSource(base="org/tiny", adapter=tiny_adapter).tokenizer()


def test_a_record_whose_values_do_not_fit(tiny_base, tiny_adapter, tmp_path):
    good = {
        "format": 1,
        "base": str(tiny_base),
        "adapters": {"default": str(tiny_adapter)},
        "branches": {"aligned": ["default"], "reference": []},
    }
    file = tmp_path / "dera.json"
    file.write_text(json.dumps(good))
    model = DeRaModel.from_pretrained(tmp_path)
    assert model.adapters == {"reference": (), "aligned": ("default",)}, "in whatever order the file has them"
    assert list(model.adapters) == ["reference", "aligned"]
    for values, message in (
        ({"branches": {"reference": [], "aligned": ["dpo"]}}, "names the adapter 'dpo'"),
        ({"branches": {"reference": [], "aligned": "default"}}, "lists of adapters"),
        ({"branches": {"reference": [], "aligned": []}}, "'aligned' has no adapter"),
        ({"branches": {"reference": []}}, "no aligned branch"),
        ({"branches": {"aligned": ["default"]}}, "no 'reference'"),
        ({"base": None}, '"base" must name a model; it is None'),
        ({"adapters": ["default"]}, '"adapters" must map'),
        ({"training": ["dpo"]}, '"training" must be'),
        ({"mixing": "logit"}, '"mixing" must be'),
    ):
        file.write_text(json.dumps({**good, **values}))
        found = error(tmp_path)
        assert str(file) in found
        assert message in found
