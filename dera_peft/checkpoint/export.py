"""A mixture as one plain PEFT adapter, for servers that load LoRA; and how far that is from DeRa."""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import save_file
from torch import nn

from dera_peft.checkpoint.adapter_check import CheckedAdapter
from dera_peft.checkpoint.adapter_file import PREFIX, WEIGHTS_FILE, AdapterFile
from dera_peft.checkpoint.adapters import attach_adapter, detach_adapter
from dera_peft.checkpoint.base import has_added_tokens
from dera_peft.checkpoint.card import write_export_card
from dera_peft.checkpoint.merging import check_same, probe
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.vocabulary import own_tokens_alone
from dera_peft.engine.biases import biases_at
from dera_peft.engine.generation import plain_generation
from dera_peft.engine.lora import check_scales
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.names import REFERENCE
from dera_peft.engine.plan import Branch, WeightPlan, read_lam
from dera_peft.engine.quantized import keep_packed
from dera_peft.errors import DeRaError
from dera_peft.files import RUN_FILE, check_new_folder, written_as_a_whole

SECOND = re.compile(r"\.lora_(embedding_)?B(\.|$)")  # B of B·A, and its bias
COMBINED = "dera_export"  # a name that the PeftModel holds for a moment
NEW_TOKENS = 32  # of each prompt's continuation, on which the two are compared
# an adapter's, which an export takes the place of; a record beside it would tell of other weights
REPLACED = ("adapter_model*", "dera.json", RUN_FILE)


@torch.no_grad()
def export(
    model: MixtureModel,
    lam: float | Mapping[str, float],
    folder: str | os.PathLike,
    prompts: Sequence[Sequence[int]] = (),
    *,
    record: Record | None = None,
    overwrite: bool = False,
) -> dict:
    """
    Writes one plain PEFT adapter whose weights are scaled by λ, with a card.

    Args:
        lam: a number, or a dict by aligned branch.
        folder: of the new adapter: a new or an empty one.
        prompts: token ids. Each is continued greedily by DeRa, and both are compared at every new token.
        record: of the model, if it was loaded from files.
        overwrite: whether the folder may have something in it. An adapter there is replaced, with its record; other
            files stay.

    Returns:
        `{"kl": mean KL(DeRa ‖ exported) in nats a token, "max_kl": ..., "tokens": how many, "prompts": how many}`.
        Empty without prompts.

    Raises:
        DeRaError: an adapter can't be scaled (DoRA, modules_to_save of other modules than linear ones and embeddings),
            several can't be combined, or what was made computes something else; or the folder is one that the model was
            loaded from, has something in it, or can't be written.
    """
    known = [] if record is None else [record.base, *record.adapters.values()]
    check_new_folder(folder, overwrite, [*known, model.config.name_or_path or ""])
    if any(len(prompt) == 0 for prompt in prompts):
        raise DeRaError("prompts: one is empty; leave it out, or give at least the token that begins a text.")
    weights = read_lam(lam, 1, model.aligned)
    check_scales(model.branches, model.adapted)
    plan = WeightPlan(model.branches, weights)
    factors = {name: float(plan.adapter_scale.get(name, torch.ones(1))) for name in plan.branches[0].adapters}
    tensors, config = _scale(model, factors) if len(factors) == 1 else _combine(model, factors)
    folder = Path(folder)
    base = model.config.name_or_path or ""
    config = replace(config, inference_mode=True, base_model_name_or_path=base or None)
    named = zip(model.aligned, weights[0].tolist(), strict=True)
    strengths = ", ".join(
        f"λ={value:g}" if len(model.aligned) == 1 else f"λ({name})={value:g}" for name, value in named
    )
    with written_as_a_whole(folder) as made:
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, made / WEIGHTS_FILE)
        config.save_pretrained(str(made))
        _check_export(model, weights, str(made))
        fit = _compare(model, weights, prompts) if prompts else {}
        write_export_card(made, folder, record, base, strengths, factors, describe_fit(fit))
        for old in itertools.chain.from_iterable(map(folder.glob, REPLACED)):
            old.unlink()
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
    with biases_at(model.base, factor):
        tensors = _state_dict(model, name)
        scaled = {key: tensor * factor if SECOND.search(key) else tensor.clone() for key, tensor in tensors.items()}
    return {**scaled, **_replaced(model, factors)[0]}, _lora_config(model, name)


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
        if not (module.scales or module.interpolates):
            raise DeRaError(
                f"{module.name}: {sorted(module.adapters)} adapt it by more than plain LoRA (DoRA, or modules_to_save "
                "of another module than a linear one or embeddings), which PEFT's weighted combination of adapters "
                "does not keep; only an adapter alone can be exported with it."
            )
    # the combination takes its settings from the first adapter: it must find the modules of all of them
    modules = [module.name for module in model.adapted if not module.is_replaced]
    configs = {name: _lora_config(model, name) for name in factors}
    peft_model.peft_config.update({name: _adapts(config, modules) for name, config in configs.items()})
    try:
        peft_model.add_weighted_adapter(list(factors), list(factors.values()), COMBINED, combination_type="cat")
    except ValueError as error:
        raise DeRaError(f"PEFT can't combine the adapters {list(factors)}: {error}") from error
    finally:
        peft_model.peft_config.update(configs)
    try:
        tensors, (replaced, options) = _state_dict(model, COMBINED), _replaced(model, factors)
        config = replace(_lora_config(model, COMBINED), **options)
        return {**{key: tensor.clone() for key, tensor in tensors.items()}, **replaced}, config
    finally:
        peft_model.delete_adapter(COMBINED)


