"""Rewards: functions that score completions, with TRL's signature; how they are named, loaded and called."""

import inspect
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dera_peft.checkpoint.fingerprint import file_fingerprint, settings_fingerprint, weights_fingerprint
from dera_peft.decoding.chats import as_chat, with_answer
from dera_peft.decoding.prompts import Prompt
from dera_peft.errors import DeRaError
from dera_peft.rewards.calls import CallFailed, Failures, accepted, call, read_values, unwrapped
from dera_peft.rewards.metrics import Metric, read_metric
from dera_peft.rewards.models import RewardModel
from dera_peft.user_code import is_object_path, load_object

# f(prompts, completions, **columns) -> list[float | None]; None for a completion that it does not score. Arrays and
# tensors will do, and it may be asynchronous.
Reward = Callable[..., Any]


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


def call_reward(
    reward: Reward,
    prompts: Sequence,
    completions: Sequence[str],
    columns: dict[str, list] | None = None,
    *,
    token_ids: Sequence[Sequence[int]] | None = None,
    chat: bool = False,
) -> list[float | None]:
    """
    The rewards of some completions; None for one that it does not score.

    The reward is called as by TRL's GRPOTrainer: with the columns by name, and `completion_ids` and `trainer_state`
    (None: nothing is trained), `log_extra` and `log_metric` (which do nothing here) where it has a parameter for them;
    the completion of a chat is `[{"role": "assistant", "content": …}]`. It may be asynchronous.

    Args:
        prompts: texts or chats.
        columns: further values of the prompts, by name, each as long as `prompts`.
        token_ids: of the completions.
        chat: whether a prompt that is a text was decoded as a user's message.

    Raises:
        DeRaError: it raises, or returns nothing like a list, or another number of values, or one that is not a finite
            number.
    """
    values = [_read(value) for value in _call(reward, prompts, completions, columns or {}, token_ids, chat)]
    for (_, fault), completion in zip(values, completions, strict=True):
        if fault:
            raise DeRaError(f"the reward {name_of(reward)!r} gave {fault}, for the completion {completion[:80]!r}.")
    return [value for value, _ in values]


def call_reward_or_mark(
    reward: Reward,
    prompts: Sequence,
    completions: Sequence[str],
    columns: dict[str, list],
    *,
    token_ids: Sequence[Sequence[int]] | None = None,
    chat: bool = False,
    failures: Failures | None = None,
) -> list[tuple[float | None, str | None]]:
    """
    As `call_reward`, but an error on one completion leaves the rewards of the others.

    Where the reward raises on all of them at once, it is called for each one alone.

    Args:
        failures: of the reward so far.

    Returns:
        For each completion its reward and the error; one of them or both are None.

    Raises:
        DeRaError: it does not return one value for each completion, or has failed on everything so far.
    """
    failures = Failures(f"the reward {name_of(reward)!r}") if failures is None else failures
    try:
        values = _call(reward, prompts, completions, columns, token_ids, chat)
    except CallFailed as error:
        if len(completions) == 1:
            failures.note(str(error))
            return [(None, str(error))]
        marked = []
        for row in range(len(completions)):
            marked += call_reward_or_mark(
                reward, [prompts[row]], [completions[row]], {name: [values[row]] for name, values in columns.items()},
                token_ids=None if token_ids is None else [token_ids[row]], chat=chat, failures=failures,
            )  # fmt: skip
        return marked
    results = [
        (value, fault and f"the reward {name_of(reward)!r} gave {fault}.") for value, fault in map(_read, values)
    ]
    for _, fault in results:
        failures.note(fault)
    return results


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


def _call(
    reward: Reward,
    prompts: Sequence,
    completions: Sequence[str],
    columns: dict[str, list],
    token_ids: Sequence[Sequence[int]] | None,
    chat: bool,
) -> list:
    check_columns(columns)
    given: list = list(completions)
    if not isinstance(reward, RewardModel):  # which makes a chat of both by itself
        prompts = [as_chat(prompt) for prompt in prompts] if chat else prompts
        given = [
            with_answer(prompt, completion)[-1:] if isinstance(prompt, list) else completion
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    trls: dict[str, Any] = {"trainer_state": None, "log_extra": _log_nothing, "log_metric": _log_nothing}
    if token_ids is not None:
        trls["completion_ids"] = [list(ids) for ids in token_ids]
    what = f"the reward {name_of(reward)!r}"
    arguments = {**columns, **accepted(reward, trls)}
    return read_values(call(reward, what, prompts=list(prompts), completions=given, **arguments), what, len(given))


def _log_nothing(name: str, values: Any) -> None:
    """In place of what GRPOTrainer gives a reward to log with."""


def _read(value: Any) -> tuple[float | None, str | None]:
    """A value as a float, and what is wrong with it, if anything."""
    value = unwrapped(value)
    if value is None:
        return None, None
    # typeshed does not know that a Real's absolute value can be compared
    if isinstance(value, numbers.Real) and abs(value) <= sys.float_info.max:  # pyrefly: ignore[unsupported-operation]
        return float(value), None
    return None, f"{str(value)[:80]} ({type(value).__name__}), which is not a finite number"
