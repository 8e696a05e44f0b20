"""
Adapters on parameters (PEFT's `target_parameters`, and so a mixture's experts and routers): weights of their own for
each branch, which computes its rows by itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.func import functional_call

from dera_peft.engine.plan import BatchPlan
from dera_peft.engine.routing import Routing
from dera_peft.errors import DeRaError

EXPERTS = "experts"  # their name in a block, in all of transformers
FULL_PRECISION = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def wrappers(outer: ParamWrapper) -> Iterator[ParamWrapper]:
    """Of a module's adapted parameters: PEFT wraps it once for each."""
    layer: nn.Module = outer
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


def check_parameters(name: str, outer: ParamWrapper) -> None:
    """
    Raises:
        DeRaError: a parameter that is adapted is quantized: a delta can't be added to it.
    """
    for wrapper in wrappers(outer):
        dtype = wrapper.get_param().dtype
        if dtype not in FULL_PRECISION:
            raise DeRaError(
                f"{name}: the adapter is on its parameter {wrapper.parameter_name!r}, which is in "
                f"{str(dtype).removeprefix('torch.')}; load the base without quantization."
            )


def find_blocks(adapted: Iterable[tuple[str, frozenset[str]]]) -> dict[str, frozenset[str]]:
    """
    The blocks of mixtures whose experts adapters change, and these and all others that work in the block.

    Args:
        adapted: names of modules, with the adapters that change them.
    """
    adapted = list(adapted)
    paths = [name.split(".") for name, _ in adapted]
    blocks = {".".join(path[: path.index(EXPERTS)]) for path in paths if EXPERTS in path}
    return {
        block: frozenset().union(*(adapters for name, adapters in adapted if name.startswith(f"{block}.")))
        for block in sorted(blocks)
    }


def parameter_forward(name: str, outer: ParamWrapper, adapters: frozenset[str], routing: Routing) -> Callable:
    """Each branch's rows with the weights W + sum of its adapters' deltas, as PEFT computes them."""
    inner = outer.get_base_layer()

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        def run(rows: slice, part: BatchPlan) -> Any:
            weights = {}
            for wrapper in wrappers(outer):
                weight = wrapper.get_param()
                if weight.is_meta:
                    raise DeRaError(
                        f"{name}: the adapter is on its parameter {wrapper.parameter_name!r}, which is offloaded; load "
                        "the base onto one device."
                    )
                deltas = [wrapper.get_delta_weight(a) for a in part.adapter_rows if a in wrapper.lora_A]
                if deltas:
                    weights[wrapper.parameter_name] = sum(deltas, weight)
            of_rows = [_rows(value, x, rows) for value in (x, *args)]
            return functional_call(inner, weights, tuple(of_rows), {k: _rows(v, x, rows) for k, v in kwargs.items()})

        return _each(name, routing, adapters, x, run)

    return forward


def block_forward(name: str, block: nn.Module, adapters: frozenset[str], routing: Routing) -> Callable:
    """
    A mixture's block, whose experts' batches are some tokens of all rows: it works token by token, so each branch's
    rows go through it by themselves.
    """
    inner = block.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = routing.plan

        def run(rows: slice, part: BatchPlan) -> Any:
            routing.plan = plan if plan.adapter_scale else part  # one run then, of all adapters
            try:
                of_rows = [_rows(value, x, rows) for value in (x, *args)]
                return inner(*of_rows, **{k: _rows(v, x, rows) for k, v in kwargs.items()})
            finally:
                routing.plan = plan

        return _each(name, routing, adapters, x, run)

    return forward


def _each(name: str, routing: Routing, adapters: frozenset[str], x: torch.Tensor, run: Callable) -> Any:
    """What `run` makes of each run of rows that see the same of `adapters`, put together again."""
    runs = routing.plan.runs(adapters)
    if len(runs) == 1:
        return run(slice(None), runs[0][1])
    return _cat([run(routing.rows(name, x, rows), part) for rows, part in runs])


def _rows(value: Any, x: torch.Tensor, rows: slice) -> Any:
    is_of_rows = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == x.shape[0]
    return value[rows] if is_of_rows else value


def _cat(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(_cat(part) for part in zip(*parts, strict=True))
    return torch.cat(list(parts)) if isinstance(parts[0], torch.Tensor) else parts[0]
