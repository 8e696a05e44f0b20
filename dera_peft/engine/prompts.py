"""Branches with prompts of their own: the rows that a batch has from its inputs on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from dera_peft.engine.names import REFERENCE
from dera_peft.engine.padding import pad as pad_sequences
from dera_peft.engine.padding import padding_id, readable
from dera_peft.engine.plan import BatchPlan, Branch
from dera_peft.engine.rules import Rules
from dera_peft.errors import DeRaError

# what of a batch can be told apart from images, positions and others of which rows have their own
WITH_REFERENCE_INPUTS = {
    "input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "past_key_values", "lam",
    "reference_inputs", "output_branches", "logits_to_keep", "use_cache", "return_dict",
}  # fmt: skip


class PromptPlan(BatchPlan):
    """
    A plan of rows with prompts of their own, which are what a forward pass is given: it forks nothing, and joins.

    `fork` gives the rows of what the branches share, as the tokens that are appended to all of them.
    """

    reads_rows = True

    def __init__(
        self,
        branches: Sequence[Branch],
        lam: torch.Tensor,
        device: torch.device | str = "cpu",
        every_branch: bool = False,
        rules: Rules | None = None,
    ):
        super().__init__(branches, lam, device, every_branch, rules)
        self.pattern = (("prompts",), *self.pattern)


@dataclass(frozen=True)
class Prompts:
    """
    Attributes:
        ids: `[B, S]` int64.
        mask: `[B, S]`, 0 where there is padding.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    def rows(self, sequences: torch.Tensor, length: int, filler: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of some sequences, padded to `length`."""
        sequences = sequences.to(self.ids.device)
        missing = length - self.ids.shape[1]
        sides = (missing, 0) if left else (0, missing)
        ids, mask = self.ids.index_select(0, sequences), self.mask.index_select(0, sequences)
        return pad(ids, sides, value=filler), pad(mask, sides)


@dataclass(frozen=True)
class RowPrompts:
    """
    The prompts of a plan's rows.

    Attributes:
        ids, mask: `[R, L]`, L the longest prompt's length.
        width: the length of the aligned branches' prompts, `[B, width]`, behind which a sequence's new tokens stand.
        shared: how many columns all rows have at the end: the shortest prompts' length.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    width: int
    shared: int

    @classmethod
    def of(
        cls,
        base: PreTrainedModel,
        plan: PromptPlan,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        reference_inputs: Mapping[str, Any],
    ) -> "RowPrompts":
        """
        Args:
            input_ids, attention_mask: `[B, S]`, the aligned branches'.
            reference_inputs: see `read_reference_inputs`.
        """
        reference = read_reference_inputs(base, reference_inputs, input_ids)
        own = Prompts(input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        sides = [reference if segment.branch.name == REFERENCE else own for segment in plan.segments]
        lengths = [side.ids.shape[1] for side in sides]
        filler, left = padding_id(base, None), not base.config.is_encoder_decoder
        rows = [
            side.rows(segment.sequences, max(lengths), filler, left)
            for side, segment in zip(sides, plan.segments, strict=True)
        ]
        ids, mask = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return cls(ids, mask, input_ids.shape[1], min(lengths))

    def expand(self, repeats: int) -> "RowPrompts":
        """Of the plan that is expanded in the same way."""
        if repeats == 1:
            return self
        ids, mask = (rows.repeat_interleave(repeats, dim=0) for rows in (self.ids, self.mask))
        return RowPrompts(ids, mask, self.width, self.shared)

    def followed(
        self, plan: PromptPlan, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The rows `[R, L+T]` of sequences `[B, width+T]`, whose T new tokens all branches read; ids and mask.
        """
        new = input_ids[:, self.width :]
        new_mask = torch.ones_like(new) if attention_mask is None else attention_mask[:, self.width :]
        return (
            torch.cat([self.ids, plan.fork(new).to(self.ids.device)], dim=1),
            torch.cat([self.mask, plan.fork(new_mask).to(self.mask)], dim=1),
        )


def read_reference_inputs(base: PreTrainedModel, given: Any, input_ids: torch.Tensor) -> Prompts:
    """
    The reference's prompts.

    Args:
        given: `{"input_ids": [B, S'], "attention_mask": [B, S']}`, as a tokenizer returns them; S' is any length. The
            mask may be left out where nothing is padded.
        input_ids: `[B, S]`, the aligned branches'.

    Raises:
        DeRaError: it is something else; its count is not that of the sequences; a decoder's prompts are padded on the
            right, or without a mask; or the base has no row for a token.
    """
    if not isinstance(given, Mapping) or not isinstance(given.get("input_ids"), torch.Tensor):
        raise DeRaError('reference_inputs must be {"input_ids": …, "attention_mask": …}, tensors as a tokenizer gives.')
    if other := [name for name in given if name not in ("input_ids", "attention_mask") and given[name] is not None]:
        raise DeRaError(f"reference_inputs[{other[0]!r}] is not supported: its keys are input_ids and attention_mask.")
    ids, mask = given["input_ids"], given.get("attention_mask")
    is_tokens = ids.ndim == 2 and not ids.is_floating_point() and ids.shape[1] > 0
    if not is_tokens or ids.shape[0] != input_ids.shape[0]:
        raise DeRaError(
            f"reference_inputs['input_ids'] is {list(ids.shape)} of {ids.dtype}: token ids of a prompt for each of the "
            f"{input_ids.shape[0]} sequences are needed."
        )
    if mask is None:
        padding = padding_id(base, None)
        if ids.shape[0] > 1 and (ids[:, 0] == padding).any() and not (ids[:, 0] == padding).all():
            raise DeRaError(
                f"reference_inputs has no attention_mask, and some prompts begin with the padding token ({padding}): "
                "give the mask."
            )
        mask = torch.ones_like(ids)
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        raise DeRaError(f"reference_inputs['attention_mask'] must have the shape of the ids, {list(ids.shape)}.")
    if not base.config.is_encoder_decoder and not mask[:, -1].all():
        raise DeRaError("reference_inputs is padded on the right: pad on the left, where new tokens do not follow.")
    ids = readable(base, ids, mask)
    assert ids is not None
    return Prompts(ids.to(input_ids.device, torch.long), mask.to(input_ids.device, torch.long))


def check_goes_with_prompts(given: Mapping[str, Any]) -> None:
    """
    Raises `DeRaError` for an argument of `generate` or `forward` that has one value a sequence, where rows differ.
    """
    for name, value in given.items():
        if value is not None and value is not False and name not in WITH_REFERENCE_INPUTS:
            raise DeRaError(
                f"{name} does not go together with reference_inputs: the branches' prompts are token ids with a mask."
            )


def check_whole(input_ids: torch.LongTensor | None, given: Mapping[str, Any]) -> torch.LongTensor:
    """`input_ids`, or a `DeRaError` where a forward pass with `reference_inputs` is given something else."""
    check_goes_with_prompts(given)
    if input_ids is None or given.get("past_key_values") is not None:
        raise DeRaError("forward with reference_inputs takes whole sequences, as input_ids; generate caches them.")
    return input_ids


def tokens_of_reference(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], filler: int
) -> dict[str, torch.Tensor]:
    """`reference_inputs` of prompts as token ids, padded with `filler` where the model's own prompts are."""
    ids, mask = pad_sequences(prompts, filler, left=not model.config.is_encoder_decoder)
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def longest(plan: BatchPlan | None, width: int, reference_width: int) -> int:
    """The longest prompt's length of a plan's rows: of the branches that it computes."""
    assert plan is not None  # branches have prompts of their own in a plan alone
    return max(reference_width if segment.branch.name == REFERENCE else width for segment in plan.segments)
