"""
What a model keeps of sequences between two steps: keys and values, or recurrent states, of all rows of a plan.

Sequences end in the last column; shorter ones stand behind padding. Keys and values of all columns are held for layers
with a sliding window too: the masks keep to the window, and a prefix can be cut off anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.plan import BatchPlan
from dera_peft.errors import DeRaError

ROOM = 64  # columns that are left for the tokens to come


class RoomyLayer(DynamicLayer):
    """Writes new keys and values into room that was left, where transformers' own copies all of them for each token."""

    _room: tuple[torch.Tensor, torch.Tensor]

    def fill(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Takes these tensors, `[R, heads, columns, D]`, of which the first `length` columns are filled."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._room = (keys, values)
        self._show(length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if not self.is_initialized or stop > self._room[0].shape[2]:
            keys = _with_columns(key_states, stop + ROOM, self.keys)
            self.fill(keys, _with_columns(value_states, stop + ROOM, self.values), stop)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = states
        self._show(stop)
        assert self.keys is not None  # _show sets both
        assert self.values is not None
        return self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys, self.values = (states[:, :, :length] for states in self._room)


def _with_columns(like: torch.Tensor, columns: int, before: torch.Tensor | None) -> torch.Tensor:
    room = like.new_empty(*like.shape[:2], columns, like.shape[3])
    if before is not None:
        room[:, :, : before.shape[2]] = before
    return room


LAYERS: dict[type, type] = {
    DynamicLayer: RoomyLayer,
    DynamicSlidingWindowLayer: RoomyLayer,
    LinearAttentionLayer: LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer: LinearAttentionAndFullAttentionLayer,
    DummyLayer: DummyLayer,
}


def layer_kinds(model: MixtureModel) -> list[type]:
    """
    The kind of each layer of a model's cache.

    Raises:
        DeRaError: the model can't be decoded by requests that join and leave.
    """
    if model.config.is_encoder_decoder:
        raise DeRaError(f"{model.config.model_type} is an encoder-decoder, which can't be served: use generate.")
    if not model._supports_default_dynamic_cache():
        raise DeRaError(f"{model.config.model_type} has a cache of its own, and can't be served: use generate.")
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    kinds = [type(layer) for layer in layers]
    if not layers:  # transformers makes them as they are needed
        kinds = [DynamicLayer] * model.config.get_text_config(decoder=True).num_hidden_layers
    for kind in kinds:
        if kind not in LAYERS:
            raise DeRaError(
                f"{model.config.model_type} has cache layers ({kind.__name__}) that can't be served: use generate."
            )
    return [LAYERS[kind] for kind in kinds]


def is_recurrent(kinds: Sequence[type]) -> bool:
    """Whether a sequence has a state that can neither be cut nor computed in chunks."""
    return any(issubclass(kind, LinearAttentionCacheLayerMixin) for kind in kinds)


def new_cache(kinds: Sequence[type]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [kind() for kind in kinds]
    return cache


@dataclass(frozen=True)
class Part:
    """
    Sequences of one cache that go into another.

    Attributes:
        sequences: indices into the plan's.
        start, stop: the columns that are taken.
    """

    plan: BatchPlan
    cache: Cache
    sequences: Sequence[int]
    start: int
    stop: int


def keys_and_values(layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Of a layer of any cache, `[R, heads, columns, D]` each; None of one that has none, or reads another layer's."""
    keys = getattr(layer, "keys", None)
    return None if keys is None else (keys, layer.values)


@torch.no_grad()
def gather(
    model: MixtureModel, kinds: Sequence[type], plan: BatchPlan, parts: Sequence[Part], length: int, room: int = ROOM
) -> DynamicCache:
    """
    A cache of its own for the parts' sequences, one part behind the other, each row ending in column `length`.

    Args:
        kinds: of its layers.
        plan: of these sequences. The rows of a branch that a part's own plan has not computed are copies of another's.
        room: columns to leave for further tokens.
    """
    by_part = [torch.tensor(part.sequences, device=plan.device) for part in parts]
    sequences = torch.cat(by_part)
    of_part = torch.cat([torch.full_like(each, index) for index, each in enumerate(by_part)])
    row_of = torch.cat([part.plan.row_of[:, each] for part, each in zip(parts, by_part, strict=True)], dim=1)
    # where each part's rows go, and which of its own they are, below and above the fork
    below = _moves(of_part, sequences, len(parts))
    above = _moves(of_part[plan.source], plan.rows_among(row_of), len(parts))
    cache = new_cache(kinds)
    for index, layer in enumerate(cache.layers):
        sources: list[Any] = [part.cache.layers[index] for part in parts]
        is_forked = index >= model.fork_layer
        moves, count = (above, plan.num_rows) if is_forked else (below, plan.batch_size)
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            _gather_states(layer, sources, moves, count)
        if isinstance(layer, DynamicLayer) and any(source.is_initialized for source in sources):
            _gather_keys(layer, sources, parts, moves, count, length, room)
    cache.dera_pattern = plan.pattern  # pyrefly: ignore[missing-attribute] # our own mark on it
    return cache


Moves = Sequence[tuple[torch.Tensor, torch.Tensor]]  # for each part: the new rows, and which of its own they are


def _moves(of_part: torch.Tensor, rows: torch.Tensor, parts: int) -> Moves:
    """`of_part` says of each new row which part it comes from, and `rows` which of that part's rows it is."""
    return [((of_part == part).nonzero()[:, 0], rows[of_part == part]) for part in range(parts)]


def _gather_keys(
    layer: DynamicLayer, sources: list[Any], parts: Sequence[Part], moves: Moves, count: int, length: int, room: int
) -> None:
    like = next(source.keys for source in sources if source.is_initialized)
    room = room if isinstance(layer, RoomyLayer) else 0
    both = [like.new_empty(count, like.shape[1], length + room, dim) for dim in _dims(sources)]
    for part, source, (new, old) in zip(parts, sources, moves, strict=True):
        width = part.stop - part.start
        for target, name in zip(both, ("keys", "values"), strict=True):
            place = new.to(target.device)
            if length > width:
                target[place, :, : length - width] = 0  # masked, but what is masked must be finite
            if width:
                states = getattr(source, name)[:, :, part.start : part.stop]
                target[place, :, length - width : length] = states.index_select(0, old.to(target.device))
    if isinstance(layer, RoomyLayer):
        layer.fill(both[0], both[1], length)
    else:
        layer.lazy_initialization(*both)
        layer.keys, layer.values = both


def _dims(sources: list[Any]) -> tuple[int, int]:
    """Of keys and of values, which differ in latent attention."""
    source = next(source for source in sources if source.is_initialized)
    return source.keys.shape[3], source.values.shape[3]


def _gather_states(layer: LinearAttentionCacheLayerMixin, sources: list[Any], moves: Moves, count: int) -> None:
    for kind in ("conv", "recurrent"):
        name, flag = f"{kind}_states", f"is_{kind}_states_initialized"
        for index, is_there in getattr(sources[0], flag).items():
            if not is_there:
                continue
            like = getattr(sources[0], name)[index]
            states = like.new_empty(count, *like.shape[1:])
            for source, (new, old) in zip(sources, moves, strict=True):
                states[new.to(like.device)] = getattr(source, name)[index].index_select(0, old.to(like.device))
            getattr(layer, name)[index] = states
            getattr(layer, flag)[index] = True
    layer.number_of_states = sources[0].number_of_states
    layer.has_previous_state = dict(sources[0].has_previous_state)
    layer.conv_kernel_size = dict(sources[0].conv_kernel_size)
    layer.device, layer.dtype = sources[0].device, sources[0].dtype
