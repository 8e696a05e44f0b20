"""The models that are measured: a known shape with random weights and adapter, or a base and an adapter as loaded."""

from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from dera_peft.checkpoint.adapters import place_adapter
from dera_peft.checkpoint.base import read_dtype
from dera_peft.checkpoint.source import ModelSource
from dera_peft.engine.names import REFERENCE
from dera_peft.errors import DeRaError
from dera_peft.model import DeRaModel

RANK = 16
# The published configurations of Llama 3.1 8B, Llama 3.2 1B, SmolLM2 135M and Qwen3 0.6B.
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama-8b": (
        LlamaConfig,
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
    ),
    "llama-1b": (
        LlamaConfig,
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-0.6b": (
        Qwen3Config,
        {
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2-135m": (
        LlamaConfig,
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": (
        LlamaConfig,
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
}


def read_config(shape: str, context: int, layers: int | None = None) -> PreTrainedConfig:
    """
    The configuration of a shape.

    Args:
        context: tokens that the positions have to reach.
        layers: instead of the shape's own number.
    """
    if shape not in SHAPES:
        raise DeRaError(f"--shape: {shape!r} is not known; choose one of {', '.join(SHAPES)}.")
    kind, settings = SHAPES[shape]
    depth = settings["num_hidden_layers"] if layers is None else layers
    depth_and_context = {"num_hidden_layers": depth, "max_position_embeddings": max(context, 8192)}
    arguments: dict[str, Any] = {**settings, **depth_and_context}
    return kind(**arguments)


def make_random(
    config: PreTrainedConfig,
    dtype: str | None,
    device: torch.device,
    quantization: str | None = None,
    top: float = 1.0,
    seed: int = 0,
) -> PeftModel:
    """
    A model of random weights with a random LoRA adapter of rank 16 on all linear layers.

    Args:
        dtype: of the weights; bfloat16 on a CUDA device and float32 on others, unless given.
        quantization: None, "nf4" or "fp4", of all linear layers but the head. Each layer's weights are made and
            quantized on the device before the next one's, so that they are never all there unquantized.
        top: the share of the layers, from the top, that the adapter is on.
    """
    torch.manual_seed(seed)
    weights_dtype = read_dtype(dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    with torch.device("meta" if quantization else device):
        base = AutoModelForCausalLM.from_config(config, dtype=weights_dtype)
    if quantization:
        _make_quantized(base, quantization, device)
    base.eval()
    depth = config.num_hidden_layers
    adapted = max(1, round(depth * top))
    adapter = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=sorted({name.rpartition(".")[2] for name, _ in _linear_layers(base)}),
        layers_to_transform=None if adapted == depth else list(range(depth - adapted, depth)),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(base, adapter).eval()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:  # PEFT starts it at zero, where both branches would agree
                parameter.normal_(std=0.02)
    place_adapter(base, "default", base.dtype)
    return peft_model.requires_grad_(False)


def _linear_layers(base: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """All but the head, by name."""
    head = base.get_output_embeddings()
    return [
        (name, module) for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]


def _make_quantized(base: PreTrainedModel, quantization: str, device: torch.device) -> None:
    """Gives a model on the meta device random weights: quantized ones in its linear layers, its own kind elsewhere."""
    import bitsandbytes as bnb  # imported when asked for: it warns where there is no GPU

    for name, linear in _linear_layers(base):
        weight = torch.empty(linear.weight.shape, dtype=base.dtype, device=device)
        packed = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=base.dtype,
            quant_type=quantization,
            device="meta",  # its own weights would be drawn on the CPU, which takes longer than all the rest
        )
        # torch declares a Parameter's __init__, and bitsandbytes its own __new__
        packed.weight = bnb.nn.Params4bit(
            weight.normal_(std=base.config.initializer_range),
            requires_grad=False,
            compress_statistics=True,  # pyrefly: ignore[unexpected-keyword]
            quant_type=quantization,  # pyrefly: ignore[unexpected-keyword]
        )
        packed._is_hf_initialized = True  # pyrefly: ignore[bad-argument-type] # what init_weights below asks for
        base.set_submodule(name, packed.to(device))
    for module in base.modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            module.to_empty(device=device, recurse=False)
    base.init_weights()
    base.is_loaded_in_4bit = True  # pyrefly: ignore[bad-argument-type] # what PEFT asks a base for that transformers loaded


def load_for_bench(source: ModelSource) -> PeftModel:
    """
    A base and its adapter as `DeRaModel.from_pretrained` loads them.

    Raises:
        DeRaError: they are something that the ways to be compared with can't do.
    """
    model = DeRaModel.from_source(source)
    names = model.adapters
    if model.config.is_encoder_decoder:
        raise DeRaError("dera bench measures decoder-only models; this base has an encoder.")
    if len(names) != 2 or names[REFERENCE] or len(names[model.aligned[0]]) != 1:
        raise DeRaError(
            f"dera bench measures one adapter over a plain base, which is what the other ways know; this model's "
            f"branches are {names}."
        )
    (name,) = names[model.aligned[0]]
    if cast("LoraConfig", model.peft_model.peft_config[name]).bias != "none":
        raise DeRaError("dera bench can't measure an adapter with trained biases: PEFT can't switch them off.")
    peft_model = model.peft_model
    model.unwrap()
    return peft_model.requires_grad_(False)
