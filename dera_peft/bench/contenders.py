"""The ways to get the mixture's next-token logits that are measured, all over the same weights."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from dera_peft.bench.engines import ENGINES, Dynamic, Engine
from dera_peft.engine.fork import find_layers
from dera_peft.engine.names import ALIGNED
from dera_peft.engine.plan import make_branches
from dera_peft.errors import DeRaError
from dera_peft.model import DeRaModel

LAM = 0.5
BASE, BASE_TWICE = "base, B rows", "base, 2B rows"
DERA, DERA_REFERENCE, DERA_ALIGNED = "DeRa λ=0.5", "DeRa λ=0", "DeRa λ=1"
DERA_TOP_HALF = "DeRa λ=0.5, adapter on top half"  # of the layers
DERA_JOIN_BEHIND = "DeRa λ=0.5, join behind head"
PEFT_ACTIVE, PEFT_MIXED = "PEFT, adapter on", "PEFT, mixed batch"
ON_OFF, TWO_MODELS = "adapter on / off, two passes", "two models, two passes"
NAMES = (
    BASE, BASE_TWICE, DERA, DERA_REFERENCE, DERA_ALIGNED, DERA_TOP_HALF, DERA_JOIN_BEHIND,
    PEFT_ACTIVE, PEFT_MIXED, ON_OFF, TWO_MODELS,
)  # fmt: skip
MIXTURES = (DERA, DERA_JOIN_BEHIND, PEFT_MIXED, ON_OFF, TWO_MODELS)  # the same logits, z_λ at λ=0.5, by five ways

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Pass:
    """
    One forward pass of a model for each token.

    Attributes:
        repeat: how many times the batch is stacked: 2 where both branches are rows of one batch.
        kwargs: of the model's forward; a function of B.
        around: a context in which the pass runs.
    """

    model: PreTrainedModel | PeftModel
    repeat: int = 1
    kwargs: Callable[[int], dict] = lambda batch_size: {}
    around: Callable[[], AbstractContextManager] = nullcontext
    cache: Cache | None = field(default=None, repr=False)
    step: Callable | None = field(default=None, repr=False)  # what computes a decoding step

    def run(self, tokens: torch.Tensor, forward: Callable) -> torch.Tensor:
        """`[B, S]` int64 -> the last position's logits, `[B·repeat, V]` (of a DeRaModel `[B, V]`)."""
        tokens = tokens.repeat(self.repeat, 1) if self.repeat > 1 else tokens
        with self.around():
            return forward(input_ids=tokens, past_key_values=self.cache, logits_to_keep=1, **self._kwargs).logits[:, -1]

    @property
    def config(self) -> PreTrainedConfig:
        return cast("PreTrainedConfig", self.model.config)  # a PeftModel's is its base's

    def make_cache(self, engine: Engine, batch_size: int, length: int) -> tuple[Cache, Callable]:
        """A cache, and what computes steps over it."""
        cache = engine.make_cache(self.model, length, self.kwargs(batch_size).get("lam"))
        return cache, engine.make_step(self.model, cache)

    def start(self, batch_size: int, cache: Cache, step: Callable) -> None:
        self.cache, self.step, self._kwargs = cache, step, self.kwargs(batch_size)


