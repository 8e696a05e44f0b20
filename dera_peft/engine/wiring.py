"""The surgery on a base's modules: adapted modules that follow a plan, and the hooks of the fork and the join."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import KVSharingDict

from dera_peft.engine.experts import block_forward, find_blocks
from dera_peft.engine.fork import find_fork_layer, find_layers, fork_inputs, has_text_part, is_head_linear
from dera_peft.engine.lora import branch_forward, check_one_replaces, check_scales, find_adapted
from dera_peft.engine.names import WEIGHTS
from dera_peft.engine.plan import Branch
from dera_peft.engine.routing import Routing
from dera_peft.errors import DeRaError


class Wiring:
    """
    What makes a base compute branches, from its making until `remove`.

    Attributes:
        routing: what fork, adapted modules and join share while a batch is computed.
        adapted: the modules that adapters of the branches change.
        fork_layer: the decoder layer before which the rows fork.
        forks_at_input: whether they fork before the base is called, and not between its modules.
        joins_before_head: whether the rows are joined before the LM head. False joins the logits behind it.
        can_join_before_head: whether the head is linear, which that needs.

    Raises:
        DeRaError: an adapter can't be kept to its branch, or the base is wired already.
    """

    def __init__(self, base: PreTrainedModel, branches: Sequence[Branch], mixing: str):
        self.base = base
        self.routing = Routing()
        names = sorted({name for branch in branches for name in branch.adapters})
        self.adapted = find_adapted(base, names)
        if mixing == WEIGHTS:
            check_scales(branches, self.adapted)
        check_one_replaces(branches, self.adapted)
        if "is_in_dera" in vars(base):
            raise DeRaError("the PeftModel is wrapped by a DeRaModel already; unwrap() that one first.")
        found = None if mixing == WEIGHTS else find_fork_layer(base, branches, self.adapted)
        self.fork_layer = found or 0
        # before the first layer, images and sounds have found their places in the sequences
        self.forks_at_input = found is None or (found == 0 and not has_text_part(base))
        self.joins_before_head = self.can_join_before_head = is_head_linear(base, self.adapted)
        self._num_heads = getattr(base.config.get_text_config(decoder=True), "num_attention_heads", 1)
        self._replaced: list[tuple[nn.Module, Callable | None]] = []
        for module in self.adapted:
            self._replace(module.module, branch_forward(module, self.routing))
        for name, adapters in find_blocks((m.name, m.adapters) for m in self.adapted).items():
            block = base.get_submodule(name)
            self._replace(block, block_forward(name, block, adapters, self.routing))
        self._handles = []
        if not self.forks_at_input:
            layers = find_layers(base)
            assert layers is not None  # where the rows fork between layers, find_fork_layer knew them
            _, layers = layers
            for index, layer in enumerate(layers[self.fork_layer :]):
                hook = self._fork_hidden_states if index == 0 else self._fork_side_inputs
                self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        head = base.get_output_embeddings()
        assert head is not None  # the base is a language model
        self._handles.append(head.register_forward_pre_hook(self._join_hidden_states))
        base.is_in_dera = True  # pyrefly: ignore[bad-argument-type] # a module's attribute may be anything

    def remove(self) -> None:
        """Leaves the base's modules as they were."""
        del self.base.is_in_dera
        for handle in self._handles:
            handle.remove()
        for module, before in reversed(self._replaced):
            del module.forward
            if before is not None:
                module.forward = before

    def _replace(self, module: nn.Module, forward: Callable) -> None:
        self._replaced.append((module, vars(module).get("forward")))  # another library's hook, or none
        module.forward = forward

    def find_other_hook(self) -> str | None:
        """A module of the base with a hook on its forward that is not one of these, by name."""
        own = {handle.id for handle in self._handles}
        for name, module in self.base.named_modules():
            if not own.issuperset((*module._forward_hooks, *module._forward_pre_hooks)):
                return name or "the base"
        return None

    def fork(self, inputs: Any) -> Any:
        """`inputs` (a nest of tuples, lists and dicts) with every `[B, ...]` tensor as `[R, ...]`."""
        if self.routing.plan.reads_rows:
            return inputs
        return fork_inputs(inputs, self.routing.plan, self._num_heads, self.routing.forked)

    def _fork_hidden_states(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        for value in kwargs.values():
            if isinstance(value, KVSharingDict):  # upper layers read from it what lower ones made, and write there too
                value.update({name: self.fork(states) for name, states in value.items()})
        return self.fork((args, kwargs))

    def _fork_side_inputs(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden_states, *others = args  # already forked
        args, kwargs = self.fork((tuple(others), kwargs))
        return (hidden_states, *args), kwargs

    def _join_hidden_states(self, head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple:
        if self.routing.keep_branches or not self.joins_before_head:
            return args
        hidden_states, *rest = args
        return (self.routing.plan.join(hidden_states), *rest)
