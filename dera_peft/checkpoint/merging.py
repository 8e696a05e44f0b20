"""An adapter merged into its base, and whether what was made of weights computes what they did apart."""

import logging
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from dera_peft.checkpoint.base import load_base, load_config
from dera_peft.checkpoint.vocabulary import embeddings
from dera_peft.engine.padding import num_rows
from dera_peft.engine.wrapped import own_module
from dera_peft.errors import DeRaError
from dera_peft.messages import warn_once

PROBE = 24  # tokens on which two models are compared

logger = logging.getLogger(__name__)


def merge(peft_model: PeftModel) -> PreTrainedModel:
    """
    The base with its one adapter merged into its weights.

    Where the embeddings are tied to the head and the adapter changes one of them, or both by themselves, they are
    untied: merged into the one weight that they share, the change of one would be a change of the other as well.
    """
    base = cast("PreTrainedModel", peft_model.get_base_model())
    is_adapted = any(own_module(module) is not module for module in embeddings(base))
    if is_adapted and base.config.get_text_config().tie_word_embeddings:
        head = own_module(cast("nn.Module", base.get_output_embeddings()))
        head.weight = nn.Parameter(cast("torch.Tensor", head.weight).detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    return cast("PreTrainedModel", peft_model.merge_and_unload(safe_merge=True))


def save_merged(peft_model: PeftModel, folder: Path, named: str, way_out: str) -> None:
    """
    Merges the one adapter of an unquantized model into its base, and saves that. It is read back, and compared with the
    base and its adapter on a few tokens.

    Args:
        named, way_out: see `check_same`.

    Raises:
        DeRaError: they differ by more than rounding.
    """
    with torch.no_grad():
        model_base = cast("PreTrainedModel", peft_model.get_base_model())
        dtype, tokens = model_base.dtype, probe(model_base)
        expected = peft_model(input_ids=tokens).logits
        with peft_model.disable_adapter():
            base = peft_model(input_ids=tokens).logits
        merge(peft_model).save_pretrained(folder)
        del peft_model, model_base  # what was saved may need its memory
        found = load_base(str(folder), load_config(str(folder)), dtype=dtype, device_map="cpu")
        check_same(expected, found(input_ids=tokens).logits, base, dtype, named, way_out)


def probe(model: PreTrainedModel) -> torch.Tensor:
    """`[1, S]` token ids to compare two models on: spread over the vocabulary, with its last ones, which may be new."""
    tokens = num_rows(model)
    spread = torch.arange(PROBE - 2) * max(1, tokens // (PROBE - 1)) + 1
    return torch.cat([spread, torch.tensor([tokens - 2, tokens - 1])])[None].clamp(0, tokens - 1).to(model.device)


def check_same(
    expected: torch.Tensor, found: torch.Tensor, base: torch.Tensor, dtype: torch.dtype, named: str, way_out: str
) -> None:
    """
    Raises `DeRaError` where logits differ from those that they should be by more than the rounding of weights in
    `dtype`, as a mean over all of them; warns where that rounding hides most of what the adapter does.

    Args:
        expected, found, base: logits of the adapter over its base, of what was made of both, and of the base alone.
        named: what was made, for messages.
        way_out: what a user can do, for the error.
    """
    expected, found, base = expected.float(), found.float(), base.float()
    size, effect = expected.square().mean().sqrt(), (expected - base).square().mean().sqrt()
    difference = (found - expected).square().mean().sqrt()
    # half of the digits: rounding adds up over layers
    rounding = torch.finfo(dtype).eps ** 0.5 / 2 * size
    if not difference <= rounding:
        raise DeRaError(
            f"{named} does not compute what the adapter does over its base: on {PROBE} tokens their logits differ by "
            f"{difference:.3g} (root mean square), where the adapter's whole effect is {effect:.3g} and rounding "
            f"explains {rounding:.2g}. {way_out}"
        )
    if difference > effect / 2:
        warn_once(
            logger,
            f"{named} loses most of the adapter's effect ({effect:.3g} on the logits, root mean square) to rounding "
            f"({difference:.3g}): {dtype} has too few digits for it.",
        )