class Contender:
    """
    One way to decode a batch of forced tokens: a prefill, then a step for each token.

    Args:
        passes: run one after the other for every token.
        mixes: whether their rows, together `[2B, V]`, are reference and aligned logits that are still to be mixed.
        engine: how its steps are computed; eagerly unless given.
    """

    def __init__(self, name: str, passes: Sequence[Pass], mixes: bool = False, engine: Engine | None = None):
        self.name, self.passes, self.mixes = name, list(passes), mixes
        self.engine = Dynamic() if engine is None else engine
        self._kept: dict[tuple[int, int], list[tuple[Cache, Callable]]] = {}

    @torch.inference_mode()
    def prefill(self, input_ids: torch.Tensor, length: int, chunk: int | None = None) -> torch.Tensor:
        """
        `[B, S]` -> `[B, V]`, the logits behind the prompt, into a cache for `length` tokens.

        Args:
            chunk: tokens of the prompt that are computed at once; all without it.
        """
        for one, (cache, step) in zip(self.passes, self._caches(len(input_ids), length), strict=True):
            one.start(len(input_ids), cache, step)
        *parts, last = input_ids.split(chunk or input_ids.shape[1], dim=1)
        for part in parts:
            self._run(part, [one.model for one in self.passes])
        return self._run(last, [one.model for one in self.passes])

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, 1]` -> `[B, V]`."""
        return self._run(tokens, [one.step for one in self.passes if one.step is not None])

    def _run(self, tokens: torch.Tensor, forwards: Sequence[Callable]) -> torch.Tensor:
        rows = [one.run(tokens, forward) for one, forward in zip(self.passes, forwards, strict=True)]
        if not self.mixes:
            return rows[0]
        reference, aligned = rows if len(rows) == 2 else rows[0].chunk(2)
        return torch.lerp(reference, aligned, LAM)

    def _caches(self, batch_size: int, length: int) -> list[tuple[Cache, Callable]]:
        """Of each pass a cache, and what computes steps over it."""
        kept = self._kept.get((batch_size, length))
        if kept is None:
            kept = [one.make_cache(self.engine, batch_size, length) for one in self.passes]
            self._kept = {(batch_size, length): kept} if self.engine.keeps_caches else {}
        else:
            for cache, _ in kept:
                cache.reset()
        return kept

    def free(self) -> None:
        """Lets go of the caches, and of what was recorded over them."""
        self._kept = {}
        for one in self.passes:
            one.cache = one.step = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The weights and buffers that it needs, each once."""
        found: dict[int, torch.Tensor] = {}
        for one in self.passes:
            for tensor in (*one.model.parameters(), *one.model.buffers()):
                found.setdefault(tensor.data_ptr(), tensor)
                # of a 4-bit weight: the scales of its blocks
                state = vars(tensor).get("quant_state")
                parts = [] if state is None else [state.absmax, state.code]
                if state is not None and state.nested:
                    parts += [state.state2.absmax, state.state2.code]
                for part in parts:
                    found.setdefault(part.data_ptr(), part)
        return list(found.values())

    @property
    def weights_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values that its caches hold now; not of the states of recurrent layers."""
        caches = [one.cache for one in self.passes if one.cache is not None]
        layers = [layer for cache in caches for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
        held = [states for layer in layers for states in (layer.keys, layer.values) if states is not None]
        return sum(states.nbytes for states in held)

    @property
    def read_bytes(self) -> int:
        """
        What one decoding step reads, in bytes: the weights, once for each pass, and the cache. The adapter is counted
        also where λ=0 leaves it out. Of an embedding that is not the head too, only the tokens' rows are read, which is
        left out.
        """
        total = self.cache_bytes
        for one in self.passes:
            base = one.model.base if isinstance(one.model, DeRaModel) else one.model
            embeddings = cast("nn.Embedding", base.get_input_embeddings()).weight
            head = base.get_output_embeddings()
            assert head is not None  # it is a language model
            unread = 0 if head.weight is embeddings else embeddings.nbytes
            total += Contender("", [one]).weights_bytes - unread
        return total


def share(model: Model) -> Model:
    """Another tree of modules over the same parameters."""
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


def make_dera(peft_model: PeftModel) -> DeRaModel:
    """
    A DeRaModel as `from_pretrained` makes it. `from_peft` makes one whose base can still be trained, for which it keeps
    4-bit weights from the faster kernel that some CPUs decode with.
    """
    (adapter,) = peft_model.peft_config
    return DeRaModel(peft_model, make_branches([], {ALIGNED: adapter})).eval()


def make_contenders(
    peft_model: PeftModel, names: Sequence[str] = NAMES, engine_name: str = "dynamic"
) -> list[Contender]:
    """
    The contenders of `names`, over the weights of one PeftModel with one adapter; "two models" has a second copy.

    With another engine than the dynamic one (`engines.ENGINES`) only those have it that are one forward pass of an
    ordinary model; the others stay as they are.

    Raises:
        DeRaError: a name is not known.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise DeRaError(f"--only: {unknown[0]!r} is not known; there are: {'; '.join(NAMES)}.")
    (adapter,) = peft_model.peft_config
    engine = ENGINES[engine_name]()
    dera: dict[bool, DeRaModel] = {}
    plain: list[PreTrainedModel] = []

    def base() -> PreTrainedModel:
        if not plain:
            plain.append(share(peft_model).unload())
        return plain[0]

    def dera_pass(lam: float, behind: bool = False) -> Pass:
        if behind not in dera:
            dera[behind] = make_dera(share(peft_model))
            dera[behind].joins_before_head &= not behind
        return _dera_pass(dera[behind], lam)

    made = []
    for name in names:
        if name in (BASE, BASE_TWICE):
            made.append(Contender(name, [Pass(base(), repeat=1 + (name == BASE_TWICE))], engine=engine))
        elif name in (DERA, DERA_REFERENCE, DERA_ALIGNED):
            lam = {DERA: LAM, DERA_REFERENCE: 0.0, DERA_ALIGNED: 1.0}[name]
            made.append(Contender(name, [dera_pass(lam)], engine=engine))
        elif name == DERA_JOIN_BEHIND:
            made.append(Contender(name, [dera_pass(LAM, behind=True)], engine=engine))
        elif name == DERA_TOP_HALF:
            upper = make_dera(_on_top_half(peft_model))
            made.append(Contender(name, [_dera_pass(upper, LAM)], engine=engine))
        elif name == PEFT_ACTIVE:
            made.append(Contender(name, [Pass(share(peft_model))]))
        elif name == PEFT_MIXED:
            kwargs = _adapter_names(adapter)
            made.append(Contender(name, [Pass(share(peft_model), repeat=2, kwargs=kwargs)], mixes=True))
        elif name == ON_OFF:
            model = share(peft_model)
            # switching on again, PEFT sets requires_grad of the shared factors, by which compiled steps of others would
            # be compiled anew in a measured round: so once before any is
            with model.disable_adapter():
                pass
            passes = [Pass(model, around=model.disable_adapter), Pass(model)]
            made.append(Contender(name, passes, mixes=True))
        else:
            second = copy.deepcopy(peft_model)
            if not _is_quantized(peft_model):  # merging into a quantized base would change it
                second = second.merge_and_unload()
            made.append(Contender(name, [Pass(base()), Pass(second)], mixes=True))
    return made


def _dera_pass(model: DeRaModel, lam: float) -> Pass:
    return Pass(model, kwargs=lambda batch_size: {"lam": model.plan(lam, batch_size)})


def _on_top_half(peft_model: PeftModel) -> PeftModel:
    """The same without the adapter on the lower half of the layers."""
    shared = share(peft_model)
    found = find_layers(cast("PreTrainedModel", shared.get_base_model()))
    if found is None:
        raise DeRaError(f"{DERA_TOP_HALF!r}: the layers of this model can't be told; leave it out with --only.")
    _, layers = found
    for layer in layers[: len(layers) // 2]:
        for name, module in list(layer.named_modules()):
            if isinstance(module, LoraLayer):
                layer.set_submodule(name, module.get_base_layer())
    return shared


def _adapter_names(adapter: str) -> Callable[[int], dict]:
    return lambda batch_size: {"adapter_names": ["__base__"] * batch_size + [adapter] * batch_size}


def _is_quantized(peft_model: PeftModel) -> bool:
    return any(not parameter.is_floating_point() for parameter in peft_model.parameters())
