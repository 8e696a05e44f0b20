"""transformers' `generate` over rows with prompts of their own: they are prepared here, and `forward` forks nothing."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from dera_peft.engine.plan import BatchPlan
from dera_peft.engine.prompts import PromptPlan, RowPrompts
from dera_peft.errors import DeRaError


class PromptRowsMixin(GenerationMixin):
    """
    The loop of `generate` goes on over the B sequences, which begin with the aligned branches' prompts. What the base
    is given at each step are the R rows of the branches: ids, mask and positions, each with its own prompt.
    """

    if TYPE_CHECKING:  # what it needs of the class that it is mixed into
        base: PreTrainedModel
        config: PreTrainedConfig

    @property
    def prepare_inputs_for_generation(self) -> Callable:  # pyrefly: ignore[bad-override]
        prepare = cast("Callable", self.base.prepare_inputs_for_generation)

        @functools.wraps(prepare)
        def prepare_rows(input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
            plan, prompts = kwargs.get("lam"), kwargs.pop("row_prompts", None)
            if isinstance(plan, PromptPlan):
                input_ids, kwargs = self._rows_of(plan, prompts, input_ids, kwargs)
            return prepare(input_ids, **kwargs)

        return prepare_rows

    def _rows_of(
        self, plan: PromptPlan, prompts: RowPrompts | None, input_ids: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """What is decoded so far, as rows with their own prompts; that it is already where there are no `prompts`."""
        if self.config.is_encoder_decoder:  # its prompts are the encoder's
            mask = kwargs.get("decoder_attention_mask")
            forked = {} if mask is None else {"decoder_attention_mask": plan.fork(mask)}
            return plan.fork(input_ids), {**kwargs, **forked}
        if prompts is None:
            return input_ids, kwargs
        ids, mask = prompts.followed(plan, input_ids, kwargs.get("attention_mask"))
        return ids, {**kwargs, **self._places(ids, mask)}

    def _rows_with_prompts(
        self,
        input_ids: torch.Tensor,
        given: Mapping[str, Any],
        reference_inputs: Mapping[str, torch.Tensor],
        logits_to_keep: int | torch.Tensor,
        plan: BatchPlan,
    ) -> dict[str, Any]:
        """
        What `forward` is given in place of sequences and `reference_inputs`.

        Args:
            given: its further arguments.
        """
        if isinstance(logits_to_keep, torch.Tensor):
            raise DeRaError("logits_to_keep must be a number with reference_inputs: columns are counted from the end.")
        count = input_ids.shape[0]
        if not isinstance(plan, PromptPlan) or plan.batch_size != count:
            raise DeRaError(f"lam is a plan of other rows; reference_inputs needs plan(lam, {count}, by_prompt=True).")
        rows = RowPrompts.of(self.base, plan, input_ids, given.get("attention_mask"), reference_inputs)
        if self.config.is_encoder_decoder:
            decoder = {name: plan.fork(value) for name, value in given.items() if name.startswith("decoder_")}
            return {"input_ids": rows.ids, "attention_mask": rows.mask, "lam": plan, **decoder}
        prepare = cast("Callable", self.base.prepare_inputs_for_generation)
        prepared = prepare(rows.ids, is_first_iteration=True, **self._places(rows.ids, rows.mask))
        return {**prepared, "lam": plan, "logits_to_keep": min(logits_to_keep or rows.shared, rows.shared)}

    def _places(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mask and positions of rows with their own prompts."""
        prepare = cast("Callable", self.base._prepare_position_ids_for_generation)
        return {"attention_mask": mask, "position_ids": prepare(ids, {"attention_mask": mask})}

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        prompts: RowPrompts | None = model_kwargs.pop("row_prompts", None)
        if prompts is None:
            return super()._prefill(  # pyrefly: ignore[bad-argument-type]
                input_ids, generation_config, model_kwargs, is_first_iteration
            )
        sequences = {name: model_kwargs.get(name) for name in ("attention_mask", "position_ids")}
        model_kwargs.update(self._places(prompts.ids, prompts.mask))
        try:
            return super()._prefill(  # pyrefly: ignore[bad-argument-type]
                cast("torch.LongTensor", prompts.ids), generation_config, model_kwargs, is_first_iteration
            )
        finally:
            model_kwargs.update(sequences, row_prompts=prompts)
