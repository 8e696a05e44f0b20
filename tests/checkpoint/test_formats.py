"""Adapters as other programs write them: names of older versions and of whole models, and files that don't fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_bases import adapt
from tiny_models import make_adapter
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from dera_peft import DeRaModel
from dera_peft.errors import DeRaError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def gemma3() -> PreTrainedModel:
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=TEXT, vision_config=vision, image_token_index=120, boi_token_index=121, eoi_token_index=122,
            mm_tokens_per_image=4,
        )
    ).eval()  # fmt: skip


def qwen3_5() -> PreTrainedModel:
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(
            text_config={**TEXT, **LINEAR_ATTENTION}, vision_config=vision, image_token_id=120, video_token_id=121,
            vision_start_token_id=122, vision_end_token_id=123,
        )
    ).eval()  # fmt: skip


def rewrite(source: Path, folder: Path, tensors: Callable[[dict], dict] = dict, **config) -> Path:
    """A copy of an adapter with other tensors and other settings."""
    shutil.copytree(source, folder)
    found = tensors(load_file(folder / "adapter_model.safetensors"))
    save_file({name: value.clone() for name, value in found.items()}, folder / "adapter_model.safetensors")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return folder


def error(base: Path, adapter: Path) -> str:
    with pytest.raises(DeRaError) as caught:
        DeRaModel.from_pretrained(base, adapter)
    return str(caught.value)


@torch.no_grad()
def off_and_on(peft_model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's own two passes."""
    aligned = peft_model(input_ids=IDS).logits
    with peft_model.disable_adapter():
        return peft_model(input_ids=IDS).logits, aligned


def check_mixture(base: Path, adapter: Path, reference: torch.Tensor, aligned: torch.Tensor) -> None:
    assert (aligned - reference).abs().max() > 0.1
    model = DeRaModel.from_pretrained(base, adapter, dtype="float32")
    for lam in (0.0, 0.4, 1.0):
        with torch.no_grad():
            logits = model(IDS, lam=lam).logits
        torch.testing.assert_close(logits, (1 - lam) * reference + lam * aligned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "targets",
    [r".*language_model.*\.(q_proj|v_proj)", r"^language_model\.model\.layers\.\d+\.self_attn\.(q_proj|v_proj)$"],
    ids=["names of both versions", "names of the older version"],
)
def test_a_vision_language_adapter_with_the_names_of_older_versions(targets, tmp_path):
    model = gemma3()
    model.save_pretrained(tmp_path / "base")
    peft_model = adapt(model, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    reference, aligned = off_and_on(peft_model)
    peft_model.save_pretrained(tmp_path / "new")
    old = rewrite(
        tmp_path / "new",
        tmp_path / "old",
        lambda ts: {name.replace(".model.language_model.", ".language_model.model."): t for name, t in ts.items()},
        target_modules=targets,
    )
    check_mixture(tmp_path / "base", old, reference, aligned)


WHOLE_REGEX = r"model\.language_model\..*\.(q_proj|v_proj|down_proj)"


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"target_modules": ["q_proj", "v_proj", "down_proj"]}, False),
        ({"target_modules": WHOLE_REGEX, "rank_pattern": {"model.language_model.layers.1.self_attn.q_proj": 2}}, False),
        ({"target_modules": ["q_proj", "v_proj", "qkv"]}, True),
    ],
    ids=["ends of names", "a regex of whole names", "with the vision tower"],
)
def test_an_adapter_of_a_whole_multimodal_model_on_its_text_model(settings, warns, tmp_path, caplog):
    model = qwen3_5()
    model.save_pretrained(tmp_path / "base")
    peft_model = adapt(model, **settings)
    reference, aligned = off_and_on(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) is not type(model)
    check_mixture(tmp_path / "base", tmp_path / "adapter", reference, aligned)
    assert ("are left out" in caplog.text) == warns


@torch.no_grad()
def test_experts_by_the_names_of_an_older_version_load(tmp_path):
    """As PEFT loads them: `w1`, `w2` and `w3` of each expert are parts of the parameters that transformers has now."""
    torch.manual_seed(0)
    config = {name: value for name, value in TEXT.items() if name != "head_dim"}
    MixtralForCausalLM(MixtralConfig(**config, num_local_experts=2)).save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])

    def add_experts(tensors: dict) -> dict:
        sizes = {"w1": (32, 64), "w2": (64, 32), "w3": (32, 64)}
        for layer in range(2):
            for expert in range(2):
                for name, (inputs, outputs) in sizes.items():
                    key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                    tensors[f"{key}.lora_A.weight"] = torch.randn(4, inputs)
                    tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, 4)
        return tensors

    targets = ["q_proj", "w1", "w2", "w3"]
    old = rewrite(adapter, tmp_path / "old", add_experts, target_modules=targets)
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), old).eval()
    z_aligned = peft_model(IDS).logits
    with peft_model.disable_adapter():
        z_ref = peft_model(IDS).logits
    without = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    assert (z_aligned - without(IDS).logits).abs().max() > 0.1, "the experts' factors must matter"
    found = DeRaModel.from_pretrained(tmp_path / "base", old)(IDS, lam=0.5).logits
    torch.testing.assert_close(found, (z_ref + z_aligned) / 2, atol=2e-4, rtol=1e-5)


def test_factors_that_the_config_does_not_target_are_an_error(tiny_base, tmp_path):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    message = error(tiny_base, rewrite(adapter, tmp_path / "narrower", target_modules=["q_proj"]))
    assert "holds factors for 'model.layers.0.mlp.up_proj', which its config does not target" in message
    fewer_layers = rewrite(adapter, tmp_path / "layers", layers_to_transform=[0, 1])
    assert "holds factors for 'model.layers.2" in error(tiny_base, fewer_layers)


def test_a_rank_other_than_the_files_is_told_as_one(tiny_base, tiny_adapter, tmp_path):
    message = error(tiny_base, rewrite(tiny_adapter, tmp_path / "rank", r=8))
    assert "its config says r=8" in message
    assert "factors of rank 4" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found_at_loading(value, tiny_base, tiny_adapter, tmp_path):
    key = "base_model.model.model.layers.3.mlp.up_proj.lora_B.weight"

    def spoil(tensors: dict) -> dict:
        tensors[key][5, 1] = value
        return tensors

    message = error(tiny_base, rewrite(tiny_adapter, tmp_path / "adapter", spoil))
    assert f"{key!r} has values that are not finite" in message
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[3, 4] = value
    model.save_pretrained(tmp_path / "base")
    assert "'model.layers.2.self_attn.o_proj.weight' has values that are not finite" in error(
        tmp_path / "base", tiny_adapter
    )


def test_files_of_other_formats_are_named(tiny_base, tiny_adapter, tmp_path):
    pickled, sharded = (Path(shutil.copytree(tiny_adapter, tmp_path / name)) for name in ("pickled", "sharded"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    message = error(tiny_base, pickled)
    assert "has no adapter_model.safetensors" in message
    assert "adapter_model.bin, a pickle" in message
    assert "weights_only=True" in message
    (sharded / "adapter_model.safetensors").rename(sharded / "adapter_model-00001-of-00001.safetensors")
    (sharded / "adapter_model.safetensors.index.json").write_text("{}")
    assert "split over several files" in error(tiny_base, sharded)
