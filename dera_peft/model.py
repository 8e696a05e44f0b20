"""`DeRaModel`: fork and join around a base model, so that one base decodes at any λ."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from dera_peft.checkpoint.record import LOGITS, WEIGHTS, Record
from dera_peft.engine.biases import hand_over_biases
from dera_peft.engine.fork import find_fork_layer, find_layers, fork_inputs, is_head_linear
from dera_peft.engine.generation import DeRaGenerationMixin
from dera_peft.engine.lora import Routing, branch_forward, check_one_replaces, check_scales, find_adapted
from dera_peft.engine.plan import (
    ALIGNED,
    REFERENCE,
    BatchPlan,
    Branch,
    WeightPlan,
    check_default_lam,
    make_branches,
    read_lam,
)
from dera_peft.errors import DeRaError

# what a batch's rows and tokens are counted by, the decoder's where there are two
TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


@dataclass
class DeRaOutput(CausalLMOutputWithPast):
    """
    `CausalLMOutputWithPast` of the mixture, with the branches' own logits where they were asked for.

    Attributes:
        logits: `[B, S, V]`, z_λ = (1-λ)·z_ref + λ·z_aligned.
        branch_logits: branch name -> `[B, S, V]`, with `output_branches=True`.
        encoder_last_hidden_state: `[R, S, D]`, a row for each branch of each sequence (encoder-decoder models only).
    """

    branch_logits: dict[str, torch.Tensor] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None


class DeRaModel(PreTrainedModel, DeRaGenerationMixin):
    """
    A base and LoRA adapters that decode as any mixture of "adapter off" and "adapter on" (DeRa, arXiv 2402.02992).

    To a caller it is an ordinary causal language model with one more argument, `lam` (λ): `forward` takes B sequences
    and returns logits for B sequences. Inside,

    - **fork**: at the first decoder layer that the branches see differently, the B rows become the rows of the
      reference branch and of the aligned branch; below it they are computed, and cached, once;
    - **branch**: each LoRA layer adds its delta to its branch's slice of rows, after one base product over all rows;
    - **join**: before the LM head the branches' rows become B rows again by the weighted sum. The head is linear, so
      this gives the mixed logits at one head's cost; where it is not, the join is behind it.

    A row whose weight is zero is never computed: λ=0 costs what the base costs, λ=1 what the adapted model costs.

    `lam` is a float, one per sequence (list or 1-D tensor, per prompt, before beams and return sequences expand it), a
    dict by branch, or a `[B, K]` tensor for K aligned adapters, which mix as z = (1-Σλ_k)·z_ref + Σ λ_k·z_k. Without it
    the model's own `lam` holds, 1.0 unless set: the model as trained; `generation_config.lam`, where set, comes before
    that.

    With `mixing="weights"` λ scales the adapters' weights instead (one row a sequence, no second branch): what people
    do without DeRa, here to be compared with.

    One instance computes one batch at a time: it is not safe to call from several threads at once.
    """

    base_model_prefix = "base"
    # What the base supports it has checked for itself, before it is wrapped.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        peft_model: PeftModel,
        branches: Sequence[Branch],
        lam: float | Mapping[str, float] = 1.0,
        mixing: str = LOGITS,
    ):
        if mixing not in (LOGITS, WEIGHTS):
            raise DeRaError(f"mixing={mixing!r} is not known; choose {LOGITS!r} (DeRa) or {WEIGHTS!r}.")
        base = peft_model.get_base_model()
        super().__init__(base.config)
        self.base = base
        self.record: Record | None = None  # what it was loaded from
        self.generation_config = base.generation_config
        self._is_stateful = base._is_stateful
        for name in ("hf_device_map", "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            if name in vars(base):
                setattr(self, name, vars(base)[name])
        self._peft_model = (peft_model,)  # in a tuple: the base's parameters are registered once
        self._routing = Routing()
        # asked once: both are slow to answer, beside a step of a small model
        self._base_slices_logits = base._supports_logits_to_keep()
        self._num_heads = getattr(base.config.get_text_config(decoder=True), "num_attention_heads", 1)
        self.training = base.training
        self.lam = check_default_lam(lam, [branch.name for branch in branches if branch.name != REFERENCE])
        self._install(branches, mixing)

    # -- making one, and taking it apart ---------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, base: str | os.PathLike | None = None, adapter: str | os.PathLike | None = None, **kwargs
    ) -> "DeRaModel":
        """
        Loads a base and its adapters, checked against each other.

        Args:
            base: hub id or folder of the base, or a folder with a `dera.json`, which names base and adapter.
            adapter: hub id or folder of a PEFT LoRA adapter; where it has a `dera.json`, the base may be left out.
            adapters: instead of `adapter`, several aligned models: name -> hub id or folder.
            reference: adapters (one, or a list) that the reference is made of with the base, as an SFT adapter.
            stacked: whether the aligned adapters were trained on top of the reference's, which then are under both
                branches (True), or go on from a copy of them and replace them (False). A `dera.json` of the adapter
                says it; without one it is True unless given.
            quantization: None, "nf4", "fp4" or "int8" (bitsandbytes); or a `quantization_config`, as in transformers.
            dtype: a torch dtype or its name; the base's own unless given.
            device_map: as in transformers.
            lam: the default λ, a number or a dict by adapter; the record's, else 1.0.
            mixing: "logits" (DeRa), or "weights" to scale the adapters' weights by λ instead; the record's, else
                "logits".
            **kwargs: passed to `AutoModelForCausalLM.from_pretrained` (`AutoModelForSeq2SeqLM` where the base has an
                encoder).

        Raises:
            DeRaError: one of them does not exist, cannot be read, or does not fit the other.
        """
        from dera_peft.checkpoint.loading import load

        return load(base, adapter, **kwargs)

    @classmethod
    def from_peft(
        cls,
        peft_model: PeftModel,
        adapter: str | Sequence[str] | None = None,
        lam: float | Mapping[str, float] = 1.0,
        *,
        reference: str | Sequence[str] = (),
        stacked: bool = True,
        mixing: str = LOGITS,
    ) -> "DeRaModel":
        """
        Wraps what a trainer holds, with no second copy. Until `unwrap` the PeftModel itself must not be called.

        Args:
            peft_model: a causal language model, or an encoder-decoder one, with LoRA adapters.
            adapter: the adapter that is the aligned model's, or a list of them, each an aligned branch of its own;
                needed only where there are several.
            lam: the default λ.
            reference, stacked, mixing: as in `from_pretrained`, with the names of adapters of the PeftModel.
        """
        from dera_peft.checkpoint.adapters import check_adapter_config, check_keeps_biases

        reference = [reference] if isinstance(reference, str) else list(reference)
        names = list(peft_model.peft_config)
        others = [name for name in names if name not in reference]
        if adapter is None and len(others) != 1:
            raise DeRaError(f"the PeftModel has the adapters {names}: say which is the aligned one with adapter=.")
        adapter = others[0] if adapter is None else adapter
        aligned = {ALIGNED: adapter} if isinstance(adapter, str) else {name: name for name in adapter}
        for name in (*reference, *aligned.values()):
            if name not in names:
                raise DeRaError(f"adapter={name!r} is not in the PeftModel; it has {names}.")
            check_adapter_config(name, peft_model.peft_config[name])
        for name, config in peft_model.peft_config.items():  # also of those that are not used: they share the biases
            check_keeps_biases(name, config)
        return cls(peft_model, make_branches(reference, aligned, stacked), lam, mixing)

    def unwrap(self) -> PeftModel:
        """
        The PeftModel, as it was before. This instance can't be used any more.

        With an adapter that was trained with `bias="lora_only"` or `"all"` it is as PEFT's own loading leaves it: the
        adapter's biases have replaced the base's.
        """
        self._check_wrapped()
        (peft_model,) = self._peft_model
        self._uninstall()
        hand_over_biases(self.base)
        self.base = None
        return peft_model

    def save_pretrained(self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs) -> None:
        """
        Writes the adapters (PEFT's format) and `dera.json` into one folder; never the base, which is named there.

        `DeRaModel.from_pretrained(save_directory)` restores the model. Other options of transformers' `save_pretrained`
        are refused.
        """
        from dera_peft.checkpoint.loading import save

        self._check_wrapped()
        if not safe_serialization:
            raise DeRaError("safe_serialization=False: adapters are only written as safetensors.")
        if kwargs:
            raise DeRaError(
                f"save_pretrained: {next(iter(kwargs))!r} is not supported; it writes one folder, as it is."
            )
        save(self, save_directory)

    def __deepcopy__(self, memo: dict) -> None:
        raise DeRaError(
            "a DeRaModel can't be copied: the copy's modules would go on to follow this one's plan; unwrap() it, copy "
            "the PeftModel, and wrap both."
        )

    @property
    def peft_model(self) -> PeftModel:
        return self._peft_model[0]

    # -- several aligned adapters ----------------------------------------------------------------------------------

    @property
    def aligned(self) -> list[str]:
        """The names of the branches that λ weights, in the order of a `[B, K]` λ's columns."""
        return [branch.name for branch in self.branches if branch.name != REFERENCE]

    @property
    def adapters(self) -> dict[str, tuple[str, ...]]:
        """Branch name -> the adapters that its rows see on top of the base."""
        return {branch.name: branch.adapters for branch in self.branches}

    def add_adapter(self, name: str, adapter: str | os.PathLike, stacked: bool | None = None) -> None:
        """
        Loads another aligned adapter, as a branch of the name `name`, checked as `from_pretrained` does.

        The default λ, where it is one number, no longer says enough for two branches: pass λ by name from here on, or
        set `model.lam` to a dict.

        Args:
            adapter: hub id or folder.
            stacked: whether it was trained on top of the reference's adapters; its `dera.json`'s word, or else True.

        Raises:
            DeRaError: it is of another base, or its `dera.json` tells of another reference.
        """
        from dera_peft.checkpoint.adapters import remove_from
        from dera_peft.checkpoint.loading import load_adapter

        self._check_wrapped()
        if name in self.adapters or name in self.peft_model.peft_config:
            raise DeRaError(f"name={name!r} is taken; the model has the branches {list(self.adapters)}.")
        stacked = load_adapter(self, name, os.fspath(adapter), stacked)
        under = self.branches[0].adapters if stacked else ()
        try:
            self._reinstall((*self.branches, Branch(name, (*under, name))))
        except DeRaError:
            remove_from(self.peft_model, name)
            self._install(self.branches, self.mixing)
            raise

    def remove_adapter(self, name: str) -> None:
        """Removes an aligned branch, and its adapter unless another branch has it too."""
        from dera_peft.checkpoint.adapters import remove_from

        self._check_wrapped()
        if name not in self.aligned:
            raise DeRaError(f"name={name!r} is not an aligned branch; there are {self.aligned}.")
        if len(self.aligned) == 1:
            raise DeRaError(f"name={name!r} is the only aligned branch; a model needs one.")
        remaining = tuple(branch for branch in self.branches if branch.name != name)
        kept = {adapter for branch in remaining for adapter in branch.adapters}
        gone = [adapter for adapter in self.adapters[name] if adapter not in kept]
        self._reinstall(remaining)
        for adapter in gone:
            remove_from(self.peft_model, adapter)
        if isinstance(self.lam, dict):
            self.lam = check_default_lam({k: self.lam.get(k, 0.0) for k in self.aligned}, self.aligned)

    def export(self, lam, folder: str | os.PathLike, prompts: Sequence[Sequence[int]] = ()) -> dict:
        """
        Writes one plain PEFT adapter whose weights are scaled by λ, for any server that loads LoRA.

        It is an approximation of DeRa (it mixes weights, not logits); how far it is from it is measured on `prompts`.

        Args:
            lam: a number, or a dict by aligned branch.
            folder: of the new adapter.
            prompts: token ids. Each is continued greedily by DeRa, and both are compared at every new token.

        Returns:
            `{"kl": mean KL(DeRa ‖ exported) in nats a token, "max_kl": ..., "tokens": how many}`; also in the adapter's
            card. Empty without prompts.

        Raises:
            DeRaError: an adapter can't be scaled (DoRA, modules_to_save), or several can't be combined.
        """
        from dera_peft.checkpoint.export import export

        self._check_wrapped()
        return export(self, lam, folder, prompts)

    # -- one forward pass ------------------------------------------------------------------------------------------

    def plan(self, lam, batch_size: int, every_branch: bool = False) -> BatchPlan:
        """The rows for `batch_size` sequences at `lam`; can be given to `forward` as its `lam` any number of times."""
        lam = read_lam(self.lam if lam is None else lam, batch_size, self.aligned)
        kind = WeightPlan if self.mixing == WEIGHTS else BatchPlan
        return kind(self.branches, lam, self.device, every_branch)

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
        self._check_wrapped()
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise DeRaError(f"{name}=True: the branches have their own, which DeRaModel does not return.")
        if self.config.is_encoder_decoder and labels is not None and kwargs.get("decoder_input_ids") is None:
            kwargs["decoder_input_ids"] = self.base.prepare_decoder_input_ids_from_labels(labels)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        tokens = next(inputs[name] for name in TOKENS if name in inputs)
        plan = lam if isinstance(lam, BatchPlan) else self.plan(lam, tokens.shape[0], every_branch=output_branches)
        self._check_inputs(inputs, plan, tokens.shape[0], output_branches)
        if not torch.compiler.is_compiling():  # a compiled step only follows one that was not, with the same plan
            self._check_cache(past_key_values, plan)

        self._routing.start(plan, tokens.shape[1], output_branches)
        try:
            if self.fork_layer == 0:
                inputs = self._fork(inputs)
            if self._base_slices_logits:
                inputs["logits_to_keep"] = logits_to_keep
            outputs = self.base(past_key_values=past_key_values, use_cache=use_cache, return_dict=True, **inputs)
        finally:
            self._routing.forked = []

        if past_key_values is None and outputs.past_key_values is not None:
            outputs.past_key_values.dera_pattern = plan.pattern
        logits, branch_logits = outputs.logits, None
        if output_branches:
            branch_logits = plan.split(logits)
        if output_branches or not self.joins_before_head:
            logits = plan.join(logits)
        if not self._base_slices_logits:
            logits = slice_logits_to_keep(logits, logits_to_keep)
        output = DeRaOutput(
            loss=None if labels is None else self._loss(logits, labels, kwargs),
            logits=logits,
            past_key_values=outputs.past_key_values,
            branch_logits=branch_logits,
            encoder_last_hidden_state=outputs.get("encoder_last_hidden_state"),
        )
        return output if return_dict else output.to_tuple()

    def _loss(self, logits: torch.Tensor, labels: torch.LongTensor, kwargs: dict) -> torch.Tensor:
        if self.config.is_encoder_decoder:  # labels are the decoder's outputs, not its inputs
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        vocab_size = self.config.get_text_config().vocab_size
        return self.base.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)

    def _check_inputs(self, inputs: dict, plan: BatchPlan, batch_size: int, output_branches: bool) -> None:
        if plan.batch_size != batch_size:
            raise DeRaError(f"lam is planned for {plan.batch_size} sequences, and the batch has {batch_size}.")
        if output_branches and not plan.every_branch:
            raise DeRaError("output_branches=True needs a plan made with every_branch=True.")
        if "encoder_outputs" in inputs and inputs["encoder_outputs"][0].shape[0] != plan.num_rows:
            raise DeRaError(
                f"encoder_outputs has {inputs['encoder_outputs'][0].shape[0]} rows, and the branches have "
                f"{plan.num_rows}: each has its own encoder outputs; pass input_ids instead."
            )

    def _check_cache(self, past_key_values: Cache | None, plan: BatchPlan) -> None:
        """A cache holds the rows of the plan that filled it; under another plan it would be read as other branches'."""
        if past_key_values is None:
            return
        filled = getattr(past_key_values, "dera_pattern", plan.pattern)
        # a static cache's length is on the device, and is only asked for where it matters
        if filled != plan.pattern and past_key_values.get_seq_length() > 0:
            raise DeRaError(
                "past_key_values was filled at a λ for which other branches were computed; go on with a λ that needs "
                "the same branches for each sequence, or start with plan(lam, batch_size, every_branch=True)."
            )
        past_key_values.dera_pattern = plan.pattern

    def _check_wrapped(self) -> None:
        if self.base is None:
            raise DeRaError("this DeRaModel was taken apart by unwrap(); wrap the PeftModel again with from_peft.")

    # -- what transformers asks of a model: the base's answers ---------------------------------------------------------

    def _check_and_adjust_experts_implementation(self, experts_implementation: str | None) -> str | None:
        return experts_implementation  # the base's choice: they share one config

    def set_experts_implementation(self, experts_implementation: str | dict) -> None:
        self.base.set_experts_implementation(experts_implementation)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.base.get_encoder(modality)

    def get_decoder(self) -> nn.Module:
        return self.base.get_decoder()

    # -- fork and join in the base's modules ---------------------------------------------------------------------------

    def _install(self, branches: Sequence[Branch], mixing: str) -> None:
        """Replaces the adapted modules' forward and hooks the fork and the join."""
        names = sorted({name for branch in branches for name in branch.adapters})
        adapted = find_adapted(self.base, names)
        if mixing == WEIGHTS:
            check_scales(branches, adapted)
        check_one_replaces(branches, adapted)
        if "is_in_dera" in vars(self.base):
            raise DeRaError("the PeftModel is wrapped by a DeRaModel already; unwrap() that one first.")
        self.branches, self.mixing, self._adapted = tuple(branches), mixing, adapted
        self.fork_layer = 0 if mixing == WEIGHTS else find_fork_layer(self.base, branches, adapted)
        self.joins_before_head = is_head_linear(self.base, adapted)
        self._replaced = {}
        for module in adapted:
            if "forward" in vars(module.module):  # another library's hook
                self._replaced[module.name] = module.module.forward
            module.module.forward = branch_forward(module, self._routing)
        self._handles = []
        if self.fork_layer > 0:
            _, layers = find_layers(self.base)
            for index, layer in enumerate(layers[self.fork_layer :]):
                hook = self._fork_hidden_states if index == 0 else self._fork_side_inputs
                self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        head = self.base.get_output_embeddings()
        self._handles.append(head.register_forward_pre_hook(self._join_hidden_states))
        self.base.is_in_dera = True

    def _reinstall(self, branches: Sequence[Branch]) -> None:
        self._uninstall()
        self._install(branches, self.mixing)

    def _uninstall(self) -> None:
        del self.base.is_in_dera
        for handle in self._handles:
            handle.remove()
        for module in self._adapted:
            del module.module.forward
            if module.name in self._replaced:
                module.module.forward = self._replaced[module.name]

    def _fork(self, inputs: Any) -> Any:
        return fork_inputs(inputs, self._routing.plan, self._num_heads, self._routing.forked)

    def _fork_hidden_states(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return self._fork((args, kwargs))

    def _fork_side_inputs(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden_states, *args = args  # already forked
        args, kwargs = self._fork((tuple(args), kwargs))
        return (hidden_states, *args), kwargs

    def _join_hidden_states(self, head: nn.Module, args: tuple) -> tuple:
        if self._routing.keep_branches or not self.joins_before_head:
            return args
        hidden_states, *rest = args
        return (self._routing.plan.join(hidden_states), *rest)
