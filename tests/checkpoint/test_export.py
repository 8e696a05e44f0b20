"""An exported adapter is a plain PEFT adapter; its distance from DeRa is measured, not promised."""

import pytest
import torch
from peft import PeftModel
from tiny_models import make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_models import TwoModels, load_two

from dera_peft import DeRaError, DeRaModel

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


def test_what_a_combination_would_lose_is_refused(tiny_base, tiny_adapter, tmp_path):
    sft = make_adapter(tiny_base, tmp_path / "sft", modules_to_save=["lm_head"])
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, reference=sft)
    with pytest.raises(DeRaError, match="modules_to_save, trainable tokens or DoRA"):
        model.export(0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_is_refused(tiny_model, tmp_path):
    with pytest.raises(DeRaError, match="prompts: one is empty"):
        tiny_model.export(0.6, tmp_path / "out", [[]])
    assert not (tmp_path / "out").exists()
