"""`DeRaModel`: fork and join around a base model, so that one base decodes at any λ."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from dera_peft.branches import ALIGNED, REFERENCE, BatchPlan, Branch, check_default_lam, read_lam
from dera_peft.errors import DeRaError
from dera_peft.lora import Routing, branch_forward, check_layer

if TYPE_CHECKING:
    from dera_peft.record import Record


@dataclass
class DeRaOutput(CausalLMOutputWithPast):
    """
    `CausalLMOutputWithPast` of the mixture, with the branches' own logits where they were asked for.

    Attributes:
        logits: `[B, S, V]`, z_λ = (1-λ)·z_ref + λ·z_aligned.
        branch_logits: branch name -> `[B, S, V]`, with `output_branches=True`.
    """

    branch_logits: dict[str, torch.Tensor] | None = None


class DeRaModel(PreTrainedModel, GenerationMixin):
    """
    A base and a LoRA adapter that decode as any mixture of "adapter off" and "adapter on" (DeRa, arXiv 2402.02992).

    To a caller it is an ordinary causal language model with one more argument, `lam` (λ): `forward` takes B sequences
    and returns logits for B sequences. Inside,

    - **fork**: at the first decoder layer that the branches see differently, the B rows become the rows of the
      reference branch and of the aligned branch; below it they are computed, and cached, once;
    - **branch**: each LoRA layer adds its delta to its branch's slice of rows, after one base product over all rows;
    - **join**: before the LM head the branches' rows become B rows again by the weighted sum. The head is linear, so
      this gives the mixed logits at one head's cost; where it is not, the join is behind it.

    A row whose weight is zero is never computed: λ=0 costs what the base costs, λ=1 what the adapted model costs.

    `lam` is a float, one per sequence (list or 1-D tensor, per prompt, before beams and return sequences expand it), a
    dict by branch, or a `[B, K]` tensor. Without it the model's own `lam` holds, 1.0 unless set: the model as trained;
    `generation_config.lam`, where set, comes before that.

    One instance computes one batch at a time: it is not safe to call from several threads at once.
    """

    base_model_prefix = "base"
    # What the base supports it has checked for itself, before it is wrapped.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, peft_model: PeftModel, branches: Sequence[Branch], lam: float = 1.0):
        base = peft_model.get_base_model()
        super().__init__(base.config)
        self.base = base
        self.lam = check_default_lam(lam)
        self.record: Record | None = None  # what it was loaded from
        self.branches = tuple(branches)
        self.generation_config = base.generation_config
        self._is_stateful = base._is_stateful
        for name in ("hf_device_map", "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            if name in vars(base):
                setattr(self, name, vars(base)[name])
        self._peft_model = (peft_model,)  # in a tuple: the base's parameters are registered once
        self._routing = Routing()
        self._forked_inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._keep_branches = False
        self.training = base.training

        self._adapted = self._find_adapted_layers()
        self.fork_layer = self._find_fork_layer()
        self.joins_before_head = self._is_head_linear()
        self._install()

    # -- making one, and taking it apart ---------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, base: str | os.PathLike | None = None, adapter: str | os.PathLike | None = None, **kwargs
    ) -> "DeRaModel":
        """
        Loads a base and an adapter, checked against each other.

        Args:
            base: hub id or folder of the base, or a folder with a `dera.json`, which names base and adapter.
            adapter: hub id or folder of a PEFT LoRA adapter; where it has a `dera.json`, the base may be left out.
            quantization: None, "nf4" or "int8" (bitsandbytes).
            dtype: a torch dtype or its name; the base's own unless given.
            device_map: as in transformers.
            lam: the default λ; the record's, else 1.0.
            **kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            DeRaError: one of them does not exist, cannot be read, or does not fit the other.
        """
        from dera_peft.loading import load

        return load(base, adapter, **kwargs)

    @classmethod
    def from_peft(cls, peft_model: PeftModel, adapter: str | None = None, lam: float = 1.0) -> "DeRaModel":
        """
        Wraps what a trainer holds, with no second copy. Until `unwrap` the PeftModel itself must not be called.

        Args:
            peft_model: a causal language model with LoRA adapters.
            adapter: the adapter that is the aligned model's; needed only where there are several.
            lam: the default λ.
        """
        from dera_peft.loading import check_adapter_config

        names = list(peft_model.peft_config)
        if adapter is None and len(names) > 1:
            raise DeRaError(f"the PeftModel has the adapters {names}: say which is the aligned one with adapter=.")
        adapter = names[0] if adapter is None else adapter
        if adapter not in names:
            raise DeRaError(f"adapter={adapter!r} is not in the PeftModel; it has {names}.")
        check_adapter_config(adapter, peft_model.peft_config[adapter])
        return cls(peft_model, [Branch(REFERENCE), Branch(ALIGNED, (adapter,))], lam)

    def unwrap(self) -> PeftModel:
        """The PeftModel, as it was before. This instance can't be used any more."""
        (peft_model,) = self._peft_model
        for handle in self._handles:
            handle.remove()
        for _, layer in self._adapted:
            del layer.forward
            if id(layer) in self._replaced:
                layer.forward = self._replaced[id(layer)]
        self.base = None
        return peft_model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Writes the adapters (PEFT's format) and `dera.json` into one folder; never the base, which is named there.

        `DeRaModel.from_pretrained(save_directory)` restores the model.
        """
        from dera_peft.loading import save

        save(self, save_directory, **kwargs)

    @property
    def peft_model(self) -> PeftModel:
        return self._peft_model[0]

    @property
    def aligned(self) -> list[str]:
        """The names of the branches that λ weights."""
        return [branch.name for branch in self.branches if branch.name != REFERENCE]

    # -- one forward pass ------------------------------------------------------------------------------------------

    def plan(self, lam, batch_size: int, every_branch: bool = False) -> BatchPlan:
        """The rows for `batch_size` sequences at `lam`; can be given to `forward` as its `lam` any number of times."""
        lam = read_lam(self.lam if lam is None else lam, batch_size, self.aligned)
        return BatchPlan(self.branches, lam, self.device, every_branch)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        lam: Any = None,
        output_branches: bool = False,
        return_dict: bool = True,
        **kwargs,
    ) -> DeRaOutput | tuple:
        """
        The mixture's logits, and its loss with `labels`.

        Args:
            input_ids: `[B, S]`.
            lam: λ (see the class), or a `BatchPlan` from `plan`.
            output_branches: also return each branch's logits, all of them at any λ.
            Others: as in the base model.

        Raises:
            DeRaError: λ does not fit the batch, the cache holds other rows, or an output is asked for that only the
                branches have (hidden states, attentions).
        """
        if self.base is None:
            raise DeRaError("this DeRaModel was taken apart by unwrap(); wrap the PeftModel again with from_peft.")
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise DeRaError(f"{name}=True: the branches have their own, which DeRaModel does not return.")
        batch_size = (inputs_embeds if input_ids is None else input_ids).shape[0]
        plan = lam if isinstance(lam, BatchPlan) else self.plan(lam, batch_size, every_branch=output_branches)
        if plan.batch_size != batch_size:
            raise DeRaError(f"lam is planned for {plan.batch_size} sequences, and the batch has {batch_size}.")
        if output_branches and not plan.every_branch:
            raise DeRaError("output_branches=True needs a plan made with every_branch=True.")
        if plan is not lam:
            self._check_cache(past_key_values, plan)

        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        if self.fork_layer == 0:
            inputs = _fork_inputs(inputs, plan, [])
        inputs = {name: value for name, value in inputs.items() if value is not None}
        slices_logits = self.base._supports_logits_to_keep()
        if slices_logits:
            inputs["logits_to_keep"] = logits_to_keep

        self._routing.plan = plan
        self._keep_branches = output_branches
        self._forked_inputs = []
        try:
            outputs = self.base(past_key_values=past_key_values, use_cache=use_cache, return_dict=True, **inputs)
        finally:
            self._forked_inputs = []

        logits, branch_logits = outputs.logits, None
        if output_branches:
            branch_logits = plan.split(logits)
        if output_branches or not self.joins_before_head:
            logits = plan.join(logits)
        if not slices_logits:
            logits = slice_logits_to_keep(logits, logits_to_keep)
        loss = None
        if labels is not None:
            vocab_size = self.config.get_text_config().vocab_size
            loss = self.base.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        output = DeRaOutput(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, branch_logits=branch_logits
        )
        return output if return_dict else output.to_tuple()

    # -- generation: λ is planned once per call ----------------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, *args, lam: Any = None, **kwargs):
        """
        transformers' `generate`, at strength `lam` (see the class); every other argument as ever.

        λ's count is checked against the prompts before beams and return sequences expand them.
        """
        return super().generate(inputs, *args, lam=lam, **kwargs)

    def _prepare_generation_config(self, generation_config, **kwargs):
        # λ is taken out first: a generation config that has a `lam` of its own would swallow the argument
        lam = kwargs.pop("lam", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        model_kwargs["lam"] = getattr(generation_config, "lam", None) if lam is None else lam
        return generation_config, model_kwargs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        plan = model_kwargs.pop("lam", None)
        if not isinstance(plan, BatchPlan):
            every_branch = bool(model_kwargs.get("output_branches"))
            plan = self.plan(plan, input_ids.shape[0], every_branch)
        self._check_cache(model_kwargs.get("past_key_values"), plan.expand(expand_size))
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        model_kwargs["lam"] = plan.expand(expand_size)
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return self.base.prepare_inputs_for_generation(input_ids, **kwargs)

    def _reorder_cache(self, past_key_values: Cache, beam_idx: torch.LongTensor) -> Cache:
        rows = self._routing.plan.reorder(beam_idx)
        for index, layer in enumerate(past_key_values.layers):
            layer.reorder_cache(beam_idx if index < self.fork_layer else rows)
        return past_key_values

    def _check_cache(self, past_key_values: Cache | None, plan: BatchPlan) -> None:
        """A cache holds the rows of the plan that filled it; under another plan it would be read as other branches'."""
        if past_key_values is None:
            return
        if past_key_values.get_seq_length() == 0:
            past_key_values.dera_pattern = plan.pattern
        elif getattr(past_key_values, "dera_pattern", plan.pattern) != plan.pattern:
            raise DeRaError(
                "past_key_values was filled at a λ for which other branches were computed; go on with a λ that needs "
                "the same branches for each sequence, or start with plan(lam, batch_size, every_branch=True)."
            )

    def _supports_default_dynamic_cache(self) -> bool:
        return self.base._supports_default_dynamic_cache()

    def _get_static_cache_init_shape(self) -> None:
        return None  # the cache takes its number of rows from the first keys that it sees

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.base.get_decoder()

    # -- where to fork and join --------------------------------------------------------------------------------------

    def _find_adapted_layers(self) -> list[tuple[str, LoraLayer]]:
        adapters = sorted({name for branch in self.branches for name in branch.adapters})
        adapted = [
            (name, module)
            for name, module in self.base.named_modules()
            if isinstance(module, LoraLayer) and any(adapter in module.r for adapter in adapters)
        ]
        for name, layer in adapted:
            check_layer(name, layer, adapters)
        return adapted

    def _decoder_layers(self) -> tuple[str, nn.ModuleList] | None:
        """The decoder's layers and their name, or None where they can't be told."""
        depth = self.config.get_text_config().num_hidden_layers
        for name, module in self.base.named_modules():
            if (
                isinstance(module, nn.ModuleList)
                and len(module) == depth
                and isinstance(module[0], GradientCheckpointingLayer)
            ):
                return name, module
        return None

    def _find_fork_layer(self) -> int:
        """The first decoder layer with an adapter that not all branches share; 0 (the input) if that can't be told."""
        found = self._decoder_layers()
        # a flex attention mask is no tensor and can't be forked between layers
        if found is None or self.config._attn_implementation == "flex_attention":
            return 0
        prefix = found[0] + "."
        common = set.intersection(*(set(branch.adapters) for branch in self.branches))
        own = {name for branch in self.branches for name in branch.adapters} - common
        first = len(found[1])
        head = self.base.get_output_embeddings()
        for name, layer in self._adapted:
            if not own & set(layer.lora_A) or layer is head:
                continue
            if not name.startswith(prefix):
                return 0
            first = min(first, int(name.removeprefix(prefix).split(".")[0]))
        # with nothing but the head adapted the rows still have to fork before it
        return min(first, len(found[1]) - 1)

    def _is_head_linear(self) -> bool:
        # LLM.int8()'s and any other quantized head are not linear in their input; soft-capping bends the logits
        head = self.base.get_output_embeddings()
        soft_cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return type(head) is nn.Linear and soft_cap is None

    def _install(self) -> None:
        self._replaced = {}
        for name, layer in self._adapted:
            if "forward" in vars(layer):  # another library's hook
                self._replaced[id(layer)] = layer.forward
            layer.forward = branch_forward(name, layer, self._routing)
        self._handles = []
        if self.fork_layer > 0:
            _, layers = self._decoder_layers()
            for index, layer in enumerate(layers[self.fork_layer :]):
                hook = self._fork_hidden_states if index == 0 else self._fork_side_inputs
                self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        head = self.base.get_output_embeddings()
        self._handles.append(head.register_forward_pre_hook(self._join_hidden_states))

    def _fork_hidden_states(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return _fork_inputs((args, kwargs), self._routing.plan, self._forked_inputs)

    def _fork_side_inputs(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden_states, *args = args  # already forked
        args, kwargs = _fork_inputs((tuple(args), kwargs), self._routing.plan, self._forked_inputs)
        return (hidden_states, *args), kwargs

    def _join_hidden_states(self, head: nn.Module, args: tuple) -> tuple:
        if self._keep_branches or not self.joins_before_head:
            return args
        hidden_states, *rest = args
        return (self._routing.plan.join(hidden_states), *rest)


def _fork_inputs(inputs: Any, plan: BatchPlan, forked: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """
    Forks every tensor with a batch dimension in a nest of tuples, lists and dicts.

    `forked` collects (tensor, its rows), so that what all layers are given (masks, rotary embeddings) is forked once.
    """
    if isinstance(inputs, torch.Tensor):
        if plan.is_identity or inputs.ndim < 2 or inputs.shape[0] != plan.batch_size:
            return inputs
        for tensor, rows in forked:
            if tensor is inputs:
                return rows
        rows = plan.fork(inputs)
        forked.append((inputs, rows))
        return rows
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_fork_inputs(value, plan, forked) for value in inputs)
    if type(inputs) is dict:
        return {name: _fork_inputs(value, plan, forked) for name, value in inputs.items()}
    return inputs
