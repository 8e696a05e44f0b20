"""Which requests are computed when: between two steps some leave, some join, and prompts are read in chunks."""

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import islice

import torch

from dera_peft.decoding.memory import Attempt, go_on_with_half
from dera_peft.engine.mixture import MixtureModel
from dera_peft.errors import DeRaError, first_line
from dera_peft.serve.captured import CapturedGroup, capture
from dera_peft.serve.draw import draw
from dera_peft.serve.group import Filling, Group, make_plan
from dera_peft.serve.prefixes import Prefixes, common, covers
from dera_peft.serve.requests import FinishReason
from dera_peft.serve.state import State
from dera_peft.serve.states import Part, gather, layer_kinds, new_cache

MAX_FILLING = 4  # groups whose prompts are read by turns, so that a short prompt does not wait for a long one
AHEAD = 64  # waiting requests that are looked at for one like the first
MARGIN = 32  # tokens that there must be room for when a request starts; more are made where they are needed
SHORT = 512  # columns up to which padding costs less than a step of its own
WASTE = 1.5  # columns with padding, over those without, of one step

logger = logging.getLogger(__name__)


class Scheduler:
    """
    The work of an engine, for one thread at a time.

    Args:
        max_rows: of a decoding step, and of prompts that are read.
        max_tokens: held by them, in all rows, with padding.
        prefill_chunk: tokens of prompts, in all rows, between two decoding steps.
        prefix_tokens: held of finished requests beside these.
        filler: the id to pad with.

    Attributes:
        waiting: requests in their order.
        filling: groups whose prompts are read; the first one is the next.
        running: groups that are decoded.
    """

    def __init__(
        self,
        model: MixtureModel,
        *,
        max_rows: int,
        max_tokens: int,
        prefill_chunk: int,
        prefix_tokens: int,
        filler: int,
    ):
        self.model, self.filler = model, filler
        self.max_rows, self.max_tokens, self.prefill_chunk = max_rows, max_tokens, prefill_chunk
        self.kinds = layer_kinds(model)
        self.prefixes = Prefixes(model, self.kinds, prefix_tokens)
        self.waiting: deque[State] = deque()
        self.filling: deque[Filling] = deque()
        self.running: list[Group] = []
        self.finished: Counter[str] = Counter()
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.steps = 0
        self._branches = model.branches

    # -- how it stands ---------------------------------------------------------------------------------------------

    @property
    def groups(self) -> list[Group]:
        return [*self.running, *(filling.group for filling in self.filling)]

    @property
    def active(self) -> list[State]:
        """The requests that are computed."""
        return [state for group in self.groups for state in group.active]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def held(self) -> int:
        """Tokens in all rows, with padding; prompts that are read count as if they had been."""
        reading = sum(filling.group.rows * filling.ids.shape[1] for filling in self.filling)
        return reading + sum(group.held for group in self.running)

    # -- one step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> bool:
        """A token of each running request, and a chunk of prompts; False where there is nothing to do."""
        self._check_branches()
        self._leave()
        self._admit()
        self._make_room()
        self._regroup()
        worked = bool(self.running or self.filling)
        if self.running:
            self.steps += 1
        for group in list(self.running):
            self._attempt(group, self._decode)
        if self.filling:
            self._fill(self.prefill_chunk)
        return worked or bool(self.waiting)

    def end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """Ends every request."""
        for state in [*self.active, *self.waiting]:
            self._end(state, reason, error)
        self.running, self.waiting = [], deque()
        self.filling.clear()

    def _check_branches(self) -> None:
        """Adapters may be added and removed between two steps: what was computed is of other branches then."""
        if self.model.branches is not self._branches:
            self.prefixes.clear()
            self.end_all("error", "the model's adapters changed while the request was decoded: send it again.")
            self._branches = self.model.branches

    def _decode(self, group: Group) -> None:
        self._draw(group, group.step())
        if not group.kept:
            self._forget(group)
            group.release()

    def _fill(self, tokens: int) -> None:
        """Reads prompts, the groups by turns."""
        while tokens > 0 and self.filling:
            filling = self.filling[0]
            self.filling.rotate(-1)
            before = filling.left
            self._attempt(filling.group, lambda group, filling=filling, tokens=tokens: self._read(filling, tokens))
            tokens -= max(1, before - filling.left) * max(1, filling.group.rows)

    def _read(self, filling: Filling, tokens: int) -> None:
        group = filling.group
        count, logits = filling.step(tokens)
        self.prompt_tokens += count * len(group.states)
        if logits is not None:
            self._draw(group, logits)
            self.filling.remove(filling)
            if group.kept:
                self.running.append(group)

    def _draw(self, group: Group, logits: torch.Tensor) -> None:
        """The next token of each sequence. Those that end with it leave before the next step."""
        group.advance()
        lambdas = group.token_lambda or [None] * len(group.states)
        for i, (state, drawn, lam) in enumerate(zip(group.states, draw(group.states, logits), lambdas, strict=True)):
            self.generated_tokens += drawn.error is None
            state.take(drawn, lam)
            if state.done:
                self.finished[state.handle.finish_reason or ""] += 1
                if drawn.error is None:
                    self.prefixes.store(group, i)

    # -- leaving -------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Those that were cancelled."""
        for group in self.groups:
            for i, state in enumerate(group.states):
                if state.handle.cancelled and not state.done:
                    self._end(state, "cancelled")
                    if group in self.running:
                        self.prefixes.store(group, i)
        for state in self.waiting:
            if state.handle.cancelled:
                self._end(state, "cancelled")
        self.waiting = deque(state for state in self.waiting if not state.done)
        self.filling = deque(filling for filling in self.filling if filling.leave())

    def _end(self, state: State, reason: FinishReason, error: str | None = None) -> None:
        if not state.done:
            state.end(reason, error)
            self.finished[reason] += 1

    # -- joining -------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and len(self.filling) < MAX_FILLING:
            batch = self._next_batch()
            if not batch:
                return
            self.filling.append(self._open(batch))  # until then they wait, so that a failure ends them too
            self.waiting = deque(state for state in self.waiting if state not in batch)

    def _next_batch(self) -> dict[State, int]:
        """The first of the waiting requests, and those like it; with the tokens that each has to compute."""
        batch: dict[State, int] = {}
        alike: defaultdict[tuple[int, ...], list[State]] = defaultdict(list)  # that are read, by their first tokens
        for filling in self.filling:
            for state in filling.group.states:
                alike[state.start].append(state)
        active, rows = self.active, self.rows
        tokens = self.held + sum(state.plan.num_rows * self._growth(state) for state in active)
        for state in islice(self.waiting, AHEAD):
            if any(self._shares(state, other) for other in alike[state.start]):
                continue  # its prompt's beginning will be known then
            own = state.plan.num_rows
            more = own * (state.length + self._growth(state))
            is_alone = not active and not batch  # which is decoded whatever it takes
            if not is_alone and (rows + own > self.max_rows or tokens + more > self.max_tokens):
                break
            found = self.prefixes.find(state, self.running)
            left = state.length - (found.tokens if found else 0)
            if batch:
                most = max(left, *batch.values())
                is_tight = most * (len(batch) + 1) <= WASTE * (sum(batch.values()) + left)
                of_batch = sum(each.plan.num_rows for each in (*batch, state))
                if state.kind != next(iter(batch)).kind or not is_tight or most * of_batch > self.prefill_chunk:
                    continue
            batch[state] = left
            alike[state.start].append(state)
            rows, tokens = rows + own, tokens + more
        return batch

    def _shares(self, state: State, other: State) -> bool:
        """Whether a good part of a request's prompt is being computed for another one that begins alike."""
        if state.kind.is_whole or not covers(other.plan, 0, state.plan):
            return False
        n = common(state.ids[:-1], other.ids)
        return n > 0 and 2 * n >= state.length

    def num_fitting(self, states: Sequence[State]) -> int:
        """How many of these requests, in their order, could be computed at once if there were no others."""
        rows = tokens = 0
        for place, state in enumerate(states):
            rows += state.plan.num_rows
            tokens += state.plan.num_rows * (state.length + self._growth(state))
            if place and (rows > self.max_rows or tokens > self.max_tokens):
                return place
        return len(states)

    def _growth(self, state: State) -> int:
        """One that can't be read again in another batch has to have room to its end."""
        return state.remaining if state.kind.is_whole else min(state.remaining, MARGIN)

    def _open(self, batch: dict[State, int]) -> Filling:
        states, most = list(batch), max(batch.values())
        plan = make_plan(self.model, states)
        length = max(state.length for state in states)
        parts = []
        for state in states:
            state.handle.start()
            known = max(0, state.length - most)
            found = self.prefixes.find(state, self.running) if known else None
            parts.append(found.part(known) if found else Part(state.plan, new_cache(self.kinds), [0], 0, 0))
            state.handle.cached_tokens = known
            self.cached_tokens += known
        width = length - most
        cache = gather(self.model, self.kinds, plan, parts, width, room=most) if width else new_cache(self.kinds)
        lengths = torch.tensor([state.length for state in states], device=self.model.device)
        return Filling(Group(self.model, self.kinds, states, plan, cache, width, lengths), self.filler)

    def _regroup(self) -> None:
        """Those that have ended leave; groups of one kind go on as one where that costs little padding."""
        together: list[list[Group]] = []
        for group in sorted(self.running, key=lambda group: not isinstance(group, CapturedGroup)):
            if group.kept:
                alike = next((others for others in together if self._can_join(others, group)), None)
                if alike is None:
                    together.append([group])
                else:
                    alike.append(group)
            else:
                group.release()
        self.running = [self._join(groups) for groups in together]

    def _can_join(self, groups: Sequence[Group], other: Group) -> bool:
        if groups[0].states[0].kind != other.states[0].kind:
            return False
        all_of_them = [*groups, other]
        length = max(group.length for group in all_of_them)
        before, held = sum(group.held for group in all_of_them), length * sum(group.rows for group in all_of_them)
        is_tight = length <= SHORT or held <= WASTE * before
        return is_tight and self.held - before + held <= self.max_tokens

    def _join(self, groups: Sequence[Group]) -> Group:
        first, *others = groups
        if not first.take(others):
            first = self._anew(groups)
        if not self.model.captures_steps or isinstance(first, CapturedGroup):
            return first
        # at most half of what there is room for, since places that are free hold as much as others
        room = (self.max_tokens - self.held + sum(group.held for group in groups)) // 2
        return capture(first, room, self.filler) or first

    def _anew(self, groups: Sequence[Group]) -> Group:
        anew = Group.of(groups)
        for group in groups:
            group.release()
        return anew

    # -- short of memory -----------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """The requests that started last wait again, to be read with their tokens so far, until there is room."""
        if self._is_short():  # without places that nobody has
            self.running = [self._anew([each]) if isinstance(each, CapturedGroup) else each for each in self.running]
        while self._is_short() and len(self.active) > 1:
            again = [state for state in self.active if not state.kind.is_whole]
            if not again:
                return
            self._put_back([max(again, key=lambda state: (state.handle.started, state.handle.created))])

    def _is_short(self) -> bool:
        """Whether there is no room for another token of each."""
        return self.held + sum(group.rows for group in self.running) > self.max_tokens

    def _put_back(self, states: Sequence[State]) -> None:
        for group in self.groups:
            group.left.update(states)
        self.filling = deque(filling for filling in self.filling if filling.leave())
        self.waiting.extendleft(reversed(states))

    def _attempt(self, group: Group, work: Callable[[Group], None]) -> None:
        """Where memory runs out everything starts again on half as much; any other error is the group's alone."""
        try:
            with Attempt(None) as attempt:
                work(group)
        except Exception as error:
            if not isinstance(error, DeRaError):
                logger.exception("a decoding step failed")
            for state in group.states:
                self._end(state, "error", f"decoding failed: {first_line(error)}")
            self._forget(group)
            return
        if not attempt.failed:
            return
        held = self.held
        self.prefixes.halve()
        self.model.release_captures()
        states = self.active
        self._forget(*self.groups)
        if len(states) == 1:
            self._end(states[0], "error", f"out of memory for a single request of {states[0].length} tokens.")
        else:
            self.waiting.extendleft(reversed([state for state in states if not state.done]))
            self.max_tokens = max(1, min(self.max_tokens, held) // 2)
        go_on_with_half(f"out of memory: going on with half as many tokens at once, {self.max_tokens}")

    def _forget(self, *groups: Group) -> None:
        self.running = [group for group in self.running if group not in groups]
        self.filling = deque(filling for filling in self.filling if filling.group not in groups)
