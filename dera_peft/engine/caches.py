"""Which rows a KV cache holds: B below the fork, those of the branches above it."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache, LinearAttentionCacheLayerMixin

from dera_peft.engine.plan import BatchPlan
from dera_peft.errors import DeRaError


def claim_cache(cache: Cache, plan: BatchPlan, fork_layer: int) -> None:
    """
    Marks a cache as that of a plan's rows. An empty one may have been of others before (`reset`): its buffers are then
    made anew by the first keys that it sees.

    Raises:
        DeRaError: it is filled, under a plan of other rows or by another model; it would be read as other branches'.
    """
    filled = getattr(cache, "dera_pattern", None)
    if filled == plan.pattern:
        return
    first = plan.first_forked(fork_layer)
    others = [
        layer
        for index, layer in _layers(cache)
        if not _rows(layer) <= {plan.num_rows if index >= first else plan.batch_size}
    ]
    # a static cache's length is on the device, and is only asked for where it matters
    if (others or filled is not None) and not _is_empty(cache):
        raise DeRaError(
            "past_key_values was filled at a λ for which other branches were computed, or by another model; go on with "
            "a λ that needs the same branches for each sequence, or start with plan(lam, batch_size, "
            "every_branch=True)."
        )
    for layer in others:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.is_conv_states_initialized = dict.fromkeys(range(layer.number_of_states), False)
            layer.is_recurrent_states_initialized = dict.fromkeys(range(layer.number_of_states), False)
        layer.is_initialized = False
    cache.dera_pattern = plan.pattern  # pyrefly: ignore[missing-attribute] # our own mark on it


def select_rows(
    cache: Cache, sequences: torch.Tensor, fork_layer: int, plan: BatchPlan, filled: BatchPlan | None = None
) -> None:
    """
    Makes of a cache that of other sequences, in its place, as for beams.

    Args:
        sequences: `[B]` int64, which of the cache's sequences each one is.
        plan: of the B sequences.
        filled: of the sequences that the cache holds; the same unless given.
    """
    rows = cast("torch.LongTensor", plan.rows_in(plan if filled is None else filled, sequences))
    if fork_layer == 0:  # an encoder-decoder's cache is two
        cache.reorder_cache(rows)
    else:
        for index, layer in enumerate(cache.layers):
            layer.reorder_cache(cast("torch.LongTensor", sequences) if index < fork_layer else rows)
    cache.dera_pattern = plan.pattern  # pyrefly: ignore[missing-attribute] # our own mark on it


def _layers(cache: Cache) -> Iterator[tuple[int, Any]]:
    """Each layer and its index, of a decoder's self-attention and of its cross-attention."""
    is_pair = isinstance(cache, EncoderDecoderCache)
    for part in (cache.self_attention_cache, cache.cross_attention_cache) if is_pair else (cache,):
        yield from enumerate(part.layers)


def _rows(layer) -> set[int]:
    """The number of rows that a layer's buffers hold; nothing for one without."""
    states = [layer.keys] if getattr(layer, "is_initialized", False) and hasattr(layer, "keys") else []
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        conv, recurrent = layer.is_conv_states_initialized, layer.is_recurrent_states_initialized
        states += [layer.conv_states[i] for i in conv if conv[i]]
        states += [layer.recurrent_states[i] for i in recurrent if recurrent[i]]
    return {state.shape[0] for state in states if isinstance(state, torch.Tensor)}


def _is_empty(cache: Cache) -> bool:
    for _, layer in _layers(cache):
        if isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values()):
            return False
    return all(layer.get_seq_length() == 0 for _, layer in _layers(cache) if hasattr(layer, "get_seq_length"))
