"""Judges: functions that compare two completions of one prompt, with the signature of TRL's judges."""

import hashlib
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from dera_peft.rewards.calls import CallFailed, Failures, call, read_values, unwrapped
from dera_peft.rewards.functions import (
    Reward,
    call_reward,
    load_reward,
    name_of,
    reward_fingerprint,
    short_name,
    source_fingerprint,
)
from dera_peft.user_code import is_object_path

# f(prompts, pairs) -> for each pair 0 (the first is better), 1 (the second is) or -1 (neither), as TRL's judges
Judge = Callable[..., list[int]]
FIRST, SECOND, NEITHER = 0, 1, -1


@dataclass(frozen=True)
class NamedJudge:
    """
    A sweep's judge.

    Attributes:
        fingerprint: of all but the pair that its verdict depends on.
    """

    name: str
    fingerprint: str
    function: Judge


def load_judge(spec: str | Judge, device_map: Any = None) -> NamedJudge:
    """
    A function, as path.py:name or itself; or a sequence-classification model, by hub id or folder, which prefers the
    completion that it scores higher.

    Raises:
        DeRaError: there is none of that name, or it is not a judge.
    """
    if not isinstance(spec, str):
        return NamedJudge(name_of(spec), source_fingerprint(spec), spec)
    found = load_reward(spec, device_map)
    name = short_name(spec)
    # a user's function may have either signature
    judge = cast("Judge", found) if is_object_path(spec) else partial(compare_scores, found)
    return NamedJudge(name, f"{name} {reward_fingerprint(spec)}", judge)


def compare_scores(reward: Reward, prompts: Sequence, pairs: Sequence[Sequence[str]]) -> list[int]:
    """By a reward's scores; neither where it gives one of the two none."""
    texts = [text for pair in pairs for text in pair]
    scores = call_reward(reward, [prompt for prompt in prompts for _ in range(2)], texts)
    verdicts = []
    for first, second in zip(scores[::2], scores[1::2], strict=True):
        if first is None or second is None or first == second:
            verdicts.append(NEITHER)
        else:
            verdicts.append(FIRST if first > second else SECOND)
    return verdicts


def judge_or_mark(
    judge: NamedJudge,
    prompts: Sequence,
    completions: Sequence[str],
    others: Sequence[str],
    keys: Sequence[Any],
    failures: Failures | None = None,
) -> list[tuple[int | None, str | None]]:
    """
    Whether each completion is better than the other one of the same prompt.

    Judges are known to favour the first or the second place, so the order of each pair is drawn from its key: random,
    and the same in every run. Two equal texts are a tie, without a call. Where the judge raises on all pairs at once,
    it is called for each one alone.

    Args:
        failures: of the judge so far.

    Returns:
        For each pair 1 (better), 0 (a tie) or -1 (worse), and None; or None and what went wrong.

    Raises:
        DeRaError: it does not return one verdict for each pair, or has failed on everything so far.
    """
    failures = Failures(f"the judge {judge.name!r}") if failures is None else failures
    verdicts: list[tuple[int | None, str | None]] = [(0, None)] * len(completions)
    asked = [row for row, pair in enumerate(zip(completions, others, strict=True)) if pair[0] != pair[1]]
    swapped = [is_swapped(keys[row]) for row in asked]
    pairs = [
        [others[row], completions[row]] if swap else [completions[row], others[row]]
        for row, swap in zip(asked, swapped, strict=True)
    ]
    results = _call(judge, [prompts[row] for row in asked], pairs, failures) if asked else []
    for row, swap, (verdict, error) in zip(asked, swapped, results, strict=True):
        if verdict is None:
            verdicts[row] = (None, error)
        elif verdict != NEITHER:
            verdicts[row] = (1 if (verdict == FIRST) != swap else -1, None)
    return verdicts


def is_swapped(key: Any) -> bool:
    """A random bit, the same for the same key."""
    return bool(hashlib.sha256(repr(key).encode()).digest()[0] & 1)


def _call(
    judge: NamedJudge, prompts: list, pairs: list[list[str]], failures: Failures
) -> list[tuple[int | None, str | None]]:
    what = f"the judge {judge.name!r}"
    try:
        verdicts = call(judge.function, what, prompts=list(prompts), pairs=[list(pair) for pair in pairs])
    except CallFailed as error:
        if len(pairs) == 1:
            failures.note(str(error))
            return [(None, str(error))]
        return [_call(judge, [prompt], [pair], failures)[0] for prompt, pair in zip(prompts, pairs, strict=True)]
    verdicts = read_values(verdicts, what, len(pairs), "pairs")
    results: list[tuple[int | None, str | None]] = []
    for verdict in map(unwrapped, verdicts):
        # True is no name of a place, though it equals 1
        is_whole = isinstance(verdict, numbers.Integral) and not isinstance(verdict, bool)
        if is_whole and verdict in (FIRST, SECOND, NEITHER):
            results.append((int(verdict), None))
        else:
            given = f"{str(verdict)[:80]} ({type(verdict).__name__})"
            results.append((None, f"{what} gave {given}, which is none of the integers 0, 1 and -1"))
        failures.note(results[-1][1])
    return results
