"""Adapters on vLLM's linear layers: one base product over all rows, and each branch's deltas on its rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from dera_peft.engine.plan import Branch
from dera_peft.errors import DeRaError
from dera_peft.vllm.deltas import Delta

Linear = ColumnParallelLinear | RowParallelLinear


@dataclass(frozen=True)
class Part:
    """
    What one adapter adds to some of a module's outputs, on this rank.

    Attributes:
        adapter: its name.
        a, b: `[r, inputs]` and `[columns, r]`.
        columns: of the output, on this rank.
    """

    adapter: str
    a: torch.Tensor
    b: torch.Tensor
    columns: slice


def adapt_linears(
    model: nn.Module,
    deltas: Mapping[str, Sequence[Delta]],
    branches: Sequence[Branch],
    packed: Mapping[str, Sequence[str]],
    is_forked: Mapping[str, bool],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """
    Makes the linear layers of a vLLM model add the deltas of adapters.

    Args:
        deltas: by the names of the base's modules; all of them are on this rank.
        packed: the name of a module here -> the base's modules that it holds, of vLLM's class.
        is_forked: the name of a module of the base -> whether it is given the rows of all branches, or each token once.

    Raises:
        DeRaError: vLLM's model has no such module.
    """
    left = set(deltas)
    for name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        parent, _, own = name.rpartition(".")
        names = [f"{parent}.{each}" for each in packed.get(own, [own])]
        found = [each for each in names if each in deltas]
        if not found:
            continue
        left.difference_update(found)
        parts = [part for each in found for part in _parts(module, names.index(each), len(names), deltas[each])]
        counted = branches if is_forked[found[0]] else branches[:1]
        _adapt(module, parts, counted, device, dtype)
    if left:
        raise DeRaError(f"vLLM's {type(model).__name__} has no module {min(left)!r}, which an adapter changes.")


def _parts(module: Linear, place: int, count: int, deltas: Sequence[Delta]) -> Iterator[Part]:
    """
    The shares of this rank.

    Args:
        place: of the base's module among those that `module` holds.
        count: of those; 1 also where the base has one module for what vLLM splits, as Phi-3's qkv_proj.
    """
    if isinstance(module, RowParallelLinear):
        for delta in deltas:  # the inputs are split; the products' sum is that of all ranks
            yield Part(delta.adapter, delta.a.chunk(module.tp_size, dim=1)[module.tp_rank], delta.b, slice(None))
        return
    widths = module.output_partition_sizes
    places = range(len(widths)) if count == 1 else [place]
    first = sum(widths[: places[0]])
    columns = slice(first, first + sum(widths[each] for each in places))
    for delta in deltas:
        whole = delta.b.split(_whole_widths(module, places))
        shares = [
            b[_share(module, each) * widths[each] :][: widths[each]] for each, b in zip(places, whole, strict=True)
        ]
        yield Part(delta.adapter, delta.a, torch.cat(shares), columns)


def _whole_widths(module: ColumnParallelLinear, places: Sequence[int]) -> list[int]:
    """The outputs of the base's parts; where there are fewer heads of keys than ranks, vLLM counts these repeated."""
    widths = [module.output_partition_sizes[each] * module.tp_size for each in places]
    if isinstance(module, QKVParallelLinear):
        repeated = module.num_kv_head_replicas
        widths = [width // (repeated if each > 0 else 1) for each, width in zip(places, widths, strict=True)]
    return widths


def _share(module: ColumnParallelLinear, place: int) -> int:
    is_of_keys = isinstance(module, QKVParallelLinear) and place > 0
    return module.tp_rank // module.num_kv_head_replicas if is_of_keys else module.tp_rank


def _adapt(
    module: Linear, parts: Sequence[Part], branches: Sequence[Branch], device: torch.device, dtype: torch.dtype
) -> None:
    """`branches`: those whose rows the module is given, each as many as the others."""
    runs = {part.adapter: _runs(branches, part.adapter) for part in parts}
    for index, part in enumerate(parts):
        # not saved with the weights, and not looked for among them
        module.register_buffer(f"dera_a_{index}", part.a.to(device, dtype).contiguous(), persistent=False)
        module.register_buffer(f"dera_b_{index}", part.b.to(device, dtype).contiguous(), persistent=False)
    module.requires_unquantized_input = True  # vLLM's fused activations would hand over quantized ones
    forward = module.forward
    reduces = isinstance(module, RowParallelLinear) and module.reduce_results and module.tp_size > 1
    if reduces:
        module.reduce_results = False  # before the deltas are added

    def adapted(x: torch.Tensor) -> Any:
        y, bias = forward(x)
        count = x.shape[0] // len(branches)
        for index, part in enumerate(parts):
            a, b = getattr(module, f"dera_a_{index}"), getattr(module, f"dera_b_{index}")
            for start, stop in runs[part.adapter]:
                rows = slice(start * count, stop * count)
                y[rows, part.columns] += x[rows] @ a.T @ b.T
        return (tensor_model_parallel_all_reduce(y) if reduces else y), bias

    module.forward = adapted


def _runs(branches: Sequence[Branch], adapter: str) -> list[tuple[int, int]]:
    """The runs of branches that see an adapter, as (first, behind the last)."""
    runs: list[tuple[int, int]] = []
    for place, branch in enumerate(branches):
        if adapter not in branch.adapters:
            continue
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs
