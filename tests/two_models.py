"""
The independent side of every comparison: two separately loaded models and the formula, no code of this package.

z_λ = (1-λ)·z_ref + λ·z_aligned; whole sequences, no cache.
"""

import inspect
import math
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


# -- rules at a token, in fp64 and one row at a time -------------------------------------------------------------------


def nats(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p ‖ q) of two distributions `[V]`."""
    there = p > 0
    return float((p[there] * (p[there] / q[there]).log()).sum())


def combined_by_hand(rule: str, z_ref: torch.Tensor, z_aligned: torch.Tensor, lam: float, left: float):
    """A rule of `engine.rules` on logits `[V]`: the combined logits, the λ that it chose, and what it spent in nats."""
    name, _, number = rule.partition(":")
    z_ref, z_aligned = z_ref.double(), z_aligned.double()
    p_ref, p_aligned = z_ref.softmax(-1), z_aligned.softmax(-1)

    def mixture(lam: float) -> torch.Tensor:
        return (1 - lam) * z_ref + lam * z_aligned

    if name == "jsd":
        mean = (p_ref + p_aligned) / 2
        lam *= (nats(p_ref, mean) + nats(p_aligned, mean)) / (2 * math.log(2))
    if name in ("kl", "kl_total"):
        bound, low, high = float(number) if name == "kl" else left, 0.0, 1.0
        if nats(mixture(lam).softmax(-1), p_ref) > bound:
            for _ in range(50):
                middle = (low + high) / 2
                low, high = (middle, high) if nats(mixture(middle * lam).softmax(-1), p_ref) < bound else (low, middle)
            lam *= low
    z = mixture(lam) if name != "aad" else p_aligned.log() - p_ref.log()
    if name in ("plausible", "aad"):
        judge = p_ref if lam < 0 else p_aligned
        z[judge < float(number) * judge.max()] = -math.inf
    return z, lam, nats(z.softmax(-1), p_ref)


class RuledModels(TwoModels):
    """
    Two whole models under a rule a row. Each forward pass goes along the whole completion again, so that what a budget
    has come to follows any sequence, beams too.
    """

    def __init__(self, reference, aligned, rules, start: int):
        """`rules`: (rule, λ by position) for each row; `start`: the prompts' length."""
        super().__init__(reference, aligned)
        self.rules, self.start = rules, start
        self.chosen: list[list[float]] = []

    def forward(self, input_ids, attention_mask=None, **kwargs):
        self.lam = 0.0
        z_ref = super().forward(input_ids, attention_mask).logits
        self.lam = 1.0
        z_aligned = super().forward(input_ids, attention_mask).logits
        rows, self.chosen = [], []
        for row, (rule, schedule) in enumerate(self.rules):
            left, chosen, z = float(rule.partition(":")[2] or 0), [], z_ref[row, -1]
            first = self.start - 1 if rule.startswith("kl_total") else input_ids.shape[1] - 1
            for place in range(first, input_ids.shape[1]):
                position = place - self.start + 1
                lam = next(value for start, value in sorted(schedule.items(), reverse=True) if position >= start)
                z, lam, spent = combined_by_hand(rule, z_ref[row, place], z_aligned[row, place], lam, left)
                left -= spent
                chosen.append(lam)
            rows.append(z.float())
            self.chosen.append(chosen)
        return CausalLMOutput(logits=torch.stack(rows)[:, None])


class TwoPrompts(TwoModels):
    """
    Two whole models with a prompt each, and the same tokens behind them; for `generate` with `use_cache=False`.

    Args:
        width: the aligned model's prompts' length, behind which what it is given has new tokens.
        prompts: the reference's, `{"input_ids": [rows, S], "attention_mask": [rows, S]}`, whatever its length S.
    """

    def __init__(self, reference, aligned, lam, width: int, prompts: dict[str, torch.Tensor]):
        super().__init__(reference, aligned, lam)
        self.width, self.prompts = width, prompts

    def forward(self, input_ids, attention_mask=None, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids_ref = torch.cat([self.prompts["input_ids"], input_ids[:, self.width :]], dim=1)
        mask_ref = torch.cat([self.prompts["attention_mask"], mask[:, self.width :]], dim=1)
        z_ref, z_aligned = last_logits(self.reference, ids_ref, mask_ref), last_logits(self.aligned, input_ids, mask)
        return CausalLMOutput(logits=(1 - self.lam) * z_ref + self.lam * z_aligned)


def last_logits(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`[B, 1, V]`, of whole sequences, each with positions of its own."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        del inputs["position_ids"]
    return model(**inputs, use_cache=False).logits[:, -1:]
