"""Sequences that are computed together: their plan, and what is kept of them between two steps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

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
    Requests of one kind that are computed together.

    Attributes:
        states: the requests. Those that have ended stay until the group is made anew.
        places: which sequence of the plan each of them is.
        length: columns that the cache holds.
        lengths: `[B]` int64, of them each sequence's own; the others are padding on its left.
        left: requests that have left without an end, to wait again.
        token_lambda: the λ of each sequence's next token, where a rule or a schedule gives it.
    """

    token_lambda: list[float] | None = None

    def __init__(
        self,
        model: MixtureModel,
        kinds: Sequence[type],
        states: Sequence[State],
        plan: BatchPlan,
        cache: Cache,
        length: int,
        lengths: torch.Tensor,
    ):
        self.model, self.kinds, self.states = model, kinds, list(states)
        self.plan, self.cache, self.length, self.lengths = plan, cache, length, lengths
        self.places: Sequence[int] = range(len(self.states))
        self.left: set[State] = set()
        self.compute: Callable[..., Any] = model  # what computes a forward pass

    @classmethod
    def of(cls, groups: Sequence["Group"]) -> "Group":
        """The requests that go on of groups of one kind, without padding that only others needed."""
        first, kept = groups[0], [group.kept for group in groups]
        states = [group.states[i] for group, own in zip(groups, kept, strict=True) for i in own]
        plan = make_plan(first.model, states)
        length = max(group.width for group in groups)
        room = min(ROOM, max(state.remaining for state in states))
        parts = [
            Part(group.plan, group.cache, [group.places[i] for i in own], max(0, group.length - length), group.length)
            for group, own in zip(groups, kept, strict=True)
        ]
        cache = gather(first.model, first.kinds, plan, parts, length, room)
        lengths = torch.tensor([state.length - 1 for state in states], device=first.lengths.device)
        return Group(first.model, first.kinds, states, plan, cache, length, lengths)

    @property
    def kept(self) -> list[int]:
        """Which of the requests go on."""
        return [i for i, state in enumerate(self.states) if not state.done and state not in self.left]

    @property
    def active(self) -> list[State]:
        return [self.states[i] for i in self.kept]

    @property
    def width(self) -> int:
        """Columns that the requests that go on need: the last token of each is not computed yet."""
        return max(state.length - 1 for state in self.active)

    @property
    def rows(self) -> int:
        """Of the requests that go on."""
        return sum(state.plan.num_rows for state in self.active)

    @property
    def held(self) -> int:
        """Tokens of all rows, with padding."""
        return self.rows * self.length

    def take(self, others: Sequence["Group"]) -> bool:
        """Lets go of requests that have ended, and takes those of others; False where a new group has to be made."""
        return not others and len(self.kept) == len(self.states)

    def release(self) -> None:
        """It is not needed any more."""

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
        outputs = self.compute(**inputs)
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
        """Computes each request's last token; the logits behind it, `[B, V]`, are in the requests' order."""
        device = self.lengths.device
        ids = torch.tensor([[state.tokens[-1]] for state in self.states], device=device)
        self.lengths = self.lengths + 1
        return self.forward(ids, *self.masked(self.lengths))

    def masked(self, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask `[B, columns]` and positions `[B, 1]` of a step, after which the sequences are so long (`[B]`)."""
        columns = torch.arange(self.length + 1, device=lengths.device)
        mask = (columns >= self.length + 1 - lengths[:, None]).long()
        return mask, lengths[:, None] - 1


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

    def leave(self) -> bool:
        """Lets go of requests that have ended or have left; False where none is left to read."""
        group, kept = self.group, self.group.kept
        if 0 < len(kept) < len(group.states):
            plan = make_plan(group.model, [group.states[i] for i in kept])
            if group.length:
                part = Part(group.plan, group.cache, kept, 0, group.length)
                group.cache = gather(group.model, group.kinds, plan, [part], group.length, room=self.left)
            rows = torch.tensor(kept, device=self.ids.device)
            self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]
            group.lengths, group.plan = group.lengths[rows], plan
            group.states = [group.states[i] for i in kept]
            group.places = range(len(kept))
        return bool(kept)
