"""Rewards: functions that score completions, with TRL's signature; how they are named, loaded and called."""

import inspect
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch

from dera_peft.checkpoint.fingerprint import file_fingerprint, settings_fingerprint, weights_fingerprint
from dera_peft.decoding.prompts import Prompt
from dera_peft.errors import DeRaError
from dera_peft.rewards.metrics import Metric, read_metric
from dera_peft.rewards.models import RewardModel
from dera_peft.user_code import is_object_path, load_object

# f(prompts, completions, **columns) -> list[float | None]; None for a completion that it does not score
Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class NamedReward:
    """
    One of a sweep's rewards.

    Attributes:
        name: what its columns are called.
        fingerprint: of all but the completion that its value depends on.
        function: with TRL's signature; None for a built-in one.
        metric: a built-in one's.
    """

    name: str
    fingerprint: str
    function: Reward | None = None
    metric: Metric | None = None


def load_rewards(specs: Sequence[str | Reward], beta: float | None = None, device_map: Any = None) -> list[NamedReward]:
    """
    Rewards by name: a function, as path.py:name or itself; a sequence-classification model, by hub id or folder; or a
    built-in one (see `metrics.read_metric`).

    They are called by the last part of their name, or by the whole of it where that is not unique.

    Args:
        beta: of the adapter's training, for the built-in `implicit`.
        device_map: for models, see `load_reward`.

    Raises:
        DeRaError: there is none of that name, or it is not a reward.
    """
    rewards = []
    for spec in specs:
        if isinstance(spec, str) and (metric := read_metric(spec, beta)):
            rewards.append(NamedReward(spec, spec, metric=metric))
        elif isinstance(spec, str):
            name = short_name(spec)
            function = load_reward(spec, device_map)
            rewards.append(NamedReward(name, f"{name} {reward_fingerprint(spec)}", function))
        else:
            rewards.append(NamedReward(name_of(spec), source_fingerprint(spec), spec))
    names = [reward.name for reward in rewards]
    for place, (spec, reward) in enumerate(zip(specs, rewards, strict=True)):
        if names.count(reward.name) > 1:
            rewards[place] = replace(reward, name=spec if isinstance(spec, str) else f"{spec.__module__}.{reward.name}")
    names = [reward.name for reward in rewards]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DeRaError(f"rewards: two of them are called {twice!r}; give one of the functions another name.")
    return rewards


def short_name(spec: str) -> str:
    """`path.py:name` -> name; `folder/model` -> model."""
    return spec.rpartition(":")[2] if is_object_path(spec) else os.path.basename(os.path.normpath(spec))


def source_fingerprint(function: Callable) -> str:
    """Of a function's source; where there is none to be had, of its name."""
    try:
        return settings_fingerprint(inspect.getsource(function))
    except (OSError, TypeError):
        return name_of(function)


def load_reward(spec: str, device_map: Any = None) -> Reward:
    """
    The reward that `spec` names: a function as path.py:name, or a sequence-classification model by hub id or folder.

    Args:
        device_map: for a model, as in transformers; the accelerator by default, if there is one.

    Raises:
        DeRaError: there is none of that name, or it is not a reward.
    """
    if not is_object_path(spec) and not spec.rpartition(":")[0].endswith(".py"):
        return RewardModel(spec, device_map)
    reward = load_object(spec)
    if not callable(reward):
        raise DeRaError(f"reward={spec!r} is not a function, but a {type(reward).__name__}.")
    return reward


def reward_fingerprint(spec: str) -> str:
    """Of a function's file, or of a local model's weights; of a hub model its name."""
    if is_object_path(spec):
        return file_fingerprint(spec.rpartition(":")[0])
    return weights_fingerprint(spec) or spec


class RewardFailed(DeRaError):
    """A reward that raises, or does not return one value for each completion."""


def call_reward(
    reward: Reward, prompts: Sequence, completions: Sequence[str], columns: dict[str, list] | None = None
) -> list[float | None]:
    """
    The rewards of some completions; None for one that it does not score.

    Args:
        columns: further values of the prompts, by name, each as long as `prompts`.

    Raises:
        RewardFailed: it raises, or returns no list, or another number of values, or one that is not a finite number.
    """
    values = [_read(value) for value in _call(reward, prompts, completions, columns or {})]
    for (_, fault), completion in zip(values, completions, strict=True):
        if fault:
            raise RewardFailed(f"the reward {name_of(reward)!r} gave {fault}, for the completion {completion[:80]!r}.")
    return [value for value, _ in values]


def call_reward_or_mark(
    reward: Reward, prompts: Sequence, completions: Sequence[str], columns: dict[str, list]
) -> list[tuple[float | None, str | None]]:
    """
    As `call_reward`, but an error on one completion leaves the rewards of the others.

    Where the reward fails on all of them at once, it is called for each one alone.

    Returns:
        For each completion its reward and the error; one of them or both are None.
    """
    try:
        values = _call(reward, prompts, completions, columns)
    except RewardFailed as error:
        if len(completions) == 1:
            return [(None, str(error))]
        return [
            call_reward_or_mark(
                reward, [prompt], [completion], {name: [values[row]] for name, values in columns.items()}
            )[0]
            for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
    return [(value, fault and f"the reward {name_of(reward)!r} gave {fault}.") for value, fault in map(_read, values)]


def columns_of(prompts: Sequence[Prompt], names: Sequence[str]) -> dict[str, list]:
    """
    What a reward is given beside prompts and completions.

    Args:
        names: the same in every batch: `column_names` of the run's prompts.
    """
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def check_columns(names: Iterable[str]) -> None:
    """Raises `DeRaError` for a column that a reward can't be given, because its own arguments are called so."""
    for name in names:
        if name in ("prompts", "completions"):
            raise DeRaError(
                f"column {name!r}: a reward is given the columns by name beside its own prompts and completions; "
                "rename the column."
            )


def name_of(function: Callable) -> str:
    return getattr(function, "__name__", None) or repr(function)


def _call(reward: Reward, prompts: Sequence, completions: Sequence[str], columns: dict[str, list]) -> Sequence:
    name = name_of(reward)
    check_columns(columns)
    try:
        values = reward(prompts=list(prompts), completions=list(completions), **columns)
    except DeRaError:
        raise
    except Exception as error:
        raise RewardFailed(f"the reward {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(values, (list, tuple)):
        raise RewardFailed(
            f"the reward {name!r} returned a {type(values).__name__}: it must return a list of numbers, one for each "
            "completion."
        )
    if len(values) != len(completions):
        raise RewardFailed(f"the reward {name!r} gave {len(values)} values for {len(completions)} completions.")
    return values


def unwrapped(value: Any) -> Any:
    """Python's number in place of a scalar of NumPy or PyTorch."""
    if isinstance(value, (torch.Tensor, numpy.ndarray, numpy.generic)) and value.ndim == 0:
        return value.item()
    return value


def _read(value: Any) -> tuple[float | None, str | None]:
    """A value as a float, and what is wrong with it, if anything."""
    value = unwrapped(value)
    if value is None:
        return None, None
    # typeshed does not know that a Real's absolute value can be compared
    if isinstance(value, numbers.Real) and abs(value) <= sys.float_info.max:  # pyrefly: ignore[unsupported-operation]
        return float(value), None
    return None, f"{str(value)[:80]} ({type(value).__name__}), which is not a finite number"
