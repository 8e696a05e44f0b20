"""A forward pass for PEFT's adapted modules that touches only its branch's rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from dera_peft.engine.biases import TrainedBias, find_bias
from dera_peft.engine.experts import EXPERTS, check_parameters, parameter_forward, wrappers
from dera_peft.engine.plan import BatchPlan, Branch
from dera_peft.engine.routing import Routing
from dera_peft.errors import DeRaError

SUPPORTED_VARIANTS = (DoraEmbeddingVariant, DoraLinearVariant)


@dataclass(frozen=True)
class Adapted:
    """
    A module of the base that adapters change, by its name there, with the names of those that are used.

    A module without LoRA may be adapted by a trained bias alone.
    """

    name: str
    module: nn.Module
    adapters: frozenset[str]
    bias: TrainedBias | None = None

    @property
    def is_replaced(self) -> bool:
        """Whether an adapter replaces the module's weights, instead of adding a product to its output."""
        return isinstance(self.module, AuxiliaryTrainingWrapper)

    @property
    def scalings(self) -> dict[str, float]:
        """The factors by which the adapters' products are multiplied."""
        return {} if not isinstance(self.module, LoraLayer) else {n: self.module.scaling[n] for n in self.module.r}

    @property
    def interpolates(self) -> bool:
        """Whether weights between the module's own and those that replace them give outputs between theirs."""
        return self.is_replaced and isinstance(self.module.original_module, (nn.Linear, nn.Embedding))

    @property
    def scales(self) -> bool:
        """Whether an adapter's share of the output is proportional to a scale, as plain LoRA's is."""
        if isinstance(self.module, ParamWrapper) or EXPERTS in self.name.split("."):
            return False
        varied = self.module.lora_variant if isinstance(self.module, LoraLayer) else ()
        return not self.is_replaced and not self.adapters.intersection(varied)


def find_adapted(base: nn.Module, adapters: Sequence[str]) -> list[Adapted]:
    """
    The modules of `base` that any of `adapters` changes.

    Raises:
        DeRaError: one is adapted in a way that can't be kept to a branch's rows; names module, adapter and reason.
    """
    found = []
    inner: set[nn.Module] = set()  # layers in a LoRA layer, which stands for them
    for name, module in base.named_modules():
        bias = find_bias(module)
        if bias is not None and bias.adapter not in adapters:
            bias = None
        if isinstance(module, ParamWrapper):
            if module in inner:
                continue
            inner.update(chain := list(wrappers(module)))
            names = {adapter for wrapper in chain for adapter in wrapper.r}
        elif isinstance(module, LoraLayer):
            inner.add(module.get_base_layer())
            names = set(module.r) if bias is None else {*module.r, bias.adapter}
        elif isinstance(module, ModulesToSaveWrapper):
            names = set(module.modules_to_save)
        elif isinstance(module, TrainableTokensWrapper):
            names = set(module.token_adapter.token_indices)
        elif bias is not None and module not in inner:
            names = {bias.adapter}
        else:
            continue
        if names := frozenset(names.intersection(adapters)):
            found.append(Adapted(name, module, names, bias))
            _check(found[-1])
    return found


def _check(adapted: Adapted) -> None:
    name, layer = adapted.name, adapted.module
    if adapted.is_replaced:
        merged = layer.token_adapter.merged_adapters if isinstance(layer, TrainableTokensWrapper) else []
    else:
        parts = wrappers(layer) if isinstance(layer, ParamWrapper) else [layer] if isinstance(layer, LoraLayer) else []
        merged = [adapter for part in parts for adapter in part.merged_adapters]
    if merged:
        raise DeRaError(f"{name}: the adapter {merged} is merged into the base; call unmerge_adapter() first.")
    if isinstance(layer, ParamWrapper):
        check_parameters(name, layer)
    if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
        return
    for adapter in sorted(adapted.adapters.intersection(layer.r)):
        is_linear = (
            adapter in layer.lora_A
            and isinstance(layer.lora_A[adapter], nn.Linear)
            and not isinstance(layer, MultiheadAttention)
        )
        if not is_linear and not isinstance(layer, LoraEmbedding):
            raise DeRaError(
                f"{name}: adapter {adapter!r} is a LoRA {type(layer).__name__}; LoRA on linear layers, embeddings and "
                "parameters is supported."
            )
        variant = layer.lora_variant.get(adapter)
        if variant is not None and type(variant) not in SUPPORTED_VARIANTS:
            kind = type(variant).__name__
            raise DeRaError(
                f"{name}: adapter {adapter!r} uses the LoRA variant {kind}, which is not supported; plain LoRA, rsLoRA "
                "and DoRA are."
            )


