"""Prompts that are computed once for many completions."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from dera_peft.engine.capture import CapturedCache
from dera_peft.engine.generation import plain_generation
from dera_peft.engine.lengths import forget_lengths
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.padding import pad
from dera_peft.engine.plan import BatchPlan
from dera_peft.engine.prompts import longest, tokens_of_reference


def can_be_shared(model: PreTrainedModel) -> bool:
    """Whether the model caches plain keys and values at every layer, so that a prompt's rows can be repeated."""
    config = model.generation_config
    if model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():
        return False
    if config.cache_implementation is not None or config.use_cache is False:
        return False
    # the layers that generate's own cache would have; sliding windows and recurrent states are of other types
    return all(type(layer) is DynamicLayer for layer in _new_cache(model).layers)


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


class Prefill:
    """
    The keys and values of prompts, in all the branches that their completions need.

    Args:
        model: for which `can_be_shared`.
        prompts: token ids.
        plan: from `model.plan`, with at least the branches that each prompt's completions need; with mixing="weights",
            of the completions' own λ. None for a model without λ.
        pad_token_id: fills up shorter prompts.
        reference_prompts: token ids that the reference reads in place of `prompts`, of a plan of prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        plan: BatchPlan | None,
        pad_token_id: int = 0,
        reference_prompts: Sequence[Sequence[int]] | None = None,
    ):
        self.model, self.plan, self.filler = model, plan, pad_token_id
        self.input_ids, self.attention_mask = input_ids, attention_mask = pad(prompts, pad_token_id, left=True)
        self.length = input_ids.shape[1]
        own: dict[str, Any] = {} if plan is None else {"lam": plan, "capture": False}
        if reference_prompts is not None:
            own["reference_inputs"] = tokens_of_reference(model, reference_prompts, pad_token_id)
            self.length = longest(plan, self.length, own["reference_inputs"]["input_ids"].shape[1])
        forget_lengths(model)
        # one token is generated and thrown away: so the base prepares positions and masks as it does for decoding
        self.cache = model.generate(
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            **own,
            **plain_generation(max_new_tokens=1, pad_token_id=pad_token_id, return_dict_in_generate=True),
        ).past_key_values

    def select(
        self, sequences: Sequence[int], length: int, plan: BatchPlan | None, new_tokens: int | None = None
    ) -> DynamicCache | CapturedCache:
        """
        A cache of its own for a batch, from which `generate` goes on with the prompts' last tokens.

        Args:
            sequences: which prompt each of the batch's sequences is of; one may stand any number of times.
            length: of the batch's longest prompt, in the branches that the plan computes.
            plan: the batch's, from `model.plan`.
            new_tokens: that `generate` will add at most; None for any other forward pass.
        """
        by_sequence = torch.tensor(sequences)
        by_row = by_sequence
        if plan is not None:
            assert self.plan is not None  # a model with λ has plans here and there
            by_row = plan.rows_in(self.plan, by_sequence.to(plan.device))
        first_forked = 0
        if isinstance(self.model, MixtureModel) and plan is not None:
            first_forked = plan.first_forked(self.model.fork_layer)
        cache = None
        if isinstance(self.model, MixtureModel) and plan is not None and new_tokens is not None:
            cache = self.model.captured_cache(plan, length + new_tokens)
        if cache is None:
            cache = _new_cache(self.model)
        for index, layer in enumerate(self.cache.layers):
            if layer.is_initialized:  # layers that share another's keys and values have none
                rows = (by_sequence if index < first_forked else by_row).to(layer.keys.device)
                # without the padding of longer prompts, and without the last token, whose output the batch needs
                keys, values = (states[:, :, self.length - length : -1] for states in (layer.keys, layer.values))
                cache.update(keys.index_select(0, rows), values.index_select(0, rows), index)
        if plan is not None:
            cache.dera_pattern = plan.pattern  # pyrefly: ignore[missing-attribute] # our own mark on it
        return cache

    def inputs_of(
        self, sequences: Sequence[int], following: Sequence[Sequence[int]], plan: BatchPlan | None
    ) -> dict[str, Any]:
        """
        The inputs of one forward pass, without λ, over a batch's last prompt tokens and what follows them; they are
        made by the base's own methods, as `generate` has them made.

        Args:
            sequences: which prompt each of the batch's sequences is of.
            following: token ids, one list per sequence, each of which may be empty; filled up on the right.
            plan: the batch's, from `model.plan`.
        """
        prompts = torch.tensor(sequences)
        # masked on the right too, where nobody looks: positions stay within what the base has
        tokens, mask = pad(following, self.filler, left=False)
        input_ids = torch.cat([self.input_ids[prompts], tokens], dim=1).to(self.model.device)
        attention_mask = torch.cat([self.attention_mask[prompts], mask], dim=1).to(self.model.device)
        position_ids = cast("Callable", self.model._prepare_position_ids_for_generation)(
            input_ids, {"attention_mask": attention_mask}
        )
        return cast("Callable", self.model.prepare_inputs_for_generation)(
            input_ids,
            next_sequence_length=1 + tokens.shape[1],
            is_first_iteration=True,
            past_key_values=self.select(sequences, self.length, plan),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
        )
