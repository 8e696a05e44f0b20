"""An export as a merged model, and as llama.cpp's file, is the PEFT adapter that is exported."""

import shutil

import pytest
import torch
from peft import PeftModel
from small_runs import store_quantized
from tiny_models import make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.gguf import modelfile

IDS = torch.arange(3, 15).view(2, 6)


@torch.no_grad()
def logits(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()(IDS).logits


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_merged_model_is_the_base_with_the_exported_adapter(tiny_base, tiny_adapter, tmp_path, quantization):
    """Of a quantized base too, the full one is what it is merged into."""
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, quantization=quantization)
    model.export(0.6, tmp_path / "adapter")
    model.export(0.6, tmp_path / "merged", format="safetensors")
    expected = logits(tiny_base, tmp_path / "adapter")
    assert (expected - logits(tiny_base)).abs().max() > 0.5
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=2e-4, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("moon").input_ids
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "A model exported at λ=0.6" in card
    assert "library_name: transformers" in card


def test_one_format_is_not_written_over_another(tiny_base, tiny_adapter, tmp_path):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    folder = tmp_path / "out"
    shutil.copytree(tiny_base, folder)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(DeRaError, match=r"holds 'model\.safetensors', of the format safetensors: name another folder"):
        model.export(0.6, folder, overwrite=True)
    with pytest.raises(DeRaError, match="format='GGUF' is not known; choose one of peft, safetensors, gguf"):
        model.export(0.6, tmp_path / "other", format="GGUF")
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    assert not (tmp_path / "other").exists()


def test_a_base_that_is_stored_quantized_is_not_merged_into(tiny_base, tiny_adapter, tmp_path):
    base = store_quantized(tiny_base, tmp_path / "nf4", "nf4")
    with pytest.raises(DeRaError, match="is stored quantized: merging needs full weights"):
        DeRaModel.from_pretrained(base, tiny_adapter).export(0.6, tmp_path / "out", format="safetensors")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_has_the_exported_factors(tiny_base, tmp_path):
    """In the order of llama.cpp's heads, which alternates between a head's halves; `make test-llama-cpp` runs it."""
    gguf = pytest.importorskip("gguf")
    settings = {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"k_proj": 3}}
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **settings)
    DeRaModel.from_pretrained(tiny_base, adapter).export(0.6, tmp_path / "out", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert [fields[f"{name}"] for name in ("general.architecture", "general.type", "adapter.type")] == [
        "llama", "adapter", "lora",
    ]  # fmt: skip
    alpha = fields["adapter.lora.alpha"]
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    own = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).state_dict()
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    assert len(found) == 2 * 4 * len(names)
    for layer in range(4):
        for name, theirs in names.items():
            a, b = (found[f"blk.{layer}.{theirs}.weight.lora_{side}"] for side in "ab")
            delta = b @ a * alpha / a.shape[0]  # as llama.cpp scales it
            key = f"model.layers.{layer}.{name}.weight"
            expected = 0.6 * (merged[key] - own[key])
            if theirs in ("attn_q", "attn_k"):
                size = 16
                rows = [h + i + half for h in range(0, len(delta), size) for i in range(8) for half in (0, 8)]
                expected = expected[rows]
            assert expected.abs().max() > 0.01
            torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "embed_tokens: a GGUF adapter is for the linear layers of the",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head: a GGUF adapter is for the linear layers of the decoder"),
        ({"lora_bias": True}, "lora_bias=True; a GGUF adapter has LoRA on linear layers alone"),
    ],
)
def test_what_a_gguf_file_cant_hold_is_refused(settings, message, tiny_base, tmp_path):
    pytest.importorskip("gguf")
    model = DeRaModel.from_pretrained(tiny_base, make_adapter(tiny_base, tmp_path / "adapter", **settings))
    with pytest.raises(DeRaError, match=message):
        model.export(0.6, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_other_architectures_are_refused_by_name(tiny_base, tiny_adapter, tmp_path, monkeypatch):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    monkeypatch.setattr(model.config, "model_type", "gpt_neox")
    with pytest.raises(DeRaError, match="is of the architecture 'gpt_neox'; GGUF adapters are written for llama, mis"):
        model.export(0.6, tmp_path / "out", format="gguf")


def test_a_modelfile_names_base_adapter_and_end_tokens():
    lines = modelfile("org/base", "λ=0.6", ["<|im_end|>"]).splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "FROM ./base.gguf", "ADAPTER ./adapter.gguf", 'PARAMETER stop "<|im_end|>"',
    ]  # fmt: skip
    assert "λ=0.6" in "\n".join(lines)
