"""Rewards: Python functions that score completions, with TRL's signature."""

import math
from collections.abc import Callable, Sequence

from dera_peft.errors import DeRaError
from dera_peft.objects import load_object

# f(prompts, completions, **columns) -> list[float]
Reward = Callable[..., list[float]]


def load_reward(spec: str) -> Reward:
    """The reward that `path.py:name` names; a function `f(prompts, completions, **columns) -> list[float]`."""
    reward = load_object(spec)
    if not callable(reward):
        raise DeRaError(f"reward={spec!r} is not a function, but a {type(reward).__name__}.")
    return reward


def score(
    reward: Reward, prompts: Sequence, completions: Sequence[str], columns: dict[str, list] | None = None
) -> list[float]:
    """
    One finite float per completion.

    Args:
        reward: from `load_reward`.
        prompts, completions: of the same length.
        columns: further columns of the prompts' rows, each as long as `prompts`.

    Raises:
        DeRaError: the reward raises, or returns another number of values, or one that is not finite.
    """
    name = getattr(reward, "__name__", repr(reward))
    try:
        values = reward(prompts=list(prompts), completions=list(completions), **(columns or {}))
    except Exception as error:
        raise DeRaError(f"the reward {name!r} raised {type(error).__name__}: {error}") from error
    if len(values) != len(completions):
        raise DeRaError(f"the reward {name!r} gave {len(values)} values for {len(completions)} completions.")
    for value, completion in zip(values, completions, strict=True):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise DeRaError(f"the reward {name!r} gave {value!r} for the completion {completion[:80]!r}.")
    return [float(value) for value in values]
