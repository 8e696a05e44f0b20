"""
A group whose step is recorded once and replayed: its rows are places, which requests take and leave.

A recorded step computes the same rows each time, and so every place has a row in every branch, whatever the λ of the
request in it, and places that nobody has are computed too. Both cost little where a step is bound by the launch of its
kernels. The recordings belong to caches of a few sizes, which the model keeps.
"""

from collections.abc import Sequence
from functools import partial

import torch
from transformers.cache_utils import Cache, StaticLayer

from dera_peft.engine.capture import CapturedCache
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.names import WEIGHTS
from dera_peft.engine.plan import BatchPlan
from dera_peft.serve.group import Group
from dera_peft.serve.state import Kind
from dera_peft.serve.states import Part, gather, keys_and_values

COLUMNS = 256  # of the smallest cache


def capture(group: Group, most: int, filler: int) -> "CapturedGroup | None":
    """
    The requests of a group, all of which go on, in steps that are captured; None where they stay as they are.

    Args:
        most: tokens of all rows that there is room for.
        filler: the id that places without a request are given.
    """
    model, columns = group.model, COLUMNS
    while columns < 2 * group.length:  # half of them for the tokens to come, and for longer requests that join
        columns *= 2
    if group.states[0].kind != Kind() or group.rows * columns > most:
        return None  # a rule is a part of a step's structure; some positions depend on the others' lengths
    count = 1 << (len(group.states) - 1).bit_length()
    plan = _every_row(model, torch.zeros(count, group.states[0].lam.shape[1], dtype=torch.float64))
    cache = model.captured_cache(plan, columns, whole=True) if plan.num_rows * columns <= most else None
    return None if cache is None else CapturedGroup(group, cache, filler)


class CapturedGroup(Group):
    """
    Args:
        group: whose requests it takes.
        cache: an empty one, with places for them.

    Attributes:
        lengths: `[places]` int64, 0 of those that nobody has.
    """

    def __init__(self, group: Group, cache: CapturedCache, filler: int):
        lengths = torch.zeros(cache.plan.batch_size, dtype=torch.long, device=group.lengths.device)
        super().__init__(group.model, group.kinds, [], cache.plan, cache, cache.length // 2, lengths)
        self.captured, self.filler = cache, filler
        self.compute = partial(group.model.captured_step, cache)
        self._add(group)

    @property
    def held(self) -> int:
        """Of all places and columns, taken or not."""
        return self.plan.num_rows * self.captured.length

    def take(self, others: Sequence[Group]) -> bool:
        kept, there = self.kept, len(self.lengths)
        count = len(kept) + sum(len(other.kept) for other in others)
        is_full = count > there or self.length == self.captured.length
        if is_full or 4 * count <= there or any(other.width > self.length for other in others):
            return False
        if len(kept) < len(self.states):
            gone = [place for i, place in enumerate(self.places) if i not in kept]
            self.lengths[torch.tensor(gone, device=self.lengths.device)] = 0
            self.places, self.states = [self.places[i] for i in kept], [self.states[i] for i in kept]
        for other in others:
            self._add(other)
        return True

    def _add(self, other: Group) -> None:
        """The requests of a group go on in places that are free."""
        kept, states, width = other.kept, other.active, other.width
        taken = set(self.places)
        places = [place for place in range(len(self.lengths)) if place not in taken][: len(kept)]
        lam = self.plan.lam.clone()
        lam[places] = torch.cat([state.lam for state in states])
        self.captured.follow(_every_row(self.model, lam))
        self.plan = self.captured.plan
        self.captured.dera_pattern = self.plan.pattern  # pyrefly: ignore[missing-attribute] # as `claim_cache` marks it
        part = Part(other.plan, other.cache, [other.places[i] for i in kept], other.length - width, other.length)
        plan = _every_row(self.model, lam[places])
        self._write(gather(self.model, self.kinds, plan, [part], width, room=0), plan, places)
        lengths = [state.length - 1 for state in states]
        self.lengths[torch.tensor(places)] = torch.tensor(lengths, device=self.lengths.device)
        self.states, self.places = [*self.states, *states], [*self.places, *places]

    def _write(self, source: Cache, plan: BatchPlan, places: Sequence[int]) -> None:
        """The keys and values of `plan`'s sequences, which end in the last column so far."""
        below = torch.tensor(places, device=plan.device)
        above = plan.rows_among(self.plan.row_of[:, below])
        for index, layer in enumerate(self.cache.layers):
            if (found := keys_and_values(source.layers[index])) is None:
                continue
            assert isinstance(layer, StaticLayer)  # there are no others with keys (`capturable`)
            is_forked = index >= self.model.fork_layer
            if not layer.is_initialized:
                rows = self.plan.num_rows if is_forked else self.plan.batch_size
                keys, values = (states.new_empty(rows, *states.shape[1:]) for states in found)
                layer.lazy_initialization(keys, values)
            layer.cumulative_length.fill_(self.length)
            to = (above if is_forked else below).to(layer.device)
            for target, states in zip((layer.keys, layer.values), found, strict=True):
                assert target is not None  # it is initialized
                start = self.length - states.shape[2]
                target[to, :, :start] = 0  # of whom had the place before; masked, but it must be finite
                target[to, :, start : self.length] = states

    def release(self) -> None:
        self.model.keep_captured(self.captured)

    def step(self) -> torch.Tensor:
        device = self.lengths.device
        places = torch.tensor(self.places, device=device)
        ids = torch.full((len(self.lengths), 1), self.filler, device=device)
        ids[places, 0] = torch.tensor([state.tokens[-1] for state in self.states], device=device)
        self.lengths[places] += 1
        # a place that nobody has sees its own token: what sees nothing is not finite
        return self.forward(ids, *self.masked(self.lengths.clamp(min=1)))[places]


def _every_row(model: MixtureModel, lam: torch.Tensor) -> BatchPlan:
    """Of sequences that all have a row in each branch."""
    if not model.branches_differ:
        return model.plan(None, len(lam))
    return model.plan(lam, len(lam), every_branch=model.mixing != WEIGHTS)
