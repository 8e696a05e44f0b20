"""The bases of `compatibility.py`, made tiny with random weights, and adapters on them."""

import torch
from compatibility import ENCODER_DECODERS, Base
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig


def make_base(base: Base):
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if base in ENCODER_DECODERS else AutoModelForCausalLM
    model = kind.from_config(base.config(), dtype=torch.float32).eval()
    config = base.config()
    model.generation_config = GenerationConfig(
        pad_token_id=0, decoder_start_token_id=getattr(config, "decoder_start_token_id", None)
    )
    for parameter in model.parameters():  # norms and biases too, which start at ones and zeros
        if parameter.ndim == 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def adapt(model, **config) -> PeftModel:
    """A PeftModel with random factors, strong enough that its branch decodes another text than the base."""
    config = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config}
    peft_model = get_peft_model(model, LoraConfig(**config)).eval()
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.data.normal_(std=0.4)
        elif "modules_to_save" in name or "trainable_tokens_delta" in name or "magnitude" in name:
            parameter.data += 0.3 * parameter.data.abs().mean() * torch.randn_like(parameter)
    return peft_model
