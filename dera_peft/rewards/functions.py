"""Rewards: what scores completions, with TRL's signature. A Python function, or a sequence-classification model."""

import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy
import torch
from huggingface_hub.errors import HFValidationError
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from dera_peft.checkpoint.devices import free_memory, read_device_map
from dera_peft.checkpoint.fingerprint import file_fingerprint, settings_fingerprint, weights_fingerprint
from dera_peft.decoding.prompts import Prompt
from dera_peft.errors import DeRaError, first_line
from dera_peft.rewards.metrics import LIST, Metric, read_metric
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


class RewardModel:
    """
    A sequence-classification model with one label, whose logit is the reward, as TRL's RewardTrainer makes them.

    It reads prompt and completion as a chat where its tokenizer has a chat template (a text prompt becomes a user
    message), and else as one text. Nothing is ever cut: what is longer than its context gets no score, which is said
    on stderr. Its weights are loaded when it is first called.

    Args:
        name: hub id or folder.
        device_map: as in transformers; the accelerator by default, if there is one.
        batch_size: texts scored at once.

    Raises:
        DeRaError: there is no such model, or it has another number of labels, or no head for a reward.
    """

    def __init__(self, name: str, device_map: Any = None, batch_size: int = 16):
        self.name, self.device_map, self.batch_size = name, device_map, batch_size
        if name.startswith((".", "/", "~")) and not os.path.isdir(name):
            raise DeRaError(f"reward={name!r}: there is no such folder.")
        try:
            self.config = AutoConfig.from_pretrained(name)
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
        except (OSError, ValueError, HFValidationError) as error:
            raise DeRaError(
                f"reward={name!r} is neither a function, as path.py:name, nor built in ({LIST}), nor a model "
                f"that can be loaded: {first_line(error)}"
            ) from error
        if self.config.num_labels != 1:
            raise DeRaError(
                f"reward={name!r} has {self.config.num_labels} labels, and a reward model has one, whose logit is the "
                "reward; for another kind of model write a function that reads its outputs: path.py:name."
            )
        if self.tokenizer.pad_token_id is None:  # as TRL does it, and so as such a model was trained
            self.tokenizer.pad_token = self.tokenizer.eos_token
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(self.tokenizer.model_max_length, context or math.inf)
        self.__name__ = name

    @cached_property
    def model(self) -> PreTrainedModel:
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                self.name,
                dtype="auto",
                device_map=read_device_map(None) if self.device_map is None else self.device_map,
                use_safetensors=True,
                output_loading_info=True,
            )
        except torch.OutOfMemoryError as error:
            raise DeRaError(
                f"reward={self.name!r} does not fit into the device's memory: take a smaller one, or score what the "
                f"sweep has decoded on another device. {first_line(error)}"
            ) from error
        except (OSError, ValueError) as error:
            raise DeRaError(f"reward={self.name!r} can't be loaded: {first_line(error)}") from error
        if missing := sorted(loading["missing_keys"]):
            raise DeRaError(
                f"reward={self.name!r} was not trained as a reward model: it has no {missing[0]!r}, which would be "
                "random. Train one with TRL's RewardTrainer, or write a function: path.py:name."
            )
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return model.eval()

    def free(self) -> None:
        """Lets go of the weights, which the next call loads again."""
        vars(self).pop("model", None)
        free_memory()

    @torch.no_grad()
    def __call__(self, prompts: Sequence, completions: Sequence[str], **columns) -> list[float | None]:
        """One reward per completion, in any batch the same but for rounding; None where the text is too long."""
        tokens = [self._encode(*pair) for pair in zip(prompts, completions, strict=True)]
        rewards: list[float | None] = [None] * len(tokens)
        # those of a like length together, for little padding
        fitting = sorted(
            (i for i, ids in enumerate(tokens) if len(ids) <= self.max_length), key=lambda i: len(tokens[i])
        )
        if len(fitting) < len(tokens):
            print(
                f"{self.name}: {len(tokens) - len(fitting)} of {len(tokens)} completions get no reward: with their "
                f"prompts they are longer than its context of {self.max_length} tokens",
                file=sys.stderr,
            )
        while fitting:
            chosen = fitting[: self.batch_size]
            values = self._score([tokens[index] for index in chosen])
            if values is None:
                self.batch_size = len(chosen) // 2
                torch.accelerator.empty_cache()
                print(f"{self.name}: out of memory, going on with {self.batch_size} texts at once", file=sys.stderr)
                continue
            fitting = fitting[len(chosen) :]
            for index, value in zip(chosen, values, strict=True):
                rewards[index] = value
        return rewards

    def _score(self, tokens: list[list[int]]) -> list[float] | None:
        """None where there is too little memory, but for a single text, for which it is an error."""
        batch = self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt")
        try:
            return self.model(**batch.to(self.model.device)).logits[:, 0].tolist()
        except torch.OutOfMemoryError as error:
            if len(tokens) > 1:
                return None
            raise DeRaError(
                f"reward={self.name!r}: out of memory for a single text of {len(tokens[0])} tokens."
            ) from error

    def _encode(self, prompt: str | list[dict], completion: str) -> list[int]:
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = [*messages, {"role": "assistant", "content": completion}]
            try:
                return self.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
            except TemplateError as error:
                raise DeRaError(f"reward={self.name!r}: its chat template refuses a chat: {error}") from error
        if not isinstance(prompt, str):
            raise DeRaError(
                f"reward={self.name!r} has no chat template, and the prompts are chats: use a reward model for chats, "
                "or write a function: path.py:name."
            )
        return self.tokenizer(prompt + completion)["input_ids"]


class RewardFailed(DeRaError):
    """A reward that raises, or does not return one value for each completion."""


def score(
    reward: Reward, prompts: Sequence, completions: Sequence[str], columns: dict[str, list] | None = None
) -> list[float | None]:
    """
    The rewards of some completions; None for one that it does not score.

    Args:
        columns: further values of the prompts, by name, each as long as `prompts`.

    Raises:
        RewardFailed: it raises, or returns no list, or another number of values, or one that is not a finite number.
    """
    found = [_read(value) for value in _call(reward, prompts, completions, columns or {})]
    for (_, fault), completion in zip(found, completions, strict=True):
        if fault:
            raise RewardFailed(f"the reward {name_of(reward)!r} gave {fault}, for the completion {completion[:80]!r}.")
    return [value for value, _ in found]


def score_or_mark(
    reward: Reward, prompts: Sequence, completions: Sequence[str], columns: dict[str, list]
) -> list[tuple[float | None, str | None]]:
    """
    As `score`, but completions on which the reward fails do not take the others along.

    Where it fails on all of them at once it is asked for each one alone.

    Returns:
        For each completion its reward and what went wrong; one of them, or both, are None.
    """
    try:
        values = _call(reward, prompts, completions, columns)
    except RewardFailed as error:
        if len(completions) == 1:
            return [(None, str(error))]
        return [
            score_or_mark(reward, [prompt], [completion], {name: [values[row]] for name, values in columns.items()})[0]
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


def name_of(function: Callable) -> str:
    return getattr(function, "__name__", None) or repr(function)


def _call(reward: Reward, prompts: Sequence, completions: Sequence[str], columns: dict[str, list]) -> Sequence:
    name = name_of(reward)
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
    if isinstance(value, numbers.Real) and abs(value) <= sys.float_info.max:
        return float(value), None
    return None, f"{str(value)[:80]} ({type(value).__name__}), which is not a finite number"
