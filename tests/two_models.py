"""
The independent side of every comparison: two separately loaded models and the formula, no code of this package.

z_λ = (1-λ)·z_ref + λ·z_aligned; whole sequences, no cache.
"""

import inspect
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


def load_two(base: Path, adapter: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The base, and another copy of it with the adapter merged into its weights; fp32."""
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    aligned = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return reference, PeftModel.from_pretrained(aligned, adapter).merge_and_unload().eval()


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count from each row's first real token."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


class TwoModels(PreTrainedModel, GenerationMixin):
    """Two whole models whose logits are mixed, for transformers' own `generate` with `use_cache=False`."""

    _supports_sdpa = True
    _can_set_experts_implementation_cached_value = True

    def __init__(self, reference: PreTrainedModel, aligned: PreTrainedModel, lam: float | torch.Tensor = 1.0):
        super().__init__(reference.config)
        self.reference, self.aligned = reference, aligned
        self.lam = lam  # a number, or [rows, 1, 1]
        self.generation_config = reference.generation_config

    def forward(self, input_ids, attention_mask=None, **kwargs):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids(attention_mask),
            "use_cache": False,
        }
        if "position_ids" not in inspect.signature(type(self.reference).forward).parameters:
            del inputs["position_ids"]  # as in models with ALiBi
        z_ref, z_aligned = self.reference(**inputs).logits, self.aligned(**inputs).logits
        return CausalLMOutput(logits=(1 - self.lam) * z_ref + self.lam * z_aligned)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def decode_by_hand(mixture: TwoModels, input_ids, attention_mask, steps: int, sample: bool = False) -> torch.Tensor:
    """Greedy decoding or sampling (torch's global generator), written out; returns the new tokens, `[B, steps]`."""
    start = input_ids.shape[1]
    for _ in range(steps):
        logits = mixture(input_ids, attention_mask).logits[:, -1]
        if sample:
            token = torch.multinomial(logits.softmax(-1), num_samples=1)
        else:
            token = logits.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(token)], dim=1)
    return input_ids[:, start:]
