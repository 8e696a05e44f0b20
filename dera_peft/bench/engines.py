"""The ways in which the decoding steps of a contender are computed, by the names that `dera bench --engine` has."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from dera_peft.engine.capturable import why_not_model
from dera_peft.engine.capture import WARM_UP, CapturedCache, CapturedStep, Recorder
from dera_peft.engine.cuda_graph import CannotRecord, CudaGraphs
from dera_peft.engine.plan import BatchPlan
from dera_peft.errors import DeRaError
from dera_peft.model import DeRaModel

Model = PreTrainedModel | PeftModel


class Engine(Protocol):
    """
    Attributes:
        keeps_caches: whether a cache serves every run of its shape, because its step belongs to it.
    """

    keeps_caches: bool

    def make_cache(self, model: Model, length: int, plan: BatchPlan | None) -> Cache:
        """An empty cache for `length` tokens. The plan is a DeRaModel's."""
        ...

    def make_step(self, model: Model, cache: Cache) -> Callable[..., Any]:
        """What computes a decoding step over the cache: called as the model is."""
        ...


class Dynamic:
    """Eager, over a cache that grows."""

    keeps_caches = False

    def make_cache(self, model: Model, length: int, plan: BatchPlan | None) -> Cache:
        return DynamicCache(config=model.config)

    def make_step(self, model: Model, cache: Cache) -> Callable[..., Any]:
        return model


class Static:
    """
    Compiled whole over a static cache, on a CUDA device with CUDA graphs, as transformers' `generate` does it for bases
    that bitsandbytes has not quantized.
    """

    keeps_caches = True

    def __init__(self):
        self._compiled: dict[int, Callable[..., Any]] = {}

    def make_cache(self, model: Model, length: int, plan: BatchPlan | None) -> Cache:
        return StaticCache(config=model.config, max_cache_len=length)

    def make_step(self, model: Model, cache: Cache) -> Callable[..., Any]:
        compiled = self._compiled.get(id(model))
        if compiled is None:
            compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
            self._compiled[id(model)] = compiled
        return compiled


class Captured:
    """
    Recorded as a CUDA graph over a static cache: of a DeRaModel as its `generate` does it with capture=True, of another
    model in the same way.

    Raises:
        DeRaError: a step can't be recorded.
    """

    keeps_caches = True

    def __init__(self, make_recorder: Callable[[], Recorder] = CudaGraphs):
        self.make_recorder = make_recorder

    def make_cache(self, model: Model, length: int, plan: BatchPlan | None) -> Cache:
        if plan is None:
            return StaticCache(config=model.config, max_cache_len=length)
        return CapturedCache(cast("PreTrainedModel", model).config, length, plan)

    def make_step(self, model: Model, cache: Cache) -> Callable[..., Any]:
        if isinstance(model, DeRaModel):
            captures = model._captures
            _refuse_if(why_not_model(model, model._wiring, captures))
            captured = CapturedStep(model, model._wiring, captures, cast("CapturedCache", cache))

            def step(**inputs: Any) -> Any:
                output = captured(**inputs)
                _refuse_if(captures.unfit)
                return output

            return step
        recorder = self.make_recorder()
        _refuse_if(None if model.device.type == recorder.device_type else f"the model is on {model.device}")
        return RecordedStep(model, recorder)


class RecordedStep:
    """A step of a model without λ as a CUDA graph: two are computed eagerly, the next one is recorded and replayed."""

    def __init__(self, model: Model, recorder: Recorder):
        self.model, self.recorder = model, recorder
        self.warm = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, **inputs: Any) -> Any:
        device = self.model.device
        try:
            if self.replay is None:
                self.recorder.start(device)
                if self.warm < WARM_UP:
                    self.warm += 1
                    return self.recorder.warm_up(partial(self.model, **inputs), device)
                self.tokens = inputs["input_ids"].clone()
                static = {**inputs, "input_ids": self.tokens}
                self.replay, self.output = self.recorder.record(partial(self.model, **static), device)
            else:
                self.tokens.copy_(inputs["input_ids"])
        except CannotRecord as reason:
            _refuse_if(str(reason))
        assert self.replay is not None
        self.replay()
        return self.output


def _refuse_if(reason: str | None) -> None:
    if reason is not None:
        raise DeRaError(f"--engine captured: {reason}.")


ENGINES: dict[str, Callable[[], Engine]] = {"dynamic": Dynamic, "static": Static, "captured": Captured}
