"""A model that is loaded already, in the place of a `ModelSource`."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dera_peft.checkpoint.end_tokens import end_tokens
from dera_peft.checkpoint.fingerprint import tensors_fingerprint
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.source import ModelSource
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.model import DeRaModel
from dera_peft.settings import setting

UNNAMED = "a model in memory"


@dataclass(frozen=True, kw_only=True)
class LoadedModel(ModelSource):
    """
    What a sweep asks of a `ModelSource`, of a `DeRaModel`.

    Attributes:
        model: mixes logits; of `from_pretrained`, or of `from_peft`.
        given_tokenizer: the model's; that of its folders unless given.

    Raises:
        DeRaError: it is no such model.
    """

    model: Any = setting(help="", on_command_line=False)
    given_tokenizer: Any = setting(None, help="", on_command_line=False)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.model, DeRaModel):
            wanted = "DeRaModel.from_pretrained or DeRaModel.from_peft makes one"
            raise DeRaError(f"model must be a DeRaModel ({wanted}); got a {type(self.model).__name__}.")
        if self.model.mixing != LOGITS:
            raise DeRaError(f"model has mixing={self.model.mixing!r}: a sweep needs one with mixing={LOGITS!r}.")

    @property
    def name(self) -> str:
        record = self.resolve()
        return next(reversed(record.adapters.values()), record.base) if self.model.record is not None else UNNAMED

    @cached_property
    def _record(self) -> Record:
        if self.model.record is not None:
            return self.model.record
        branches = {branch.name: list(branch.adapters) for branch in self.model.branches}
        return Record(self.config.name_or_path or UNNAMED, {}, branches)

    @cached_property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.given_tokenizer is None:
            if self.model.record is None and not self.config.name_or_path:
                raise DeRaError("tokenizer: the model was made in memory, so that nothing names its own: give it.")
            return super().tokenizer()
        tokenizer = deepcopy(self.given_tokenizer)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def end_tokens(self) -> list[int]:
        return end_tokens(self.model.generation_config, self.tokenizer(), self.resolve())

    def fingerprint(self) -> dict[str, Any]:
        """Of the weights as they are now: a model in memory may have been trained since it was loaded."""
        return {"weights": tensors_fingerprint(self.model.named_parameters()), "mixing": self.model.mixing}
