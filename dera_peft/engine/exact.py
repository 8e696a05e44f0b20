"""
Samples of the exact mixture: sequential Monte Carlo over completions, with token-level DeRa as its proposal.

The mixture of the theory is over whole completions, π*(y|x) = Π_k π_k(y|x)^w_k / Z(x), where w are the weights of the
branches: 1-λ and λ. Token by token, DeRa draws from Π_t [Π_k p_k(y_t|x, y_<t)^w_k / Z_t(x, y_<t)] and so leaves out the
normalizers Z_t = Σ_v Π_k p_k(v|x, y_<t)^w_k: a completion that it draws has the weight Π_t Z_t. Here N of them, the
particles of a prompt, are drawn side by side. Where their weights become uneven, they are drawn anew from among
themselves before their next token. At the end one is drawn by its weight (Doucet and Johansen, "A tutorial on particle
filtering and smoothing", 2009).

A completion that reached the limit of tokens counts by the tokens that it has: the branches then are their models with
that limit.
"""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.generation.utils import ALL_CACHE_NAMES

from dera_peft.engine.caches import select_rows
from dera_peft.engine.generation import PLAIN_GENERATION, MixtureGenerationMixin, plain_generation
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.names import WEIGHTS
from dera_peft.engine.noise import GumbelMax
from dera_peft.engine.padding import padding_id, readable
from dera_peft.engine.particles import Particles
from dera_peft.engine.plan import BatchPlan
from dera_peft.engine.rules import LINEAR
from dera_peft.engine.samples import ExactSample
from dera_peft.errors import DeRaError

# How tokens are drawn. transformers takes each name with any value: what is not as it is here is refused.
AS_IT_IS = {
    **PLAIN_GENERATION, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "combine": LINEAR
}  # fmt: skip
# Arguments of `generate` that have no part in it.
OTHERS = {
    name for kind in (GenerationMixin, MixtureGenerationMixin) for name in inspect.signature(kind.generate).parameters
} - {"self", "inputs", "args", "kwargs", "lam", "stopping_criteria"}


def sample_exact(
    model: MixtureModel, input_ids: torch.Tensor | None, particles: int, keys: Sequence[int], **kwargs: Any
) -> list[ExactSample]:
    """
    A sample of the exact mixture for each of B prompts, whose particles are the B·N rows of one batch.

    Args:
        input_ids: `[B, S]`; None where there are `inputs_embeds`.
        particles: N.
        keys: of the random numbers, one for each prompt, from `row_key`.
        kwargs: λ as `lam`, the model's other inputs, and arguments of `generate` that say where a completion ends
            (`max_new_tokens`, `eos_token_id`, `stopping_criteria`) or how keys and values are cached. How tokens are
            drawn is fixed, and the base's generation config has no part in it.

    Raises:
        DeRaError: an argument would have tokens drawn from something else.
    """
    if isinstance(particles, bool) or not isinstance(particles, int) or particles < 1:
        raise DeRaError(f"particles={particles!r} must be an integer of at least 1.")
    if model.mixing == WEIGHTS:
        raise DeRaError(f"mixing={WEIGHTS!r} has no branches whose mixture could be sampled; load it without mixing.")
    if isinstance(lam := kwargs.get("lam"), BatchPlan) and lam.rules is not None:
        raise DeRaError("lam: the exact mixture knows no rule and no schedule; make a plan without them.")
    inputs = {}
    for name, value in kwargs.items():
        if name in AS_IT_IS and (value is None or (value or None) == (AS_IT_IS[name] or None)):  # 0 and None are "off"
            continue
        if name in AS_IT_IS or name in OTHERS:
            raise DeRaError(
                f"{name}={value!r}: the exact mixture is sampled at temperature 1, with nothing truncated or penalised "
                f"and no search; leave {name} out, or use generate."
            )
        inputs[name] = value
    if input_ids is not None:
        inputs["input_ids"] = readable(model.base, input_ids, inputs.get("attention_mask"))
    run = _Run(Particles(particles, keys))
    return model.generate(**inputs, **plain_generation(), capture=False, custom_generate=run)


