"""Rewards: what scores completions, with TRL's signature. A Python function, or a sequence-classification model."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from dera_peft.devices import read_device_map
from dera_peft.errors import DeRaError, first_line
from dera_peft.fingerprint import file_fingerprint, weights_fingerprint
from dera_peft.objects import is_object_path, load_object
from dera_peft.prompts import Prompt

# f(prompts, completions, **columns) -> list[float | None]; None for a completion that it does not score
Reward = Callable[..., list[float | None]]


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
                f"reward={name!r} is neither a function, as path.py:name, nor a model that can be loaded: "
                f"{first_line(error)}"
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
        except (OSError, ValueError) as error:
            raise DeRaError(f"reward={self.name!r} can't be loaded: {first_line(error)}") from error
        if missing := sorted(loading["missing_keys"]):
            raise DeRaError(
                f"reward={self.name!r} was not trained as a reward model: it has no {missing[0]!r}, which would be "
                "random. Train one with TRL's RewardTrainer, or write a function: path.py:name."
            )
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return model.eval()

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
        for start in range(0, len(fitting), self.batch_size):
            chosen = fitting[start : start + self.batch_size]
            batch = self.tokenizer.pad({"input_ids": [tokens[index] for index in chosen]}, return_tensors="pt")
            logits = self.model(**batch.to(self.model.device)).logits  # [B, 1]
            for index, value in zip(chosen, logits[:, 0].tolist(), strict=True):
                rewards[index] = value
        return rewards

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


def score(
    reward: Reward,
    prompts: Sequence,
    completions: Sequence[str],
    columns: dict[str, list] | None = None,
    allow_none: bool = False,
) -> list[float | None]:
    """
    One finite float per completion.

    Args:
        reward: from `load_reward`.
        prompts, completions: of the same length.
        columns: further columns of the prompts' rows, each as long as `prompts`.
        allow_none: pass on None, a reward's word for "not scored"; without, it is an error.

    Raises:
        DeRaError: the reward raises, or returns no list, or another number of values, or one that is not finite.
    """
    name = getattr(reward, "__name__", repr(reward))
    try:
        values = reward(prompts=list(prompts), completions=list(completions), **(columns or {}))
    except DeRaError:
        raise
    except Exception as error:
        raise DeRaError(f"the reward {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(values, (list, tuple)):
        raise DeRaError(
            f"the reward {name!r} returned a {type(values).__name__}: it must return a list of numbers, one for each "
            "completion."
        )
    if len(values) != len(completions):
        raise DeRaError(f"the reward {name!r} gave {len(values)} values for {len(completions)} completions.")
    for value, completion in zip(values, completions, strict=True):
        if value is None and allow_none:
            continue
        if not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise DeRaError(
                f"the reward {name!r} gave {value!r} for the completion {completion[:80]!r}: it must be a finite "
                "number."
            )
    return [None if value is None else float(value) for value in values]


def score_batch(
    reward: Reward,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    names: Sequence[str],
    allow_none: bool = False,
) -> list[float | None]:
    """
    As `score`, for prompts with the columns of their rows.

    Args:
        names: of the columns that the reward is given, the same in every batch: `column_names` of the run's prompts.
    """
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    return score(reward, [prompt.content for prompt in prompts], completions, columns, allow_none)
