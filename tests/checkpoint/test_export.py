"""An exported adapter is a plain PEFT adapter; its distance from DeRa is measured, not promised."""

import shutil

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from tiny_bases import adapt
from tiny_models import make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_models import TwoModels, load_two

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint import export

IDS = torch.arange(3, 15).view(2, 6)
SETTINGS = [
    {},
    {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"k_proj": 3}},
    {"lora_bias": True},
    {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
]


def plain(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder).eval()(IDS).logits


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_export_is_the_adapter_scaled(tiny_base, tmp_path, settings):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **settings)
    model = DeRaModel.from_pretrained(tiny_base, adapter)
    before = model(IDS, lam=0.6).logits
    assert model.export(0.6, tmp_path / "out") == {}
    expected = DeRaModel.from_pretrained(tiny_base, adapter, mixing="weights")(IDS, lam=0.6).logits
    torch.testing.assert_close(plain(tiny_base, tmp_path / "out"), expected, atol=2e-4, rtol=1e-5)
    assert (expected - plain(tiny_base, adapter)).abs().max() > 0.5
    assert torch.equal(model(IDS, lam=0.6).logits, before), "the model is as it was"


@torch.no_grad()
def test_several_adapters_become_one(tiny_base, tiny_adapter, top_adapter, tmp_path):
    sft = make_adapter(tiny_base, tmp_path / "sft", seed=5, r=2)
    names = {"helpful": tiny_adapter, "harmless": top_adapter}
    model = DeRaModel.from_pretrained(tiny_base, adapters=names, reference=sft)
    lam = {"helpful": 0.7, "harmless": -0.2}
    before = model(IDS, lam=lam).logits
    model.export(lam, tmp_path / "out")
    expected = DeRaModel.from_pretrained(tiny_base, adapters=names, reference=sft, mixing="weights")(IDS, lam=lam)
    torch.testing.assert_close(plain(tiny_base, tmp_path / "out"), expected.logits, atol=2e-4, rtol=1e-5)
    assert torch.equal(model(IDS, lam=lam).logits, before)
    assert set(model.peft_model.peft_config) == {"reference_1", "helpful", "harmless"}


@torch.no_grad()
def test_the_distance_from_dera_is_measured_and_written_down(tiny_base, tiny_adapter, tmp_path):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    prompt = AutoTokenizer.from_pretrained(tiny_base)("The old lighthouse").input_ids
    fit = model.export(0.6, tmp_path / "out", [prompt])
    # the same by hand: two models mixed, and PEFT's own loading of what was written, on DeRa's own continuation
    mixture = TwoModels(*load_two(tiny_base, tiny_adapter), 0.6)
    ids = torch.tensor([prompt])
    tokens = mixture.generate(
        ids, max_new_tokens=32, do_sample=False, use_cache=False, generation_config=model.generation_config
    )
    log_p = mixture(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "out").eval()
    log_q = exported(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert fit["tokens"] == len(kl)
    assert fit["kl"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert fit["max_kl"] == pytest.approx(kl.max().item(), rel=1e-3)
    assert fit["kl"] > 0.01, "weights are another mixture than logits"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{fit['kl']:.4g} nats a token" in card
    assert "λ=0.6" in card
    assert model.export(1.0, tmp_path / "one", [prompt])["max_kl"] < 1e-5, "at λ=1 both are the adapter"


def test_what_does_not_scale_is_refused(tiny_base, tmp_path):
    model = DeRaModel.from_pretrained(tiny_base, make_adapter(tiny_base, tmp_path / "dora", use_dora=True))
    with pytest.raises(DeRaError, match="DoRA"):
        model.export(0.5, tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], r".*\.(q_proj|up_proj)"], ids=["list", "expression"])
