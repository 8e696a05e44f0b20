"""4-bit bases on a CPU with AVX512-BF16, where an evaluation packs their weights."""

import copy

import pytest
import torch
from cpu_packing import force_cpu_packing
from peft import PeftModel
from small_runs import load_plainly
from torch import nn
from transformers import BitsAndBytesConfig

from dera_peft import DeRaError, DeRaModel
from dera_peft.engine.quantized import keep_trainable

IDS = torch.arange(3, 27).view(4, 6)


@pytest.fixture
def packing(monkeypatch) -> None:
    force_cpu_packing(monkeypatch)


def linear_4bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    return bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")


def load_to_train(base, adapter) -> PeftModel:
    """As PEFT loads it, before anything keeps its weights unpacked."""
    model = load_plainly(base, nf4=True)
    for layer in linears(model):
        layer.support_avx512bf16_for_cpu = True
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def linears(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "support_avx512bf16_for_cpu" in vars(module)]


def are_packed(model: nn.Module) -> list[bool]:
    return [vars(layer.weight.quant_state).get("packing_format_for_cpu", False) for layer in linears(model)]


def gradients(peft_model: PeftModel) -> dict[str, torch.Tensor | None]:
    peft_model.train()
    peft_model.zero_grad()
    peft_model(IDS, labels=IDS).loss.backward()
    return {name: weight.grad for name, weight in peft_model.named_parameters() if weight.requires_grad}


def test_an_evaluation_packs_a_layer_and_its_gradient_is_lost(packing):
    """The library's fault, without which the other tests here would test nothing."""
    layer = linear_4bit()
    kept = copy.deepcopy(layer)
    keep_trainable(kept)
    x = torch.randn(2, 5, 128)
    with torch.no_grad():
        packed, unpacked = layer.eval()(x), kept.eval()(x)
    assert are_packed(layer) == [True]
    assert are_packed(kept) == [False]
    assert not torch.equal(packed, unpacked)
    torch.testing.assert_close(packed, unpacked, atol=2**-7 * unpacked.abs().max().item(), rtol=0)  # bf16's precision
    found = []
    for each in (layer, kept):
        before = torch.eye(128, requires_grad=True)
        (each.train()(x @ before).sum() + before.sum()).backward()
        found.append(before.grad)
    assert torch.equal(found[0], torch.ones(128, 128)), "none came through the layer"
    assert not torch.equal(found[1], torch.ones(128, 128))


def test_what_a_trainer_holds_keeps_its_gradients(packing, tiny_base, tiny_adapter):
    expected = gradients(load_to_train(tiny_base, tiny_adapter))
    peft_model = load_to_train(tiny_base, tiny_adapter)
    with torch.no_grad():
        peft_model.eval()(IDS)
    assert all(are_packed(peft_model)), "it is from_peft that keeps them from it"
    lost = gradients(peft_model)
    assert any(not torch.equal(lost[name], gradient) for name, gradient in expected.items())

    peft_model = load_to_train(tiny_base, tiny_adapter)
    model = DeRaModel.from_peft(peft_model)
    model.eval()
    model.generate(IDS, lam=0.5, max_new_tokens=3, do_sample=False, pad_token_id=0)
    found = gradients(model.unwrap())
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert all(gradient.any() for gradient in found.values())


@torch.no_grad()
def test_a_packed_model_is_wrapped_to_decode_and_not_to_train(packing, tiny_base, tiny_adapter):
    peft_model = load_to_train(tiny_base, tiny_adapter).eval()
    z_aligned = peft_model(IDS).logits
    with pytest.raises(DeRaError, match=r"self_attn.q_proj.base_layer' can't be trained through.*Load the model anew"):
        DeRaModel.from_peft(peft_model)
    peft_model.requires_grad_(False)
    torch.testing.assert_close(DeRaModel.from_peft(peft_model)(IDS).logits, z_aligned, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_what_is_loaded_to_decode_takes_the_packed_kernel(packing, tiny_base, tiny_adapter):
    def load(dtype: torch.dtype) -> DeRaModel:
        return DeRaModel.from_pretrained(tiny_base, tiny_adapter, quantization="nf4", dtype=dtype)

    packed, unpacked, in_bf16 = load(torch.float32), load(torch.float32), load(torch.bfloat16)
    keep_trainable(unpacked)
    keep_trainable(in_bf16)
    logits, expected, rounded = (model(IDS, lam=0.5).logits.float() for model in (packed, unpacked, in_bf16))
    assert all(are_packed(packed))
    assert not any(are_packed(unpacked))
    assert 0 < (logits - expected).abs().mean() < (rounded - expected).abs().mean(), "its products alone are in bf16"


@torch.no_grad()
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_saving_and_loading_adapters_leaves_packed_weights_as_they_are(
    double, packing, tiny_base, tiny_adapter, top_adapter, tmp_path
):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, quantization_config=quantization, dtype=torch.float32)
    expected = model(IDS, lam=0.5).logits
    assert all(are_packed(model))
    model.save_pretrained(tmp_path / "saved")
    model.export(0.5, tmp_path / "exported")
    model.add_adapter("other", top_adapter)
    model.export({"aligned": 0.5, "other": 0.5}, tmp_path / "combined")
    assert torch.equal(model(IDS, lam={"aligned": 0.5, "other": 0.0}).logits, expected)
