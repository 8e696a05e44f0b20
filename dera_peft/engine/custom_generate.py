"""transformers' `custom_generate`: λ in the `generate` of a model that holds adapters, which is then as it was."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import get_model_status
from transformers import PreTrainedModel

from dera_peft.engine.adapter_kinds import read_branches
from dera_peft.engine.mixture import MixtureModel
from dera_peft.errors import DeRaError

logger = logging.getLogger(__name__)


# transformers gives `model` by name, and a model that was loaded with such a function the inputs by their place
def generate(
    inputs: torch.Tensor | None = None,
    *,
    model: PreTrainedModel,
    adapter: str | Sequence[str] | None = None,
    reference: str | Sequence[str] = (),
    stacked: bool = True,
    **kwargs: Any,
):
    """
    `MixtureModel.generate` with the adapters that are in `model`, with no second copy.

    The model is wired for this one call. Who calls often wraps it once (`from_peft`): then a CUDA graph of the step is
    recorded once, too.

    Args:
        model: what PEFT has put adapters into: transformers hands over that, and not the PeftModel around it.
        adapter: as in `from_peft`; the active one unless given.
        reference: as in `from_peft`.
        stacked: as in `from_peft`.
        kwargs: of `MixtureModel.generate`, `lam` among them.

    Raises:
        DeRaError: the model has no adapter that λ could weight, or is wrapped already; or an argument does not fit.
    """
    if isinstance(model, MixtureModel):
        raise DeRaError("custom_generate: this is a DeRaModel, which takes lam by itself; leave custom_generate out.")
    _check_no_adapter_names(model)
    active = _active_adapters(model)
    if adapter is None:
        own = [name for name in active if name not in ([reference] if isinstance(reference, str) else reference)]
        if len(own) != 1:
            raise DeRaError(
                f"custom_generate: λ is the weight of one active adapter, and active are {active}: say with adapter= "
                "which one is the aligned model's, and with reference= which are the reference's."
            )
        adapter = own[0]
    _tell_of_dropout(model)
    mixture = MixtureModel(model, read_branches(model, adapter, reference, stacked))
    try:
        return mixture.generate(inputs, **kwargs)
    finally:
        mixture.unwrap()


def _active_adapters(model: PreTrainedModel) -> list[str]:
    """Those that the model computes with. Raises `DeRaError` where λ could not weight them."""
    try:
        status = get_model_status(model)
    except ValueError:  # no layer of it is PEFT's
        raise DeRaError(
            f"custom_generate: this {type(model).__name__} has no layers with an adapter that λ could weight: give a "
            "PeftModel with a LoRA adapter that is not merged, or load_adapter one."
        ) from None
    if status.merged_adapters:
        raise DeRaError(
            f"custom_generate: merged into the base is {status.merged_adapters}, so that no layer can leave it out: "
            "call unmerge_adapter() first."
        )
    if status.enabled is not True:
        raise DeRaError(
            "custom_generate: the adapters are switched off (disable_adapter), so λ has nothing to weight: call it "
            "outside, and for the base give lam=0."
        )
    if isinstance(status.active_adapters, str):
        raise DeRaError("custom_generate: other adapters are active in some layers than in others: call set_adapter().")
    return status.active_adapters


def _tell_of_dropout(model: PreTrainedModel) -> None:
    """Warns where dropout makes other logits at each call, as in a model that is being trained."""
    if any(isinstance(module, torch.nn.Dropout) and module.training and module.p > 0 for module in model.modules()):
        logger.warning(
            "custom_generate: the model is in training mode, and its dropout changes the logits: call eval()"
        )


def _check_no_adapter_names(model: PreTrainedModel) -> None:
    """
    Raises `DeRaError` where PEFT's `generate` has chosen an adapter for each row, which λ does. PEFT hands that down by
    hooks, and takes them away again unless an error is raised; so that is done here.
    """
    chosen = False
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, partial) and "adapter_names" in hook.keywords:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
                chosen = True
    if chosen:
        raise DeRaError(
            "custom_generate: adapter_names chooses an adapter for each row, and so does λ: leave it out, and give lam "
            "as a list with one for each prompt."
        )
