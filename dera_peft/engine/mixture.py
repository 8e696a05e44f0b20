"""`MixtureModel`: fork and join around a base model, so that one base decodes at any λ."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep

from dera_peft.engine.adapter_kinds import read_branches
from dera_peft.engine.biases import hand_over_biases
from dera_peft.engine.caches import claim_cache
from dera_peft.engine.capture import CapturedStep, Captures
from dera_peft.engine.fork import check_inputs, check_media, has_text_part, own_adapters
from dera_peft.engine.generation import MixtureGenerationMixin
from dera_peft.engine.lora import Adapted
from dera_peft.engine.names import LOGITS, REFERENCE, WEIGHTS
from dera_peft.engine.output import MixtureOutput
from dera_peft.engine.padding import fill_padding, num_rows
from dera_peft.engine.plan import BatchPlan, Branch, WeightPlan, check_default_lam
from dera_peft.engine.prompts import PromptPlan, check_whole
from dera_peft.engine.quantized import keep_trainable
from dera_peft.engine.strength import check_one_branch, check_rules, read_strength
from dera_peft.engine.turns import Turn, in_turn
from dera_peft.engine.wiring import Wiring
from dera_peft.errors import DeRaError

# what a batch's rows and tokens are counted by, the decoder's where there are two
TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


class MixtureModel(PreTrainedModel, MixtureGenerationMixin):
    """
    A base and LoRA adapters that decode as any mixture of "adapter off" and "adapter on" (DeRa, arXiv 2402.02992).
    Without an adapter its branches can only differ by their prompts; given one prompt, it decodes as the base does.

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

    One instance computes one batch at a time: threads that call it at once wait for each other.

    It knows nothing of files; `dera_peft.DeRaModel` adds loading and saving.

    Attributes:
        branches: the reference's first, then one for each aligned adapter.
        mixing: "logits" or "weights".
        lam: the default λ, a number or a dict by aligned branch.
    """

    base_model_prefix = "base"
    # What the base supports it has checked for itself, before it is wrapped.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        branches: Sequence[Branch],
        lam: float | Mapping[str, float] = 1.0,
        mixing: str = LOGITS,
    ):
        if mixing not in (LOGITS, WEIGHTS):
            raise DeRaError(f"mixing={mixing!r} is not known; choose {LOGITS!r} (DeRa) or {WEIGHTS!r}.")
        if mixing == WEIGHTS and not own_adapters(branches):
            raise DeRaError(f"mixing={mixing!r} scales the weights of adapters, and this model has none.")
        base = cast("PreTrainedModel", model.get_base_model()) if isinstance(model, PeftModel) else model
        super().__init__(base.config)
        self.base = base
        self.generation_config = base.generation_config
        self._is_stateful = base._is_stateful
        for name in ("hf_device_map", "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            if name in vars(base):
                setattr(self, name, vars(base)[name])
        self.turn = Turn()  # of the thread that computes, see `in_turn`
        self._wrapped = (model,)  # in a tuple: the base's parameters are registered once
        self._has_text_part = has_text_part(base)
        self._base_slices_logits = base._supports_logits_to_keep()  # slow to answer, beside a step of a small model
        self.training = base.training
        self.lam = check_default_lam(lam, [branch.name for branch in branches if branch.name != REFERENCE])
        self.mixing = mixing
        self._captures = Captures()
        self._wire(branches)

    @in_turn
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
        combine: Any = None,
        reference_inputs: Mapping[str, torch.Tensor] | None = None,
        output_branches: bool = False,
        output_log_z: bool = False,
        return_dict: bool = True,
        **kwargs,
    ) -> MixtureOutput | tuple:
        """
        The mixture's logits, and its loss with `labels`. Further arguments are the base model's.

        Args:
            input_ids: `[B, S]`.
            lam: λ (see the class), or a `BatchPlan` from `plan`. A plan of prompts (`by_prompt=True`) is one of the
                branches' rows, which then are what is given: `input_ids` is `[R, S]`.
            combine: the rule by which the branches' logits become one (see `plan`), of each place by itself. The logits
                are in fp32 then.
            reference_inputs: as in `generate`, what the reference reads: its prompt, and behind it the same tokens that
                stand at the end of `input_ids`. The logits are those of the last columns, as many as both have.
            output_branches: also return each branch's logits, all of them at any λ.
            output_log_z: also return what normalizes the mixture of the branches' probabilities.

        Raises:
            DeRaError: λ does not fit the batch, the cache holds other rows, an output is asked for that only the
                branches have (hidden states, attentions), or the rule is one of whole completions, or can't be trained.
        """
        self._check_wrapped()
        if reference_inputs is not None:
            kwargs.update(past_key_values=past_key_values, position_ids=position_ids, inputs_embeds=inputs_embeds)
            given = {"attention_mask": attention_mask, "labels": labels, **kwargs}
            input_ids, plan = check_whole(input_ids, given), lam
            if not isinstance(lam, BatchPlan):
                plan = self.plan(lam, input_ids.shape[0], output_branches, combine, by_prompt=True)
            check_rules(plan, lam, combine, labels)
            rows = self._rows_with_prompts(input_ids, given, reference_inputs, logits_to_keep, plan)
            return self.forward(**rows, use_cache=use_cache, output_branches=output_branches, return_dict=return_dict)
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise DeRaError(f"{name}=True: the branches have their own, which DeRaModel does not return.")
        if self.config.is_encoder_decoder and labels is not None and kwargs.get("decoder_input_ids") is None:
            kwargs["decoder_input_ids"] = self.base.prepare_decoder_input_ids_from_labels(labels)
        if input_ids is not None and input_ids.shape[1] > 1:
            input_ids = cast("torch.LongTensor", fill_padding(input_ids, attention_mask, num_rows(self)))
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        tokens = next(inputs[name] for name in TOKENS if name in inputs)
        plan = lam if isinstance(lam, BatchPlan) else self.plan(lam, tokens.shape[0], output_branches, combine)
        check_rules(plan, lam, combine, labels)
        check_inputs(inputs, plan, tokens.shape[0], output_branches)
        # a compiled step only follows one that was not, with the same plan
        if past_key_values is not None and not torch.compiler.is_compiling():
            claim_cache(past_key_values, plan, self.fork_layer)

        keeps_branches = output_branches or output_log_z or plan.behind_head is not None
        self._wiring.routing.start(plan, tokens.shape[1], keeps_branches)
        try:
            if self._wiring.forks_at_input:
                if self._has_text_part and not (plan.is_identity and not plan.adapter_scale):
                    check_media(self.base, inputs, plan.batch_size)
                inputs = self._wiring.fork(inputs)
            if self._base_slices_logits:
                inputs["logits_to_keep"] = logits_to_keep
            outputs = self.base(past_key_values=past_key_values, use_cache=use_cache, return_dict=True, **inputs)
        finally:
            self._wiring.routing.forked = []

        if past_key_values is None and outputs.past_key_values is not None:
            outputs.past_key_values.dera_pattern = plan.pattern
        logits = outputs.logits if self._base_slices_logits else slice_logits_to_keep(outputs.logits, logits_to_keep)
        branch_logits = plan.split(logits) if output_branches else None
        more: dict[str, Any] = {}
        if output_log_z:
            logits, more = plan.join_log_probs(logits)
        elif plan.behind_head is not None:
            logits, more["token_lambda"], more["token_spent"] = plan.behind_head.join(logits)
        elif output_branches or not self.joins_before_head:
            logits = plan.join(logits)
        output = MixtureOutput(
            loss=None if labels is None else self._loss(logits, labels, kwargs),
            logits=logits,
            past_key_values=outputs.past_key_values,
            branch_logits=branch_logits,
            encoder_last_hidden_state=outputs.get("encoder_last_hidden_state"),
            **more,
        )
        return output if return_dict else output.to_tuple()

    def plan(
        self,
        lam: Any,
        batch_size: int,
        every_branch: bool = False,
        combine: Any = None,
        lambda_schedule: Any = None,
        by_prompt: bool = False,
    ) -> BatchPlan:
        """
        The rows for `batch_size` sequences at `lam`; can be given to `forward` as its `lam` any number of times.

        Args:
            every_branch: compute all branches for all sequences, also at weight zero.
            combine: a rule (`engine.rules`, `engine.combine`) as "kl:0.05", or one for each sequence.
            lambda_schedule: λ by the position of a new token, as {0: 2.0, 20: 1.0}, or one for each sequence.
            by_prompt: for branches with prompts of their own (`reference_inputs`), whose rows `forward` is given.

        Raises:
            DeRaError: one of them does not fit; or there is one where no branch differs from another.
        """
        if not self.branches_differ and not by_prompt:
            check_one_branch(lam, combine, lambda_schedule, every_branch)
            lam = dict.fromkeys(self.aligned, 1.0)
        strength = read_strength(lam, combine, lambda_schedule, batch_size, self.aligned, self.mixing, self.lam)
        lam, rules = strength
        if self.mixing == WEIGHTS:
            if by_prompt:
                raise DeRaError(f"mixing={WEIGHTS!r} has one row a sequence, which can't have two prompts: mix logits.")
            return WeightPlan(self.branches, lam, self.device, every_branch)
        kind = PromptPlan if by_prompt else BatchPlan
        return kind(self.branches, lam, self.device, every_branch, rules)

    def _loss(self, logits: torch.Tensor, labels: torch.LongTensor, kwargs: dict) -> torch.Tensor:
        if self.config.is_encoder_decoder:  # labels are the decoder's outputs, not its inputs
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        vocab_size = self.config.get_text_config().vocab_size
        return self.base.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)

    def _check_wrapped(self) -> None:
        if self.base is None:
            raise DeRaError("this DeRaModel was taken apart by unwrap(); wrap the PeftModel again with from_peft.")

    # -- making one, and taking it apart ---------------------------------------------------------------------------

    @classmethod
    def from_peft(
        cls,
        peft_model: PeftModel | PreTrainedModel,
        adapter: str | Sequence[str] | None = None,
        lam: float | Mapping[str, float] = 1.0,
        *,
        reference: str | Sequence[str] = (),
        stacked: bool = True,
        mixing: str = LOGITS,
    ) -> Self:
        """
        Wraps what a trainer holds, with no second copy. Until `unwrap` the PeftModel itself must not be called.

        On a CPU, 4-bit weights then stay in the form in which they can be trained through (see `keep_trainable`).

        Args:
            peft_model: a causal language model, or an encoder-decoder one, with LoRA adapters; or the model of
                transformers that they are in, as its own `load_adapter` makes one.
            adapter: the adapter that is the aligned model's, or a list of them, each an aligned branch of its own;
                needed only where there are several.
            lam: the default λ.
            reference: the adapters (one, or a list) that make the reference of the base.
            stacked: whether the aligned adapters come on top of the reference's, or replace them.
            mixing: "logits" (DeRa), or "weights" to scale the adapters' weights by λ instead.

        Raises:
            DeRaError: an adapter is not there, or is of a kind that can't be switched off row by row; or the model is
                to be trained, and its 4-bit weights can't be trained through any more.
        """
        branches = read_branches(peft_model, adapter, reference, stacked)
        keep_trainable(peft_model)
        return cls(peft_model, branches, lam, mixing)

    @in_turn
    def unwrap(self) -> PeftModel | PreTrainedModel:
        """
        The PeftModel (or the model without adapters), as it was before. This instance can't be used any more.

        With an adapter that was trained with `bias="lora_only"` or `"all"` it is as PEFT's own loading leaves it: the
        adapter's biases have replaced the base's.
        """
        self._check_wrapped()
        (wrapped,) = self._wrapped
        self._captures.clear()
        self._wiring.remove()
        hand_over_biases(self.base)
        self.base = None  # pyrefly: ignore[bad-assignment] # what _check_wrapped looks for
        return wrapped

    def __deepcopy__(self, memo: dict) -> None:
        raise DeRaError(
            "a DeRaModel can't be copied: the copy's modules would go on to follow this one's plan; unwrap() it, copy "
            "the PeftModel, and wrap both."
        )

    def _wire(self, branches: Sequence[Branch]) -> None:
        self._wiring = Wiring(self.base, branches, self.mixing)
        self.branches = tuple(branches)

    def _rewire(self, branches: Sequence[Branch]) -> None:
        """Other branches of the same base. Where they don't fit (`DeRaError`) the model stays as it was."""
        before = self._wiring
        joins_behind_head = before.can_join_before_head and not before.joins_before_head  # the caller's choice
        before.remove()
        try:
            self._wire(branches)
        except DeRaError:
            self._wire(self.branches)
            raise
        finally:
            if joins_behind_head:
                self.joins_before_head = False

    # -- what it consists of -------------------------------------------------------------------------------------------

    @property
    def peft_model(self) -> PeftModel:
        (wrapped,) = self._wrapped
        if not isinstance(wrapped, PeftModel):
            raise DeRaError(
                "this model was wrapped without its PeftModel, which this needs: give that to from_peft."
                if self.branches_differ
                else "this model has no adapter: load the base with one, DeRaModel.from_pretrained(base, adapter)."
            )
        return wrapped

    @property
    def branches_differ(self) -> bool:
        """Whether the branches have different adapters. If not, they can only differ by their prompts."""
        return bool(own_adapters(self.branches))

    @property
    def aligned(self) -> list[str]:
        """The names of the branches that λ weights, in the order of a `[B, K]` λ's columns."""
        return [branch.name for branch in self.branches if branch.name != REFERENCE]

    @property
    def adapters(self) -> dict[str, tuple[str, ...]]:
        """Branch name -> the adapters that its rows see on top of the base."""
        return {branch.name: branch.adapters for branch in self.branches}

    @property
    def fork_layer(self) -> int:
        """The decoder layer before which the rows fork; 0 if they fork at the input."""
        return self._wiring.fork_layer

    @property
    def joins_before_head(self) -> bool:
        """Whether the rows are joined before the LM head, and not their logits behind it."""
        return self._wiring.joins_before_head

    @joins_before_head.setter
    def joins_before_head(self, joins: bool) -> None:
        self._wiring.joins_before_head = joins

    @property
    def adapted(self) -> list[Adapted]:
        """The base's modules that the branches' adapters change."""
        return self._wiring.adapted

    # -- what transformers asks of a model: the base's answers ---------------------------------------------------------

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """What computes a step of the call of `generate` in progress, where transformers does not do it by itself."""
        cache = self._captures.current
        if cache is None:
            return super().get_compiled_call(compile_config)
        return CapturedStep(self, self._wiring, self._captures, cache)

    # None where the base has no experts
    def _check_and_adjust_experts_implementation(  # pyrefly: ignore[bad-override]
        self, experts_implementation: str | None
    ) -> str | None:
        return experts_implementation  # the base's choice: they share one config

    def set_experts_implementation(self, experts_implementation: str | dict) -> None:
        self.base.set_experts_implementation(experts_implementation)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.base.get_encoder(modality)

    def get_decoder(self) -> nn.Module | None:
        return self.base.get_decoder()