def _state_dict(model: MixtureModel, name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors by the names of its file; with the base's embeddings where those have added tokens."""
    has_added = has_added_tokens(model.base, model.config.name_or_path or "")
    with keep_packed(model.base), own_tokens_alone(model.base):
        tensors = get_peft_model_state_dict(model.peft_model, adapter_name=name, save_embedding_layers=has_added)
    return {key: tensor for key, tensor in tensors.items() if ".modules_to_save." not in key}


def _replaced(model: MixtureModel, factors: Mapping[str, float]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Own weights + Σ factor·(the adapter's - own) of the modules that adapters bring weights for, by the names of a file,
    and what an adapter's config says of them.

    Raises:
        DeRaError: two adapters train tokens of one module.
    """
    tensors: dict[str, torch.Tensor] = {}
    modules, tokens = [], {}
    for adapted in model.adapted:
        wrapper, names = adapted.module, sorted(adapted.adapters & set(factors))
        if isinstance(wrapper, ModulesToSaveWrapper) and names:
            modules.append(adapted.name)
            for key, own in cast("nn.Module", wrapper.original_module).state_dict().items():
                parts = [(wrapper.modules_to_save[name].state_dict()[key], factors[name]) for name in names]
                tensors[f"{PREFIX}{adapted.name}.{key}"] = _interpolate(own, parts)
        elif isinstance(wrapper, TrainableTokensWrapper) and names and wrapper.token_adapter.tied_adapter is None:
            if len(names) > 1:
                raise DeRaError(f"{adapted.name}: {names} each train tokens of it; export them one by one.")
            layer, (name,) = wrapper.token_adapter, names
            tokens[adapted.name] = list(layer.token_indices[name])
            own = cast("torch.Tensor", layer.get_base_layer().weight)[tokens[adapted.name]]
            part = (layer.trainable_tokens_delta[name], factors[name])
            tensors[f"{PREFIX}{adapted.name}.token_adapter.trainable_tokens_delta"] = _interpolate(own, [part])
    return tensors, {"modules_to_save": modules or None, "trainable_token_indices": tokens or None}


def _interpolate(own: torch.Tensor, parts: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
    total = own.float()
    for tensor, factor in parts:
        total = total + factor * (tensor.to(own.device).float() - own.float())
    return total.to(own.dtype)


def _check_export(model: MixtureModel, weights: torch.Tensor, folder: str) -> None:
    """
    Raises `DeRaError` where the adapter in `folder`, loaded over the base, does not compute what the adapters with
    their weights scaled do.
    """
    file = AdapterFile.read(folder, "the exported adapter")
    if file.config.bias != "none":  # a model holds one adapter with biases of the base's own modules
        return
    training, branches = model.training, model.branches
    inputs = {"input_ids": probe(model.base)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    model.eval()
    expected = model(**inputs, lam=WeightPlan(branches, weights, model.device)).logits
    base = model(**inputs, lam=WeightPlan(branches, torch.zeros_like(weights), model.device)).logits
    attach_adapter(model.peft_model, CheckedAdapter(file, frozenset()), COMBINED)
    try:
        model._rewire((Branch(REFERENCE), Branch(COMBINED, (COMBINED,))))
        found = model(**inputs, lam=1.0).logits
    finally:
        model._rewire(branches)
        detach_adapter(model.peft_model, COMBINED)
        model.train(training)
    # products of quantized weights round their inputs too
    dtype = torch.bfloat16 if "quantization_config" in vars(model.config) else model.dtype
    check_same(expected, found, base, dtype, "the exported adapter", "It was not saved.")


def _adapts(config: LoraConfig, modules: list[str]) -> LoraConfig:
    """The config with `modules` as the only ones that it names."""
    return replace(
        config, target_modules=modules, layers_to_transform=None, layers_pattern=None, exclude_modules=None,
        modules_to_save=None, trainable_token_indices=None,
    )  # fmt: skip


def _lora_config(model: MixtureModel, name: str) -> LoraConfig:
    return cast("LoraConfig", model.peft_model.peft_config[name])  # a MixtureModel has no other adapters


def _compare(model: MixtureModel, weights: torch.Tensor, prompts: Sequence[Sequence[int]]) -> dict:
    if model.config.is_encoder_decoder:
        raise DeRaError("prompts: an export of an encoder-decoder model is not compared; leave the prompts out.")
    divergences = []
    lam = dict(zip(model.aligned, weights[0].tolist(), strict=True))
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        sequence = model.generate(ids, lam=lam, **plain_generation(max_new_tokens=NEW_TOKENS))
        keep = {"logits_to_keep": sequence.shape[1] - ids.shape[1] + 1, "use_cache": False}
        log_p = model(sequence, lam=lam, **keep).logits[0, :-1].float().log_softmax(-1)  # [new, V]
        scaled = WeightPlan(model.branches, weights, model.device)
        log_q = model(sequence, lam=scaled, **keep).logits[0, :-1].float().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
    kl = torch.cat(divergences)
    return {"kl": kl.mean().item(), "max_kl": kl.max().item(), "tokens": len(kl), "prompts": len(prompts)}
