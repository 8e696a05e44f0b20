"""
The captured step: a decoding step of one plan, recorded once as a CUDA graph and replayed for each token.

A decoding step of a small batch is bound by launching thousands of kernels from Python; a graph launches them at once.
transformers' own `generate` stays the loop: it asks the model for the function that computes a step
(`get_compiled_call`), and is given a `CapturedStep`. Sampling, logits processors and stopping are outside of it.

A graph reads and writes the memory that it was recorded with. So what differs from step to step is copied into buffers:
tokens, masks, positions, and the weights that λ gives the branches. Keys and values are in a static cache, to which the
recordings belong.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache, StaticLayer, StaticSlidingWindowLayer

from dera_peft.engine.cuda_graph import CannotRecord, CudaGraphs
from dera_peft.engine.plan import BatchPlan
from dera_peft.engine.wiring import Wiring

WARM_UP = 2  # steps computed eagerly first, in which kernels are loaded and chosen, and get their workspaces
LENGTHS = 64  # a cache's length is a multiple of it, so that calls of nearly the same length can share one
KEPT, KEPT_BYTES = 8, 2 * 2**30  # idle caches, and the bytes that they may hold, kept for a call like an earlier one

RETURNED = ("logits", "token_lambda", "token_spent")  # of a step's output

PLAIN = (bool, int, float, str)

logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """What records steps: `CudaGraphs`, or a stand-in for it on another device."""

    device_type: str

    def start(self, device: torch.device) -> torch.cuda.Stream | None:
        """Before anything else; gives a second stream where there is one, for products beside the base's."""
        ...

    def warm_up(self, step: Callable[[], Any], device: torch.device) -> Any:
        """Computes a step and returns its output. Raises `CannotRecord`, with the output, if it can't be recorded."""
        ...

    def record(self, step: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """Records a step without computing it: what computes it, and its output, whose tensors that fills."""
        ...


class SlidingLayer(StaticSlidingWindowLayer):
    """transformers' own makes an index on the host at each step once its window is full, which can't be recorded."""

    def __init__(self, max_cache_len: int):
        super().__init__(max_cache_len, max_cache_len)

    @property
    def is_full(self) -> bool:
        return self.cumulative_length_int >= self.max_cache_len

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_full or key_states.shape[-2] != 1:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None  # once it is full
        assert self.values is not None
        self.cumulative_length_int += 1
        for states, new in ((self.keys, key_states), (self.values, value_states)):
            states.copy_(torch.cat([states[:, :, 1:], new], dim=2))
        return self.keys, self.values


@dataclass
class _Recording:
    """
    The recording of a cache's step for one kind of inputs, with its sliding windows full or not yet.

    Attributes:
        warm: how many steps were computed eagerly.
        replay: computes a step; None until it is recorded.
        buffers: the inputs that it reads, in the order of `tensors_in`.
        make_output: makes the step's output, but for its cache.
    """

    warm: int = 0
    replay: Callable[[], None] | None = None
    buffers: list[torch.Tensor] = field(default_factory=list)
    make_output: Callable[..., Any] = dict


class CapturedCache(StaticCache):
    """
    A static cache with the recordings that read and write it: they go when it goes.

    Attributes:
        length: the tokens that it has room for.
        plan: the plan of its steps, in tensors of its own.
        whole: whether layers with a sliding window hold all tokens too, which their masks then keep to the window.
        recordings: by what a step depends on beside the plan.
    """

    def __init__(self, config: PreTrainedConfig, length: int, plan: BatchPlan, whole: bool = False):
        super().__init__(config, length)
        self.layers = [
            layer
            if type(layer) is not StaticSlidingWindowLayer
            else StaticLayer(length)
            if whole
            else SlidingLayer(layer.max_cache_len)
            for layer in self.layers
        ]
        self.length, self.plan, self.whole = length, plan.copy(), whole
        self.recordings: dict[tuple, _Recording] = {}

    @property
    def sliding(self) -> list[SlidingLayer]:
        return [layer for layer in self.layers if isinstance(layer, SlidingLayer)]

    def states(self) -> Iterator[tuple[int, StaticLayer, torch.Tensor, torch.Tensor]]:
        """The layers that hold keys and values, and do not read another layer's: index, layer, keys and values."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, StaticLayer) and layer.keys is not None and layer.values is not None:
                yield index, layer, layer.keys, layer.values

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for _, _, keys, values in self.states())

    def follow(self, plan: BatchPlan) -> None:
        """Goes on under `plan`."""
        if plan.structure == self.plan.structure:
            self.plan.take_lam(plan)
        else:
            self.plan, self.recordings = plan.copy(), {}

    def as_dynamic(self, config: PreTrainedConfig) -> DynamicCache:
        """A copy of what it holds in a cache that grows, as other calls return it."""
        cache = DynamicCache(config=config)
        for index, layer, keys, values in self.states():
            length = int(layer.get_seq_length())
            end = min(length, layer.max_cache_len)
            cache.update(keys[:, :, :end], values[:, :, :end], index)  # which copies them
            if length > end:  # of a sliding window
                cache.layers[index].cumulative_length = length  # pyrefly: ignore[missing-attribute]
        cache.dera_pattern = self.plan.pattern  # pyrefly: ignore[missing-attribute] # our own mark on it
        return cache


class CapturedStep:
    """
    What `generate` calls for each token, in the model's place.

    The first steps are computed eagerly. The next one is recorded, which computes nothing, and replayed, as all further
    ones are. Steps that turn out not to be recordable stay eager.
    """

    def __init__(self, model: PreTrainedModel, wiring: Wiring, captures: "Captures", cache: CapturedCache):
        self.model, self.routing, self.captures, self.cache = model, wiring.routing, captures, cache

    def __call__(self, **inputs: Any) -> Any:
        tokens = inputs.get("input_ids")
        if tokens is None or tokens.shape[1] != 1 or self.captures.unfit:  # tokens of a prompt, given in chunks
            return self.model(**inputs)
        plan = inputs["lam"]
        if plan.rules is not None and plan.rules.state is not None:
            self.cache.plan.take_lam(plan)
        varying = {name: value for name, value in inputs.items() if name not in ("past_key_values", "lam")}
        kind = repr(map_tensors(lambda tensor: (tensor.shape, tensor.dtype), varying))
        key = (tuple(layer.is_full for layer in self.cache.sliding), kind)
        recording = self.cache.recordings.setdefault(key, _Recording())
        if recording.replay is not None:
            for buffer, value in zip(recording.buffers, tensors_in(varying), strict=True):
                buffer.copy_(value)
            for layer in self.cache.sliding:
                layer.cumulative_length_int += 1  # which the step does on the host, where a replay does nothing
        else:
            try:
                output = self._warm_up_or_record(recording, inputs, varying)
            except CannotRecord as reason:
                output = reason.output
                if output is None or recording.warm == WARM_UP:  # what happens in a first step may be for once
                    self.captures.refuse(str(reason))
                if output is None:
                    output = self.model(**inputs)
            if output is not None:
                return output
        assert recording.replay is not None
        recording.replay()
        return recording.make_output(past_key_values=self.cache)

    def _warm_up_or_record(self, recording: _Recording, inputs: dict, varying: dict) -> Any:
        """The step's output, or None where it was recorded, and so not computed."""
        recorder, device = self.captures.recorder, self.model.device
        self.routing.side_stream = recorder.start(device)
        try:
            if recording.warm < WARM_UP:
                recording.warm += 1
                # under the plan that is recorded, which keeps what a first pass makes of it on the host
                return recorder.warm_up(partial(self.model, **{**inputs, "lam": self.cache.plan}), device)
            self._record(recording, varying)
        finally:
            self.routing.side_stream = None

    def _record(self, recording: _Recording, varying: dict) -> None:
        """
        Raises:
            CannotRecord: the step does what a replay would leave out. Nothing has changed then.
        """
        model, cache, recorder = self.model, self.cache, self.captures.recorder
        static = map_tensors(lambda tensor: tensor.clone(memory_format=torch.contiguous_format), varying)
        lengths = [layer.cumulative_length_int for layer in cache.sliding]
        named = dict(model.named_modules())
        before = host_state(named.values())
        try:
            replay, output = recorder.record(
                partial(model, **static, past_key_values=cache, lam=cache.plan), model.device
            )
            for name, then, now in zip(named, before, host_state(named.values()), strict=True):
                if then != now:
                    changed = min(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
                    raise CannotRecord(f"a step changes {name}.{changed} on the host")
        except CannotRecord:
            for layer, length in zip(cache.sliding, lengths, strict=True):
                layer.cumulative_length_int = length
            for module, then in zip(named.values(), before, strict=True):
                vars(module).update(then)
            raise
        recording.replay, recording.buffers = replay, list(tensors_in(static))
        tensors = {name: output[name] for name in RETURNED if name in output}
        recording.make_output = partial(type(output), **tensors)


class Captures:
    """
    The captured steps of one model: of the call of `generate` in progress, and of earlier ones.

    Attributes:
        recorder: what records.
        asked: whether the call's steps are to be captured; None where nobody said.
        current: the call's cache, where its steps are captured.
        unfit: why steps of this model can't be captured, found out at an attempt.
    """

    def __init__(self, recorder: Recorder | None = None):
        self.recorder = CudaGraphs() if recorder is None else recorder
        self.asked: bool | None = None
        self.current: CapturedCache | None = None
        self.unfit: str | None = None
        self._idle: list[tuple[tuple, CapturedCache]] = []  # the one used last at the end
        self._fingerprint: tuple = ()
        self._said: set[str] = set()

    @contextmanager
    def call(self, asked: bool | None) -> Iterator[None]:
        """A call of `generate`, at whose end its cache waits for another one."""
        before = self.asked, self.current
        self.asked, self.current = asked, None
        try:
            yield
            if self.current is not None:
                self.keep(self.current)
        except torch.OutOfMemoryError:
            self.clear()
            raise
        finally:
            self.asked, self.current = before

    def wants(self, asked: bool | None, device: torch.device) -> bool:
        """Whether to capture steps, or to say why not, of a model on `device`."""
        return device.type == self.recorder.device_type if asked is None else asked

    def check_fresh(self, model: PreTrainedModel, wiring: Wiring) -> None:
        """Forgets what is known of a model whose weights have moved since, or that is put together in another way."""
        tensors = chain(model.parameters(), model.buffers())
        fingerprint = (
            wiring,
            wiring.joins_before_head,
            model.config._attn_implementation,
            tuple(tensor.data_ptr() for tensor in tensors),
            tuple(tuple(module.scalings.items()) for module in wiring.adapted),
        )
        if fingerprint != self._fingerprint:
            self.clear()
            self._fingerprint, self.unfit = fingerprint, None

    def take(self, config: PreTrainedConfig, plan: BatchPlan, length: int, whole: bool = False) -> CapturedCache:
        """
        An empty cache for at least `length` tokens, to follow the plan: an idle one with its recordings if there is one
        of this shape.
        """
        length = -(-length // LENGTHS) * LENGTHS
        key = self._key(plan, length, whole)
        for place, (its_key, cache) in enumerate(self._idle):
            if its_key == key:
                del self._idle[place]
                cache.reset()
                return cache
        return CapturedCache(config.get_text_config(decoder=True), length, plan, whole)

    def clear(self) -> None:
        """Gives back the memory of idle caches and their recordings."""
        self._idle.clear()

    def refuse(self, reason: str) -> None:
        """Steps stay eager from here on, until the model changes."""
        self.unfit = reason
        self.clear()
        self.say(reason)

    def say(self, reason: str) -> None:
        """Why steps are not captured: once, and as a warning to a caller who asked for it."""
        if reason not in self._said:
            self._said.add(reason)
            level = logging.INFO if self.asked is None else logging.WARNING
            logger.log(level, f"decoding steps are not captured as CUDA graphs: {reason}")

    def _key(self, plan: BatchPlan, length: int, whole: bool) -> tuple:
        return plan.structure, length, whole, torch.is_inference_mode_enabled()

    def keep(self, cache: CapturedCache) -> None:
        """It waits for `take`."""
        self._idle.append((self._key(cache.plan, cache.length, cache.whole), cache))
        while len(self._idle) > KEPT or sum(each.nbytes for _, each in self._idle) > KEPT_BYTES:
            del self._idle[0]


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """A nest of dicts, lists and tuples with `function` of each tensor in the tensor's place."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, each) for name, each in value.items()}
    return type(value)(map_tensors(function, each) for each in value) if type(value) in (list, tuple) else value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a nest of dicts, lists and tuples."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, value)
    return iter(found)


def host_state(modules: Iterable[torch.nn.Module]) -> list[dict[str, Any]]:
    """The plain values that each of the modules holds as attributes."""
    return [{name: value for name, value in vars(module).items() if type(value) in PLAIN} for module in modules]
