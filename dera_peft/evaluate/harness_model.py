"""`DeRaLM`: a `DeRaModel` as lm-evaluation-harness has its models, registered there as "dera"."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.lambdas import Lambda, for_adapters
from dera_peft.errors import DeRaError
from dera_peft.model import DeRaModel
from dera_peft.settings import nearest, option_name, user_fields

# the arguments of HFLM that say how it uses a model; the others say which one it loads, and how
USES = (
    "add_bos_token", "chat_template_args", "enable_thinking", "logits_cache", "max_length", "mixed_precision_dtype",
    "prefix_token_id", "softmax_dtype", "think_end_token", "truncation",
)  # fmt: skip
SOURCES = {each.name: option_name(each) for each in user_fields(ModelSource)}
OWN = {**SOURCES, "lam": "--lambda", "pretrained": "--base", "peft": "--adapter", "batch_size": "--batch_size"}


@register_model("dera")
class DeRaLM(HFLM):
    """
    A model of the harness at one λ: `lm_eval.simple_evaluate("dera", "adapter=./dpo,lam=0.5", tasks=[…])`.

    Instances of the same base and adapters, one after the other, share one copy of the weights.

    Args:
        lam: λ, of several adapters by name; the model's own default unless given.
        batch_size: as of the harness's `hf`.
        max_batch_size: as of the harness's `hf`.
        device: where `device_map` is not given.
        arguments: fields of `ModelSource`, and those in `USES`, which are as of `hf`.

    Raises:
        DeRaError: an argument is not known, or the model can't be loaded.
    """

    def __init__(
        self,
        lam: float | Mapping[str, float] | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        device: str | None = None,
        **arguments: Any,
    ):
        check_names(arguments, ("lam", "batch_size", "max_batch_size", "device", *SOURCES, *USES))
        source = ModelSource.read(**{name: value for name, value in arguments.items() if name in SOURCES})
        if source.device_map is None and device is not None:
            source = replace(source, device_map=device)
        model, tokenizer = load_once(json.dumps(given_fields(source), sort_keys=True))
        self.lam = lambda_of(lam, source)
        super().__init__(
            pretrained=model,
            backend="seq2seq" if model.config.is_encoder_decoder else "causal",
            revision=source.revision or source.resolve().base_revision,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            **{name: value for name, value in arguments.items() if name in USES},
        )

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        self._at_own_lam()
        return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **arguments: Any):
        self._at_own_lam()
        return super()._model_generate(context, max_length, stop, **arguments)

    def _at_own_lam(self) -> None:
        """The model is shared by instances at other λ."""
        self.model.lam = self.lam


def check_names(arguments: Mapping[str, Any], known: Sequence[str], argument: str = "model_args") -> None:
    """Raises `DeRaError` where an argument is not known; the harness's own model ignores it."""
    for name in arguments:
        if name not in known:
            raise DeRaError(f"{argument}: {name!r} is not an argument of this model; {nearest(name, known)}")


def lambda_of(lam: float | Mapping[str, float] | None, source: ModelSource) -> Lambda:
    """λ as a model has it; the default of its record unless given."""
    record = source.resolve()
    (value,) = for_adapters([record.lam if lam is None else lam], record.aligned, "lam")
    return value


def given_fields(source: ModelSource) -> dict[str, Any]:
    """A source as the harness's `model_args`."""
    values = {name: getattr(source, name) for name in SOURCES}
    return {name: value for name, value in values.items() if value not in (None, ())}


@lru_cache(maxsize=1)
def load_once(values: str) -> tuple[DeRaModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a source (its fields as JSON); the one that was asked for last is kept."""
    source = ModelSource(**json.loads(values)).placed()
    return DeRaModel.from_source(source).eval(), source.tokenizer()
