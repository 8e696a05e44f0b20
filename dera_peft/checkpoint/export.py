"""
A mixture at a fixed λ for programs that know nothing of it: as one plain PEFT adapter, as llama.cpp's file of one, or
merged into the base; and how far that is from DeRa.
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import save_file
from torch import nn

from dera_peft.checkpoint.adapter_check import CheckedAdapter
from dera_peft.checkpoint.adapter_file import PREFIX, WEIGHTS_FILE, AdapterFile
from dera_peft.checkpoint.adapters import attach_adapter, detach_adapter
from dera_peft.checkpoint.base import has_added_tokens, load_base
from dera_peft.checkpoint.card import write_export_card
from dera_peft.checkpoint.end_tokens import recorded_end_tokens
from dera_peft.checkpoint.fit import compare, describe_fit
from dera_peft.checkpoint.formats import Format
from dera_peft.checkpoint.gguf import FILE_NAME, MODELFILE, check_can_be_gguf, modelfile, write_gguf
from dera_peft.checkpoint.loading import check, end_as_trained
from dera_peft.checkpoint.merging import check_same, probe, save_merged
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.vocabulary import own_tokens_alone
from dera_peft.engine.biases import biases_at
from dera_peft.engine.lora import check_scales
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.names import ALIGNED, REFERENCE
from dera_peft.engine.plan import Branch, WeightPlan, read_lam
from dera_peft.engine.quantized import keep_packed
from dera_peft.errors import DeRaError
from dera_peft.files import RUN_FILE, check_new_folder, written_as_a_whole

SECOND = re.compile(r"\.lora_(embedding_)?B(\.|$)")  # B of B·A, and its bias
COMBINED = "dera_export"  # a name that the PeftModel holds for a moment

# of each format, the files that an export takes the place of
WEIGHTS = {"peft": ("adapter_model*",), "safetensors": ("model*.safetensors*",), "gguf": (FILE_NAME, MODELFILE)}
OF_OTHER_WEIGHTS = ("dera.json", RUN_FILE)  # which a record beside them would tell of


@torch.no_grad()
def export(
    model: MixtureModel,
    lam: float | Mapping[str, float],
    folder: str | os.PathLike,
    prompts: Sequence[Sequence[int]] = (),
    *,
    format: Format = "peft",
    record: Record | None = None,
    base_arguments: Mapping[str, Any] = {},
    overwrite: bool = False,
) -> dict:
    """
    Writes one adapter whose weights are scaled by λ, with a card.

    Args:
        lam: a number, or a dict by aligned branch.
        folder: of what is written: a new or an empty one.
        prompts: token ids. Each is continued greedily by DeRa, and both are compared at every new token.
        format: a plain PEFT adapter; "safetensors", the base (unquantized, loaded anew) with it merged into its
            weights; or "gguf", llama.cpp's file of it with a Modelfile for Ollama.
        record: of the model, if it was loaded from files.
        base_arguments: of `from_pretrained`, with which the base was loaded.
        overwrite: whether the folder may have something in it. What is there in the same format is replaced, with its
            record; other files stay.

    Returns:
        `{"kl": mean KL(DeRa ‖ exported) in nats a token, "max_kl": ..., "tokens": how many, "prompts": how many}`.
        Empty without prompts.

    Raises:
        DeRaError: an adapter can't be scaled (DoRA, modules_to_save of other modules than linear ones and embeddings),
            several can't be combined, the format can't hold it, or what was made computes something else; or the folder
            is one that the model was loaded from, has something in it, or can't be written.
    """
    base = model.config.name_or_path or ""
    known = [base] if record is None else [record.base, base, *record.adapters.values()]
    check_new_folder(folder, overwrite, known)
    folder = Path(folder)
    _check_format(model, base, folder, format)
    if any(len(prompt) == 0 for prompt in prompts):
        raise DeRaError("prompts: one is empty; leave it out, or give at least the token that begins a text.")
    weights = read_lam(lam, 1, model.aligned)
    check_scales(model.branches, model.adapted)
    plan = WeightPlan(model.branches, weights)
    factors = {name: float(plan.adapter_scale.get(name, torch.ones(1))) for name in plan.branches[0].adapters}
    tensors, config = _scale(model, factors) if len(factors) == 1 else _combine(model, factors)
    config = replace(config, inference_mode=True, base_model_name_or_path=base or None)
    named = list(zip(model.aligned, weights[0].tolist(), strict=True))
    strengths = ", ".join(
        f"λ={value:g}" if len(model.aligned) == 1 else f"λ({name})={value:g}" for name, value in named
    )
    with written_as_a_whole(folder) as made, TemporaryDirectory() as apart:
        adapter = made if format == "peft" else Path(apart)
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, adapter / WEIGHTS_FILE)
        config.save_pretrained(str(adapter))
        _check_export(model, weights, str(adapter))
        scaled = WeightPlan(model.branches, weights, model.device)
        fit = compare(model, dict(named), scaled, prompts) if prompts else {}
        if format == "safetensors":
            _merge(model, adapter, made, record, base_arguments)
        if format == "gguf":
            write_gguf(adapter, model.config, made / FILE_NAME)
            stops = [] if record is None else recorded_end_tokens(record)
            (made / MODELFILE).write_text(modelfile(base, strengths, stops), encoding="utf-8")
        write_export_card(made, folder, record, base, strengths, factors, describe_fit(fit), format)
        for old in itertools.chain.from_iterable(map(folder.glob, (*WEIGHTS[format], *OF_OTHER_WEIGHTS))):
            old.unlink()
    return fit


def _check_format(model: MixtureModel, base: str, folder: Path, format: str) -> None:
    """Raises `DeRaError` where a format can't be had of this base, or the folder holds weights in another one."""
    if format not in WEIGHTS:
        raise DeRaError(f"format={format!r} is not known; choose one of {', '.join(WEIGHTS)}.")
    for other, patterns in WEIGHTS.items():
        if other != format and (found := next(itertools.chain.from_iterable(map(folder.glob, patterns)), None)):
            raise DeRaError(f"output={str(folder)!r} holds {found.name!r}, of the format {other}: name another folder.")
    if format == "gguf":
        check_can_be_gguf(model.config, base)
    if format == "safetensors":
        if model.config.is_encoder_decoder:
            raise DeRaError(f"base={base!r} has an encoder; only decoders are merged.")
        if not base:
            raise DeRaError("the base has no name (it was not loaded from a hub or a folder) to load it by, unmerged.")


def _merge(
    model: MixtureModel, adapter: Path, folder: Path, record: Record | None, base_arguments: Mapping[str, Any]
) -> None:
    """Merges an exported adapter into its base, on the CPU, where there is more room."""
    base = str(model.config.name_or_path if record is None else record.base)
    arguments = {name: value for name, value in base_arguments.items() if name != "quantization_config"}
    of_export = Record(base, {"default": str(adapter)}, {REFERENCE: [], ALIGNED: ["default"]})
    checked = check(of_export, arguments)
    if getattr(checked.config, "quantization_config", None) is not None:
        raise DeRaError(f"base={base!r} is stored quantized: merging needs full weights. Name a base with them.")
    dtype = None if "quantization_config" in vars(model.config) else model.dtype
    full = load_base(base, checked.config, None, dtype, "cpu", skeleton=checked.skeleton, **arguments)
    peft_model = cast("PeftModel", checked.attach(full))
    end_as_trained(full, of_export if record is None else record, arguments)
    save_merged(peft_model, folder, "the merged model", "It was not saved.")


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
