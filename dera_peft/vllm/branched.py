"""
A vLLM model in which each request forks into its branches.

T tokens are T rows up to the first layer with an adapter, and n·T rows from there on, those of the reference first. An
attention layer there has the heads of all branches side by side, in one KV cache: blocks, prefix cache, preemption and
scheduler see one request, and the keys and values that are cached do not depend on λ. Before the head the rows are
mixed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index, make_empty_intermediate_tensors_factory
from vllm.sequence import IntermediateTensors

from dera_peft.checkpoint.check import check
from dera_peft.vllm.branches import Branches
from dera_peft.vllm.deltas import fork_layer, layer_of, read_deltas
from dera_peft.vllm.linear import adapt_linears
from dera_peft.vllm.rows_v1 import rows_of


class Branched(nn.Module):
    """Stands before a causal language model of vLLM's among the bases of a class; `models` has them."""

    model: Any
    config: Any
    packed_modules_mapping: dict[str, list[str]]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        branches = Branches.of(vllm_config)
        deltas = read_deltas(branches, check(branches.record, branches.base_arguments))
        fork, count = fork_layer(branches, deltas), len(branches.branches)
        with heads_of_branches(count, fork):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.joins_in_forward = vllm_config.use_v2_model_runner
        # runner V1 says to a logits processor which request is at which row, see `rows_v1`
        self.rows = None if self.joins_in_forward else rows_of(vllm_config)
        self.count = count
        first, last = self.model.start_layer, self.model.end_layer - 1  # on this rank
        for index in range(max(first, fork), last + 1):
            layer = self.model.layers[index]
            layer.forward = forked_layer(
                layer.forward,
                count,
                forks=index == fork,
                unfolds=index == first > fork,
                folds=index == last and not get_pp_group().is_last_rank,
            )
            for module in layer.modules():
                if isinstance(module, Attention):
                    module.forward = forked_attention(module.forward, count)
        if first > fork:
            self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
                ["hidden_states", "residual"], count * self.config.hidden_size
            )
        here = {module: each for module, each in deltas.items() if first <= layer_of(module) <= last}
        adapt_linears(
            self, here, branches.all, self.packed_modules_mapping,
            {module: layer_of(module) >= fork for module in here},
            torch.device(vllm_config.device_config.device), vllm_config.model_config.dtype,
        )  # fmt: skip

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        branch_weights: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """
        Args:
            branch_weights: `[T, n]`, of runner V2 alone.

        Returns:
            The mixed hidden states, `[T, hidden]`; of runner V1 those of the branches side by side, `[T, n·hidden]`.
        """
        hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        if isinstance(hidden, IntermediateTensors):  # for the next rank of a pipeline
            return hidden
        if not self.joins_in_forward:
            return fold(hidden, self.count)
        assert branch_weights is not None  # which `state_v2.BranchState` gives
        return join(hidden.unflatten(0, (self.count, -1)), branch_weights)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if not self.joins_in_forward:
            assert self.rows is not None
            assert len(hidden_states) <= len(self.rows)
            weights = self.rows[: len(hidden_states)].to(hidden_states.device)
            hidden_states = join(hidden_states.unflatten(-1, (self.count, -1)).transpose(0, 1), weights)
        return super().compute_logits(hidden_states)  # pyrefly: ignore[not-callable] # vLLM's class has it

    def get_model_state_cls(self) -> type:
        """Of runner V2."""
        from dera_peft.vllm.state_v2 import BranchState

        return BranchState


def join(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sums of `[n, T, hidden]` by `[T, n]`, in fp32: `[T, hidden]`. Of weight zero nothing is added."""
    weights = weights.T[:, :, None]
    return torch.where(weights == 0, 0.0, rows.float() * weights).sum(0).to(rows.dtype)


def fold(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`[n·T, width]`, the branches one behind the other, to `[T, n·width]`, side by side."""
    return rows.unflatten(0, (count, -1)).transpose(0, 1).flatten(1)


def unfold(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `fold`."""
    return rows.unflatten(-1, (count, -1)).transpose(0, 1).flatten(0, 1)


def forked_attention(forward: Callable, count: int) -> Callable:
    """The `forward` of an attention layer with the heads of all branches, for the rows of these."""

    def forked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        folded = (fold(each, count) for each in (query, key, value))
        return unfold(forward(*folded, *args, **kwargs), count)

    return forked


def forked_layer(forward: Callable, count: int, forks: bool, unfolds: bool, folds: bool) -> Callable:
    """
    The `forward` of a decoder layer that computes the rows of all branches.

    Args:
        forks: it is the first of them.
        unfolds, folds: it is given by, or gives to, another rank of a pipeline, which count tokens between them.
    """

    def forked(
        positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if forks:
            hidden_states = hidden_states.repeat(count, 1)
            residual = None if residual is None else residual.repeat(count, 1)
        if unfolds:
            assert residual is not None  # as between all layers
            hidden_states, residual = unfold(hidden_states, count), unfold(residual, count)
        hidden_states, residual = forward(positions.repeat(count), hidden_states, residual, **kwargs)
        if folds:
            hidden_states, residual = fold(hidden_states, count), fold(residual, count)
        return hidden_states, residual

    return forked


@contextmanager
def heads_of_branches(count: int, first_layer: int) -> Iterator[None]:
    """The attention layers that are made meanwhile have, from a layer on, the heads of `count` branches."""
    init = Attention.__init__

    def branched(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *args: Any, **kwargs: Any):
        heads = count if extract_layer_index(kwargs["prefix"]) >= first_layer else 1
        init(self, num_heads * heads, head_size, scale, num_kv_heads * heads, *args, **kwargs)

    Attention.__init__ = branched
    try:
        yield
    finally:
        Attention.__init__ = init
