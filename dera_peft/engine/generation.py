"""transformers' `generate` over branches: the rows are planned once per call, from λ, and fixed for the call."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode

from dera_peft.engine.caches import claim_cache, select_rows
from dera_peft.engine.capturable import why_not_call, why_not_model
from dera_peft.engine.capture import CapturedCache, CapturedStep, Captures
from dera_peft.engine.fork import has_text_part
from dera_peft.engine.padding import num_rows, padding_id, readable
from dera_peft.engine.plan import BatchPlan
from dera_peft.engine.prompt_rows import PromptRowsMixin
from dera_peft.engine.prompts import PromptPlan, RowPrompts, check_goes_with_prompts
from dera_peft.engine.turns import in_turn
from dera_peft.engine.wiring import Wiring
from dera_peft.errors import DeRaError

STRENGTH = ("lam", "combine", "lambda_schedule")
OWN = (*STRENGTH, "output_branches", "reference_inputs")

# What a generation config says of the model, its cache and the length, and not of how tokens are drawn or returned.
OF_THE_MODEL = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config",
    "disable_compile", "transformers_version",
}  # fmt: skip
# All else, at transformers' own defaults.
PLAIN_GENERATION = {
    name: value
    for name, value in {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params()}.items()
    if name not in OF_THE_MODEL and not name.startswith("_")
}


def plain_generation(**settings: Any) -> dict[str, Any]:
    """
    Arguments of `generate` with which a caller draws tokens by `settings` alone: greedily, one sequence a prompt and
    returned as a tensor unless they say otherwise, whatever the base's generation config holds.
    """
    return {**PLAIN_GENERATION, **settings}


def _take_negative(kwargs: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """transformers' negative prompt out of the arguments of `generate`; without a mask nothing of it is padding."""
    ids, mask = (kwargs.pop(f"negative_prompt_{name}", None) for name in ("ids", "attention_mask"))
    return None if ids is None else {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}


