"""Captured steps against eager ones, on a CUDA device and, with a stand-in for its graphs, on a CPU."""

from collections.abc import Callable
from typing import Any

import torch
from compatibility import VOCABULARY
from transformers.cache_utils import StaticCache

from dera_peft import DeRaModel
from dera_peft.engine.capture import LENGTHS, RETURNED, CapturedCache, Captures, host_state
from dera_peft.engine.cuda_graph import CudaGraphs

LAM = [0.0, 0.5, 1.0, 1.5]
OPTIONS = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}


class Counted:
    """A recorder, with how many recordings and replays there were."""

    def __init__(self, recorder):
        self.recorder, self.device_type = recorder, recorder.device_type
        self.recordings = self.replays = 0

    def start(self, device):
        return self.recorder.start(device)

    def warm_up(self, step, device):
        return self.recorder.warm_up(step, device)

    def record(self, step, device):
        replay, output = self.recorder.record(step, device)
        self.recordings += 1

        def counted() -> None:
            self.replays += 1
            replay()

        return counted, output


def padded(device: torch.device) -> dict[str, torch.Tensor]:
    """Four prompts of different lengths."""
    ids = torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, count in enumerate([3, 0, 5, 2]):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def watch(model: DeRaModel, device: torch.device) -> Counted:
    """Moves a model, and has its recordings counted; a CPU's are those of the stand-in."""
    if model.device.type != device.type:
        model.to(device)
    recorder = Counted(CudaGraphs() if device.type == "cuda" else EagerRecorder())
    model._captures = Captures(recorder)
    return recorder


def run(model: DeRaModel, capture: bool, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[B, S]`, and the logits of each step, captured or eager, over a static cache of the same length."""
    options = {**OPTIONS, **options}
    ids = options.pop("input_ids", None)
    length = (0 if ids is None else ids.shape[1]) + options["max_new_tokens"]
    if not capture:
        config = model.config.get_text_config(decoder=True)
        options["past_key_values"] = StaticCache(config=config, max_cache_len=-(-length // LENGTHS) * LENGTHS)
        options["disable_compile"] = True
    torch.manual_seed(0)
    output = model.generate(ids, capture=capture, output_logits=True, return_dict_in_generate=True, **options)
    return output.sequences, torch.stack(output.logits)


def assert_bit_equal(model: DeRaModel, **options: Any) -> torch.Tensor:
    """Tokens of the captured run, after comparing them and all logits to the eager run's."""
    (tokens, logits), (eager_tokens, eager_logits) = (run(model, capture, **options) for capture in (True, False))
    assert tokens.tolist() == eager_tokens.tolist()
    assert torch.equal(logits, eager_logits)
    return tokens


class EagerRecorder:
    """
    Keeps a step as a function, and runs that on the same tensors at each replay.

    A graph runs the branches that the host took when it was recorded, in the memory that there was then, and changes
    nothing on the host. So the function runs with the host's state as it was at the recording, which is put back
    afterwards; and it fails if tensors have moved since, or if a step changes more of the host's state than a recording
    knows of.
    """

    device_type = "cpu"

    def start(self, device: torch.device) -> None:
        """It has no streams."""

    def warm_up(self, step: Callable[[], Any], device: torch.device) -> Any:
        return step()

    def record(self, step: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
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
        for name in RETURNED:
            if output.get(name) is not None:
                output[name] = output[name].clone().fill_(float("nan"))
        tensors, modules = _tensors(model, step.keywords), list(model.modules())
        addresses = [tensor.data_ptr() for tensor in tensors()]

        def replay() -> None:
            assert [tensor.data_ptr() for tensor in tensors()] == addresses, (
                "a replay would read memory that is no longer there"
            )
            now, host = _lengths(cache), host_state(modules)
            _set_lengths(cache, lengths)
            now_computed = step()
            for name in RETURNED:
                if output.get(name) is not None:
                    output[name].copy_(now_computed[name])
            advanced = [None if length is None else length + 1 for length in lengths]
            assert _lengths(cache) == advanced, "a step changes the host's state in the cache otherwise than known"
            assert host_state(modules) == host, "a step changes the host's state in the model"
            _set_lengths(cache, now)

        return replay, output


def _lengths(cache: CapturedCache) -> list[int | None]:
    return [getattr(layer, "cumulative_length_int", None) for layer in cache.layers]


def _set_lengths(cache: CapturedCache, lengths: list[int | None]) -> None:
    for layer, length in zip(cache.layers, lengths, strict=True):
        if length is not None:
            layer.cumulative_length_int = length


def _tensors(model, inputs: dict) -> Callable[[], list[torch.Tensor]]:
    """Gives the tensors that a step reads as they are there when it is asked."""
    cache, plan = inputs["past_key_values"], inputs["lam"]
    places = [module._parameters for module in model.modules()] + [module._buffers for module in model.modules()]

    def tensors() -> list[torch.Tensor]:
        found = [tensor for place in places for tensor in place.values() if tensor is not None]
        found += [state for layer in cache.layers for state in (layer.keys, layer.values) if state is not None]
        found += [tensor for segment in plan.segments for tensor in (segment.sequences, segment.weights)]
        found += [] if plan.combiner is None else [*plan.combiner.tensors, plan.combiner.rows]
        return [*found, plan.source, *plan.adapter_scale.values()]

    return tensors
