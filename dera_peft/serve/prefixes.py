"""Prompts that begin alike are computed once: what is known of finished requests, within a bound."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast
from weakref import WeakValueDictionary

import torch

from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.plan import BatchPlan, WeightPlan
from dera_peft.serve.group import Group
from dera_peft.serve.state import LEAST, State
from dera_peft.serve.states import Part, RoomyLayer, keys_and_values, new_cache


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two sequences begin with alike; 0 for fewer than LEAST."""
    if a[:LEAST] != b[:LEAST] or len(a) < LEAST:
        return 0
    places = range(min(len(a), len(b)) + 1)
    return bisect_left(places, True, key=lambda n: a[:n] != b[:n]) - 1


def covers(filled: BatchPlan, sequence: int, plan: BatchPlan) -> bool:
    """Whether a sequence of `filled` has the rows that `plan`, of one sequence, needs: its branches, at any λ."""
    there, needed = filled.pattern[sequence], plan.pattern[0]
    if isinstance(plan, WeightPlan):  # keys and values depend on λ itself
        return there == needed
    return all(has >= needs for has, needs in zip(there, needed, strict=True))


@dataclass(frozen=True)
class Found:
    """
    A beginning that is known.

    Attributes:
        tokens: how many.
        part: gives the first of them, as many as it is asked for.
    """

    tokens: int
    part: Callable[[int], Part]


@dataclass(frozen=True)
class Entry:
    """
    A finished request.

    Attributes:
        plan: of one sequence in the same rows; entries share it.
        places: `[R, tokens]` int64, where keys and values of each of its rows are.
    """

    plan: BatchPlan
    places: torch.Tensor


class Prefixes:
    """
    Keys and values of finished requests, those used last.

    They are in one buffer for each layer, with a place for each token and row. Tensors of their own would leave the
    allocator with more and more holes between them, as requests come and go.

    Args:
        kinds: of the layers of the model's cache.
        most: tokens of all rows that are held at most.

    Attributes:
        held: tokens of all rows that are held.
    """

    def __init__(self, model: MixtureModel, kinds: Sequence[type], most: int):
        self.model, self.kinds, self.most = model, kinds, most
        self.clear()

    def clear(self) -> None:
        """Forgets all, and gives back the memory."""
        self.held = 0
        self._entries: OrderedDict[tuple[int, ...], Entry] = OrderedDict()  # the one used last at the end
        self._starting: dict[tuple[int, ...], list[tuple[int, ...]]] = {}  # the entries by their first tokens
        self._plans: WeakValueDictionary[tuple, BatchPlan] = WeakValueDictionary()  # those of the entries, by pattern
        self._places = torch.arange(self.most)  # those that are free from `held` on
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer, `[most, heads, D]`

    def halve(self) -> None:
        """Forgets all, and holds half as much from here on."""
        self.most //= 2
        self.clear()

    def find(self, state: State, groups: Sequence[Group]) -> Found | None:
        """
        The longest known beginning of a request, without its last token, whose logits have to be computed: among
        finished requests, and those that are decoded.
        """
        if state.kind.is_whole or state.length <= LEAST:
            return None
        ids, start = state.ids[:-1], state.start
        best, part, key = 0, None, None
        for tokens in self._starting.get(start, ()):
            entry = self._entries[tokens]
            is_longer = ids[: best + 1] == tokens[: best + 1]
            if is_longer and covers(entry.plan, 0, state.plan) and (n := common(ids, tokens)) > best:
                best, part, key = n, partial(self._part, entry), tokens
        for group in groups:
            for index, other in enumerate(group.states):
                if other.start == start and covers(other.plan, 0, state.plan):
                    own = other.length - 1
                    if (n := common(ids, other.ids[:own])) > best:
                        best, part, key = n, partial(_running_part, group, index, group.length - own), None
        if key is not None:
            self._entries.move_to_end(key)
        return None if part is None else Found(best, part)

    def store(self, group: Group, index: int) -> None:
        """Keeps a sequence of a group, in the rows that it has there."""
        state = group.states[index]
        tokens = state.length - 1  # the last one was drawn, and not computed
        ids = state.ids[:tokens]
        size = tokens * state.plan.num_rows
        if state.kind.is_whole or tokens < LEAST or size > self.most:
            return
        for known in list(self._starting.get(state.start, ())):
            entry, n = self._entries[known], common(ids, known)
            if n == len(ids) and covers(entry.plan, 0, state.plan):
                self._entries.move_to_end(known)
                return  # a longer one is there
            if n == len(known) and covers(state.plan, 0, entry.plan):
                self._drop(known)
        if ids in self._entries:  # in other branches
            self._drop(ids)
        while self.held + size > self.most:
            self._drop(next(iter(self._entries)))
        places = self._places[self.held : self.held + size].clone().view(-1, tokens)
        self.held += size
        self._entries[ids] = Entry(self._plans.setdefault(state.plan.pattern, state.plan), places)
        self._starting.setdefault(state.start, []).append(ids)
        self._write(group, index, places)

    def _drop(self, key: tuple[int, ...]) -> None:
        places = self._entries.pop(key).places.flatten()
        self.held -= len(places)
        self._places[self.held : self.held + len(places)] = places
        alike = self._starting[key[:LEAST]]
        alike.remove(key)
        if not alike:
            del self._starting[key[:LEAST]]

    def _write(self, group: Group, index: int, places: torch.Tensor) -> None:
        sequence = group.places[index]
        above = group.states[index].plan.rows_among(group.plan.row_of[:, [sequence]])
        below = torch.tensor([sequence])
        columns = slice(group.length - places.shape[1], group.length)
        for number, layer in enumerate(group.cache.layers):
            if (both := keys_and_values(layer)) is None:
                continue
            if number not in self._buffers:
                keys, values = (states.new_empty(self.most, states.shape[1], states.shape[3]) for states in both)
                self._buffers[number] = keys, values
            rows, to = (above, places) if number >= self.model.fork_layer else (below, places[:1])
            for buffer, states in zip(self._buffers[number], both, strict=True):
                own = states[:, :, columns].index_select(0, rows.to(states.device))  # [R, heads, tokens, D]
                buffer[to.flatten().to(states.device)] = own.transpose(1, 2).flatten(0, 1)

    def _part(self, entry: Entry, tokens: int) -> Part:
        cache = new_cache(self.kinds)
        for number, buffers in self._buffers.items():
            places = entry.places[: None if number >= self.model.fork_layer else 1, :tokens]
            layer = cast("RoomyLayer", cache.layers[number])
            keys, values = (
                buffer[places.to(buffer.device)].transpose(1, 2)
                for buffer in buffers  # [R, heads, tokens, D]
            )
            layer.fill(keys, values, tokens)
        return Part(entry.plan, cache, [0], 0, tokens)


def _running_part(group: Group, index: int, start: int, tokens: int) -> Part:
    return Part(group.plan, group.cache, [group.places[index]], start, start + tokens)