class _Run:
    """What `generate` calls in the place of its own loop, with inputs, cache and stopping criteria prepared."""

    def __init__(self, particles: Particles):
        self.particles = particles

    def __call__(
        self,
        model: MixtureModel,
        input_ids: torch.Tensor,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> list[ExactSample]:
        particles, length = self.particles, input_ids.shape[1]
        noise = GumbelMax(particles.row_keys, length)
        filler = padding_id(model.base, generation_config.pad_token_id)  # behind an end
        # a prompt is computed once, for all of its particles
        outputs = model._prefill(
            cast("torch.LongTensor", input_ids), generation_config, {**model_kwargs, "output_log_z": True}
        )
        input_ids, model_kwargs = _expand(model, input_ids, outputs, model_kwargs, particles.count)
        log_p, log_z = (each[:, -1].repeat_interleave(particles.count, 0) for each in (outputs.logits, outputs.log_z))
        lengths = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)  # of those that have ended
        while True:
            # behind its end a completion has one continuation, of probability 1 in each branch
            particles.weigh(log_z.masked_fill(lengths > 0, 0))
            if (chosen := particles.resample(input_ids.shape[1] - length)) is not None:
                chosen = chosen.to(input_ids.device)
                input_ids, log_p, lengths = input_ids[chosen], log_p[chosen], lengths[chosen]
                if (cache := _cache(model_kwargs)) is not None:
                    select_rows(cache, chosen, model.fork_layer, model_kwargs["lam"])
            tokens = noise(cast("torch.LongTensor", input_ids), log_p).argmax(-1).masked_fill(lengths > 0, filler)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            has_ended = stopping_criteria(input_ids, None) & (lengths == 0)
            lengths = lengths.masked_fill(has_ended, input_ids.shape[1] - length)
            if lengths.all():
                break
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1 if generation_config.use_cache else None, **model_kwargs
            )
            outputs = model(**inputs, output_log_z=True)
            log_p, log_z = outputs.logits[:, -1], outputs.log_z[:, -1]
            model_kwargs = _advance(model, outputs, model_kwargs)
        rows = particles.draw()
        return _samples(particles, [input_ids[row, length : length + lengths[row]].tolist() for row in rows])


def _advance(model: MixtureModel, outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """`model_kwargs` after a pass that read all tokens but the one that is drawn next."""
    return model._update_model_kwargs_for_generation(
        outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
    )


def _cache(model_kwargs: dict[str, Any]) -> Any:
    return next((model_kwargs[name] for name in ALL_CACHE_NAMES if model_kwargs.get(name) is not None), None)


def _expand(
    model: MixtureModel, input_ids: torch.Tensor, outputs: Any, model_kwargs: dict[str, Any], count: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Of B prompts that were read, `count` rows of each, with their keys and values."""
    model_kwargs = _advance(model, outputs, model_kwargs)
    plan = model_kwargs["lam"]
    if (cache := _cache(model_kwargs)) is not None:
        sequences = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(count)
        select_rows(cache, sequences, model.fork_layer, plan.expand(count), filled=plan)
    return model._expand_inputs_for_generation(
        count, model.config.is_encoder_decoder, input_ids=input_ids, **model_kwargs
    )


def _samples(particles: Particles, tokens: Sequence[list[int]]) -> list[ExactSample]:
    log_z, sizes, resamplings = (
        each.tolist() for each in (particles.log_z, particles.effective_sizes, particles.resamplings)
    )
    errors = particles.log_z_errors.tolist() if particles.count > 1 else [None] * len(tokens)
    return [
        ExactSample(
            each,
            log_z=log_z[place],
            log_z_error=errors[place],
            effective_size=sizes[place],
            resamplings=resamplings[place],
            ancestors=len(particles.ancestors[place].unique()),
            particles=particles.count,
        )
        for place, each in enumerate(tokens)
    ]