def check_scales(branches: Sequence[Branch], adapted: Sequence[Adapted]) -> None:
    """
    Refuses adapters whose weights can't be scaled by λ.

    Raises:
        DeRaError: names module and adapter.
    """
    common = set.intersection(*(set(branch.adapters) for branch in branches))
    for module in adapted:
        if not (module.scales or module.interpolates) and (own := module.adapters - common):
            kind = "modules_to_save" if module.is_replaced else "DoRA"
            if isinstance(module.module, ParamWrapper) or EXPERTS in module.name.split("."):
                kind = "target_parameters or experts"
            raise DeRaError(
                f"{module.name}: adapter {min(own)!r} uses {kind}, whose weights can't be scaled by λ; mix logits."
            )


def check_one_replaces(branches: Sequence[Branch], adapted: Sequence[Adapted]) -> None:
    """
    Refuses a branch of which two adapters replace the weights of one module: only one could be used.

    Raises:
        DeRaError: names module and adapters.
    """
    for module in adapted:
        for branch in branches:
            both = [name for name in branch.adapters if name in module.adapters]
            if module.is_replaced and len(both) > 1:
                raise DeRaError(
                    f"{module.name}: the adapters {both} of the branch {branch.name!r} each bring weights of their own "
                    "for it (modules_to_save or trainable tokens), and only one's can be used."
                )


def branch_forward(adapted: Adapted, routing: Routing) -> Callable:
    """The `forward` of an adapted module under a plan."""
    module = adapted.module
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _replaced_forward(adapted, module, routing)
    if isinstance(module, ParamWrapper):
        return parameter_forward(adapted.name, module, adapted.adapters, routing)
    forward = _lora_forward(adapted, module, routing) if isinstance(module, LoraLayer) else module.forward
    return forward if adapted.bias is None else _biased_forward(adapted.name, adapted.bias, routing, forward)


def _lora_forward(adapted: Adapted, layer: LoraLayer, routing: Routing) -> Callable:
    """
    One base product over all rows, whatever the base layer is (quantized or not), then y[rows] += B(A(x[rows]))·s in
    place for the rows of the branches that have the adapter.
    """
    name, base_layer = adapted.name, layer.base_layer
    shares = {adapter: _make_share(layer, adapter) for adapter in adapted.adapters.intersection(layer.r)}

    def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        plan = routing.plan
        if routing.side_stream is not None:
            return forward_beside(x, routing.side_stream, *args, **kwargs)
        y = base_layer(x, *args, **kwargs)
        for adapter, runs in plan.adapter_rows.items():
            share = shares.get(adapter)
            if share is None:
                continue
            for run in runs:
                if run.start is None:  # all rows
                    share.add(share.lower(x, plan), y, plan)
                else:
                    rows = routing.rows(name, x, run)
                    share.add(share.lower(x[rows], plan), y[rows], plan)
        return y

    def forward_beside(x: torch.Tensor, side: torch.cuda.Stream, *args, **kwargs) -> torch.Tensor:
        """The same, with the small products with A on a second stream: they take no time beside the base's product."""
        plan, main = routing.plan, torch.cuda.current_stream()
        parts = [
            (shares[adapter], routing.rows(name, x, run))
            for adapter, runs in plan.adapter_rows.items()
            if adapter in shares
            for run in runs
        ]
        if not parts:  # a wait has its price too
            return base_layer(x, *args, **kwargs)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            lowered = [(share, rows, share.lower(x[rows], plan)) for share, rows in parts]
        y = base_layer(x, *args, **kwargs)
        main.wait_stream(side)
        for share, rows, low in lowered:
            share.add(low, y[rows], plan)
        return y

    return forward


class _Share(NamedTuple):
    """
    How an adapter's share is added to a module's output, in two functions.

    Attributes:
        lower: of the rows x and the plan, what needs no output yet: A·x for plain LoRA.
        add: adds to the rows y in place what `lower` gave.
    """

    lower: Callable[[torch.Tensor, BatchPlan], torch.Tensor]
    add: Callable[[torch.Tensor, torch.Tensor, BatchPlan], None]


def _as_it_is(x: torch.Tensor, plan: BatchPlan) -> torch.Tensor:
    return x


def _make_share(layer: LoraLayer, adapter: str) -> _Share:
    if adapter in layer.lora_variant:
        variant = layer.lora_variant[adapter]

        def add_variant(x: torch.Tensor, y: torch.Tensor, plan: BatchPlan) -> None:
            y.copy_(variant.forward(layer, active_adapter=adapter, x=_cast(layer, adapter, x), result=y))

        return _Share(_as_it_is, add_variant)
    is_plain = (
        not isinstance(layer, LoraEmbedding)
        and layer.lora_B[adapter].bias is None
        # of an offloaded layer, whose weights come when the module is called
        and not layer.lora_A[adapter].weight.is_meta
    )
    if is_plain:
        return _make_product(layer, adapter)

    def add_delta(x: torch.Tensor, y: torch.Tensor, plan: BatchPlan) -> None:
        y.add_(_scaled(_delta(layer, adapter, x), plan, adapter), alpha=layer.scaling[adapter])

    return _Share(_as_it_is, add_delta)


