"""Do a base and its adapters fit each other? Told from configs and headers, before weights are read."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from dera_peft.checkpoint.adapter_check import CheckedAdapter, check_adapter
from dera_peft.checkpoint.adapter_file import AdapterFile
from dera_peft.checkpoint.adapters import attach_adapter
from dera_peft.checkpoint.base import load_config, make_skeleton
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.vocabulary import find_tokens, resize
from dera_peft.engine.padding import num_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """
    What was read of a base and its adapters to see that they fit each other.

    Attributes:
        skeleton: see `make_skeleton`.
        adapters: by their names.
        own_tokens: how many the base has.
        tokens: how many the adapters were trained with.
    """

    config: PreTrainedConfig
    skeleton: PreTrainedModel
    adapters: dict[str, CheckedAdapter]
    own_tokens: int
    tokens: int

    def attach(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel | PeftModel:
        """
        The base with the adapters, if there are any, and with their tokens.

        Args:
            options: of `attach_adapter`.

        Raises:
            DeRaError: an adapter's weights are not finite, or it would change the base.
        """
        if self.tokens != self.own_tokens:
            logger.info(
                "the base has %d tokens, and the adapter was trained with %d: its embeddings are resized",
                self.own_tokens, self.tokens,
            )  # fmt: skip
            resize(model, self.tokens)
        known, adapted = self.own_tokens, model
        for name, adapter in self.adapters.items():
            adapted = attach_adapter(adapted, adapter, name, own_tokens=known, **options)
            known = self.tokens if adapter.copies else known  # they have brought the base's rows for added tokens
        return adapted


def check(
    record: Record,
    base_arguments: Mapping[str, Any] = {},
    *,
    config: PreTrainedConfig | None = None,
    base_argument: str = "base",
    adapter_argument: str = "adapter",
) -> Checked:
    """
    Checks that the base and the adapters of a record are there and fit each other; reads no weights.

    Args:
        base_arguments: of transformers' `from_pretrained`.
        config: from `load_config`, where it is there already.
        base_argument, adapter_argument: what names them for the user, for messages.

    Raises:
        DeRaError: one of them can't be read, or does not fit the other.
    """
    if config is None:
        config = load_config(record.base, base_arguments, base_argument)
    skeleton = make_skeleton(config, base_arguments.get("trust_remote_code"), base_argument)
    files = {name: AdapterFile.read(folder, adapter_argument) for name, folder in record.adapters.items()}
    own_tokens = num_rows(skeleton)
    tokens = find_tokens(files.values(), skeleton)
    if tokens is not None:
        resize(skeleton, tokens)
    adapters = {name: check_adapter(file, record.base, skeleton, name) for name, file in files.items()}
    record.check_base(base_arguments.get("revision"))
    return Checked(config, skeleton, adapters, own_tokens, tokens or own_tokens)
