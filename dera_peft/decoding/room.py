"""How much is computed at once: what is usual on a CPU, what the free memory holds on a GPU."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dera_peft.decoding.batch_size import ON_CPU, ON_GPU
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.names import WEIGHTS

CACHED = 0.5  # shares of the free memory of a GPU: keys and values,
COMPUTED = 0.2  # what the layers hold in a pass,
DISTRIBUTIONS = 0.25  # and logits with what is made of them; the rest is for fragments
COPIES = 24  # bytes of a logit in all its forms: as computed, in fp32, and the probabilities and mixtures made of it


@dataclass(frozen=True)
class Room:
    """
    What fits on a device at once. It is an estimate: where it was too much, the work is halved (`memory.Attempt`).

    Attributes:
        sequences: completions that are decoded together, where no batch size is given.
        cached: tokens of all sequences together whose keys and values are held, in all branches, while decoding.
        tokens: of one pass that scores, counted once for each branch; bounds what the layers hold.
        logits: of one such pass; they fill the memory at a vocabulary of 150,000.
    """

    sequences: int = ON_CPU
    cached: int = 32 * 1024
    tokens: int = 16 * 1024
    logits: int = 32 * 1024 * 1024

    @staticmethod
    def of(model: PreTrainedModel) -> "Room":
        """On a model's device as it is now, with the model loaded."""
        if model.device.type != "cuda":
            return Room()
        free = free_bytes(model.device)
        config = model.config.get_text_config(decoder=True)
        hidden, itemsize = config.hidden_size, model.dtype.itemsize
        wide = getattr(config, "intermediate_size", None) or 4 * hidden
        heads = getattr(config, "num_attention_heads", 1)  # a recurrent model has none, and needs no more than this
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        head = getattr(config, "head_dim", None) or hidden // heads
        a_row = 2 * config.num_hidden_layers * key_heads * head * itemsize
        in_a_layer = (8 * hidden + 4 * wide) * itemsize
        branches = len(model.branches) if isinstance(model, MixtureModel) and model.mixing != WEIGHTS else 1
        return Room(
            ON_GPU,
            int(CACHED * free / (a_row * branches)),
            int(COMPUTED * free / in_a_layer),
            int(DISTRIBUTIONS * free / COPIES),
        )


def free_bytes(device: torch.device) -> int:
    """Of a CUDA device: what nobody has, and what torch has reserved and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