def test_the_first_adapters_layers_do_not_hide_the_others(tiny_base, top_adapter, tmp_path, targets):
    layers = {} if isinstance(targets, str) else {"layers_to_transform": [0, 3]}
    names = {"first": top_adapter, "second": make_adapter(tiny_base, tmp_path / "a", target_modules=targets, **layers)}
    model = DeRaModel.from_pretrained(tiny_base, adapters=names, mixing="weights")
    configs = dict(model.peft_model.peft_config)
    lam = {"first": 0.7, "second": 0.6}
    expected = model(IDS, lam=lam).logits
    assert (expected - model(IDS, lam={"first": 0.7}).logits).abs().max() > 0.5
    model.export(lam, tmp_path / "out")
    torch.testing.assert_close(plain(tiny_base, tmp_path / "out"), expected, atol=2e-4, rtol=1e-5)
    assert model.peft_model.peft_config == configs


def test_what_a_combination_would_lose_is_refused(tiny_base, tmp_path):
    sft = make_adapter(tiny_base, tmp_path / "sft", use_dora=True, target_modules=["up_proj"])
    adapter = make_adapter(tiny_base, tmp_path / "adapter", target_modules=["q_proj"])
    model = DeRaModel.from_pretrained(tiny_base, adapter, reference=sft)
    with pytest.raises(DeRaError, match="by more than plain LoRA"):
        model.export(0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_added_tokens(base, folder, **settings):
    """An adapter trained with two tokens that the base does not have, on a head and embeddings of its own."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(322)
    adapt(model, target_modules=["q_proj", "v_proj"], **settings).save_pretrained(folder)
    return folder


def scaled_by_hand(base, adapter, lam: float) -> PeftModel:
    """PEFT's model of an adapter, with all that the adapter changes at own + λ·(changed - own)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(322)
    peft_model = PeftModel.from_pretrained(model, adapter).eval()
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            module.lora_B["default"].weight.data *= lam
        elif isinstance(module, ModulesToSaveWrapper):
            own, trained = module.original_module.weight, module.modules_to_save["default"].weight
            trained.data.copy_(own + lam * (trained - own))
        elif isinstance(module, TrainableTokensWrapper):
            layer = module.token_adapter
            own, trained = layer.base_layer.weight[[320, 321]], layer.trainable_tokens_delta["default"]
            trained.data.copy_(own + lam * (trained - own))
    return peft_model


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [320, 321]}, "modules_to_save": ["lm_head"]},
    ],
    ids=["modules_to_save", "tokens"],
)
def test_added_tokens_are_scaled_too(settings, tiny_base, tiny_adapter, tmp_path):
    sft = with_added_tokens(tiny_base, tmp_path / "sft", **settings)
    ids = torch.tensor([[5, 320, 7, 321, 9]])
    expected = scaled_by_hand(tiny_base, sft, 0.6)(ids).logits
    assert (expected - scaled_by_hand(tiny_base, sft, 1.0)(ids).logits).abs().max() > 0.1
    DeRaModel.from_pretrained(tiny_base, sft).export(0.6, tmp_path / "alone")
    torch.testing.assert_close(
        DeRaModel.from_pretrained(tiny_base, tmp_path / "alone")(ids).logits, expected, atol=2e-4, rtol=1e-5
    )
    weights = DeRaModel.from_pretrained(tiny_base, sft, mixing="weights")(ids, lam=0.6).logits
    torch.testing.assert_close(weights, expected, atol=2e-4, rtol=1e-5)
    # as the reference of another adapter: the whole of it, below λ of the other
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, reference=sft)
    model.export(0.6, tmp_path / "on-top")
    below = PeftModel.from_pretrained(scaled_by_hand(tiny_base, sft, 1.0).merge_and_unload(), tiny_adapter).eval()
    for module in below.modules():
        if isinstance(module, LoraLayer):
            module.lora_B["default"].weight.data *= 0.6
    found = DeRaModel.from_pretrained(tiny_base, tmp_path / "on-top")(ids).logits
    torch.testing.assert_close(found, below(ids).logits, atol=2e-4, rtol=1e-5)


