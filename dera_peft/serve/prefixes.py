"""Prompts that begin alike are computed once: what is known of finished requests, within a bound."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from transformers.cache_utils import DynamicCache

from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.plan import BatchPlan, WeightPlan
from dera_peft.serve.group import Group
from dera_peft.serve.state import State
from dera_peft.serve.states import Part, gather

LEAST = 8  # tokens worth looking for


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
    """A beginning that is known: the cache of one sequence, where it begins in it, and how many tokens of it fit."""

    plan: BatchPlan
    cache: DynamicCache
    sequence: int
    start: int
    tokens: int

    def part(self, tokens: int) -> Part:
        """Its first tokens."""
        return Part(self.plan, self.cache, [self.sequence], self.start, self.start + tokens)


class Prefixes:
    """
    Keys and values of finished requests, those used last.

    Args:
        most: tokens of all rows that are held at most.
    """

    def __init__(self, model: MixtureModel, most: int):
        self.model, self.most = model, most
        self.held = 0
        self._entries: OrderedDict[tuple[int, ...], Found] = OrderedDict()  # the one used last at the end

    def find(self, state: State, groups: Sequence[Group]) -> Found | None:
        """
        The longest known beginning of a request, without its last token, whose logits have to be computed: among
        finished requests, and those that are decoded.
        """
        if state.kind.is_whole or state.length <= LEAST:
            return None
        ids = state.ids[:-1]
        best, key = None, None
        for tokens, entry in self._entries.items():
            if covers(entry.plan, 0, state.plan) and (n := common(ids, tokens)) > (best.tokens if best else 0):
                best, key = Found(entry.plan, entry.cache, 0, 0, n), tokens
        for group in groups:
            for index, other in enumerate(group.states):
                if covers(group.plan, index, state.plan):
                    own = other.length - 1
                    if (n := common(ids, other.ids[:own])) > (best.tokens if best else 0):
                        best, key = Found(group.plan, group.cache, index, group.length - own, n), None
        if key is not None:
            self._entries.move_to_end(key)
        return best

    def store(self, group: Group, index: int) -> None:
        """Keeps a sequence of a group, in the rows that it has there."""
        state = group.states[index]
        tokens = state.length - 1  # the last one was drawn, and not computed
        ids = state.ids[:tokens]
        size = tokens * state.plan.num_rows
        if state.kind.is_whole or tokens < LEAST or size > self.most:
            return
        for known, entry in list(self._entries.items()):
            n = common(ids, known)
            if n == len(ids) and covers(entry.plan, 0, state.plan):
                self._entries.move_to_end(known)
                return  # a longer one is there
            if n == len(known) and covers(state.plan, 0, entry.plan):
                self._drop(known)
        if ids in self._entries:  # in other branches
            self._drop(ids)
        while self.held + size > self.most:
            self._drop(next(iter(self._entries)))
        part = Part(group.plan, group.cache, [index], group.length - tokens, group.length)
        cache = gather(self.model, state.plan, [part], tokens, room=0)
        self._entries[ids] = Found(state.plan, cache, 0, 0, tokens)
        self.held += size

    def clear(self) -> None:
        self._entries.clear()
        self.held = 0

    def _drop(self, key: tuple[int, ...]) -> None:
        entry = self._entries.pop(key)
        self.held -= entry.tokens * entry.plan.num_rows
