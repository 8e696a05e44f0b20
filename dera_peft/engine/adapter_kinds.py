"""Which PEFT adapters can be switched off row by row: LoRA, with a base that stays as it is."""

from collections.abc import Sequence

from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from transformers import PreTrainedModel

from dera_peft.engine.names import ALIGNED
from dera_peft.engine.plan import Branch, make_branches
from dera_peft.errors import DeRaError

# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base's own
# weights when the adapter is created, so that "adapter off" would not be the reference.
INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
ADVICE: dict[PeftType | str | None, str] = {
    PeftType.XLORA: "its gate mixes adapters by input; load them as several LoRA adapters and weight them by λ",
    PeftType.IA3: "IA3 rescales activations; train a LoRA adapter",
    PeftType.VERA: "train a LoRA adapter, or convert it (peft.convert_to_lora)",
    PeftType.LOHA: "convert it to LoRA (peft.convert_to_lora)",
    PeftType.LOKR: "convert it to LoRA (peft.convert_to_lora)",
    PeftType.ADALORA: "train with plain LoRA and a rank_pattern",
    PeftType.PROMPT_TUNING: "it changes the prompt, not the model; train a LoRA adapter",
    PeftType.PREFIX_TUNING: "it changes the cache, not the model; train a LoRA adapter",
    PeftType.P_TUNING: "it changes the prompt, not the model; train a LoRA adapter",
}


def check_adapter_kind(adapter: str, config: PeftConfig, argument: str = "adapter") -> LoraConfig:
    """
    Refuses adapters for which "adapter off" is not the base, or that are not LoRA. Returns the config.

    Args:
        argument: what names the adapter for the user, for messages.

    Raises:
        DeRaError: names the adapter, the setting and what would work.
    """
    named = f"{argument}={adapter!r}"
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        advice = ADVICE.get(config.peft_type, "train a LoRA adapter")
        raise DeRaError(f"{named} is of type {kind}; only LoRA is supported: {advice}.")
    check_one_has_biases(adapter, [config])
    if config.init_lora_weights not in INITS_THAT_KEEP_THE_BASE:
        raise DeRaError(
            f"{named} was initialised with {config.init_lora_weights!r}, which changes the base's weights, "
            "so the base alone is not its reference; convert it to plain LoRA when saving (save_pretrained's "
            "path_initial_model_for_weight_conversion)."
        )
    if config.alora_invocation_tokens:
        raise DeRaError(
            f"{named} is an activated LoRA (alora_invocation_tokens={config.alora_invocation_tokens!r}), "
            "which is only on behind its invocation; train a LoRA that is always on."
        )
    return config


def check_keeps_biases(adapter: str, config: LoraConfig, argument: str = "adapter") -> None:
    """
    Refuses adapters that, in a PeftModel, have replaced the base's own biases.

    Args:
        argument: what names the adapter for the user, for messages.

    Raises:
        DeRaError: names the adapter, the setting and what would work.
    """
    if config.bias != "none":
        raise DeRaError(
            f"{argument}={adapter!r} has bias={config.bias!r}: PEFT writes its biases over the base's own, so "
            "switching it off does not give the reference back. Load it from its folder (DeRaModel.from_pretrained), "
            "which keeps both, or train with bias='none' (lora_bias=True is supported)."
        )


def check_one_has_biases(adapter: str, configs: Sequence[LoraConfig]) -> None:
    """PEFT keeps one bias a module, and its copies of modules_to_save have biases of their own."""
    biased = [config.bias for config in configs if config.bias != "none"]
    if len(biased) > 1 or (biased and any(config.modules_to_save for config in configs)):
        raise DeRaError(
            f"adapter={adapter!r}: bias={biased[0]!r} goes together with no second such adapter in a model, and with "
            "no modules_to_save; train with bias='none'."
        )


def read_branches(
    model: PeftModel | PreTrainedModel,
    adapter: str | Sequence[str] | None,
    reference: str | Sequence[str],
    stacked: bool,
) -> list[Branch]:
    """
    The branches of what a trainer holds; arguments and errors are those of `MixtureModel.from_peft`.
    """
    configs: dict[str, PeftConfig] | None = getattr(model, "peft_config", None)  # which a model without adapters lacks
    if not configs:
        raise DeRaError(
            f"from_peft takes a PeftModel, and this is a {type(model).__name__} without adapters: give what "
            "get_peft_model or PeftModel.from_pretrained returns, or a model that load_adapter gave one."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        kind = type(base).__name__
        raise DeRaError(f"from_peft takes a PeftModel of a model of transformers, and its base is a {kind}.")
    reference = [reference] if isinstance(reference, str) else list(reference)
    names = list(configs)
    others = [name for name in names if name not in reference]
    if adapter is None and len(others) != 1:
        raise DeRaError(f"the PeftModel has the adapters {names}: say which is the aligned one with adapter=.")
    adapter = others[0] if adapter is None else adapter
    aligned = {ALIGNED: adapter} if isinstance(adapter, str) else {name: name for name in adapter}
    for name in (*reference, *aligned.values()):
        if name not in names:
            raise DeRaError(f"adapter={name!r} is not in the PeftModel; it has {names}.")
        check_adapter_kind(name, configs[name])
    for name, config in configs.items():  # also of those that are not used: they share the biases
        assert isinstance(config, LoraConfig)  # as the ones that are used: a PeftModel's adapters are of one kind
        check_keeps_biases(name, config)
    return make_branches(reference, aligned, stacked)
