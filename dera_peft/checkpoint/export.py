"""A mixture as one plain PEFT adapter, for servers that load LoRA; and how far that is from DeRa."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from dera_peft.engine.biases import biases_at
from dera_peft.engine.lora import check_scales
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.plan import WeightPlan, read_lam
from dera_peft.engine.quantized import keep_packed
from dera_peft.errors import DeRaError
from dera_peft.files import write_atomically

SECOND = re.compile(r"\.lora_(embedding_)?B(\.|$)")  # B of B·A, and its bias
COMBINED = "dera_export"  # a name that the PeftModel holds for a moment
NEW_TOKENS = 32  # of each prompt's continuation, on which the two are compared
CARD = """---
library_name: peft
base_model: {base}
---

# A LoRA adapter exported at {lam}

Made by `dera export` from {sources}: a plain LoRA adapter for the base alone, whose weights are scaled once.

It is an approximation of decoding-time realignment (DeRa, arXiv 2402.02992), which mixes the models' logits; here their
weights are mixed.

{fit}
"""


@torch.no_grad()
def export(
    model: MixtureModel,
    lam: float | Mapping[str, float],
    folder: str | os.PathLike,
    prompts: Sequence[Sequence[int]] = (),
) -> dict:
    """
    Writes one plain PEFT adapter whose weights are scaled by λ, with a card.

    Args:
        lam: a number, or a dict by aligned branch.
        folder: of the new adapter.
        prompts: token ids. Each is continued greedily by DeRa, and both are compared at every new token.

    Returns:
        `{"kl": mean KL(DeRa ‖ exported) in nats a token, "max_kl": ..., "tokens": how many, "prompts": how many}`.
        Empty without prompts.

    Raises:
        DeRaError: an adapter can't be scaled (DoRA, modules_to_save), or several can't be combined.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise DeRaError("prompts: one is empty; leave it out, or give at least the token that begins a text.")
    weights = read_lam(lam, 1, model.aligned)
    check_scales(model.branches, model.adapted)
    plan = WeightPlan(model.branches, weights)
    factors = {name: float(plan.adapter_scale.get(name, torch.ones(1))) for name in plan.branches[0].adapters}
    tensors, config = _scale(model, factors) if len(factors) == 1 else _combine(model, factors)
    fit = _compare(model, weights, prompts) if prompts else {}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config = replace(config, inference_mode=True, base_model_name_or_path=model.config.name_or_path or None)
    config.save_pretrained(str(folder))
    named = zip(model.aligned, weights[0].tolist(), strict=True)
    card = CARD.format(
        base=model.config.name_or_path,
        lam=", ".join(f"λ={value:g}" if len(model.aligned) == 1 else f"λ({name})={value:g}" for name, value in named),
        sources=" and ".join(f"`{name}` (times {factor:g})" for name, factor in factors.items()),
        fit=describe_fit(fit),
    )
    write_atomically(folder / "README.md", card)
    return fit


def describe_fit(fit: dict) -> str:
    """What `export` returned, as a sentence."""
    if not fit:
        return "How far it is from DeRa was not measured: no prompts were given."
    return (
        f"Measured over {fit['tokens']} tokens that DeRa wrote at this λ (greedily, at most {NEW_TOKENS} a prompt, "
        f"{fit['prompts']} prompts): KL(DeRa ‖ this adapter) is {fit['kl']:.4g} nats a token, at most "
        f"{fit['max_kl']:.4g}."
    )


def _scale(model: MixtureModel, factors: dict[str, float]) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """One adapter: its second factors times λ, whatever its ranks and scalings are."""
    ((name, factor),) = factors.items()
    with biases_at(model.base, factor), keep_packed(model.base):
        tensors = get_peft_model_state_dict(model.peft_model, adapter_name=name, save_embedding_layers=False)
        scaled = {key: tensor * factor if SECOND.search(key) else tensor.clone() for key, tensor in tensors.items()}
    return scaled, _lora_config(model, name)


def _combine(model: MixtureModel, factors: dict[str, float]) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Several adapters: PEFT's weighted combination "cat", which is exact: a LoRA of the sum of their ranks."""
    peft_model = model.peft_model
    for name in factors:
        config = peft_model.peft_config[name]
        for option, plain in (("use_rslora", False), ("lora_bias", False), ("rank_pattern", {}), ("bias", "none")):
            if getattr(config, option) != plain:
                raise DeRaError(
                    f"adapter {name!r} has {option}={getattr(config, option)!r}, which PEFT's weighted combination of "
                    "adapters does not keep; only an adapter alone can be exported with it."
                )
    for module in model.adapted:
        if not module.scales:
            raise DeRaError(
                f"{module.name}: {sorted(module.adapters)} adapt it by more than plain LoRA (modules_to_save, "
                "trainable tokens or DoRA), which PEFT's weighted combination of adapters does not keep; only an "
                "adapter alone can be exported with it."
            )
    # the combination takes its settings from the first adapter: it must find the modules of all of them
    modules = [module.name for module in model.adapted]
    configs = {name: _lora_config(model, name) for name in factors}
    peft_model.peft_config.update({name: _adapts(config, modules) for name, config in configs.items()})
    try:
        peft_model.add_weighted_adapter(list(factors), list(factors.values()), COMBINED, combination_type="cat")
    except ValueError as error:
        raise DeRaError(f"PEFT can't combine the adapters {list(factors)}: {error}") from error
    finally:
        peft_model.peft_config.update(configs)
    try:
        with keep_packed(model.base):
            tensors = get_peft_model_state_dict(peft_model, adapter_name=COMBINED, save_embedding_layers=False)
        return {key: tensor.clone() for key, tensor in tensors.items()}, _lora_config(model, COMBINED)
    finally:
        peft_model.delete_adapter(COMBINED)


def _adapts(config: LoraConfig, modules: list[str]) -> LoraConfig:
    """The config with `modules` as the only ones that it names."""
    return replace(config, target_modules=modules, layers_to_transform=None, layers_pattern=None, exclude_modules=None)


def _lora_config(model: MixtureModel, name: str) -> LoraConfig:
    return cast("LoraConfig", model.peft_model.peft_config[name])  # a MixtureModel has no other adapters


def _compare(model: MixtureModel, weights: torch.Tensor, prompts: Sequence[Sequence[int]]) -> dict:
    if model.config.is_encoder_decoder:
        raise DeRaError("prompts: an export of an encoder-decoder model is not compared; leave the prompts out.")
    divergences = []
    lam = dict(zip(model.aligned, weights[0].tolist(), strict=True))
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        sequence = model.generate(ids, lam=lam, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
        keep = {"logits_to_keep": sequence.shape[1] - ids.shape[1] + 1, "use_cache": False}
        log_p = model(sequence, lam=lam, **keep).logits[0, :-1].float().log_softmax(-1)  # [new, V]
        scaled = WeightPlan(model.branches, weights, model.device)
        log_q = model(sequence, lam=scaled, **keep).logits[0, :-1].float().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
    kl = torch.cat(divergences)
    return {"kl": kl.mean().item(), "max_kl": kl.max().item(), "tokens": len(kl), "prompts": len(prompts)}
