"""Quantized and offloaded bases against two passes of PEFT over the same base, adapter on and adapter off."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import store_quantized
from tiny_models import make_adapter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.source import ModelSource

IDS = torch.arange(3, 27).view(4, 6)
LAM = [0.0, 0.5, 1.0, 1.5]
NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def two_passes(peft_model):
    ids = IDS.to(peft_model.device)
    z_aligned = peft_model(ids).logits
    with peft_model.disable_adapter():
        z_ref = peft_model(ids).logits
    assert (z_ref - z_aligned).abs().max() > 1
    return z_ref, z_aligned


def assert_mixture(model, atol=2e-4):
    ids = IDS.to(model.device)
    found, output = model(ids, lam=LAM).logits, model.generate(ids, lam=LAM, num_beams=3, **NEW)
    cacheless = model.generate(ids, lam=LAM, num_beams=3, use_cache=False, **NEW)
    z_ref, z_aligned = two_passes(model.unwrap())
    weight = torch.tensor(LAM, device=ids.device)[:, None, None]
    torch.testing.assert_close(found, (1 - weight) * z_ref + weight * z_aligned, atol=atol, rtol=1e-5)
    assert output.tolist() == cacheless.tolist()
    return z_ref


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_four_bits(tiny_base, tiny_adapter, quantization, device):
    pytest.importorskip("bitsandbytes")
    model = DeRaModel.from_pretrained(
        tiny_base, tiny_adapter, quantization=quantization, dtype=torch.float32, device_map=str(device)
    )
    weight = model.base.model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.quant_state.quant_type == quantization
    z_ref = assert_mixture(model)
    full = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)(IDS).logits
    assert (z_ref.cpu() - full).abs().max() > 1e-2, "the base must really be quantized"


@pytest.fixture(scope="module")
def stored(tiny_base, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints that are quantized already, as people publish them."""
    pytest.importorskip("bitsandbytes")
    return {kind: store_quantized(tiny_base, tmp_path_factory.mktemp(kind), kind) for kind in ("nf4", "int8")}


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"quantization": "nf4"}, {"quantization_config": None}])
def test_a_checkpoint_in_four_bits_stays_as_it_is(arguments, stored, tiny_base, tiny_adapter):
    model = DeRaModel.from_pretrained(stored["nf4"], tiny_adapter, dtype="float32", **arguments)
    layer = model.base.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.compute_dtype == torch.float32  # its config says bfloat16, and float32 is asked for
    z_ref = assert_mixture(model)
    full = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)(IDS).logits
    assert (z_ref - full).abs().max() > 1e-2, "the base must really be quantized"


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("nf4", {"quantization": "int8"}, "quantization: int8 is asked for"),
        ("nf4", {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "quantization_config: int8"),
        ("int8", {"quantization": "nf4"}, "quantization: nf4 is asked for"),
    ],
)
def test_another_quantization_than_the_checkpoints_is_refused(kind, arguments, said, stored, tiny_adapter):
    with pytest.raises(DeRaError, match=f"{said}.*is a checkpoint in {kind}"):
        DeRaModel.from_pretrained(stored[kind], tiny_adapter, **arguments)


def test_what_a_source_is_quantized_to(stored, tiny_base, tiny_adapter):
    def of(base, **arguments) -> tuple:
        return ModelSource(base=base, adapter=tiny_adapter, **arguments).quantized_to()

    assert of(tiny_base) == (None, False)
    assert of(tiny_base, quantization="nf4") == ("nf4", False)
    assert of(stored["int8"]) == ("int8", True)
    assert of(stored["nf4"]) == of(stored["nf4"], quantization="nf4") == ("nf4 without double quantization", True)


def test_a_checkpoint_of_a_package_that_is_not_here_is_refused_in_words(tiny_base, tiny_adapter, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    values = json.loads((base / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    (base / "config.json").write_text(json.dumps(values))
    with pytest.raises(DeRaError, match=r"nf4 is asked for.*is a checkpoint in gptq"):
        DeRaModel.from_pretrained(base, tiny_adapter, quantization="nf4")
    with pytest.raises(DeRaError, match="can't be loaded"):
        DeRaModel.from_pretrained(base, tiny_adapter)


@torch.no_grad()
def test_int8_is_exact_to_the_precision_of_int8(tiny_base, tiny_adapter):
    """LLM.int8() rounds activations by row, and picks outlier columns by batch: rows see each other a little."""
    pytest.importorskip("bitsandbytes")
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, quantization="int8", dtype=torch.float32)
    assert_mixture_in_int8 = model(IDS, lam=LAM).logits
    z_ref, z_aligned = two_passes(model.unwrap())
    weight = torch.tensor(LAM)[:, None, None]
    expected = (1 - weight) * z_ref + weight * z_aligned
    full = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)(IDS).logits
    rounding = (z_ref - full).abs().mean()
    assert rounding > 1e-3, "the base must really be quantized"
    assert (assert_mixture_in_int8 - expected).abs().mean() < rounding


@torch.no_grad()
def test_dora_over_four_bits(tiny_base, tmp_path, device):
    pytest.importorskip("bitsandbytes")
    adapter = make_adapter(tiny_base, tmp_path / "dora", use_dora=True)
    options = {"quantization": "nf4", "dtype": torch.float32, "device_map": str(device)}
    assert_mixture(DeRaModel.from_pretrained(tiny_base, adapter, **options))


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_by_a_quantization_config(tiny_base, tiny_adapter, bits):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = {8: quantization.Int8WeightOnlyConfig, 4: quantization.IntxWeightOnlyConfig}[bits]
    model = DeRaModel.from_pretrained(
        tiny_base, tiny_adapter, quantization_config=TorchAoConfig(config()), dtype=torch.float32
    )
    weight = model.base.model.layers[0].mlp.up_proj.base_layer.weight
    assert type(weight).__module__.startswith("torchao")
    assert_mixture(model)


def test_one_quantization_at_a_time(tiny_base, tiny_adapter):
    with pytest.raises(DeRaError, match="not both"):
        DeRaModel.from_pretrained(tiny_base, tiny_adapter, quantization="nf4", quantization_config={})


@torch.no_grad()
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_layers(tiny_base, tiny_adapter, tmp_path, place):
    """Layers that live elsewhere come when they are called, and their adapters with them."""
    plain = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    expected = plain(IDS, lam=LAM).logits
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{index}": "cpu" if index < 2 else place for index in range(4)}
    model = DeRaModel.from_pretrained(
        tiny_base, tiny_adapter, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    if place == "disk":
        assert model.base.model.layers[3].mlp.up_proj.base_layer.weight.is_meta
    torch.testing.assert_close(model(IDS, lam=LAM).logits, expected, atol=1e-5, rtol=1e-5)
    tokens = model.generate(IDS, lam=LAM, num_beams=3, **NEW)
    assert tokens.tolist() == plain.generate(IDS, lam=LAM, num_beams=3, **NEW).tolist()


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two accelerators")
def test_layers_on_several_devices(tiny_base, tiny_adapter):
    expected = DeRaModel.from_pretrained(tiny_base, tiny_adapter)(IDS, lam=LAM).logits
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, device_map="balanced")
    assert len({parameter.device for parameter in model.parameters()}) == 2
    torch.testing.assert_close(model(IDS.to(model.device), lam=LAM).logits.cpu(), expected, atol=2e-4, rtol=1e-5)
    for name, module in model.base.named_modules():
        if name.endswith("up_proj"):
            assert module.lora_A["default"].weight.device == module.base_layer.weight.device
