"""Why the steps of a model, or of one call of `generate`, can't be captured."""

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode

from dera_peft.engine.capture import CapturedCache, Captures
from dera_peft.engine.wiring import Wiring

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE, GenerationMode.GROUP_BEAM_SEARCH)
ATTENTION = ("sdpa", "eager")  # the others unpad on the host, or take masks that are no tensors
LAYERS = (StaticLayer, StaticSlidingWindowLayer, DummyLayer)


def why_not_model(model: PreTrainedModel, wiring: Wiring, captures: Captures) -> str | None:
    """Why no step of the model can be captured, or None."""
    base, config = wiring.base, model.config
    decoder = config.get_text_config(decoder=True)
    if model.device.type != captures.recorder.device_type:
        return f"the model is on {model.device}"
    if any(parameter.device != model.device for parameter in model.parameters()):
        return "the model's weights are on several devices, or offloaded"
    if model.training or base.training:
        return "the model is in training mode: call eval() first"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast keeps weights in another dtype, and only for as long as it is on"
    if getattr(model, "is_loaded_in_8bit", False):
        return "LLM.int8() looks for outliers on the host"
    if config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if not base._can_compile_fullgraph:
        return f"{config.model_type} is not made for a static cache"
    if config._attn_implementation not in ATTENTION:
        return f'attn_implementation={config._attn_implementation!r}; "sdpa" can be captured'
    if getattr(decoder, "alibi", False):
        return "ALiBi is not made for a static cache"
    for layer in StaticCache(decoder, 1).layers:
        if type(layer) not in LAYERS:
            return f"{config.model_type} has layers with a state of their own ({type(layer).__name__})"
    if (name := wiring.find_other_hook()) is not None:
        return f"there are hooks on {name}, which a replay would not call"
    return captures.unfit


def why_not_call(
    generation_config: GenerationConfig, mode: GenerationMode, past_key_values: Cache | None
) -> str | None:
    """Why the steps of one call can't be captured, though the model's can, or None."""
    if mode in BEAMS:
        return f"num_beams={generation_config.num_beams} moves the cache's rows"
    if mode not in MODES:
        return f"{mode.value} computes several tokens in a step"
    if generation_config.use_cache is False:
        return "use_cache=False"
    if generation_config.cache_implementation not in (None, "static"):
        return f"cache_implementation={generation_config.cache_implementation!r}"
    if generation_config.compile_config is not None:
        return "compile_config asks for a compiled step"
    if past_key_values is not None and not isinstance(past_key_values, CapturedCache):
        return "past_key_values is a cache of the caller's"
    return None