def _make_product(layer: LoraLayer, adapter: str) -> _Share:
    """
    The same in few operations, and in few steps of Python: while one token a row is decoded, their number costs more
    than the products themselves.
    """
    lora_a, lora_b = cast("nn.Linear", layer.lora_A[adapter]), cast("nn.Linear", layer.lora_B[adapter])
    dropout = layer.lora_dropout[adapter]
    rank, outputs, scaling = lora_b.in_features, lora_b.out_features, layer.scaling
    # `lora_a.weight` would be found by nn.Module.__getattr__, which takes as long as the product
    a_parameters = cast("dict[str, nn.Parameter]", lora_a._parameters)
    b_parameters = cast("dict[str, nn.Parameter]", lora_b._parameters)

    def lower(x: torch.Tensor, plan: BatchPlan) -> torch.Tensor:
        a = a_parameters["weight"]
        if x.dtype != a.dtype:
            x = x.type(a.dtype)
        low = nn.functional.linear(dropout(x) if dropout.training else x, a)
        return _scaled(low, plan, adapter) if plan.adapter_scale else low

    def add(low: torch.Tensor, y: torch.Tensor, plan: BatchPlan) -> None:
        b = b_parameters["weight"]
        if low.dtype == b.dtype == y.dtype:
            # folded to [n·S, D], the product and the sum are one call
            y.view(-1, outputs).addmm_(low.view(-1, rank), b.t(), alpha=scaling[adapter])
        else:
            y.add_(nn.functional.linear(low, b).type(y.dtype), alpha=scaling[adapter])

    return _Share(lower, add)


def _biased_forward(name: str, bias: TrainedBias, routing: Routing, unbiased: Callable) -> Callable:
    """y[rows] += trained bias - own bias, behind everything else: DoRA's norms leave the bias out."""

    def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        y = unbiased(x, *args, **kwargs)
        for run in routing.plan.adapter_rows.get(bias.adapter, ()):
            rows = routing.rows(name, x, run)
            y[rows].add_(_scaled(bias.delta.expand_as(y[rows]), routing.plan, bias.adapter))
        return y

    return forward


def _scaled(delta: torch.Tensor, plan: BatchPlan, adapter: str) -> torch.Tensor:
    """An adapter's share of the output times its λ, where weights are mixed."""
    if adapter not in plan.adapter_scale:
        return delta
    scale = plan.adapter_scale[adapter].to(delta.device, delta.dtype)
    scale = scale.repeat_interleave(delta.shape[0] // len(scale))
    return delta * scale.view(-1, *[1] * (delta.ndim - 1))


def _delta(layer: LoraLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(layer, LoraEmbedding):
        lora_a, lora_b, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
        return lora_b(lora_a(dropout(_cast(layer, adapter, x))))
    delta: torch.Tensor = layer._embed(x, layer.lora_embedding_A[adapter].T) @ layer.lora_embedding_B[adapter].T
    scale = layer._get_embed_scale()  # Gemma's embeddings are scaled in their own forward
    return delta if scale is None else delta * scale.to(delta.dtype)


def _cast(layer: LoraLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
    return x if isinstance(layer, LoraEmbedding) else x.to(cast("nn.Linear", layer.lora_A[adapter]).weight.dtype)


def _replaced_forward(adapted: Adapted, wrapper: AuxiliaryTrainingWrapper, routing: Routing) -> Callable:
    """Each branch's rows through the weights that its adapter brings, or through the base's own."""
    name, original = adapted.name, cast("nn.Module", wrapper.original_module)

    def of(adapter: str | None) -> Callable:
        if adapter is None:
            return original
        if isinstance(wrapper, ModulesToSaveWrapper):
            return wrapper.modules_to_save[adapter]
        return lambda x: wrapper.token_adapter.forward_adapters(x, [adapter])

    def mixed(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Of one row a sequence, whose weights are own + Σ scale·(replacing - own)."""
        own = y = original(x, *args, **kwargs)
        for adapter in sorted(adapted.adapters.intersection(routing.plan.adapter_rows)):
            y = y + _scaled(of(adapter)(x, *args, **kwargs) - own, routing.plan, adapter)
        return y

    def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not adapted.adapters.isdisjoint(routing.plan.adapter_scale):
            return mixed(x, *args, **kwargs)
        parts = []
        wanted = [next(iter(adapted.adapters & set(s.branch.adapters)), None) for s in routing.plan.segments]
        if len(set(wanted)) == 1:
            return of(wanted[0])(x, *args, **kwargs)
        for segment, adapter in zip(routing.plan.segments, wanted, strict=True):
            rows = routing.rows(name, x, slice(segment.start, segment.stop))
            parts.append(of(adapter)(x[rows], *args, **kwargs))
            if not isinstance(parts[-1], torch.Tensor):
                raise DeRaError(f"{name} is in modules_to_save and does not return a tensor; it can't be branched.")
        return torch.cat(parts)

    return forward
