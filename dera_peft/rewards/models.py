"""Reward models: sequence-classification models whose one logit is the reward of a completion."""

import logging
import math
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dera_peft.checkpoint.devices import free_memory, read_device_map
from dera_peft.decoding.chats import ChatError, render, with_answer
from dera_peft.decoding.memory import Attempt, go_on_with_half
from dera_peft.errors import DeRaError, first_line
from dera_peft.messages import warn_once
from dera_peft.rewards.metrics import LIST

logger = logging.getLogger(__name__)


class RewardModel:
    """
    A sequence-classification model with one label, whose logit is the reward, as TRL's RewardTrainer makes them.

    It reads prompt and completion as a chat where its tokenizer has a chat template (a text prompt becomes a user
    message), and else as one text. Nothing is cut: a text that is longer than its context gets no reward, with a
    warning. Its weights are loaded at the first call.

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
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
        except (OSError, ValueError, HFValidationError) as error:
            raise DeRaError(
                f"reward={name!r} is neither a function, as path.py:name, nor built in ({LIST}), nor a model "
                f"that can be loaded: {first_line(error)}"
            ) from error
        self.tokenizer = cast("PreTrainedTokenizerBase", tokenizer)
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
        """Frees the weights; the next call loads them again."""
        vars(self).pop("model", None)
        free_memory()

    @torch.no_grad()
    def __call__(self, prompts: Sequence, completions: Sequence[str], **columns) -> list[float | None]:
        """One reward per completion, independent of its batch except for rounding; None where the text is too long."""
        tokens = [self._encode(*pair) for pair in zip(prompts, completions, strict=True)]
        rewards: list[float | None] = [None] * len(tokens)
        # texts of similar length together, for little padding
        fitting = sorted(
            (i for i, ids in enumerate(tokens) if len(ids) <= self.max_length), key=lambda i: len(tokens[i])
        )
        if len(fitting) < len(tokens):
            warn_once(
                logger,
                f"{self.name}: {len(tokens) - len(fitting)} of {len(tokens)} completions get no reward: with their "
                f"prompts they are longer than its context of {self.max_length} tokens; further ones are not reported",
                topic=f"{self.name}: longer than its context",
            )
        while fitting:
            chosen = fitting[: self.batch_size]
            error = None
            if len(chosen) == 1:
                error = f"reward={self.name!r}: out of memory for a single text of {len(tokens[chosen[0]])} tokens."
            with Attempt(error) as attempt:
                batch = self.tokenizer.pad({"input_ids": [tokens[index] for index in chosen]}, return_tensors="pt")
                values = self.model(**batch.to(self.model.device)).logits[:, 0].tolist()
            if attempt.failed:
                self.batch_size = len(chosen) // 2
                go_on_with_half(f"{self.name}: out of memory, going on with {self.batch_size} texts at once")
                continue
            fitting = fitting[len(chosen) :]
            for index, value in zip(chosen, values, strict=True):
                rewards[index] = value
        return rewards

    def _encode(self, prompt: str | list[dict], completion: str) -> list[int]:
        if self.tokenizer.chat_template:
            try:
                rendered = render(self.tokenizer, with_answer(prompt, completion), {}, return_dict=True)
            except ChatError as error:
                raise DeRaError(f"reward={self.name!r}: {error}") from error
            return cast("dict[str, list[int]]", rendered)["input_ids"]  # by return_dict
        if not isinstance(prompt, str):
            raise DeRaError(
                f"reward={self.name!r} has no chat template, and the prompts are chats: use a reward model for chats, "
                "or write a function: path.py:name."
            )
        return self.tokenizer(prompt + completion)["input_ids"]
