"""Sequences that are computed together: their plan, and what is kept of them between two steps."""

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache

from dera_peft.engine.lengths import forget_lengths
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.padding import pad
from dera_peft.engine.plan import BatchPlan
from dera_peft.engine.rules import LINEAR
from dera_peft.serve.state import State
from dera_peft.serve.states import ROOM, Part, gather


def make_plan(model: MixtureModel, states: Sequence[State]) -> BatchPlan:
    """Of requests of one kind, as far as each of them is."""
    if not model.branches_differ:  # for which there is no λ
        return model.plan(None, len(states))
    lam, requests = torch.cat([state.lam for state in states]), [state.request for state in states]
    if all(request.combine == LINEAR and not request.schedule for request in requests):
        return model.plan(lam, len(states))
    schedules = [request.schedule or None for request in requests]
    combine = [request.combine for request in requests]
    plan = model.plan(lam, len(states), combine=combine, lambda_schedule=schedules)
    if plan.combiner is not None:
        position = torch.tensor([len(state.tokens) for state in states])
        plan.combiner.resume(position, torch.tensor([state.spent for state in states]))
    return plan


class Group:
    """
    Attributes:
        states: its requests, of one kind.
        length: columns that the cache holds.
        lengths: `[B]` int64, of them each sequence's own; the others are padding on its left.
        token_lambda: the λ of each sequence's next token, where a rule or a schedule gives it.
    """

    token_lambda: list[float] | None = None

    def __init__(
        self,
        model: MixtureModel,
        states: Sequence[State],
        plan: BatchPlan,
        cache: DynamicCache,
        length: int,
        lengths: torch.Tensor,
    ):
        self.model, self.states = model, list(states)
        self.plan, self.cache, self.length, self.lengths = plan, cache, length, lengths

    @property
    def rows(self) -> int:
        return self.plan.num_rows

    @property
    def held(self) -> int:
        """Tokens of all rows, with padding."""
        return self.rows * self.length

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The mixed logits of the last token, `[B, V]` fp32, after `input_ids` (`[B, S]`)."""
        if self.states[0].kind.lengths is not None:
            forget_lengths(self.model)
        inputs = self.model.prepare_inputs_for_generation(
            input_ids,
            past_key_values=self.cache,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            is_first_iteration=self.length == 0,
            logits_to_keep=1,
            lam=self.plan,
        )
        outputs = self.model(**inputs)
        self.length += input_ids.shape[1]
        self._of_rule = outputs.token_lambda, outputs.token_spent
        return outputs.logits[:, -1].float()

    def advance(self) -> None:
        """After a forward pass behind which a token of each sequence is drawn."""
        combiner, self.token_lambda = self.plan.combiner, None
        if combiner is None:
            return
        lam, spent = (None if value is None else value[:, -1] for value in self._of_rule)
        self.token_lambda = (combiner.lam if lam is None else lam).tolist()
        combiner.advance(lam, spent)
        for state, nats in zip(self.states, combiner.spent.tolist(), strict=True):
            state.spent = nats

    def step(self) -> torch.Tensor:
        """Computes each sequence's last token."""
        device = self.lengths.device
        ids = torch.tensor([[state.tokens[-1]] for state in self.states], device=device)
        self.lengths = self.lengths + 1
        columns = torch.arange(self.length + 1, device=device)
        mask = (columns >= self.length + 1 - self.lengths[:, None]).long()
        return self.forward(ids, mask, self.lengths[:, None] - 1)

    def part(self, kept: Sequence[int], start: int) -> Part:
        return Part(self.plan, self.cache, kept, start, self.length)

    def keep(self, kept: Sequence[int], trim: bool = True) -> None:
        """
        Only these sequences go on.

        Args:
            trim: whether padding that only the others needed is taken off.
        """
        self.states = [self.states[i] for i in kept]
        self.lengths = self.lengths[torch.tensor(kept, device=self.lengths.device)]
        start = self.length - max(state.length - 1 for state in self.states) if trim else 0
        plan = make_plan(self.model, self.states)
        if self.length > start:
            self.cache = gather(self.model, plan, [self.part(kept, start)], self.length - start, self._room())
        self.plan, self.length = plan, self.length - start

    def join(self, other: "Group") -> None:
        """The other's sequences go on in this one."""
        mine, its = range(len(self.states)), range(len(other.states))
        length = max(self.length, other.length)
        self.states = [*self.states, *other.states]
        plan = make_plan(self.model, self.states)
        parts = [self.part(mine, 0), other.part(its, 0)]
        self.cache = gather(self.model, plan, parts, length, self._room())
        self.plan, self.length = plan, length
        self.lengths = torch.cat([self.lengths, other.lengths])

    def _room(self) -> int:
        return min(ROOM, max(state.remaining for state in self.states))


class Filling:
    """
    A group whose sequences are read, in chunks, up to their last token.

    Args:
        group: with what is known already of each sequence, and the lengths that they will have.
        filler: the id to pad with.
    """

    def __init__(self, group: Group, filler: int):
        self.group = group
        device = group.lengths.device
        ids, mask = pad([state.ids for state in group.states], filler, left=True)
        self.ids, self.mask = ids.to(device), mask.to(device)
        self.positions = (self.mask.cumsum(dim=-1) - 1).clamp(min=0)

    @property
    def left(self) -> int:
        """Columns to compute."""
        return self.ids.shape[1] - self.group.length

    def step(self, tokens: int) -> tuple[int, torch.Tensor | None]:
        """
        Computes the next columns.

        Args:
            tokens: at most so many in all rows, and one column at least.

        Returns:
            the columns computed, and the logits behind the last one when it was.
        """
        start = self.group.length
        count = self.left if self.group.states[0].kind.is_whole else max(1, tokens // self.group.rows)
        stop = min(self.ids.shape[1], start + count)
        columns = slice(start, stop)
        logits = self.group.forward(self.ids[:, columns], self.mask[:, :stop], self.positions[:, columns])
        return stop - start, logits if self.left == 0 else None

    def keep(self, kept: Sequence[int]) -> None:
        self.group.keep(kept, trim=False)
        rows = torch.tensor(kept, device=self.ids.device)
        self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]
