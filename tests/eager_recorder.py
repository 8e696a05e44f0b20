"""A stand-in for CUDA graphs on a CPU: what it replays does what a graph would do, and no more."""

from collections.abc import Callable
from typing import Any

import torch

from dera_peft.engine.capture import CapturedCache, host_state


class EagerRecorder:
    """
    Keeps a step as a function, and runs that on the same tensors at each replay.

    A graph runs the branches that the host took when it was recorded, in the memory that there was then, and changes
    nothing on the host. So the function runs with the host's state as it was at the recording, which is put back
    afterwards; and it fails if tensors have moved since, or if a step changes more of the host's state than a recording
    knows of.

    Attributes:
        recordings, replays: how many there were.
    """

    device_type = "cpu"
    side_stream = None

    def __init__(self):
        self.recordings = self.replays = 0

    def warm_up(self, step: Callable[[], Any], device: torch.device) -> Any:
        return step()

    def record(self, step: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        self.recordings += 1
        model, cache = step.func, step.keywords["past_key_values"]
        assert isinstance(cache, CapturedCache)
        states = [
            getattr(layer, name) for layer in cache.layers for name in ("keys", "values") if layer.keys is not None
        ]
        states += [layer.cumulative_length for layer in cache.layers if hasattr(layer, "cumulative_length")]
        kept = [state.clone() for state in states]
        lengths = _lengths(cache)
        output = step()
        for state, before in zip(states, kept, strict=True):  # recording computes nothing
            state.copy_(before)
        output.logits = output.logits.clone().fill_(float("nan"))
        addresses = _addresses(model, step.keywords)

        def replay() -> None:
            self.replays += 1
            assert _addresses(model, step.keywords) == addresses, "a replay would read memory that is no longer there"
            now, host = _lengths(cache), host_state(model)
            _set_lengths(cache, lengths)
            output.logits.copy_(step().logits)
            advanced = [None if length is None else length + 1 for length in lengths]
            assert _lengths(cache) == advanced, "a step changes the host's state in the cache otherwise than known"
            assert host_state(model) == host, "a step changes the host's state in the model"
            _set_lengths(cache, now)

        return replay, output


def _lengths(cache: CapturedCache) -> list[int | None]:
    return [getattr(layer, "cumulative_length_int", None) for layer in cache.layers]


def _set_lengths(cache: CapturedCache, lengths: list[int | None]) -> None:
    for layer, length in zip(cache.layers, lengths, strict=True):
        if length is not None:
            layer.cumulative_length_int = length


def _addresses(model, inputs: dict) -> list[int]:
    cache, plan = inputs["past_key_values"], inputs["lam"]
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [state for layer in cache.layers for state in (layer.keys, layer.values) if state is not None]
    tensors += [tensor for segment in plan.segments for tensor in (segment.sequences, segment.weights)]
    tensors += [plan.source, *plan.adapter_scale.values()]
    return [tensor.data_ptr() for tensor in tensors]