@torch.no_grad()
def test_an_export_that_computes_something_else_is_not_saved(tiny_model, tmp_path, monkeypatch):
    before, scale = tiny_model(IDS, lam=0.5).logits, export._scale

    def spoiled(*args):
        tensors, config = scale(*args)
        return {name: tensor * 1.5 if "layers.2" in name else tensor for name, tensor in tensors.items()}, config

    monkeypatch.setattr(export, "_scale", spoiled)
    with pytest.raises(DeRaError, match="the exported adapter does not compute what the adapter does"):
        tiny_model.export(0.6, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert torch.equal(tiny_model(IDS, lam=0.5).logits, before)


def test_an_empty_prompt_is_refused(tiny_model, tmp_path):
    with pytest.raises(DeRaError, match="prompts: one is empty"):
        tiny_model.export(0.6, tmp_path / "out", [[]])
    assert not (tmp_path / "out").exists()


def files_of(*folders) -> dict:
    return {file: file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def copies(tiny_base, tiny_adapter, tmp_path):
    """A base, and an adapter with a record that names it, which a test may spoil."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_base, base)
    DeRaModel.from_pretrained(base, tiny_adapter).save_pretrained(adapter)
    return base, adapter


def test_a_folder_that_the_model_is_loaded_from_is_never_written(copies, tmp_path, monkeypatch):
    base, adapter = copies
    before = files_of(base, adapter)
    model = DeRaModel.from_pretrained(adapter=adapter)
    (tmp_path / "link").symlink_to(adapter)
    (tmp_path / "base-link").symlink_to(base, target_is_directory=True)
    monkeypatch.chdir(adapter)
    for output in (adapter, tmp_path / "link", ".", "../adapter", "../base", tmp_path / "base-link"):
        for overwrite in (False, True):
            with pytest.raises(DeRaError, match="is read from there"):
                model.export(0.5, output, overwrite=overwrite)
    assert files_of(base, adapter) == before
    model.export(0.5, adapter / "new")  # a folder below it is another one
    assert {file: content for file, content in files_of(base, adapter).items() if file in before} == before


def test_an_export_takes_the_place_of_another_adapter_only_where_it_is_told(copies, tiny_model, tmp_path):
    _, other = copies
    (other / "notes.txt").write_text("mine")
    before = files_of(other)
    with pytest.raises(DeRaError, match=r"output='.*adapter' is not empty: .*--overwrite"):
        tiny_model.export(0.5, other)
    assert files_of(other) == before
    tiny_model.export(0.5, other, overwrite=True)
    assert not (other / "dera.json").exists(), "it told of the adapter that was there"
    assert (other / "notes.txt").read_text() == "mine"
    tiny_model.export(0.5, tmp_path / "new")
    weights = "adapter_model.safetensors"
    assert (other / weights).read_bytes() == (tmp_path / "new" / weights).read_bytes()
    with pytest.raises(DeRaError, match="is a file"):
        tiny_model.export(0.5, other / "notes.txt", overwrite=True)


def test_a_full_disk_is_one_message_and_leaves_what_was_there(copies, tiny_model, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    _, other = copies
    before = files_of(other)
    monkeypatch.setattr("dera_peft.checkpoint.export.save_file", full)
    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    for folder in (tmp_path / "new", other):
        with pytest.raises(DeRaError, match=r"can't be written: .*No space left on device.* left\)\.$"):
            tiny_model.export(0.5, folder, overwrite=True)
    assert files_of(other) == before
    assert files_of(tmp_path / "new") == {}
    with pytest.raises(DeRaError, match="No space left on device"):
        tiny_model.save_pretrained(tmp_path / "saved")


def test_saving_a_model_writes_over_no_other_part_of_it(copies, tiny_adapter, tmp_path):
    base, adapter = copies
    two = DeRaModel.from_pretrained(base, adapters={"default": adapter, "other": tiny_adapter})
    two.save_pretrained(tmp_path / "two")
    again = DeRaModel.from_pretrained(tmp_path / "two")
    before = files_of(base, tmp_path / "two")
    for folder in (base, tmp_path / "two" / "other"):
        with pytest.raises(DeRaError, match="name another folder"):
            again.save_pretrained(folder)
    assert files_of(base, tmp_path / "two") == before
    again.save_pretrained(tmp_path / "two")  # each adapter over itself
    assert DeRaModel.from_pretrained(tmp_path / "two").aligned == ["default", "other"]