class MixtureGenerationMixin(PromptRowsMixin):
    """
    What a `MixtureModel` does otherwise than other models when it generates.

    Attributes:
        capture: whether decoding steps are captured as CUDA graphs where they can be, unless a call of `generate` says.
            None: they are, and where they can't be nobody is warned.

    transformers declares the `self` of its own mixin as a protocol which no `PreTrainedModel` meets (its dtype and
    device are properties), so a type checker is told to pass over each call of the mixin's methods.
    """

    capture: bool | None = None

    if TYPE_CHECKING:  # what it needs of the class that it is mixed into
        base: PreTrainedModel
        config: PreTrainedConfig
        _wiring: Wiring
        _captures: Captures

        @property
        def device(self) -> torch.device: ...
        @property
        def dtype(self) -> torch.dtype: ...
        @property
        def fork_layer(self) -> int: ...
        def plan(
            self,
            lam: Any,
            batch_size: int,
            every_branch: bool = ...,
            combine: Any = ...,
            lambda_schedule: Any = ...,
            by_prompt: bool = ...,
        ) -> BatchPlan: ...
        def _check_wrapped(self) -> None: ...

    @in_turn
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args,
        lam: Any = None,
        combine: Any = None,
        lambda_schedule: Any = None,
        reference_inputs: Mapping[str, torch.Tensor] | None = None,
        capture: bool | None = None,
        **kwargs,
    ):
        """
        transformers' `generate` at strength `lam` (see `MixtureModel`). All other arguments are transformers' own.

        λ's count is checked against the prompts before beams and return sequences expand them; so are those of
        `combine` and `lambda_schedule`.

        Args:
            lam: λ, or a `BatchPlan` from `plan`. Its `token_lambda` then says which λ each new token had, but not of
                beams, several sequences a prompt and prompt lookup.
            combine: the rule by which the branches' logits become one at each token (`engine.combine`): "linear"
                (DeRa), "plausible:0.1", "aad:0.1", "kl:0.05", "kl_total:5" or "jsd"; or a list, one for each prompt.
            lambda_schedule: in λ's place, λ by the position of a new token, as {0: 2.0, 20: 1.0}; or a list of them,
                None for a prompt whose λ stays.
            reference_inputs: `{"input_ids": …, "attention_mask": …}`, prompts that the reference reads in place of
                `inputs`, which are then the aligned branches' alone; of any length, padded on the left. All branches
                read the tokens that follow. What is returned begins with `inputs`. transformers' `guidance_scale`, with
                `negative_prompt_ids`, is another way to say both: the scale is λ, and the negative prompt (or without
                one the last token of `inputs`) the reference's.
            capture: whether decoding steps are recorded once as a CUDA graph and replayed for each token, which is
                several times as fast for small batches; the model's `capture` unless given. Where it can't be done (on
                a CPU, with beams, offloaded weights, LLM.int8(), recurrent states) the steps are computed as ever; to
                whom asked for it with True, a warning says why, once.

        Raises:
            DeRaError: λ, a rule, a schedule or `reference_inputs` does not fit; the base has no row for a token; or
                what is asked for makes passes of its own that know no λ (drafts by another model or by some of the
                layers, continuous batching), or can't keep what a rule has come to (prompt lookup, beams without a
                cache).
        """
        self._check_wrapped()
        given = kwargs.get("input_ids") if inputs is None else inputs
        input_ids = readable(self.base, given, kwargs.get("attention_mask"))
        if inputs is not None:
            inputs = input_ids
        elif given is not None:
            kwargs["input_ids"] = input_ids
        negative = _take_negative(kwargs)
        own = {"reference_inputs": reference_inputs, "negative_inputs": negative, "prompt": input_ids}
        with self._captures.call(self.capture if capture is None else capture):
            strength = {"lam": lam, "combine": combine, "lambda_schedule": lambda_schedule}
            output = super().generate(inputs, *args, **strength, **own, **kwargs)  # pyrefly: ignore[bad-argument-type]
            cache = self._captures.current
            if cache is not None and not isinstance(output, torch.Tensor):  # the next call will overwrite the cache
                output.past_key_values = cache.as_dynamic(self.config.get_text_config(decoder=True))
        if given is not None and input_ids is not given and not self.config.is_encoder_decoder:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            sequences[:, : given.shape[1]] = given.repeat_interleave(len(sequences) // len(given), dim=0)
        return output

    def _prepare_generation_config(self, generation_config, **kwargs):
        # taken out first: a generation config that has a `lam` of its own would swallow the argument
        strength = {name: kwargs.pop(name, None) for name in STRENGTH}
        reference, negative, prompt = (
            kwargs.pop(name, None) for name in ("reference_inputs", "negative_inputs", "prompt")
        )
        generation_config, model_kwargs = super()._prepare_generation_config(  # pyrefly: ignore[bad-argument-type]
            generation_config, **kwargs
        )
        scale = generation_config.guidance_scale
        generation_config.guidance_scale = None  # for which transformers would compute passes of its own
        if scale not in (None, 1):
            for name, value in (("lam", strength["lam"]), ("reference_inputs", reference)):
                if value is not None:
                    raise DeRaError(f"guidance_scale={scale!r} and {name} say the same in two ways: give one of them.")
            if negative is None and (prompt is None or self.config.is_encoder_decoder):
                raise DeRaError(f"guidance_scale={scale!r} needs negative_prompt_ids here.")
            strength["lam"], reference = scale, {"input_ids": prompt[:, -1:]} if negative is None else negative
        elif scale is None and negative is not None:
            raise DeRaError("negative_prompt_ids needs the guidance_scale with which it is mixed.")
        if isinstance(lam := strength["lam"], BatchPlan) and lam.reads_rows != (reference is not None):
            raise DeRaError(f"lam is a plan of by_prompt={lam.reads_rows}; reference_inputs goes with one of True.")
        if reference is not None:
            if generation_config.token_healing:
                raise DeRaError("token_healing=True does not go together with reference_inputs: it changes one prompt.")
            check_goes_with_prompts(model_kwargs)
            model_kwargs["reference_inputs"] = reference
        for name, value in strength.items():
            model_kwargs[name] = getattr(generation_config, name, None) if value is None else value
        pad = generation_config.pad_token_id
        if pad is not None and pad >= num_rows(self.base):
            # sequences that have ended are filled with it, and read on
            end = generation_config.eos_token_id
            generation_config.pad_token_id = padding_id(self.base, end[0] if isinstance(end, list) else end)
        return generation_config, model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        if generation_mode_kwargs.get("assistant_model") is not None:
            raise DeRaError("assistant_model is not supported: it is not given λ; prompt_lookup_num_tokens is.")
        for name in ("assistant_early_exit", "use_mtp"):
            if value := getattr(generation_config, name):
                raise DeRaError(
                    f"{name}={value!r} is not supported: its drafts are made without branches; "
                    "prompt_lookup_num_tokens is."
                )
        super()._validate_generation_mode(  # pyrefly: ignore[bad-argument-type]
            generation_mode, generation_config, generation_mode_kwargs
        )

    def _plan_of(self, model_kwargs: dict[str, Any], batch_size: int) -> BatchPlan:
        """Of λ and the rules in `model_kwargs`, in which it then stands for all of them."""
        lam, combine, schedule = (model_kwargs.pop(name, None) for name in STRENGTH)
        plan = lam
        if not isinstance(lam, BatchPlan):
            by_prompt = model_kwargs.get("reference_inputs") is not None
            every_branch = bool(model_kwargs.get("output_branches"))
            plan = self.plan(lam, batch_size, every_branch, combine, schedule, by_prompt)
        elif not (combine is None and schedule is None):
            raise DeRaError("combine, lambda_schedule: the plan that lam is has its rules; give them to plan().")
        model_kwargs["lam"] = plan
        return plan

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        assert input_ids is not None  # as generate calls it
        plan = self._plan_of(model_kwargs, input_ids.shape[0])
        del model_kwargs["lam"]
        if (reference := model_kwargs.pop("reference_inputs", None)) is not None:
            assert isinstance(plan, PromptPlan)
            rows = RowPrompts.of(self.base, plan, input_ids, model_kwargs.get("attention_mask"), reference)
            model_kwargs["row_prompts"] = rows.expand(expand_size)
        if (cache := model_kwargs.get("past_key_values")) is not None:
            claim_cache(cache, plan.expand(expand_size), self.fork_layer)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # pyrefly: ignore[bad-argument-type]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        model_kwargs["lam"] = plan = plan.expand(expand_size)
        if plan.combiner is not None:
            plan.combiner.restart()
        return input_ids, model_kwargs

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        """Where images and sounds are the same for all branches they are encoded once, before anything expands."""
        inputs = (inputs_tensor, model_kwargs, model_input_name, generation_config)
        if self.config.is_encoder_decoder:
            return super()._maybe_prepare_encoder_kwargs_for_generation(*inputs)  # pyrefly: ignore[bad-argument-type]
        if self._wiring.forks_at_input or not has_text_part(self.base):
            return model_kwargs
        plan = self._plan_of(model_kwargs, inputs_tensor.shape[0])
        self._wiring.routing.start(plan, inputs_tensor.shape[1])
        prepare = cast("Callable", self.base._maybe_prepare_encoder_kwargs_for_generation)
        return prepare(*inputs)

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        """The encoder runs before anything expands: once, on the branches' rows, which then expand as sequences do."""
        plan = self._plan_of(model_kwargs, inputs_tensor.shape[0])
        own = {name: model_kwargs.pop(name) for name in OWN if name in model_kwargs}
        if (reference := own.pop("reference_inputs", None)) is None:
            rows = plan.fork(inputs_tensor)
        else:
            assert isinstance(plan, PromptPlan)
            prompts = RowPrompts.of(self.base, plan, inputs_tensor, model_kwargs.get("attention_mask"), reference)
            rows, model_kwargs["attention_mask"] = prompts.ids, prompts.mask
        self._wiring.routing.start(plan, rows.shape[1])
        forked = super()._prepare_text_encoder_decoder_kwargs_for_generation(  # pyrefly: ignore[bad-argument-type]
            rows, self._wiring.fork(model_kwargs), model_input_name, generation_config
        )
        return {**model_kwargs, **own, "encoder_outputs": forked["encoder_outputs"]}

    # Properties, since transformers reads from the signatures which inputs a model takes.
    @property
    def _prepare_position_ids_for_generation(self) -> Callable:  # pyrefly: ignore[bad-override]
        return cast("Callable", self.base._prepare_position_ids_for_generation)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict[str, Any], *args, **kwargs):
        """After each new token."""
        plan = model_kwargs["lam"]
        if plan.combiner is not None:
            of_rule = (outputs.get(name) for name in ("token_lambda", "token_spent"))
            plan.combiner.advance(*(None if value is None else value[:, -1] for value in of_rule))
        update = cast("Callable", self.base._update_model_kwargs_for_generation)
        return update(outputs, model_kwargs, *args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        self.base._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in OWN})

    def init_continuous_batching(self, *args, **kwargs):
        raise DeRaError(
            "transformers' continuous batching (generate_batch, cache_implementation='paged') is not supported: it "
            "packs prompts into one row, for which there is no λ each; use generate."
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _reorder_cache(self, past_key_values: Cache, beam_idx: torch.LongTensor) -> Cache:
        plan = self._wiring.routing.plan
        if plan.combiner is not None:
            plan.combiner.reorder(beam_idx)
        select_rows(past_key_values, beam_idx, plan.first_forked(self.fork_layer), plan)
        return past_key_values

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        cache = model_kwargs.get("past_key_values")
        if (combiner := model_kwargs["lam"].combiner) is not None:
            combiner.prepare(generation_config, generation_mode)
        captures = self._captures
        if (prompts := model_kwargs.get("row_prompts")) is not None:  # longer, perhaps, than the sequences' own
            max_cache_length += max(0, prompts.ids.shape[1] - prompts.width)
        if captures.wants(captures.asked, self.device):
            reason = self.why_not_captured() or why_not_call(generation_config, generation_mode, cache)
            if reason is None:
                plan = model_kwargs["lam"]
                if cache is None:
                    length = max(max_cache_length, generation_config.max_cache_len or 0)
                    cache = captures.take(self.config, plan, length)
                cache.follow(plan)
                model_kwargs["past_key_values"] = captures.current = cache
                return True
            captures.say(reason)
        return super()._prepare_cache_for_generation(  # pyrefly: ignore[bad-argument-type]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    @property
    def captures_steps(self) -> bool:
        """Whether decoding steps are captured where they can be: as `capture` says, or else on a GPU."""
        return self._captures.wants(self.capture, self.device)

    def captured_cache(self, plan: BatchPlan, length: int, whole: bool = False) -> CapturedCache | None:
        """
        A cache for `generate` to go on from, over which it will capture steps; None where it won't.

        Args:
            plan: the call's, from `plan`.
            length: of the sequences at most, in tokens.
            whole: as a `CapturedCache` has it, for `captured_step`.
        """
        if not self.captures_steps or self.why_not_captured() is not None:
            return None
        cache = self._captures.take(self.config, plan, length, whole)
        cache.follow(plan)
        return cache

    def captured_step(self, cache: CapturedCache, **inputs: Any) -> Any:
        """A decoding step over a cache of `captured_cache`, in the place of `forward`."""
        with self._captures.call(self.capture):
            return CapturedStep(cast("PreTrainedModel", self), self._wiring, self._captures, cache)(**inputs)

    def keep_captured(self, cache: CapturedCache) -> None:
        """A cache of `captured_cache` that is not needed any more waits for the next one like it."""
        self._captures.keep(cache)

    def release_captures(self) -> None:
        """Gives back the memory that earlier calls' captured steps hold, for calls like them."""
        self._captures.clear()

    def why_not_captured(self) -> str | None:
        """Why this model's decoding steps can't be captured, as it is now, or None."""
        model = cast("PreTrainedModel", self)
        self._captures.check_fresh(model, self._wiring)
        return why_not_model(model, self._wiring, self._captures)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, CapturedCache):
            return cache is self._captures.current
        return super()._valid_auto_compile_criteria(  # pyrefly: ignore[bad-argument-type]
            model_kwargs, generation_config
        )

    def _supports_default_dynamic_cache(self) -> bool:
        return self.base._supports_default_dynamic_cache()

    def _prepare_static_cache(self, *args, prefill_chunk_size, model_kwargs, **kwargs) -> Cache:
        """
        A cache is made with the first keys that it sees, of as many rows as these have. But a prefill in chunks may be
        compiled, and then there has to be one before: of B rows below the fork, and of the branches' above it.
        """
        cache = super()._prepare_static_cache(  # pyrefly: ignore[bad-argument-type]
            *args, prefill_chunk_size=None, model_kwargs=model_kwargs, **kwargs
        )
        if prefill_chunk_size is None or self.config.is_encoder_decoder:
            return cache
        shape = self.base._get_static_cache_init_shape()
        if shape is None:
            return cache
        plan = model_kwargs["lam"]
        heads, sizes = ([size] * len(cache.layers) if isinstance(size, int) else size for size in shape)
        for index, (layer, num_heads, head_dim) in enumerate(zip(cache.layers, heads, sizes, strict=True)):
            rows = plan.batch_size if index < plan.first_forked(self.fork_layer) else plan.num_rows
            if layer.supports_early_init:
                empty = torch.empty(rows, num_heads, 0, head_dim, dtype=self.dtype, device=self.device)
                layer.lazy_initialization(empty, empty)  # pyrefly: ignore[missing-attribute] # DummyLayer supports no such
        cache.dera_pattern = plan.pattern  # pyrefly: ignore[missing-attribute] # our own mark on it
        return cache
