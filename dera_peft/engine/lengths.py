"""Rotary embeddings that change with the longest position in the batch: which sequences can be computed together."""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class RopeSwitch:
    """
    Attributes:
        length: up to which a sequence has the embeddings of the pretraining.
        grows: whether they change with each further token (dynamic NTK), and not once (LongRoPE).
    """

    length: int
    grows: bool

    def kind(self, first: int, last: int) -> Hashable:
        """
        What sequences have in common that can stand in one batch, each with the embeddings that it has alone.

        Args:
            first, last: the lengths with which it is computed, as those of a prompt and of the whole.
        """
        if last <= self.length:
            return "short"
        return "long" if first > self.length and not self.grows else (first, last)


def find_rope_switch(config: PreTrainedConfig) -> RopeSwitch | None:
    """None where positions have the same embeddings in every batch."""
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    of_layer_types = [value for value in parameters.values() if isinstance(value, dict)]
    switches = []
    for rope in of_layer_types or [parameters]:
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            switches.append(RopeSwitch(rope["original_max_position_embeddings"], grows=False))
        elif "dynamic" in kind:
            switches.append(RopeSwitch(config.max_position_embeddings, grows=True))
    return min(switches, key=lambda switch: (switch.length, not switch.grows), default=None)


def forget_lengths(model: nn.Module) -> None:
    """Sets dynamic NTK back to the state of a new model: it keeps the frequencies of the longest sequence so far."""
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            if vars(module)[name] != module.original_max_seq_len:
                original = getattr(module, f"{prefix}original_inv_freq")
                setattr(module, name, module.original_max_seq_len)
                setattr(module, f"{prefix}inv_freq", original.to(getattr(module, f"{prefix}inv_freq").device))
